# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Logging of a run to the terminal, `metrics.jsonl` and the tracker, and the plots of `pathmoe plot`."""

import json
import math
import os
import sys
from pathlib import Path

import matplotlib
from accelerate import Accelerator
from tqdm.auto import tqdm

from pathmoe.command import ArgumentParser
from pathmoe.files import check_writable, write_aside, write_text
from pathmoe.train.recipe import Recipe, RecipeError


MARK = "PathMoE train_accelerate.py plot"  # written into the PNG: only files with this mark are replaced


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def read_metrics(file: Path) -> list[dict]:
    """Reads a `metrics.jsonl`. If a run was killed while it wrote the last line, that line is ignored.

    Raises:
        RecipeError: If a line is not a JSON object with a step.
    """
    if file.exists() and not file.is_file():
        raise RecipeError(f"{file} is not a file: move it away.")
    metrics, lines = [], file.read_bytes().split(b"\n") if file.exists() else [b""]
    if lines[-1] and not lines[-1].startswith(b"{"):
        raise RecipeError(f"{file} line {len(lines)} is damaged: remove the line.")
    for number, line in enumerate(lines[:-1], 1):
        try:
            metrics.append(json.loads(line))
            float(metrics[-1]["step"])
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise RecipeError(f"{file} line {number} is damaged: remove the line.") from error
    return metrics


class Log:
    """Logs metrics on the main process. Existing metrics of steps after `first_step` are removed first.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine with the tracker.
        first_step (`int`): The step from which the run continues.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, first_step: int):
        self.accelerator, self.file = accelerator, Path(recipe.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(self.file) if line["step"] <= first_step] if first_step else []
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))
        if recipe.tracker is not None:
            accelerator.init_trackers("pathmoe", config={k: str(v) for k, v in vars(recipe).items()})

    def write(self, line: str, **values):
        if self.accelerator.is_main_process:
            tqdm.write(line)
            # JSON has no NaN.
            known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            with self.file.open("a") as file:
                file.write(json.dumps(known) + "\n")
        numbers = {}
        for name, value in values.items():
            value = [x for x in value if x is not None] if isinstance(value, list) else value
            if isinstance(value, list) and value and not isinstance(value[0], list | str):
                numbers |= {f"{name}/mean": sum(value) / len(value), f"{name}/max": max(value)}
            elif isinstance(value, int | float) and name != "step":
                numbers[name] = value
        self.accelerator.log(numbers, step=values["step"])


def is_spike(counters: dict, loss: float) -> bool:
    """Returns whether a loss is more than six standard deviations above the running mean, and updates the averages.

    Mean and variance are exponential averages over about 50 steps. The first 50 losses are never spikes.

    Args:
        counters (`dict`): The counters of the run, which hold the averages.
        loss (`float`): The loss of the step.
    """
    seen, mean, variance = counters["losses_seen"], counters["loss_mean"], counters["loss_variance"]
    spike = seen >= 50 and loss > mean + 6 * variance**0.5
    rate = max(1 / (seen + 1), 1 / 50)
    step = min(loss - mean, 6 * variance**0.5) if spike else loss - mean  # a spike must not hide the next one
    counters |= {
        "losses_seen": seen + 1,
        "loss_mean": mean + rate * step,
        "loss_variance": (1 - rate) * (variance + rate * step * step),
    }
    return spike


CURVES = {
    "loss": "training loss",
    "eval_loss": "validation loss",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "load_cv": "expert load: coefficient of variation",
    "effective_experts": "effective experts (exp of load entropy)",
    "dead_experts": "dead experts per layer",
    "router_entropy": "router entropy (bits)",
    "router_grad_norm": "router gradient norm",
    "adjacent_jaccard": "agreement of adjacent layers (Jaccard)",
    "path_coverage_100": "tokens on the 100 most frequent paths",
    "distinct_paths": "distinct paths",
}


def check_curves(run: str, metrics: list[dict]):
    """Checks that the metrics can be plotted.

    Raises:
        RecipeError: If a value cannot be plotted. The message names the field and the step.
    """
    for line in metrics:
        for name in (CURVES.keys() | {"load"}) & line.keys():
            rows = line[name] if name == "load" and isinstance(line[name], list) else [line[name]]
            rows = [row if isinstance(row, list) else [row] for row in rows]
            numbers = all(value is None or isinstance(value, int | float) for row in rows for value in row)
            if not numbers or len({len(row) for row in rows}) > 1:
                raise RecipeError(
                    f"{run}/metrics.jsonl: {name} of step {line['step']} is {str(line[name])[:60]}, which cannot be "
                    "plotted: remove the line."
                )


def plot(args: list[str]) -> Path:
    """Plots the metrics of one or several runs. Metrics per layer are shown by mean and range.

    Returns:
        `Path`: The PNG file.

    Raises:
        RecipeError: If a folder holds no run, or if the metrics are damaged.
        UserError: If the PNG file cannot be written or would replace a file that is not a plot.
    """
    parser = ArgumentParser(prog=f"{Path(sys.argv[0]).name} plot", description=plot.__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folders of runs")
    parser.add_argument("--output", help="PNG file (default: training.png in the first run)")
    options = parser.parse_args(args)
    if len({os.path.realpath(run) for run in options.runs}) < len(options.runs):
        raise RecipeError(f"RUN {' '.join(options.runs)} names a run twice: name each once.")
    runs = {}
    for run in options.runs:
        runs[run] = read_metrics(Path(run) / "metrics.jsonl")
        if not runs[run]:
            raise RecipeError(f"{run} holds no metrics.jsonl with a finished line: name the output_dir of a run.")
        check_curves(run, runs[run])
        if not any(line.get(name) is not None for line in runs[run] for name in CURVES):
            raise RecipeError(f"{run}/metrics.jsonl has nothing to draw: no line has one of {', '.join(CURVES)}.")
    output = Path(options.output or Path(options.runs[0]) / "training.png")
    if output.suffix != ".png":
        raise RecipeError(f"--output {output} must end in .png.")
    check_writable(output, "--output", MARK)
    loads = {run: [m for m in metrics if "load" in m] for run, metrics in runs.items()}
    loads = {run: measured for run, measured in loads.items() if measured}
    rows, extra = 3, bool(loads)
    figure = plt.figure(figsize=(16, 9 + 3.2 * extra), layout="constrained")
    parts = figure.subfigures(1 + extra, 1, height_ratios=[9, 3.2][: 1 + extra], squeeze=False)[:, 0]
    for axes, (name, title) in zip(parts[0].subplots(rows, 4).flat, CURVES.items()):
        for run, metrics in runs.items():
            points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
            if not points:
                continue
            steps = [step for step, _ in points]
            values = [[x for x in v if x is not None] if isinstance(v, list) else [v] for _, v in points]
            if not all(values):
                continue
            (line,) = axes.plot(steps, [sum(v) / len(v) for v in values], label=Path(run).name)
            if any(len(v) > 1 for v in values):
                axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, lw=0,
                                  color=line.get_color())  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if name == "loss":
            axes.legend(fontsize=8)
    if extra:
        panels = parts[1].subplots(1, len(loads), squeeze=False)[0]
        for axes, (run, measured) in zip(panels, loads.items()):
            image = axes.imshow(measured[-1]["load"], aspect="auto", cmap="viridis", vmin=0, vmax=1)
            axes.set(title=f"{Path(run).name}: share of tokens, step {measured[-1]['step']}", xlabel="expert")
            axes.set_ylabel("layer")
        parts[1].colorbar(image, ax=panels)
    with write_aside(output) as partial:
        figure.savefig(partial, dpi=80, metadata={"Source": MARK})
    plt.close(figure)
    return output
