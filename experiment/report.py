# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes tables, gates, verdict and pictures from the results so far. The report names missing runs."""

import itertools
import math
from functools import partial

import matplotlib
import numpy as np

from experiment.collapse import draw_collapse
from experiment.first.train import ExperimentRun
from experiment.runs import Experiment
from experiment.statistics import HALF_OF_THE_PAPER, TwoWay, holm, sequential, sign_flip
from pathmoe.command import UserError
from pathmoe.files import write_aside, write_text
from pathmoe.markdown import markdown_table


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


ROW, BASE = "pathb4", "indep-lbl"
SECONDARY = ("indep", "indep-bias", "rand")
table = partial(markdown_table, gap=" ")
LEAST_EXPERTS, MOST_NOISE, LEAST_LOSS = 12, 0.01, 0.02  # the gates


def missing(experiment: Experiment, runs: list[ExperimentRun]) -> str:
    """Returns a sentence that names the runs without a result, or an empty string."""
    names = [run.name for run in runs if experiment.read(run) is None]
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"\n**Incomplete**: {len(names)} of {len(runs)} runs have no result yet: {shown}.\n" if names else ""


def tuning(experiment: Experiment) -> str:
    """Formats the losses by which the learning rate of each row is chosen."""
    runs, chosen = experiment.tuning_runs(), experiment.learning_rates()
    rates = [f"{float(rate):g}" for rate in experiment.settings["tune"]["learning_rates"]]
    lines = []
    for row, of_row in runs.items():
        results = [experiment.read(run) for run in of_row]
        losses = [f"{result['validation_loss']:.4f}" if result else "–" for result in results]
        lines.append([row, *losses, f"{chosen[row]:g}" if row in chosen else "incomplete"])
    every = [run for of_row in runs.values() for run in of_row]
    return "## Learning rates\nValidation loss (nats).\n" + missing(experiment, every) + "\n" + table(
        ["row", *rates, "chosen"], lines
    )  # fmt: skip


def finished_seeds(experiment: Experiment) -> dict[str, list[dict]]:
    """Returns the results of each row, for the first seeds of the plan that all rows have finished."""
    rows, found = experiment.settings["rows"], {}
    for run in experiment.primary_runs():
        found[run.row, run.seed] = experiment.read(run)
    complete = itertools.takewhile(
        lambda seed: all(found.get((row, seed)) for row in rows), experiment.settings["primary"]["seeds"]
    )
    seeds = list(complete)
    return {row: [found[row, seed] for seed in seeds] for row in rows}


def experts_early(result: dict) -> list[float]:
    """Returns the effective experts of each layer at the measurement nearest to 5 % of the steps."""
    use = result["effective_experts"]
    nearest = min(range(len(use["steps"])), key=lambda i: abs(use["steps"][i] - 0.05 * result["steps"]))
    return use["layers"][nearest]


def gates(results: dict[str, list[dict]]) -> str:
    """Formats the three gates: each value, and whether the gate holds."""
    y = {row: [result["nats"] for result in of_row] for row, of_row in results.items()}
    values = np.array(list(y.values()))
    early = [experts_early(result) for row in ("indep", ROW) for result in results[row]]
    means, least = min(np.mean(layers) for layers in early), min(min(layers) for layers in early)
    shared = values - values.mean(axis=0)
    noise, raw = np.ptp(shared, axis=1).max(), np.ptp(values, axis=1).max()
    worse = float(np.mean(y["rand"]) - np.mean(y["indep"]))
    lines = [
        ["G1 no collapse", f"{means:.1f} effective experts (smallest layer {least:.1f})", f"at least {LEAST_EXPERTS}",
         says(means >= LEAST_EXPERTS)],
        ["G2 noise", f"{noise:.4f} nats (raw {raw:.4f})", f"at most {MOST_NOISE}", says(noise <= MOST_NOISE)],
        ["G3 assay sensitivity", f"{worse:+.4f} nats", f"at least {LEAST_LOSS}", says(worse >= LEAST_LOSS)],
    ]  # fmt: skip
    return "### Gates\n" + table(["gate", "found", "asked for", ""], lines)


def says(holds: bool) -> str:
    return "holds" if holds else "**fails**"


def primary(experiment: Experiment) -> str:
    """Formats part 1: every run, the gates, the looks and the secondary contrasts."""
    rows, seeds = list(experiment.settings["rows"]), experiment.settings["primary"]["seeds"]
    absent = set(rows) - set(experiment.learning_rates())
    text = ["## Part 1: the primary contrast\n"]
    if absent:
        return text[0] + f"**Incomplete**: no learning rate yet for {', '.join(sorted(absent))}."
    runs = experiment.primary_runs()
    found = {(run.row, run.seed): experiment.read(run) for run in runs}
    lines = [[row, *(f"{r['nats']:.4f}" if (r := found[row, seed]) else "–" for seed in seeds)] for row in rows]
    text += [missing(experiment, runs), "Held-out nats a token.\n", table(["row", *map(str, seeds)], lines), ""]
    results = finished_seeds(experiment)
    y = {row: [result["nats"] for result in of_row] for row, of_row in results.items()}
    count = len(y[ROW])
    if count < 2:
        return "\n".join([*text, f"{count} seeds are complete; gates and contrasts need two."])
    text += [gates(results), "", "### Verdict"]
    looks, verdict = sequential(y, ROW, BASE)
    lines = [
        [f"{look['seeds']}", f"{look['alpha']:g}", f"{look['difference']:+.4f}",
         f"{look['low']:+.4f} to {look['high']:+.4f}", look["verdict"] or "next look"]
        for look in looks
    ]  # fmt: skip
    text += [f"{ROW} − {BASE}, in nats; half of the paper's effect is {HALF_OF_THE_PAPER:.4f}.\n"]
    text += [table(["seeds", "α", "difference", "interval", "verdict"], lines), ""]
    text += [f"**{verdict or 'Incomplete: the next look has not been reached'}**", "", "### All contrasts"]
    model = TwoWay.fit(y)
    p = [model.p_value(ROW, base) for base in SECONDARY]
    corrected = dict(zip(SECONDARY, holm(p)))
    lines = []
    for base in (BASE, *SECONDARY):
        difference, low, high = model.interval(ROW, base, 0.05)
        flips = sign_flip([one - two for one, two in zip(y[ROW], y[base])])
        p_value = f"{corrected[base]:.2g}" if base in corrected else "primary"
        percent = f"{100 * math.expm1(difference):+.2f} %"
        lines.append([base, f"{difference:+.4f}", f"{low:+.4f} to {high:+.4f}", percent, p_value, f"{flips:.3g}"])
    text += [
        f"{ROW} minus each row over {count} seeds; residual {model.deviation:.5f} nats with {model.freedom} degrees "
        "of freedom; intervals of 95 %.\n",
        table(["against", "nats", "interval", "perplexity", "p by Holm", "p by sign flips"], lines),
    ]
    return "\n".join(text)


def map_points(experiment: Experiment) -> dict[str, tuple[float, float, float, float, float]]:
    """Computes the finished points of the map.

    Returns:
        `dict`: For each point the contrast pathb4 − indep, both ends of its interval, the perplexity of indep, and the
        mean cosine of the router inputs of neighbouring layers. The residual is pooled over the points.
    """
    contrasts, squares, freedom, beside = {}, 0.0, 0, {}
    for point, runs in experiment.map_runs(extra=False).items():
        results = {(run.row, run.seed): experiment.read(run) for run in runs}
        seeds = experiment.settings["map"]["seeds"]
        if runs and all(results.values()):
            y = {row: [results[row, seed]["nats"] for seed in seeds] for row in experiment.settings["map"]["rows"]}
            model = TwoWay.fit(y)
            squares, freedom = squares + model.deviation**2 * model.freedom, freedom + model.freedom
            contrasts[point] = model.means[ROW] - model.means["indep"]
            cosines = [np.mean(result["cosine_to_next_layer"]) for result in results.values()]
            beside[point] = math.exp(model.means["indep"]), float(np.mean(cosines))
    if not contrasts:
        return {}
    pooled = TwoWay(dict.fromkeys((ROW, "indep"), 0.0), len(seeds), math.sqrt(squares / freedom), freedom)
    half = pooled.interval(ROW, "indep", 0.05)[2]
    return {point: (c, c - half, c + half, *beside[point]) for point, c in contrasts.items()}


def mapped(experiment: Experiment) -> str:
    """Formats part 2 as a table, and draws map.png."""
    if "map" not in experiment.settings:
        return ""
    points, every = map_points(experiment), [run for runs in experiment.map_runs().values() for run in runs]
    text = "## Part 2: the map\n"
    if not every:
        return text + "**Incomplete**: no learning rates yet."
    lines = [
        [point, f"{c:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{perplexity:.2f}", f"{cosine:.3f}"]
        for point, (c, low, high, perplexity, cosine) in points.items()
    ]
    if points:
        draw_map(experiment, points)
    head = ["point", "pathb4 − indep", "interval", "perplexity of indep", "cosine to next layer"]
    return text + missing(experiment, every) + "\n" + table(head, lines)


def draw_map(experiment: Experiment, points: dict):
    """Draws map.png: the contrast at each point with its interval."""
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.32 * len(points)), layout="constrained")
    for height, (c, low, high, *_) in enumerate(reversed(points.values())):
        axes.plot([low, high], [height, height], color="tab:blue", lw=2)
        axes.plot(c, height, "o", color="tab:blue")
    axes.set_yticks(range(len(points)), list(reversed(points)))
    axes.axvline(0, color="black", lw=0.8)
    axes.axvline(2 * HALF_OF_THE_PAPER, color="tab:green", ls=":", label="the paper's effect")
    axes.set(xlabel="pathb4 − indep (nats; below 0 sharing is better)")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(fontsize=8)
    with write_aside(experiment.results / "map.png") as partial:
        figure.savefig(partial, dpi=90, format="png")
    plt.close(figure)


def curves(experiment: Experiment):
    """Draws curves.png: validation loss and effective experts over the steps, for all finished runs of part 1."""
    runs = [result for run in experiment.primary_runs() if (result := experiment.read(run))]
    if not runs:
        return
    figure, (loss, experts) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    colours = {row: f"C{i}" for i, row in enumerate(experiment.settings["rows"])}
    for run in runs:
        first = {"label": run["row"]} if run["seed"] == experiment.settings["primary"]["seeds"][0] else {}
        loss.plot(*zip(*run["validation_curve"]), color=colours[run["row"]], lw=1, **first)
        use = run["effective_experts"]
        experts.plot(use["steps"], np.min(use["layers"], axis=1), color=colours[run["row"]], lw=1, **first)
    loss.set(title="validation loss (nats)", xlabel="step")
    experts.set(title="effective experts in the layer that has least", xlabel="step")
    for axes in (loss, experts):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with write_aside(experiment.results / "curves.png") as partial:
        figure.savefig(partial, dpi=90, format="png")
    plt.close(figure)


def provenance(experiment: Experiment) -> str:
    """Formats the hours, processors and commits of the results."""
    runs = [run for of_row in experiment.tuning_runs().values() for run in of_row] + experiment.primary_runs()
    runs += [run for of_point in experiment.map_runs().values() for run in of_point]
    results = [result for run in runs if (result := experiment.read(run))]
    if not results and not any(experiment.results.glob("collapse-*.json")):
        raise UserError(
            f"{experiment.results} holds no result of a run: train a part first, or name another --results."
        )
    corpora = {tuple(sorted(result["corpus"].items())) for result in results}
    if len(corpora) > 1:
        raise UserError(f"{experiment.results} mixes results of {len(corpora)} corpora or tokenizers: separate them.")
    hours = sum(result["seconds"] for result in results) / 3600
    names = {key: ", ".join(sorted({result[key] for result in results})) or "–" for key in ("processor", "commit")}
    hashes = "; ".join(f"{name} {value[:16]}" for corpus in corpora for name, value in corpus)
    return (
        f"## Provenance\n{len(results)} runs, {hours:.1f} hours of training, on: {names['processor']}; commits: "
        f"{names['commit']}. SHA-256 of the text and the tokenizer: {hashes or '–'}."
    )


def report(experiment: Experiment) -> str:
    """Writes report.md and the pictures into the folder of the results, and returns the text."""
    where = provenance(experiment)  # first, because it raises an error if results do not belong together
    parts = ["# Results so far", tuning(experiment), primary(experiment), mapped(experiment), where]
    curves(experiment)
    draw_collapse(experiment)
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(experiment.results / "report.md", text)
    return text
