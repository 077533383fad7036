# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The tables of the report, in Markdown."""

import math
from functools import partial

import numpy as np
import pandas as pd

from experiment.first.measured import BASELINE, SeedNoise, Table
from pathmoe.markdown import markdown_table


table_of = partial(markdown_table, gap=" ")
PATH_MEASURES = {
    "agreement": "agreement of neighbouring layers",
    "sustained_4": "tokens with an expert for 4 layers or more",
    "distinct_paths": "distinct paths",
    "coverage_10": "tokens on the 10 most frequent paths",
    "load_variation": "variation of the load",
    "routing_entropy": "routing entropy (of an undecided router's)",
    "adjusted": "information on parts of speech beyond chance",
    "purity": "purity of paths for parts of speech",
}
BLOCK_SIZES = {size: f"pathb{size}-moe" for size in (2, 4, 8, 12, 16)} | {1: "indep-moe"}
# What is changed on both sides: the PathMoE and the independent routing that differ by nothing but the sharing.
PAIRS = {
    "nothing": ("pathb4-moe", "indep-moe"),
    "with LBL": ("pathb4-moe-lbl", "indep-moe-lbl"),
    "with a selection bias": ("pathb4-moe-bias", "indep-moe-bias"),
    "cosine scores (X-MoE)": ("pathb4x-moe", "x-moe"),
    "the first layer has its own router": ("pathb4-moe-first", "indep-moe"),
    "the first layer has its own router, with LBL": ("pathb4-moe-lbl-first", "indep-moe-lbl"),
    "routers' first logits as wide as at the paper's width": ("pathb4-moe-init", "indep-moe-init"),
    "routers learn at a quarter of the rate": ("pathb4-moe-slow-router", "indep-moe-slow-router"),
    "k = 1": ("pathb4-moe-top1", "indep-moe-top1"),
    "k = 2": ("pathb4-moe-top2", "indep-moe-top2"),
    "k = 8": ("pathb4-moe-top8", "indep-moe-top8"),
    "wide embeddings": ("pathb4-moe-embed", "indep-moe-embed"),
    "wide embeddings, with LBL": ("pathb4-moe-lbl-embed", "indep-moe-lbl-embed"),
}


def percent(difference: dict | None, digits: int = 1) -> str:
    """A difference as people read it, with its interval."""
    if difference is None:
        return ""
    value, low, high = (f"{100 * difference[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def with_seeds(difference: dict | None) -> str:
    """A difference with its interval and, where there are several, what each seed gave."""
    text = percent(difference)
    if difference is not None and len(difference["seeds"]) > 1:
        text += f" (seeds {', '.join(f'{100 * seed:+.1f}' for seed in difference['seeds'])})"
    return text


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def with_each_seed(perplexities: list[float]) -> str:
    """Their mean and, where there are several, each."""
    each = f" ({', '.join(f'{value:.2f}' for value in perplexities)})" if len(perplexities) > 1 else ""
    return f"{geometric_mean(perplexities):.2f}{each}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def with_interval(measured: dict) -> str:
    if measured["low"] is None:
        return number(measured["value"])
    return f"{number(measured['value'])} [{number(measured['low'])}, {number(measured['high'])}]"


def apart(one: dict, two: dict) -> dict:
    """The difference of two measured values, with the widest ends that their intervals allow."""
    return {
        "value": one["value"] - two["value"],
        "low": one["low"] - two["high"],
        "high": one["high"] - two["low"],
    }


def repeat_noise(repeats: list[tuple[str, int, int, float]]) -> str:
    """What [`find_repeats`] found, in words."""
    if not repeats:
        return ""
    apart_by = ", ".join(f"{row} (seed {seed}) {100 * by:.1f} %" for row, seed, _, by in repeats)
    return (
        "**Rounding.** A run and the longer one of its row and seed do the same until the shorter one's learning rate "
        f"decays, but for rounding where kernels or threads differ. After {repeats[0][2] / 1e6:.1f}M tokens their "
        f"validation perplexities are apart by: {apart_by}."
    )


def pair_table(table: Table) -> str:
    """PathMoE against independent routing under each change."""
    lines = []
    for change, (path, independent) in PAIRS.items():
        if path in table.rows and independent in table.rows:
            pair = (independent, path), (path, independent)
            values = [f"{geometric_mean(table.perplexity(row, beside)):.2f}" for row, beside in pair]
            agreement = table.path_measure(path, "agreement")
            lines.append(
                [
                    change,
                    *values,
                    with_seeds(table.difference(path, independent)),
                    with_seeds(table.difference(path, BASELINE)),
                    number(agreement["value"]),
                ]
            )
    against = [f"PathMoE against {base}" for base in ("it", BASELINE)]
    return table_of(["changed on both sides", "independent", "PathMoE", *against, "agreement in PathMoE"], lines)


def ablation_table(table: Table, name: str, rows: dict[int, str], base: int) -> str:
    """What a number does: a line for each of its values."""
    lines = []
    for value, row in sorted(rows.items()):
        if row in table.rows:
            measures = [table.path_measure(row, key) for key in ("agreement", "distinct_paths", "load_variation")]
            shuffled = rise(table, row, "experts shuffled, each_layer")
            lines.append(
                [
                    str(value),
                    with_each_seed(table.perplexity(row)),
                    "" if value == base else with_seeds(table.difference(row, rows[base])),
                    with_seeds(table.difference(row, BASELINE)),
                    *(number(measure["value"]) for measure in measures),
                    percent(shuffled, 0),
                ]
            )
    head = ["perplexity", f"against {base}", f"against {BASELINE}"]
    head += [PATH_MEASURES[key] for key in ("agreement", "distinct_paths", "load_variation")]
    return table_of([name, *head, "rise when experts are shuffled"], lines)


def top_k_rows(row: str) -> dict[int, str]:
    return {k: f"{row}-top{k}" for k in (1, 2, 8)} | {4: row}


def perplexity_table(table: Table) -> str:
    """Rows by their difference from the baseline, which is over the seeds that both have."""

    def against_baseline(row: str) -> float:
        difference = table.difference(row, BASELINE)
        return math.inf if difference is None else difference["value"]

    lines = []
    for row in sorted(table.rows, key=against_baseline):
        lines.append(
            [
                row,
                with_each_seed(table.perplexity(row)),
                "" if row == BASELINE else with_seeds(table.difference(row, BASELINE)),
                "" if row == "indep-moe" else with_seeds(table.difference(row, "indep-moe")),
                f"{np.median([run.tokens_per_s for run in table.rows[row].values()]):,.0f}",
            ]
        )
    head = ["row", "perplexity (each seed)", f"against {BASELINE} [95 %]", "against indep-moe [95 %]", "tokens/s"]
    return table_of(head, lines)


def path_table(table: Table) -> str:
    lines = []
    for row in table.rows:
        measures = [table.path_measure(row, key) for key in PATH_MEASURES]
        if any(measures):
            lines.append([row, *("" if measure is None else with_interval(measure) for measure in measures)])
    return table_of(["row", *PATH_MEASURES.values()], lines)


def layer_table(table: Table) -> str:
    """What parts the first layer from the others; means over the seeds."""
    lines = []
    for row, runs in table.rows.items():
        found = [run for run in runs.values() if "stream" in run.measures]  # no dense model has one
        if not found:
            continue
        norm, turn, spread = (
            np.mean([run.measures["stream"][name] for run in found], axis=0) for name in ("norm", "turn", "spread")
        )
        rises = np.mean([run.layer_rises() for run in found], axis=0)
        cells = [norm[0], norm[1], norm[-1], turn[0], turn[1:].min(), spread[0], spread[1:4].min()]
        together = rise(table, row, "experts shuffled, each_layer")["value"]
        shuffled = [f"{100 * share:+.0f} %" for share in (rises[0], rises[1:].max(), together)]
        lines.append([row, *map(number, cells), *shuffled])
    head = ["row", "stream into the experts of layer 1", "of layer 2", "of the last"]
    head += ["cosine of routers' inputs, layers 1 and 2", "others, at least"]
    head += ["spread of logits, layer 1", "layers 2 to 4, at least"]
    head += ["rise when layer 1 is shuffled", "another one, at most", "all"]
    return table_of(head, lines)


def source_table(table: Table, rows: list[str]) -> str:
    """Perplexity by source, and each row's difference from the baseline."""
    first = next(iter(table.rows[rows[0]].values()))
    lines = []
    for source in sorted(first.documents["source"].unique()):
        line = [source]
        for row in rows:
            means = []
            for run in table.rows[row].values():
                documents = run.documents[run.documents["source"] == source]
                means.append(documents["nll"].sum() / documents["tokens"].sum())
            cell = f"{math.exp(np.mean(means)):.1f}"
            line.append(cell if row == BASELINE else f"{cell}, {percent(table.difference(row, BASELINE, source))}")
        lines.append(line)
    return table_of(["source", *rows], lines)


def rise(table: Table, row: str, curve: str, index: int = -1) -> dict | None:
    """A point of a perturbation curve: by what share perplexity rises; the mean over the seeds, with ends."""
    curves = [run.perturbations for run in table.rows.get(row, {}).values()]
    found = [of_run[curve]["rise"][index] for of_run in curves if curve in of_run]
    if not found:
        return None
    return {
        "value": np.mean([point["estimate"] for point in found]),
        "low": min(point["low"] for point in found),
        "high": max(point["high"] for point in found),
    }


def verdict(paper: int, ours: dict, over_seeds: tuple[float, float] = (math.inf, -math.inf)) -> str:
    """Whether an effect has the paper's sign: undecided where its interval over documents or over seeds holds zero.
    Where the paper has no effect (0) the answer is never yes, for that would need a margin."""
    low, high = min(ours["low"], over_seeds[0]), max(ours["high"], over_seeds[1])
    if low <= 0 <= high:
        return "undecided"
    return "yes" if np.sign(ours["value"]) == paper else "**no**"


def paper_table(tables: dict[int, Table], noise: SeedNoise) -> str:
    """The paper's findings beside ours, each at the largest budget that has both rows."""
    lines = []

    def largest(*rows: str) -> Table | None:
        having = [table for _, table in sorted(tables.items(), reverse=True) if all(row in table.rows for row in rows)]
        return having[0] if having else None

    def compare_perplexity(what: str, row: str, base: str, paper: str, sign: int):
        table = largest(row, base)
        if table is not None:
            ours = table.difference(row, base)
            low, high = noise.interval(ours)
            here = f"{with_seeds(ours)} after {table.tokens / 1e6:g}M tokens"
            ends = f"[{100 * low:+.1f}, {100 * high:+.1f}]" if noise.freedom else ""
            lines.append([what, paper, here, ends, verdict(sign, ours, (low, high))])

    def compare_measure(what: str, key: str, paper: str, sign: int):
        table = largest("pathb4-moe", "indep-moe-lbl")
        if table is None:
            return
        one, two = (table.path_measure(row, key) for row in ("pathb4-moe", "indep-moe-lbl"))
        if one is None or two is None:  # nothing has tags
            return
        ours = " beside ".join(map(with_interval, (one, two)))
        lines.append([what, paper, ours, "", verdict(sign, apart(one, two))])

    path, independent = "pathb4-moe", "indep-moe"
    compare_perplexity(
        "PathMoE (B = 4, no LBL) against Indep-MoE with LBL", path, BASELINE, "-4.8 % (12.29 / 12.91)", -1
    )
    compare_perplexity("LBL on Indep-MoE", BASELINE, independent, "needed; erratic or collapsing without", -1)
    compare_perplexity("PathMoE against Indep-MoE, both without LBL", path, independent, "better", -1)
    compare_perplexity("LBL on PathMoE", "pathb4-moe-lbl", path, "not needed", 1)
    compare_perplexity(
        "PathMoE with X-MoE scores against X-MoE", "pathb4x-moe", "x-moe", "+0.42 points of accuracy", -1
    )
    compare_perplexity("Recurrent-MoE against PathMoE", "recurrent-moe", path, "about equal", 0)
    compare_perplexity("Rand-MoE against Indep-MoE with LBL", "rand-moe", BASELINE, "the lower bound", 1)
    for size in (2, 8, 12):
        compare_perplexity(f"Block size {size} against 4", f"pathb{size}-moe", path, "B = 4 best", 1)
    for k in (1, 8):
        compare_perplexity(f"PathMoE, top-{k} against top-2", f"pathb4-moe-top{k}", "pathb4-moe-top2", "k = 2 best", 1)
    compare_perplexity("PathMoE, top-4 against top-2", path, "pathb4-moe-top2", "k = 2 best", 1)
    compare_measure("Jaccard agreement of neighbouring layers", "agreement", "79 % beside 48 %", 1)
    compare_measure("Tokens that keep an expert for 4 layers or more", "sustained_4", "higher", 1)
    compare_measure("Routing entropy", "routing_entropy", "11 % lower", -1)
    compare_measure("Information of paths on parts of speech, beyond chance", "adjusted", "tighter clusters", 1)
    compare_measure("Purity of paths for parts of speech (rises with the number of paths)", "purity", "as above", 1)
    table = largest(path, BASELINE)
    if table is not None:
        shuffled = [rise(table, row, "experts shuffled, each_layer") for row in (path, BASELINE)]
        ours = " beside ".join(percent(point, 0) for point in shuffled)
        finding = ["Perplexity when experts are shuffled", "+237 % beside +5328 %", ours]
        lines.append([*finding, "", verdict(-1, apart(*shuffled))])
        for index, (count, points) in enumerate(((10, "-2.49"), (100, "-0.53"), (500, "+0.15"))):
            ours = rise(table, path, "most frequent paths only, other experts allowed", index)
            finding = [f"PathMoE's perplexity on its {count} most frequent paths", f"{points} points of accuracy"]
            lines.append([*finding, percent(ours), "", verdict(-1 if points[0] == "+" else 1, ours)])
    return table_of(["finding", "paper", "here [95 %, documents]", "95 %, seeds", "same direction"], lines)


def task_table(tasks: pd.DataFrame) -> str:
    """Accuracy by task and row, the mean over the seeds; the last line is the average with each seed's difference."""
    rows, lines = list(tasks["model"].unique()), []
    for task in tasks["task"].unique():
        line = [task.removeprefix("pathmoe_offline_")]
        for row in rows:
            cells = tasks[(tasks["task"] == task) & (tasks["model"] == row)]
            text = f"{100 * cells['score'].mean():.1f}"
            if row != rows[0]:
                text += "; " + ", ".join(
                    f"{100 * cell.difference:+.1f} [{100 * cell.low:+.1f}, {100 * cell.high:+.1f}]"
                    for cell in cells.itertuples()
                )
            line.append(text)
        lines.append(line)
    return table_of(["accuracy (%)", rows[0], *(f"{row}; difference of each seed [95 %]" for row in rows[1:])], lines)
