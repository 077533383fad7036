# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Summarizes a run in one table and one picture: results, a text sample and statistics of the expert paths.

    python eval/report.py --run runs/quickstart --text runs/quickstart/data/validation.jsonl

The command reads RUN/metrics.jsonl, RUN/final and, if they exist, RUN/perplexity.json and RUN/lm_eval. It writes
RUN/report.md and RUN/report.png.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib
import torch
from tqdm.auto import tqdm

from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.evaluate.compare import escape
from pathmoe.evaluate.inputs import check_whole, keep_texts, load_file, load_tokenizer
from pathmoe.evaluate.run_lm_eval import load_results
from pathmoe.files import check_writable, read_json, write_aside
from pathmoe.loading import load_model
from pathmoe.paths import adjacent_jaccard, path_counts, path_coverage, record_paths
from pathmoe.paths.measure import jaccard_chance


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)


PROMPT = "The history of"
TOP = 10
MARK = "PathMoE eval/report.py"  # written into the PNG: only files with this mark are replaced


def trace_paths(model, tokenizer, text: Path, max_tokens: int):
    """Records the paths of the first `max_tokens` tokens of a text file, document by document."""
    seen = 0
    rows = load_file(text, "--text")
    if "text" not in rows.column_names:
        raise UserError(f"--text {text} has no column 'text', only {', '.join(rows.column_names)}.")
    documents = list(filter(None, keep_texts(rows, "text", f"--text {text}")[0]["text"]))
    if not documents:
        raise UserError(f"--text {text} has no text: all rows are empty.")
    length = model.config.max_position_embeddings
    with record_paths(model) as trace, torch.no_grad(), tqdm(total=max_tokens, desc="paths", disable=None) as bar:
        for document in documents:
            ids = tokenizer(document, return_tensors="pt", truncation=True, max_length=length).input_ids
            ids = ids[:, : max_tokens - seen]
            model(ids, use_cache=False)
            seen += ids.shape[1]
            bar.update(ids.shape[1])
            if seen == max_tokens:
                break
    return trace


def path_rows(experts: torch.Tensor, config) -> list[tuple[str, str]]:
    tokens, layers, k = experts.shape
    chance = jaccard_chance(config.num_experts, k)
    return [
        (f"distinct paths of {tokens:,} tokens", f"{len(path_counts(experts)):,} of {config.num_experts}^{layers}"),
        (f"tokens on the {TOP} most frequent paths", f"{path_coverage(experts, TOP):.1%}"),
        ("adjacent layers agree (Jaccard)", f"{adjacent_jaccard(experts):.3f} (chance {chance:.3f})"),
    ]


def result_rows(run: Path) -> list[tuple[str, str]]:
    rows = []
    if (run / "perplexity.json").exists():
        scores = read_json(run / "perplexity.json", "--run")
        check_whole(scores.get("settings") or {}, f"--run: {run / 'perplexity.json'}")
        try:
            for unit, digits in (("token", 2), ("word", 1)):
                value = scores[f"{unit}_perplexity"]  # null if it overflows
                rows.append(
                    (f"held-out perplexity per {unit}", "infinite" if value is None else f"{value:.{digits}f}")
                )
            rows.append(("held-out bits per byte", f"{scores['bits_per_byte']:.3f}"))
            for source, of_source in scores["sources"].items():
                rows.append((f"held-out bits per byte, {escape(source)}", f"{of_source['bits_per_byte']:.3f}"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"--run: {run / 'perplexity.json'} is not a result of eval/perplexity.py: run that again."
            ) from error
    if (run / "lm_eval").exists():
        for task, metrics in load_results(run / "lm_eval").items():
            for metric, (value, stderr) in metrics.items():
                error = "" if stderr is None else f" ± {stderr:.3f}"
                if not isinstance(value, int | float):
                    raise UserError(f"--run: {run / 'lm_eval'}: {task} {metric} is {value!r:.40}: evaluate again.")
                rows.append((f"{escape(task)} {metric}", f"{value:.3f}{error}"))
    return rows


def plot(metrics: list[dict], experts: torch.Tensor, file: Path):
    """Plots the loss, the share of tokens on the most frequent paths, and the agreement of each pair of layers."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    steps = [m for m in metrics if "loss" in m]
    left.plot([m["tokens"] / 1e6 for m in steps], [m["loss"] for m in steps], label="training")
    per_step = steps[-1]["tokens"] / steps[-1]["step"] / 1e6
    evaluations = [m for m in metrics if "eval_loss" in m]
    left.plot(
        [m["step"] * per_step for m in evaluations], [m["eval_loss"] for m in evaluations], "o", label="held out"
    )
    left.set(xlabel="million tokens", ylabel="cross-entropy (nats per token)", title="Learning")
    left.legend()

    counts = path_counts(experts)
    middle.plot(torch.arange(1, len(counts) + 1), counts.cumsum(0) / counts.sum())
    middle.set(
        xscale="log", xlabel="most frequent paths", ylabel="share of tokens", title="Concentration", ylim=(0, 1)
    )

    layers = experts.shape[1]
    pairs = torch.tensor(
        [[adjacent_jaccard(experts[:, [i, j]]) for j in range(layers)] for i in range(layers)], dtype=torch.float
    )
    image = right.imshow(pairs, vmin=0, vmax=1, cmap="viridis")
    right.set(xlabel="layer", ylabel="layer", title="Agreement of the expert sets (Jaccard)")
    figure.colorbar(image, ax=right)
    figure.savefig(file, dpi=120, metadata={"Source": MARK})
    plt.close(figure)


def read_metrics(file: Path) -> list[dict]:
    """Reads a run's metrics.jsonl.

    Raises:
        UserError: If the file is not a file of metrics or has no training step.
    """
    try:
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        steps = [line for line in metrics if "loss" in line and line["step"] > 0 and line["tokens"] >= 0]
        for line in metrics:
            for key in ("step", "tokens", "loss", "eval_loss"):
                if not math.isfinite(line.get(key, 0)):
                    raise ValueError(f"{key} is {line[key]}")
    except (AttributeError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--run: {file} is not a file of training metrics: {error}") from error
    if not steps:
        raise UserError(f"--run: {file} has no training step: train first.")
    return metrics


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a column `text`")
    parser.add_argument("--max_tokens", type=int, default=20_000)
    options = parser.parse_args(args)
    for path in (options.run / "final", options.run / "metrics.jsonl"):
        if not path.exists():
            parser.error(f"--run {options.run}: {path} does not exist: train first.")
    if not options.text.exists():
        parser.error(f"--text {options.text} does not exist: name a file with a column `text`.")
    if options.max_tokens < 1:
        parser.error(f"--max_tokens {options.max_tokens} must be at least 1.")
    for name, mark in (("report.md", "| measure "), ("report.png", MARK)):
        check_writable(options.run / name, "--run", mark)
    metrics = read_metrics(options.run / "metrics.jsonl")
    results = result_rows(options.run)
    tokenizer = load_tokenizer(str(options.run / "final"), "--run")
    model = load_model(options.run / "final", what=f"--run {options.run}", switch=None)

    experts = trace_paths(model, tokenizer, options.text, options.max_tokens).experts
    rows = results + path_rows(experts, model.config)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    torch.manual_seed(0)
    sample = model.generate(**prompt, max_new_tokens=60, do_sample=True, top_p=0.9, temperature=0.8)

    width = max(len(name) for name, _ in rows)
    table = "\n".join(
        [f"| {'measure':<{width}} | value |", f"|{'-' * (width + 2)}|---|"]
        + [f"| {name:<{width}} | {value} |" for name, value in rows]
    )
    text = f"{table}\n\nA sample:\n\n> {escape(str(tokenizer.decode(sample[0], skip_special_tokens=True)))}\n"
    with write_aside(options.run / "report.md") as page, write_aside(options.run / "report.png") as picture:
        page.write_text(text, encoding="utf-8")
        plot(metrics, experts, picture)
    print(f"\n{text}\nThe picture is {options.run / 'report.png'}.")


if __name__ == "__main__":
    run_command(main)
