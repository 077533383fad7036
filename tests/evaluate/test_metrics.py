# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The modules of `evaluate`, loaded by path."""

from pathlib import Path

import evaluate
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pathmoe.evaluate.scoring import perplexity


FOLDER = Path(__file__).parents[2] / "eval" / "metrics"


@pytest.fixture(scope="module", params=["perplexity", "routing_consistency"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def metric(name):
    return evaluate.load(str(FOLDER / name))


@pytest.fixture(scope="module")
def consistency():
    return evaluate.load(str(FOLDER / "routing_consistency"))


def test_every_module_is_described(metric, name):
    assert metric.name == name and "evaluate.load" in metric.description and "Args:" in metric.inputs_description


def test_perplexity_is_that_of_the_script(model, tokenizer, texts):
    metric = evaluate.load(str(FOLDER / "perplexity"))
    found = metric.compute(predictions=texts, model=model, tokenizer=tokenizer, max_length=32, stride=8)
    assert found == perplexity(model, tokenizer, texts, max_length=32, stride=8)


def test_consistency_is_that_of_the_sets_of_experts(model, tokenizer, texts, consistency):
    """The routers' own logits, token by token, with Python's sets."""
    shares = []
    for text in texts:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt"), output_router_logits=True).router_logits
        layers = [[set(row.topk(2).indices.tolist()) for row in layer] for layer in logits]
        for above, below in zip(layers, layers[1:]):
            shares += [len(a & b) / len(a | b) for a, b in zip(above, below)]
    found = consistency.compute(predictions=texts, model=model, tokenizer=tokenizer)
    assert found["routing_consistency"] == pytest.approx(sum(shares) / len(shares))
    assert found["tokens"] * 3 == len(shares) and found["truncated"] == 0
    assert found["chance"] == 2 / (2 * 4 - 2)


def test_texts_that_are_too_long_are_counted(model, tokenizer, texts, consistency):
    found = consistency.compute(predictions=texts, model=model, tokenizer=tokenizer, max_length=20)
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert found["truncated"] == sum(length > 20 for length in lengths) > 0
    assert found["tokens"] == sum(min(length, 20) for length in lengths)


def test_model_without_routers_is_refused(tokenizer, consistency):
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM has no routers that are recognised"):
        consistency.compute(predictions=["a"], model=dense, tokenizer=tokenizer)


def test_text_without_a_token_is_refused(model, tokenizer, consistency):
    with pytest.raises(ValueError, match="None of the 2 texts has a token"):
        consistency.compute(predictions=["", ""], model=model, tokenizer=tokenizer)
