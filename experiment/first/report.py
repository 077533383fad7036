# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Tables and plots of an experiment whose runs `measure.py` has measured.

    python -m experiment.first.report --config experiment/first/cpu.yaml --runs runs/experiment/cpu \\
        --output experiment/first/results/cpu
    python -m experiment.first.report --config experiment/first/cpu.yaml --runs experiment/first/results/cpu/runs \\
        --output experiment/first/results/cpu

The first one also keeps each run's recipe, metrics and measures in OUTPUT/runs, of which the second one makes the same
tables, and writes the best run's model card with what was measured. A difference between two rows is the mean over the
seeds that both have, paired by document; its interval is Student's over documents. What the seeds gave stands beside
it, and [`SeedNoise`] gives the interval over seeds.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml
from scipy import stats

from pathmoe.evaluate.compare import compare, interval, read_run


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from experiment.first.train import comparison_runs, read_experiment
from pathmoe.train.log import read_metrics


KEPT = ("recipe.yaml", "metrics.jsonl", "measures.json")
BASELINE = "indep-moe-lbl"
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


@dataclass(frozen=True)
class Measured:
    """A run and what was measured of it.

    Args:
        row, tokens, seed: As in [`experiment.first.train.ExperimentRun`].
        folder (`Path`): Where its files are.
    """

    row: str
    tokens: int
    seed: int
    folder: Path

    @cached_property
    def metrics(self) -> list[dict]:
        return read_metrics(self.folder / "metrics.jsonl")

    @cached_property
    def measures(self) -> dict:
        return json.loads((self.folder / "measures.json").read_text(encoding="utf-8"))

    @cached_property
    def documents(self) -> pd.DataFrame:
        return pd.DataFrame(self.measures["documents"]).set_index("text_sha")

    @property
    def perplexity(self) -> float:
        return math.exp(self.documents["nll"].sum() / self.documents["tokens"].sum())

    @property
    def tokens_per_s(self) -> float:
        return float(np.median([line["tokens_per_s"] for line in self.metrics if "tokens_per_s" in line]))

    def path_measures(self) -> dict[str, dict]:
        """`value`, `low` and `high` of each measure; empty for a dense model.

        Information and purity rise with the number of paths, whatever these are. `adjusted` is the normalized mutual
        information less what permuted labels give, as a share of what is left: adjusted mutual information with the
        mean of the entropies (Vinh, Epps and Bailey 2010, https://jmlr.org/papers/v11/vinh10a.html).
        """
        rows = {row["key"]: row for row in self.measures.get("measures", [])}
        if rows:
            rows["sustained_4"] = {"value": self.measures["sustained_4"], "low": None, "high": None}
        if "nmi" in rows:
            chance = rows["nmi"]["baseline"]
            ends = {key: rows["nmi"][key] for key in ("value", "low", "high")}
            rows["adjusted"] = {key: None if v is None else (v - chance) / (1 - chance) for key, v in ends.items()}
        return rows

    def perturbation(self, title: str) -> list[dict]:
        """The points of the perturbation curve whose title begins so: by what share perplexity rises."""
        for curve in self.measures.get("perturbations", {}).get("curves", []):
            if curve["title"].startswith(title):
                return curve["rise"]
        return []

    def layer_rises(self) -> list[float]:
        """By what share perplexity rises when the experts of each one of the layers are shuffled."""
        return [point["estimate"] for point in self.perturbation("Experts shuffled in one layer")]

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a metric; of per-layer ones the mean."""
        per_step = self.tokens_per_step
        lines = [line for line in self.metrics if line.get(name) is not None]
        return (
            np.array([line["step"] * per_step for line in lines]),
            np.array([np.mean(line[name]) for line in lines]),
        )

    @cached_property
    def recipe(self) -> dict:
        return yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))

    @property
    def tokens_per_step(self) -> int:
        return self.recipe["batch_size"] * self.recipe["sequence_length"]


class Table:
    """The runs of one token budget.

    Args:
        runs (`list[Measured]`): All with equally many tokens.
    """

    def __init__(self, runs: list[Measured]):
        self.rows: dict[str, dict[int, Measured]] = {}
        for run in runs:
            self.rows.setdefault(run.row, {})[run.seed] = run
        self.tokens = runs[0].tokens

    def difference(self, row: str, base: str, source: str | None = None) -> dict | None:
        """By how much a row's perplexity is above another's: `value`, `low`, `high` and one of each of the `seeds`,
        as shares of it; `None` where no seed is in both.

        It is exp(d) - 1, with d the difference of the mean losses per token.
        """
        seeds = sorted(set(self.rows.get(row, {})) & set(self.rows.get(base, {})))
        if not seeds:
            return None
        differences = []
        for seed in seeds:
            one, two = (self.rows[name][seed].documents for name in (row, base))
            if source is not None:
                one, two = one[one["source"] == source], two[two["source"] == source]
            if not one.index.equals(two.index):
                raise SystemExit(f"{row} and {base} were measured on other documents: measure them again.")
            differences.append((one["nll"] - two["nll"]) / one["tokens"])
        weights = one["tokens"].to_numpy(float)
        mean = np.mean(differences, axis=0)
        low, high = interval(mean, weights)
        value, *of_seeds = (math.expm1(np.average(d, weights=weights)) for d in (mean, *differences))
        return {"value": value, "low": math.expm1(low), "high": math.expm1(high), "seeds": of_seeds}

    def perplexity(self, row: str, beside: str | None = None) -> list[float]:
        """Of each seed; where another row is named, of those that both have."""
        seeds = set(self.rows[row]) & set(self.rows[beside or row])
        return [self.rows[row][seed].perplexity for seed in sorted(seeds)]

    def path_measure(self, row: str, key: str) -> dict | None:
        """Mean over the seeds, with the first seed's interval widened to hold each seed's value."""
        found = [run.path_measures().get(key) for _, run in sorted(self.rows.get(row, {}).items())]
        found = [entry for entry in found if entry is not None]
        if not found:
            return None
        ends = [entry[end] for entry in found for end in ("low", "value", "high") if entry[end] is not None]
        return {"value": np.mean([entry["value"] for entry in found]), "low": min(ends), "high": max(ends)}


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


def table_of(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ["---"] + ["--:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


@dataclass(frozen=True)
class SeedNoise:
    """What neither a run's row nor its seed tells of its perplexity, from all rows of several seeds: the residual of
    an additive model of log perplexity, with an effect of each row and one of each seed within a token budget.

    Args:
        deviation (`float`): Its standard deviation.
        freedom (`int`): The degrees of freedom that it is estimated with; 0 where no budget has two rows of two
            seeds.

    One deviation for all rows and budgets is an approximation: rows without balancing may vary more than others.
    """

    deviation: float
    freedom: int

    @classmethod
    def of(cls, tables: dict[int, Table]) -> "SeedNoise":
        runs = pd.DataFrame(
            {"row": f"{row} {tokens}", "seed": f"{seed} {tokens}", "log": math.log(run.perplexity)}
            for tokens, table in tables.items()
            for row, seeds in table.rows.items()
            if len(seeds) > 1
            for seed, run in seeds.items()
        )
        if runs.empty:
            return cls(math.nan, 0)
        effects = pd.get_dummies(runs[["row", "seed"]]).to_numpy(float)
        fit, _, rank, _ = np.linalg.lstsq(effects, runs["log"], rcond=None)
        freedom = len(runs) - int(rank)
        squares = float(np.square(runs["log"] - effects @ fit).sum())
        return cls(math.sqrt(squares / freedom) if freedom else math.nan, freedom)

    def interval(self, difference: dict) -> tuple[float, float]:
        """Student's 95 % interval of a difference of two rows over the seeds that they share, as shares."""
        if not self.freedom:
            return -1.0, math.inf
        half = stats.t.ppf(0.975, self.freedom) * self.deviation * math.sqrt(2 / len(difference["seeds"]))
        middle = math.log1p(difference["value"])
        return math.expm1(middle - half), math.expm1(middle + half)

    def __str__(self) -> str:
        if not self.freedom:
            return "No two rows of a budget have two seeds, so that no difference can be told from what a seed does."
        ends = [self.interval({"value": 0.0, "seeds": [0] * seeds}) for seeds in (1, 2, 3)]
        widths = ", ".join(f"{100 * low:+.1f} to {100 * high:+.1f} %" for low, high in ends)
        return (
            f"**Seeds.** Beyond what its row and its seed explain, a run's perplexity varies by "
            f"{100 * self.deviation:.1f} % (standard deviation with {self.freedom} degrees of freedom). The 95 % "
            f"interval over seeds of a difference of nothing is {widths} with 1, 2, 3 seeds in common. Intervals in "
            "brackets are over documents and do not hold that."
        )


def find_repeats(tables: dict[int, Table]) -> list[tuple[str, int, int, float]]:
    """How far rounding alone takes runs of one row and seed apart: the row, the seed, after how many tokens, and the
    share by which their perplexities differ.

    A run and a longer one of its row and seed are the same run until the shorter one's learning rate decays.
    """
    found = []
    for tokens, table in tables.items():
        for row, seeds in table.rows.items():
            for seed, run in seeds.items():
                constant = (1 - run.recipe["decay_steps"]) * tokens
                for longer in (other for more, other in tables.items() if more > tokens):
                    if other := longer.rows.get(row, {}).get(seed):
                        curves = [dict(zip(*each.curve("eval_loss"))) for each in (run, other)]
                        at = max((x for x in curves[0].keys() & curves[1].keys() if x <= constant), default=None)
                        if at is not None:
                            found.append((row, seed, at, math.expm1(abs(curves[0][at] - curves[1][at]))))
    return found


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
            shuffled = rise(table, row, "Experts shuffled, each layer")
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
        together = rise(table, row, "Experts shuffled, each layer")["value"]
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
    found = [points[index] for run in table.rows.get(row, {}).values() if (points := run.perturbation(curve))]
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
        shuffled = [rise(table, row, "Experts shuffled, each layer") for row in (path, BASELINE)]
        ours = " beside ".join(percent(point, 0) for point in shuffled)
        finding = ["Perplexity when experts are shuffled", "+237 % beside +5328 %", ours]
        lines.append([*finding, "", verdict(-1, apart(*shuffled))])
        for index, (count, points) in enumerate(((10, "-2.49"), (100, "-0.53"), (500, "+0.15"))):
            ours = rise(table, path, "Most frequent paths", index)
            finding = [f"PathMoE's perplexity on its {count} most frequent paths", f"{points} points of accuracy"]
            lines.append([*finding, percent(ours), "", verdict(-1 if points[0] == "+" else 1, ours)])
    return table_of(["finding", "paper", "here [95 %, documents]", "95 %, seeds", "same direction"], lines)


def compare_tasks(runs: list[Measured]) -> pd.DataFrame:
    """Each run's tasks and their average beside the baseline's of the same seed, paired by item; empty where no
    baseline has been evaluated."""
    tables = []
    for seed in sorted({run.seed for run in runs}):
        of_seed = [run for run in runs if run.seed == seed and (run.folder / "lm_eval" / "results.json").is_file()]
        of_seed.sort(key=lambda run: run.row != BASELINE)
        if of_seed and of_seed[0].row == BASELINE:
            tables.append(compare([read_run(run.folder / "lm_eval", run.row) for run in of_seed]).assign(seed=seed))
    columns = ["task", "model", "score", "difference", "low", "high", "seed"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


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
    figure.savefig(file, dpi=110)
    plt.close(figure)


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
    figure.savefig(file, dpi=100)
    plt.close(figure)


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
    figure.savefig(file, dpi=100)
    plt.close(figure)


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
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_perturbations(table: Table, file: Path) -> None:
    """Perplexity over the undisturbed one, of every perturbation."""
    example = next(run for runs in table.rows.values() for run in runs.values() if "perturbations" in run.measures)
    titles = [curve["title"] for curve in example.measures["perturbations"]["curves"]]
    figure, axes = plt.subplots(2, math.ceil(len(titles) / 2), figsize=(18, 8), layout="constrained")
    for axis, title in zip(axes.flat, titles):
        for run, style in lines_of(table):
            curves = run.measures.get("perturbations", {}).get("curves", [])
            for curve in (curve for curve in curves if curve["title"] == title):
                x = range(len(curve["values"]))
                y, low, high = ([1 + point[key] for point in curve["rise"]] for key in ("estimate", "low", "high"))
                axis.plot(x, y, marker="o", **style)
                axis.fill_between(x, low, high, color=style["color"], alpha=0.12)
                axis.set_xticks(x, ["all" if value is None else str(value) for value in curve["values"]])
                axis.set_xlabel(curve["axis"])
        axis.set(title=title, yscale="log", ylabel="perplexity over undisturbed")
    axes.flat[0].legend(fontsize="small")
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def write_card(run: Measured, tasks: pd.DataFrame, final: Path, file: Path) -> None:
    """The run's model card, as training wrote it, with what was measured since."""
    lines = [["perplexity per token of held-out documents", f"{run.perplexity:.2f}"]]
    measures = run.path_measures()
    lines += [[name, with_interval(measures[key])] for key, name in PATH_MEASURES.items() if key in measures]
    of_run = tasks[(tasks["model"] == run.row) & (tasks["seed"] == run.seed)]
    lines += [[f"accuracy on {cell.task}", f"{100 * cell.score:.1f} %"] for cell in of_run.itertuples()]
    head, recipe = (final / "README.md").read_text(encoding="utf-8").split("\nTrained with this recipe", 1)
    evaluated = table_of(["evaluated", "value [95 %]"], lines)
    file.write_text(f"{head}\n{evaluated}\n\nTrained with this recipe{recipe}", encoding="utf-8")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of runs that were measured")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(args)
    experiment = read_experiment(options.config)
    wanted = comparison_runs(experiment, learning_rate=1.0)  # runs are found by name, which does not tell it
    done = [run for run in wanted if (options.runs / run.name / "measures.json").is_file()]
    if not done:
        raise SystemExit(f"--runs {options.runs} holds no measured run of {options.config}.")
    kept = options.output / "runs"
    if options.runs.resolve() != kept.resolve():
        if not (options.runs / done[0].name / "final").is_dir():
            raise SystemExit(
                f"--runs {options.runs} holds what a report kept: its tables go to --output {options.runs.parent}"
            )
        for run in done:
            (kept / run.name).mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(options.runs / run.name / name, kept / run.name / name)
        shutil.copyfile(options.runs / "tuned.json", kept / "tuned.json")
        evaluated = [Measured(run.row, run.tokens, run.seed, options.runs / run.name) for run in done]
        tasks = compare_tasks(evaluated)
        tasks.to_csv(options.output / "tasks.csv", index=False)
        most = max(run.tokens for run in evaluated)
        best = min((run for run in evaluated if run.tokens == most), key=lambda run: run.perplexity)
        write_card(best, tasks, best.folder / "final", options.output / "best_model_card.md")
    tuned = json.loads((kept / "tuned.json").read_text(encoding="utf-8"))
    runs = [Measured(run.row, run.tokens, run.seed, kept / run.name) for run in done]
    tables = {
        tokens: Table([run for run in runs if run.tokens == tokens]) for tokens in sorted({r.tokens for r in runs})
    }
    longest = tables[max(tables)]
    hours = sum(run.tokens / run.tokens_per_s for run in runs) / 3600
    noise = SeedNoise.of(tables)
    missing = [run.name for run in wanted if run not in done]
    rates = ", ".join(f"{float(rate):g}: {loss:.4f}" for rate, loss in tuned["losses"].items())
    parts = [
        f"{len(done)} of {len(wanted)} runs, {hours:.1f} hours of training on one CPU core each. Learning rate "
        f"{tuned['learning_rate']:g}, chosen on `{experiment['tune']['row']}` by validation loss ({rates}).",
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        *filter(None, (str(noise), repeat_noise(find_repeats(tables)))),
        "## Beside the paper",
        paper_table(tables, noise),
    ]
    for tokens, table in sorted(tables.items(), reverse=True):
        after = f"after {tokens / 1e6:g}M tokens"
        parts += [f"## Perplexity {after}", perplexity_table(table)]
        parts += [f"## Sharing against not sharing {after}", pair_table(table)]
        for title, number_of, rows, base in (
            ("Block size", "layers that share", BLOCK_SIZES, 1),
            ("Experts of a token, PathMoE", "k", top_k_rows("pathb4-moe"), 4),
            ("Experts of a token, independent", "k", top_k_rows("indep-moe"), 4),
        ):
            if rows[base] in table.rows and len(set(rows.values()) & set(table.rows)) > 2:
                parts += [f"## {title} {after}", ablation_table(table, number_of, rows, base)]
        parts += [f"## Paths {after}", path_table(table)]
        parts += [f"## What the routers of each layer see, and what their choices matter, {after}", layer_table(table)]
    parts += [f"## Perplexity by source after {longest.tokens / 1e6:g}M tokens"]
    parts += [source_table(longest, list(longest.rows))]
    if len(tasks := pd.read_csv(options.output / "tasks.csv")):
        parts += [f"## Tasks after {longest.tokens / 1e6:g}M tokens", task_table(tasks)]
    (options.output / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_learning(tables, options.output / "learning.png")
    plot_routing(longest, options.output / "routing.png")
    plot_differences(tables, noise, options.output / "perplexity.png")
    plot_perturbations(longest, options.output / "perturbations.png")
    plot_layers(longest, options.output / "layers.png")
    print(f"Wrote {options.output / 'tables.md'} and five plots of {len(done)} runs.")


if __name__ == "__main__":
    main()
