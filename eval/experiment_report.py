# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Tables and plots of an experiment whose runs `experiment.py` has measured.

    python eval/experiment_report.py --config configuration/experiment/cpu.yaml --runs runs/experiment/cpu \\
        --output results/cpu
    python eval/experiment_report.py --config configuration/experiment/cpu.yaml --runs results/cpu/runs \\
        --output results/cpu

The first one also keeps each run's recipe, metrics and measures in OUTPUT/runs, of which the second one makes the same
tables. A difference between two rows is the mean over the seeds that both have, paired by document; its interval is
Student's over documents. What the seeds gave stands beside it, for two or three of them make no interval.
"""

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml
from compare import compare, interval, read_run


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


sys.path.insert(0, str(Path(__file__).parents[1]))

from training.experiment import comparison_runs, read_experiment  # noqa: E402
from training.log import read_metrics  # noqa: E402


KEPT = ("recipe.yaml", "metrics.jsonl", "measures.json")
BASELINE = "indep-moe-lbl"
PATH_MEASURES = {
    "agreement": "agreement of neighbouring layers",
    "sustained_4": "tokens with an expert for 4 layers or more",
    "distinct_paths": "distinct paths",
    "coverage_10": "tokens on the 10 most frequent paths",
    "load_variation": "variation of the load",
    "routing_entropy": "routing entropy (of an undecided router's)",
    "nmi": "NMI of paths and parts of speech",
    "purity": "purity of paths for parts of speech",
}


@dataclass(frozen=True)
class Measured:
    """A run and what was measured of it.

    Args:
        row, tokens, seed: As in [`training.experiment.Run`].
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
        """`value`, `low` and `high` of each measure; empty for a dense model."""
        rows = {row["key"]: row for row in self.measures.get("measures", [])}
        if rows:
            rows["sustained_4"] = {"value": self.measures["sustained_4"], "low": None, "high": None}
        return rows

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and values of a metric; of per-layer ones the mean."""
        per_step = self.tokens_per_step
        lines = [line for line in self.metrics if line.get(name) is not None]
        return (
            np.array([line["step"] * per_step for line in lines]),
            np.array([np.mean(line[name]) for line in lines]),
        )

    @property
    def tokens_per_step(self) -> int:
        recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
        return recipe["batch_size"] * recipe["sequence_length"]


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

    def perplexity(self, row: str) -> list[float]:
        return [run.perplexity for _, run in sorted(self.rows[row].items())]

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


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def with_interval(measured: dict) -> str:
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


def perplexity_table(table: Table) -> str:
    """Rows from the lowest perplexity up."""
    lines = []
    for row in sorted(table.rows, key=lambda row: np.mean(table.perplexity(row))):
        values = table.perplexity(row)
        seeds = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
        lines.append(
            [
                row,
                f"{np.exp(np.mean(np.log(values))):.2f}{seeds}",
                "" if row == BASELINE else percent(table.difference(row, BASELINE)),
                "" if row == "indep-moe" else percent(table.difference(row, "indep-moe")),
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
            lines.append(
                [row]
                + [
                    "" if m is None else f"{number(m['value'])} [{number(m['low'])}, {number(m['high'])}]"
                    for m in measures
                ]
            )
    return table_of(["row", *PATH_MEASURES.values()], lines)


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
    found = []
    for run in table.rows.get(row, {}).values():
        for entry in run.measures.get("perturbations", {}).get("curves", []):
            if entry["title"].startswith(curve):
                found.append(entry["rise"][index])
    if not found:
        return None
    return {
        "value": np.mean([point["estimate"] for point in found]),
        "low": min(point["low"] for point in found),
        "high": max(point["high"] for point in found),
    }


def verdict(paper: float, ours: dict | None) -> str:
    """Whether a signed effect goes the paper's way."""
    if ours is None:
        return "not measured"
    if ours["low"] <= 0 <= ours["high"]:
        return "undecided"
    return "yes" if (ours["value"] > 0) == (paper > 0) else "**no**"


def paper_table(tables: dict[int, Table]) -> str:
    """The paper's findings beside ours, each at the largest budget that has both rows."""
    lines = []

    def largest(*rows: str) -> Table | None:
        having = [table for _, table in sorted(tables.items(), reverse=True) if all(row in table.rows for row in rows)]
        return having[0] if having else None

    def compare_perplexity(what: str, row: str, base: str, paper: str, sign: int):
        table = largest(row, base)
        if table is not None:
            ours = table.difference(row, base)
            lines.append([what, paper, f"{percent(ours)} ({table.tokens / 1e6:g}M tokens)", verdict(sign, ours)])

    def compare_measure(what: str, key: str, paper: str, sign: int):
        table = largest("pathb4-moe", "indep-moe-lbl")
        if table is None:
            return
        one, two = (table.path_measure(row, key) for row in ("pathb4-moe", "indep-moe-lbl"))
        if one is None or two is None:  # nothing has tags
            return
        ours = " beside ".join(map(with_interval, (one, two)))
        lines.append([what, paper, ours, verdict(sign, apart(one, two))])

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
    compare_measure("Purity of paths for parts of speech", "purity", "tighter clusters", 1)
    table = largest(path, BASELINE)
    if table is not None:
        shuffled = [rise(table, row, "Experts shuffled, each layer") for row in (path, BASELINE)]
        ours = " beside ".join(percent(point, 0) for point in shuffled)
        finding = ["Perplexity when experts are shuffled", "+237 % beside +5328 %", ours]
        lines.append([*finding, verdict(-1, apart(*shuffled))])
        speeds = [np.median([run.tokens_per_s for run in table.rows[row].values()]) for row in (path, BASELINE)]
        finding = ["Tokens per second", "55.67 beside 55.21 thousand", " beside ".join(f"{s:,.0f}" for s in speeds)]
        lines.append([*finding, f"{speeds[0] / speeds[1]:.2f} times; no measure unless alone"])
    return table_of(["finding", "paper", "here [95 %]", "same direction"], lines)


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


def plot_learning(tables: dict[int, Table], file: Path) -> None:
    figure, axes = plt.subplots(1, len(tables), figsize=(8 * len(tables), 5), layout="constrained", squeeze=False)
    for axis, (tokens, table) in zip(axes[0], sorted(tables.items())):
        for number_of_row, (row, runs) in enumerate(table.rows.items()):
            color, style = f"C{number_of_row % 10}", ("-", "--", ":")[number_of_row // 10]
            for label, run in zip([row, *[None] * len(runs)], runs.values()):
                x, y = run.curve("eval_loss")
                axis.plot(x / 1e6, y, style, color=color, label=label)
        axis.set(title=f"{tokens / 1e6:g}M tokens", xlabel="million tokens", ylabel="validation loss (nats per token)")
        low = min(run.curve("eval_loss")[1].min() for runs in table.rows.values() for run in runs.values())
        axis.set_ylim(low - 0.05, low + 1.2)
        axis.legend(fontsize="small", ncols=2)
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
        for index, (row, runs) in enumerate(table.rows.items()):
            for label, run in zip([row, *[None] * len(runs)], runs.values()):
                x, y = run.curve(name)
                axis.plot(x / 1e6, y, color=f"C{index % 10}", ls=("-", "--", ":")[index // 10], label=label)
        axis.set(title=title, xlabel="million tokens")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_differences(tables: dict[int, Table], file: Path) -> None:
    """Every row's perplexity against the baseline's, with its interval and each seed."""
    figure, axes = plt.subplots(1, len(tables), figsize=(7.5 * len(tables), 6), layout="constrained", squeeze=False)
    for axis, (tokens, table) in zip(axes[0], sorted(tables.items())):
        found = {row: table.difference(row, BASELINE) for row in table.rows if row != BASELINE}
        found = {row: difference for row, difference in found.items() if difference is not None}
        order = sorted(found, key=lambda row: found[row]["value"], reverse=True)
        for height, row in enumerate(order):
            difference = found[row]
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
        for index, (row, runs) in enumerate(table.rows.items()):
            for label, run in zip([row, *[None] * len(runs)], runs.values()):
                curves = run.measures.get("perturbations", {}).get("curves", [])
                for curve in (curve for curve in curves if curve["title"] == title):
                    x = range(len(curve["values"]))
                    y, low, high = ([1 + point[key] for point in curve["rise"]] for key in ("estimate", "low", "high"))
                    axis.plot(x, y, "o-", color=f"C{index % 10}", label=label)
                    axis.fill_between(x, low, high, color=f"C{index % 10}", alpha=0.12)
                    axis.set_xticks(x, ["all" if value is None else str(value) for value in curve["values"]])
                    axis.set_xlabel(curve["axis"])
        axis.set(title=title, yscale="log", ylabel="perplexity over undisturbed")
    axes.flat[0].legend(fontsize="small")
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    figure.savefig(file, dpi=90)
    plt.close(figure)


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
    kept.mkdir(parents=True, exist_ok=True)
    if options.runs.resolve() != kept.resolve():
        for run in done:
            (kept / run.name).mkdir(exist_ok=True)
            for name in KEPT:
                shutil.copyfile(options.runs / run.name / name, kept / run.name / name)
        shutil.copyfile(options.runs / "tuned.json", kept / "tuned.json")
        evaluated = [Measured(run.row, run.tokens, run.seed, options.runs / run.name) for run in done]
        compare_tasks(evaluated).to_csv(options.output / "tasks.csv", index=False)
    tuned = json.loads((kept / "tuned.json").read_text(encoding="utf-8"))
    runs = [Measured(run.row, run.tokens, run.seed, kept / run.name) for run in done]
    tables = {
        tokens: Table([run for run in runs if run.tokens == tokens]) for tokens in sorted({r.tokens for r in runs})
    }
    longest = tables[max(tables)]
    hours = sum(run.tokens / run.tokens_per_s for run in runs) / 3600
    missing = [run.name for run in wanted if run not in done]
    rates = ", ".join(f"{float(rate):g}: {loss:.4f}" for rate, loss in tuned["losses"].items())
    parts = [
        f"{len(done)} of {len(wanted)} runs, {hours:.1f} hours of training on one CPU core each. Learning rate "
        f"{tuned['learning_rate']:g}, chosen on `{experiment['tune']['row']}` by validation loss ({rates}).",
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        "## Beside the paper",
        paper_table(tables),
    ]
    for tokens, table in sorted(tables.items(), reverse=True):
        parts += [f"## Perplexity after {tokens / 1e6:g}M tokens", perplexity_table(table)]
        parts += [f"## Paths after {tokens / 1e6:g}M tokens", path_table(table)]
    parts += [f"## Perplexity by source after {longest.tokens / 1e6:g}M tokens"]
    parts += [source_table(longest, list(longest.rows))]
    if len(tasks := pd.read_csv(options.output / "tasks.csv")):
        parts += [f"## Tasks after {longest.tokens / 1e6:g}M tokens", task_table(tasks)]
    (options.output / "tables.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    plot_learning(tables, options.output / "learning.png")
    plot_routing(longest, options.output / "routing.png")
    plot_differences(tables, options.output / "perplexity.png")
    plot_perturbations(longest, options.output / "perturbations.png")
    print(f"Wrote {options.output / 'tables.md'} and four plots of {len(done)} runs.")


if __name__ == "__main__":
    main()
