# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The plots of the report."""

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib

from experiment.first.measured import BASELINE, Measured, SeedNoise, Table
from pathmoe.files import write_aside


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def save(figure: plt.Figure, file: Path, dpi: int) -> None:
    with write_aside(file) as partial:
        figure.savefig(partial, dpi=dpi)
    plt.close(figure)


def lines_of(table: Table) -> Iterator[tuple[Measured, dict]]:
    """Every run with how its line is drawn: a row has one colour and style, and is named once."""
    for index, (row, runs) in enumerate(table.rows.items()):
        for label, run in zip([row, *[None] * len(runs)], runs.values()):
            yield run, {"color": f"C{index % 10}", "ls": ("-", "--", ":", "-.")[index // 10], "label": label}


def plot_learning(tables: dict[int, Table], file: Path) -> None:
    figure, axes = plt.subplots(1, len(tables), figsize=(9 * len(tables), 6), layout="constrained", squeeze=False)
    for axis, (tokens, table) in zip(axes[0], sorted(tables.items())):
        for run, style in lines_of(table):
            x, y = run.curve("eval_loss")
            axis.plot(x / 1e6, y, **style)
        axis.set(title=f"{tokens / 1e6:g}M tokens", xlabel="million tokens", ylabel="validation loss (nats per token)")
        low = min(run.curve("eval_loss")[1].min() for runs in table.rows.values() for run in runs.values())
        axis.set_ylim(low - 0.05, low + 1.2)
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, file, dpi=110)


def plot_routing(table: Table, file: Path) -> None:
    """How the experts are used while they are trained."""
    titles = {
        "load_cv": "variation of the load (mean of layers)",
        "effective_experts": "experts in effect (mean of layers)",
        "dead_experts": "experts without a token (mean of layers)",
        "adjacent_jaccard": "agreement of neighbouring layers",
        "distinct_paths": "distinct paths of a batch",
        "router_entropy": "entropy of the router (bits)",
    }
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (name, title) in zip(axes.flat, titles.items()):
        for run, style in lines_of(table):
            x, y = run.curve(name)
            axis.plot(x / 1e6, y, **style)
        axis.set(title=title, xlabel="million tokens")
    axes[0, 0].legend(fontsize="small")
    save(figure, file, dpi=100)


def plot_layers(table: Table, file: Path) -> None:
    """What the routers of each layer see, and what their choices matter."""
    titles = {
        "norm": "root mean square of the residual stream",
        "turn": "cosine of a router's input and the next layer's",
        "spread": "standard deviation of a token's logits",
        None: "rise of perplexity, this layer's experts shuffled",
    }
    figure, axes = plt.subplots(1, len(titles), figsize=(19, 4.5), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items()):
        for run, style in lines_of(table):
            if "stream" in run.measures:  # no dense model has one
                values = run.measures["stream"][name] if name else run.layer_rises()
                axis.plot(values, marker="o", ms=3, **style)
        axis.set(title=title, xlabel="layer", yscale="linear" if name else "log")
    axes[0].legend(fontsize="small")
    save(figure, file, dpi=100)


def plot_differences(tables: dict[int, Table], noise: SeedNoise, file: Path) -> None:
    """Every row's perplexity against the baseline's, each seed's, the interval over documents, in gray over seeds."""
    figure, axes = plt.subplots(1, len(tables), figsize=(7.5 * len(tables), 6), layout="constrained", squeeze=False)
    for axis, (tokens, table) in zip(axes[0], sorted(tables.items())):
        found = {row: table.difference(row, BASELINE) for row in table.rows if row != BASELINE}
        found = {row: difference for row, difference in found.items() if difference is not None}
        order = sorted(found, key=lambda row: found[row]["value"], reverse=True)
        for height, row in enumerate(order):
            difference = found[row]
            if noise.freedom:
                axis.plot([100 * end for end in noise.interval(difference)], [height] * 2, color="0.85", lw=5)
            axis.plot([100 * difference["low"], 100 * difference["high"]], [height] * 2, color="C0")
            axis.plot([100 * seed for seed in difference["seeds"]], [height] * len(difference["seeds"]), "C1|", ms=9)
            axis.plot(100 * difference["value"], height, "C0o")
        axis.axvline(0, color="gray", lw=0.8)
        axis.set_yticks(range(len(order)), order)
        axis.set(title=f"{tokens / 1e6:g}M tokens", xlabel=f"perplexity against {BASELINE} (%), lower is better")
    save(figure, file, dpi=100)


def plot_perturbations(table: Table, file: Path) -> None:
    """Perplexity over the undisturbed one, of every perturbation."""
    example = next(run for runs in table.rows.values() for run in runs.values() if "perturbations" in run.measures)
    count = len(example.perturbations)
    figure, axes = plt.subplots(2, math.ceil(count / 2), figsize=(18, 8), layout="constrained")
    for axis, (name, first) in zip(axes.flat, example.perturbations.items()):
        for run, style in lines_of(table):
            if curve := run.perturbations.get(name):
                x = range(len(curve["values"]))
                y, low, high = ([1 + point[key] for point in curve["rise"]] for key in ("estimate", "low", "high"))
                axis.plot(x, y, marker="o", **style)
                axis.fill_between(x, low, high, color=style["color"], alpha=0.12)
                axis.set_xticks(x, ["all" if value is None else str(value) for value in curve["values"]])
                axis.set_xlabel(curve["axis"])
        axis.set(title=first["title"], yscale="log", ylabel="perplexity over undisturbed")
    axes.flat[0].legend(fontsize="small")
    for axis in axes.flat[count:]:
        axis.remove()
    save(figure, file, dpi=90)
