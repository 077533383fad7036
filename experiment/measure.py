# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures a finished run: held-out loss, expert use over time, curves and provenance, in a small file."""

import hashlib
import os
import platform
import subprocess
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import pathmoe  # noqa: F401  registers PathMoE with the Auto classes
from experiment.first.train import ExperimentRun, final_loss
from experiment.runs import corpus_files, digest
from pathmoe.evaluate.scoring import score
from pathmoe.train.log import read_metrics


HELD_OUT_TOKENS = 1 << 19


def held_out(folder: Path, tokenizer, tokens: int) -> tuple[list[str], list[str]]:
    """Returns texts and sources of the first validation documents by hash, with at least `tokens` tokens in total."""
    builder, files = corpus_files(folder)
    rows = list(load_dataset(builder, data_files=files["validation"], split="train"))
    rows.sort(key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest())
    chosen, count = [], 0
    for row in rows:
        if count >= tokens:
            break
        chosen.append(row)
        count += len(tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"])
    return [row["text"] for row in chosen], [row["source"] for row in chosen]


@torch.no_grad()
def turns(model, tokens: torch.Tensor) -> list[float]:
    """Returns the mean cosine of the router inputs of each layer and the next, for tokens of shape `(batch, T)`."""
    inputs = []
    hooks = [
        layer.post_attention_layernorm.register_forward_hook(lambda _, args, output: inputs.append(output))
        for layer in model.model.layers
    ]
    model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [round(torch.cosine_similarity(a, b, dim=-1).mean().item(), 4) for a, b in zip(inputs, inputs[1:])]


def score_held_out(folder: Path, corpus: Path, length: int, tokens: int) -> dict:
    """Measures a model's held-out loss, in total and for each source, and the cosines between router inputs."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    model = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    texts, sources = held_out(corpus, tokenizer, tokens)
    documents, _ = score(model, tokenizer, texts, max_length=length, stride=length)
    sums = defaultdict(lambda: [0.0, 0])
    for document, source in zip(documents, sources):
        for name in ("", source):
            sums[name][0] += document["nll"]
            sums[name][1] += document["tokens"]
    total, count = sums.pop("")
    sample = [tokenizer(text)["input_ids"][:length] for text in texts[:64]]
    sample = torch.tensor([ids for ids in sample if len(ids) == length][:16] or sample[:1])
    return {
        "nats": total / count,
        "held_out_tokens": count,
        "sources": {name: {"nats": round(n / t, 5), "tokens": t} for name, (n, t) in sorted(sums.items())},
        "cosine_to_next_layer": turns(model, sample),
    }


def measure(run: ExperimentRun, output: Path, corpus: dict, tokens: int | None) -> dict:
    """Collects the result of a finished run.

    Args:
        run (`ExperimentRun`): The run.
        output (`Path`): The folder of the runs.
        corpus (`dict`): The hashes of corpus and tokenizer.
        tokens (`int`, *optional*): The least number of held-out tokens to score. `None` skips the scoring.
    """
    folder, length = output / run.name, run.recipe["sequence_length"]
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if "tokens_per_s" in line]
    seen = [0, *(line["tokens"] for line in steps)]
    routing = [line for line in lines if "effective_experts" in line]
    text = Path(run.recipe["data_files"]["validation"]).parent
    return (
        {name: getattr(run, name) for name in ("name", "row", "seed", "tokens")}
        | {"steps": run.recipe["max_steps"], "learning_rate": run.recipe["learning_rate"]}
        | {"settings": digest(run), "corpus": corpus}
        | {"validation_loss": final_loss(output, run)}
        | ({} if tokens is None else score_held_out(folder, text, length, tokens))
        | {
            "effective_experts": {
                "steps": [line["step"] for line in routing],
                "layers": [[round(x, 2) for x in line["effective_experts"]] for line in routing],
            },
            "learning_curve": [[line["step"], round(line["loss"], 4)] for line in steps],
            "validation_curve": [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line],
            "seconds": round(sum((t - s) / m["tokens_per_s"] for s, t, m in zip(seen, seen[1:], steps))),
            "processor": processor(),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "commit": commit(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
    )


def processor() -> str:
    """Returns the name of the GPU, or else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Returns the checked-out commit, with a mark if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
