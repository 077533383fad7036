# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the runs of an experiment that are done and not measured yet.

    python -m experiment.first.measure --config experiment/first/cpu.yaml --runs runs/experiment/cpu \\
        --data runs/experiment/data/validation.jsonl runs/brown/brown.jsonl

Writes RUN/measures.json: perplexity by document of the first data file, the measures of the expert paths in equally
many tokens of every file, what the routers see in each layer, and the perturbation curves. Files are as
`path_report.py` takes them. The runs of the most tokens are also evaluated on the suite `experiment` (RUN/lm_eval).
Stopped at any moment, the same command goes on. `report.py` makes tables and plots of it.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pathmoe  # noqa: F401  registers PathMoE with the Auto classes
from experiment.first.train import comparison_runs, read_experiment
from pathmoe import paths
from pathmoe.evaluate.path_figures import measure, perturb
from pathmoe.evaluate.path_reading import encode, read_documents, read_text, tags_of
from pathmoe.evaluate.scoring import score, summarize
from pathmoe.files import write_text


MAX_LENGTH = 256  # what the runs were trained on
SEED = 0


def choose_documents(rows: list[dict], each: int) -> list[dict]:
    """At most `each` documents of every source, the same for every run."""
    random.Random(SEED).shuffle(rows)
    taken = {}
    for row in rows:
        of_source = taken.setdefault(row["source"], [])
        if len(of_source) < each:
            of_source.append(row)
    return [row for source in sorted(taken) for row in taken[source]]


@torch.no_grad()
def measure_stream(model: PreTrainedModel, pieces: list[list[int]]) -> dict[str, list[float]]:
    """What the routers see, as means over the tokens of some pieces.

    Returns:
        `dict`: An entry for each layer of `norm`, the root mean square of the residual stream before the norm that
        precedes the router; `spread`, the standard deviation of a token's router logits over the experts; and, but for
        the last layer, `turn`, the cosine of the router's input and the next layer's.
    """
    seen, measured = [], {"norm": [], "spread": [], "turn": []}
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda _, args, output: seen.append((*args, output)))
        for layer in model.model.layers
    ]
    for piece in pieces:
        seen.clear()
        logits = torch.stack(model(torch.tensor([piece]), use_cache=False, output_router_logits=True).router_logits)
        streams, inputs = (torch.cat(of_layers) for of_layers in zip(*seen))  # (L, T, D) each
        measured["norm"].append(streams.square().mean(-1).sqrt())
        measured["spread"].append(logits.std(-1))
        measured["turn"].append(torch.cosine_similarity(inputs[:-1], inputs[1:], dim=-1))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values, dim=1).mean(1).tolist() for name, values in measured.items()}


def measure_run(folder: Path, options: argparse.Namespace) -> None:
    """Measures one run; writes FOLDER/measures.json."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    validation, *others = read_documents(options.data)
    chosen = choose_documents(validation, options.documents)
    scored, _ = score(model, tokenizer, [row["text"] for row in chosen], MAX_LENGTH, MAX_LENGTH, batch_size=16)
    for document, row in zip(scored, chosen):
        document["source"] = row["source"]
    result = {"perplexity": summarize(scored), "documents": scored}
    if model.config.num_experts > 1:
        share = options.tokens // len(options.data)
        entries = []
        for rows in (chosen, *others):
            random.Random(SEED).shuffle(rows)
            entries += encode(tokenizer, rows, share, MAX_LENGTH)
        reading = read_text(model, entries, MAX_LENGTH)
        result |= {
            "measures": measure(reading, tags_of(reading), options.resamples, SEED),
            "load": paths.expert_load(reading.experts, model.config.num_experts).tolist(),
            "jaccard": paths.jaccard_matrix(reading.experts).tolist(),
            "sustained_4": paths.sustained_engagement(reading.experts, 4),
            "stream": measure_stream(model, reading.pieces),
            "perturbations": perturb(model, reading, options.perturbed_tokens, MAX_LENGTH, SEED),
        }
    write_text(folder / "measures.json", json.dumps(result) + "\n")


def evaluate_tasks(folder: Path, items: int) -> None:
    """Runs the suite `experiment` on one run, in a process of its own; goes on where it was stopped."""
    command = ["--model", folder / "final", "--suite", "experiment", "--output", folder / "lm_eval", "--limit", items]
    with (folder / "lm_eval.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "pathmoe.evaluate.run_lm_eval", *map(str, command)],
            check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def measure_runs(options: argparse.Namespace) -> None:
    """Measures all runs that are done, some at once."""
    runs = comparison_runs(read_experiment(options.config), learning_rate=1.0)  # a name does not tell the rate
    done = [run for run in runs if (options.runs / run.name / "final" / "config.json").is_file()]
    if not done:
        raise SystemExit(f"--runs {options.runs} holds no run of {options.config} that is done: train first.")
    most = max(run.tokens for run in runs)
    jobs = [(measure_run, run, options) for run in done]
    jobs += [(evaluate_tasks, run, options.items) for run in done if run.tokens == most]
    written = {measure_run: "measures.json", evaluate_tasks: "lm_eval/results.json"}
    todo = [job for job in jobs if not (options.runs / job[1].name / written[job[0]]).is_file()]
    with (
        ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool,
        tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="measure") as bar,
    ):
        submitted = [pool.submit(function, options.runs / run.name, option) for function, run, option in todo]
        try:
            for future in as_completed(submitted):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the experiment's YAML")
    parser.add_argument("--runs", type=Path, required=True, help="output folder of experiment/first/train.py")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="files with columns `text` and `source`")
    parser.add_argument("--documents", type=int, default=16, help="of each source, for the perplexity")
    parser.add_argument("--tokens", type=int, default=20_000, help="of all files together, for the paths")
    parser.add_argument("--perturbed_tokens", type=int, default=4_000)
    parser.add_argument("--resamples", type=int, default=100, help="of each bootstrap")
    parser.add_argument("--items", type=int, default=200, help="of each task")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="how many at once")
    measure_runs(parser.parse_args(args))


if __name__ == "__main__":
    main()
