# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""lm-eval's scores against a scorer written by hand: on a tiny PathMoE always, on SmolLM2-135M in `make reference`."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pathmoe.evaluate import run_lm_eval


REFERENCE = Path(os.environ.get("REFERENCE_MODEL", "runs/reference/model"))
# One of each type: a last word; choices; beginnings with one common end; one-letter choices; generation with examples.
TYPES = ["lambada_openai", "piqa", "winogrande", "mmlu_high_school_biology", "triviaqa_wikipedia_heldout"]
# Of the first 40 items, by another program: accuracy with its standard error below.
KNOWN = {"piqa": 0.725, "sciq": 0.80, "arc_easy": 0.50, "lambada_openai": 0.275}


def log_likelihood(model, tokenizer, context, continuation):
    """The plain way: one sequence, no padding, no cache, no shared passes, in float64 after the logits."""
    start = len(tokenizer(context.rstrip()).input_ids)
    ids = tokenizer(context + continuation).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(start, len(ids)))


def generate(model, tokenizer, prompt, until, length=256):
    """Greedy, token by token."""
    ids = tokenizer(prompt).input_ids
    text, first = "", len(ids)
    while len(ids) < first + length and not any(stop in text for stop in until):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
        text = tokenizer.decode(ids[first:], skip_special_tokens=True)
    for stop in until:
        text = text.split(stop)[0]
    return text.strip()


def evaluate(folder, output, tasks, limit, batch_size=8, shots=None):
    names = [f"pathmoe_offline_{task}" for task in tasks]
    options = ["--limit", str(limit), "--batch_size", str(batch_size), "--output", str(output), "--device", "cpu"]
    options += [] if shots is None else ["--num_fewshot", str(shots)]
    results = run_lm_eval.main(["--model", str(folder), "--tasks", ",".join(names), *options])["results"]
    read = {}
    for task, name in zip(tasks, names):
        lines = (output / "tasks" / f"{name}.jsonl").read_text().splitlines()
        read[task] = [json.loads(line) for line in lines], results[name]
    return read


def check_by_hand(model, tokenizer, samples):
    """Every log-likelihood, every choice and every generated answer of lm-eval's samples."""
    for sample in samples:
        if isinstance(sample["arguments"][0][1], dict):
            prompt, settings = sample["arguments"][0]
            room = model.config.max_position_embeddings - 256
            assert len(tokenizer(prompt).input_ids) <= room
            until = [*settings["until"], tokenizer.eos_token]
            assert sample["filtered_resps"] == [generate(model, tokenizer, prompt, until)]
            continue
        by_hand = [log_likelihood(model, tokenizer, *arguments) for arguments in sample["arguments"]]
        assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(by_hand, abs=1e-3, rel=1e-5)
        if len(by_hand) > 1:
            right = sample["target"] if isinstance(sample["target"], int) else int(sample["doc"]["answer"]) - 1
            best, second = sorted(by_hand)[-1], sorted(by_hand)[-2]
            assert best - second < 1e-3 or sample["acc"] == (by_hand.index(best) == right)


def test_scores_of_a_tiny_model_are_those_by_hand(model, model_folder, tokenizer, tmp_path):
    tasks = [task for task in TYPES if task != "triviaqa_wikipedia_heldout"]
    for samples, _ in evaluate(model_folder, tmp_path, tasks, limit=3).values():
        check_by_hand(model, tokenizer, samples)


@pytest.fixture(scope="module")
def reference():
    if not REFERENCE.is_dir():
        pytest.fail(f"{REFERENCE} is not there: make reference")
    return AutoModelForCausalLM.from_pretrained(REFERENCE).eval(), AutoTokenizer.from_pretrained(REFERENCE)


@pytest.mark.slow
@pytest.mark.parametrize("task", TYPES)
def test_scores_of_the_reference_model_are_those_by_hand(reference, tmp_path, task):
    shots = 5 if task == "triviaqa_wikipedia_heldout" else None
    samples, _ = evaluate(REFERENCE, tmp_path, [task], limit=50, shots=shots)[task]
    assert len(samples) == 50
    check_by_hand(*reference, samples)


@pytest.mark.slow
def test_batch_size_does_not_change_the_reference_model(reference, tmp_path):
    tasks = ["lambada_openai", "piqa", "winogrande"]
    one, eight = (evaluate(REFERENCE, tmp_path / str(size), tasks, 25, batch_size=size) for size in (1, 8))
    for task in tasks:
        for first, second in zip(one[task][0], eight[task][0], strict=True):
            values = [[response[0] for response in sample["filtered_resps"]] for sample in (first, second)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.slow
def test_reference_model_scores_what_is_known_of_it(reference, tmp_path):
    for task, (_, result) in evaluate(REFERENCE, tmp_path, list(KNOWN), limit=40).items():
        assert abs(result["acc,none"] - KNOWN[task]) <= 2 * result["acc_stderr,none"]
