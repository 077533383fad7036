# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Compares evaluations item by item: which model is better at which task, by how much, and with what certainty.

    pathmoe compare out/indep out/path --output comparison
    pathmoe compare out/a/perplexity.json out/b/perplexity.json --names a b --output comparison

A RUN is an output folder of `run_lm_eval.py`, or the .json file of `perplexity.py`. The other runs are compared with
the first. The command writes `comparison.md`, `comparison.csv` and `comparison.png` to OUTPUT.

The test is the paired sign-flip permutation test: if two models are equally good, the sign of an item's difference is
random. The test assumes nothing about the distribution of the differences. If items are right or wrong, it is
McNemar's exact test and p is exact. Otherwise p comes from 9999 random flips. Holm's method corrects p for the number
of tasks and models: it bounds the probability of any false positive, even if tasks depend on each other. The average
(of lm-eval's tasks) or the total (of all documents) is a single test per model, corrected for the number of models.
"""

import argparse
import hashlib
import html
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

from pathmoe.command import ArgumentParser, UserError, one_line, run_command
from pathmoe.evaluate.inputs import check_whole
from pathmoe.evaluate.run_lm_eval import score_of
from pathmoe.files import check_writable, read_json, write_aside


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

from pathmoe.markdown import markdown_table


FLIPS = 9999
MARK = "PathMoE eval/compare.py"  # written into the PNG: only files with this mark are replaced
PERPLEXITY_SETTINGS = ("max_length", "stride", "name", "split", "text_column", "limit")


class RunError(UserError):
    """A run cannot be read, or runs cannot be compared. The message lists the differences."""


@dataclass
class Task:
    """The results of a run on one task.

    Attributes:
        settings (`dict`): The settings, which must be equal in runs that are compared.
        items (`pd.DataFrame`): One row per item: `digest` of the prompt and target, `value` and `weight`. The score is
            the weighted mean of the values. For right or wrong items, the value is 1 or 0 and the weight 1; for
            documents, the value is in bits per byte and the weight is the number of bytes.
    """

    settings: dict
    items: pd.DataFrame


@dataclass
class EvaluationRun:
    """A run, whose scores are bits per byte (lower is better) if `bits` is true, and accuracies otherwise."""

    name: str
    tasks: dict[str, Task]
    bits: bool

    @property
    def summary(self) -> str:
        return "total" if self.bits else "average"


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()


def read_lm_eval(folder: Path, name: str) -> EvaluationRun:
    """Reads a run from an output folder of `run_lm_eval.py`. All tasks of a group are treated as one task."""
    results = read_json(folder / "results.json", "RUN")
    tasks = {}
    for entry in results["entries"]:
        settings, rows = {}, []
        for leaf in results.get("group_subtasks", {}).get(entry, [entry]):
            if leaf not in results["results"]:
                raise RunError(f"{folder} has no results of {leaf}: {results['errors'].get(leaf, 'run it again')}")
            result = read_json(folder / "tasks" / f"{leaf}.json", "RUN")
            check_whole(result["settings"], f"{folder}: {leaf}")
            scored = score_of(result["results"][leaf])
            if scored is None:
                raise RunError(f"{folder}: {leaf} has neither accuracy nor exact match: leave it out with --tasks.")
            metric, filtered = scored[0].split(",")
            settings |= {
                f"version of {leaf}": result["versions"][leaf],
                f"num_fewshot of {leaf}": result["n-shot"][leaf],
                f"metric of {leaf}": metric,
                "limit": result["settings"]["limit"],
            }
            values, file = [], folder / "tasks" / f"{leaf}.jsonl"
            with file.open(encoding="utf-8") as lines:
                for sample in read_lines(lines, file):
                    if sample["filter"] == filtered:
                        asked = digest([sample["arguments"], sample["target"]])
                        rows.append((f"{leaf}/{sample['doc_id']}", asked, sample[metric], 1))
                        values.append(sample[metric])
            if values:
                check_same_evaluation(file, sum(values) / len(values), file.with_suffix(".json"), scored[1])
        items = pd.DataFrame(rows, columns=["item", "digest", "value", "weight"]).set_index("item")
        tasks[entry] = Task(settings, items)
    return EvaluationRun(name, tasks, bits=False)


def read_lines(lines: Iterable[str], file: Path) -> Iterator[dict]:
    """Yields the objects of JSON lines.

    Raises:
        RunError: If a line is damaged. The message names the file and the line.
    """
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise RunError(f"{file} line {number} is damaged ({one_line(error)}): evaluate again.") from error


def check_same_evaluation(items: Path, of_items: float, result: Path, stated: float):
    """Checks that the score of the items is the score in the result, so that both files are of the same evaluation.

    Raises:
        RunError: If it is not. The message has both files and both scores.
    """
    if math.isfinite(of_items) and not math.isclose(of_items, stated, rel_tol=1e-6, abs_tol=1e-9):
        raise RunError(
            f"the score is {of_items:.6g} in {items} but {stated:.6g} in {result}: the files are of different "
            "evaluations. Evaluate again."
        )


def read_perplexity(file: Path, name: str) -> EvaluationRun:
    """Reads a run from an output of `perplexity.py`, with one task per source and one for all documents."""
    result = read_json(file, "RUN")
    settings = result["settings"]
    check_whole(settings, f"{file}")
    with file.with_suffix(".jsonl").open(encoding="utf-8") as lines:
        documents = pd.DataFrame(read_lines(lines, file.with_suffix(".jsonl")))
    check_same_evaluation(file.with_suffix(".jsonl"), documents["nll"].sum(skipna=False), file, result["nll"])
    documents = documents[documents["bytes"] > 0]
    items = pd.DataFrame(
        {
            "digest": documents["text_sha"],
            "value": documents["nll"] / documents["bytes"] / math.log(2),
            "weight": documents["bytes"],
        }
    )
    settings = {key: settings[key] for key in PERPLEXITY_SETTINGS}
    groups = items.groupby(documents["source"]) if "source" in documents else []
    tasks = {str(source): Task(settings, of_source) for source, of_source in groups}
    return EvaluationRun(name, tasks | {"total": Task(settings, items)}, bits=True)


def read_run(path: str | Path, name: str | None = None) -> EvaluationRun:
    """Reads a run.

    Args:
        path (`str` or `Path`): An output folder of `run_lm_eval.py`, or the .json file of `perplexity.py`.
        name (`str`, *optional*): The name of the run. Defaults to the path.

    Raises:
        RunError: If the run does not exist, is damaged or lacks results.
    """
    path = Path(path)
    name = name or str(path)
    try:
        if (path / "results.json").is_file():
            run = read_lm_eval(path, name)
        elif path.is_file() and path.suffix == ".json" and path.with_suffix(".jsonl").is_file():
            run = read_perplexity(path, name)
        else:
            raise RunError(
                f"{path} is neither a folder of run_lm_eval.py with results.json nor a .json of perplexity.py with a "
                ".jsonl beside it."
            )
        check_scores(run)
        return run
    except UserError as error:
        raise RunError(error) from error
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise RunError(f"{path} is not a result of the evaluation ({reason}): evaluate again.") from error


def check_scores(run: EvaluationRun) -> None:
    """Raises `RunError` if the run has no tasks, or if a task has no items or a score that is not a finite number."""
    if not run.tasks:
        raise RunError(f"{run.name} has no tasks.")
    for name, task in run.tasks.items():
        if task.items.empty:
            raise RunError(f"{run.name}: {name} has no items.")
        for column in ("value", "weight"):
            numbers = pd.to_numeric(task.items[column], errors="coerce").to_numpy(float)
            if len(bad := np.flatnonzero(~np.isfinite(numbers))):
                what = "score" if column == "value" else column
                raise RunError(
                    f"{run.name}: {name}: the {what} of item {task.items.index[bad[0]]} is "
                    f"{task.items[column].iloc[bad[0]]}, and {len(bad)} of {len(numbers)} are not finite numbers: the "
                    "model diverged or the file is damaged. Evaluate again."
                )


def check_comparable(runs: list[EvaluationRun]) -> None:
    """Raises `RunError` with all differences unless all runs have the same tasks, settings and items."""
    first, differences = runs[0], []
    for run in runs[1:]:
        for task in first.tasks.keys() ^ run.tasks.keys():
            differences.append(f"{task}: only {(first if task in first.tasks else run).name} has it")
        for task in first.tasks.keys() & run.tasks.keys():
            one, two = first.tasks[task], run.tasks[task]
            settings = [key for key in one.settings | two.settings if one.settings.get(key) != two.settings.get(key)]
            for key in settings:
                values = f"{one.settings.get(key)!r} in {first.name}, {two.settings.get(key)!r} in {run.name}"
                differences.append(f"{task}: {key} is {values}")
            if settings:
                continue
            if not one.items.index.equals(two.items.index):
                counts = f"{len(one.items)} in {first.name}, {len(two.items)} in {run.name}"
                differences.append(f"{task}: the items differ ({counts})")
            elif others := list(one.items.index[one.items["digest"] != two.items["digest"]]):
                differences.append(f"{task}: prompts or answers of {len(others)} items differ, such as {others[0]}")
    if differences:
        raise RunError("These runs cannot be compared:\n" + "\n".join(f"  {line}" for line in sorted(differences)))


def mean_and_error(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Computes the weighted mean of independent items and its standard error (for unit weights, that of lm-eval)."""
    mean = np.average(values, weights=weights)
    if len(values) < 2:
        return mean, float("nan")
    spread = np.sum((weights * (values - mean)) ** 2) * len(values) / (len(values) - 1)
    return mean, np.sqrt(spread) / np.sum(weights)


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """Computes the two-sided p-value of the sum of paired differences under random signs.

    Args:
        differences (`np.ndarray` of shape `(items,)`): The difference of each item, times its weight.
        seed (`int`): Seed of the random flips, which are used if the differences have several magnitudes.

    Returns:
        `float`: The exact p (McNemar's test) for one magnitude, else `(1 + extreme) / (1 + FLIPS)`, at least 1e-4.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    magnitudes, counts = np.unique(np.abs(differences), return_counts=True)
    if len(magnitudes) == 1:
        return stats.binomtest(int((differences > 0).sum()), len(differences)).pvalue
    generator, extreme = np.random.default_rng(seed), 0
    observed = abs(differences.sum()) - 1e-12 * abs(differences).sum()  # equal sums may be rounded differently
    for start in range(0, FLIPS, 100):
        # Items of one magnitude flip together: the number of heads is binomial.
        heads = generator.binomial(counts, 0.5, size=(min(100, FLIPS - start), len(counts)))
        extreme += int((np.abs((2 * heads - counts) @ magnitudes) >= observed).sum())
    return (1 + extreme) / (1 + FLIPS)


def interval(differences: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Computes the 95 % confidence interval of the weighted mean of paired differences.

    For right or wrong items, it is the interval of Bonett and Price (2012, "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data"), which is also valid for few items. Otherwise it is
    Student's.
    """
    count = len(differences)
    if set(np.unique(differences)) <= {-1, 0, 1} and (weights == 1).all():
        better, worse = ((np.sum(differences == sign) + 1) / (count + 2) for sign in (1, -1))
        middle = better - worse
        half = stats.norm.ppf(0.975) * math.sqrt((better + worse - middle**2) / (count + 2))
        return max(-1.0, middle - half), min(1.0, middle + half)
    mean, error = mean_and_error(differences, weights)
    half = stats.t.ppf(0.975, count - 1) * error if count > 1 else float("nan")
    return mean - half, mean + half


def holm(p: np.ndarray) -> np.ndarray:
    """Corrects p-values for multiple testing by Holm's method (1979)."""
    order = np.argsort(p)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return corrected


def compare(runs: list[EvaluationRun]) -> pd.DataFrame:
    """Compares all runs with the first.

    Args:
        runs (`list[EvaluationRun]`): The runs, as read by [`read_run`].

    Returns:
        `pd.DataFrame`: One row per task and model, and one for the average or total of each model, with the columns
        `task`, `model`, `items`, `score` and `stderr`. Except for the first model, rows also have the `difference` to
        the first model, its 95 % interval from `low` to `high`, `p`, `p_holm`, and the numbers of items in which the
        model is better (`win`), equal (`tie`) and worse (`loss`). Accuracies are from 0 to 1. Fewer bits per byte are
        better.

    Raises:
        RunError: If the runs' tasks, versions, limits, numbers of examples or prompts differ.
    """
    check_comparable(runs)
    first, rows = runs[0], []
    names = [task for task in first.tasks if task != first.summary]
    better = -1 if first.bits else 1
    for run in runs:
        flips, of_run = [], []
        for name in first.tasks:
            items, base = run.tasks[name].items, first.tasks[name].items
            values, weights = items["value"].to_numpy(float), items["weight"].to_numpy(float)
            score, stderr = mean_and_error(values, weights)
            row = {"task": name, "model": run.name, "items": len(items), "score": score, "stderr": stderr}
            if run is not first:
                differences = values - base["value"].to_numpy(float)
                low, high = interval(differences, weights)
                row |= {"difference": np.average(differences, weights=weights), "low": low, "high": high}
                row |= {"p": sign_flip_p(differences * weights)}
                signs = np.sign(differences) * better
                row |= {"win": (signs > 0).sum(), "tie": (signs == 0).sum(), "loss": (signs < 0).sum()}
                row["difference_error"] = mean_and_error(differences, weights)[1]
                flips.append(differences * weights / weights.sum())
            of_run.append(row)
        if not first.bits and len(names) > 1:
            table = pd.DataFrame(of_run)
            row = {"task": first.summary, "model": run.name, "items": table["items"].sum()}
            row |= {"score": table["score"].mean(), "stderr": np.sqrt((table["stderr"] ** 2).sum()) / len(names)}
            if run is not first:
                row["difference"] = table["difference"].mean()
                half = stats.norm.ppf(0.975) * np.sqrt((table["difference_error"] ** 2).sum()) / len(names)
                row |= {"low": row["difference"] - half, "high": row["difference"] + half}
                row |= {"p": sign_flip_p(np.concatenate(flips) / len(names)), **table[["win", "tie", "loss"]].sum()}
            of_run.append(row)
        rows += of_run
    table = pd.DataFrame(rows).drop(columns="difference_error", errors="ignore")
    if len(runs) > 1:
        compared, summary = table["p"].notna(), table["task"] == first.summary
        for family in (compared & ~summary, compared & summary):
            table.loc[family, "p_holm"] = holm(table.loc[family, "p"].to_numpy())
        table[["win", "tie", "loss"]] = table[["win", "tie", "loss"]].astype("Int64")
    return table


def escape(name: str) -> str:
    """Escapes a name for a cell of a Markdown table: HTML, column marks and line breaks."""
    return html.escape(" ".join(name.split()), quote=False).replace("|", "\\|")


def markdown(table: pd.DataFrame, runs: list[EvaluationRun]) -> str:
    """Formats the table of [`compare`] in Markdown, with one row per task, in percent or bits per byte."""
    names = {run.name: escape(run.name) for run in runs}
    first, others = runs[0], runs[1:]
    scale, digits, unit = (1, 4, "bits per byte") if first.bits else (100, 2, "%")
    head = ["task", "items", *(f"{names[run.name]} ({unit})" for run in runs)]
    for run in others:
        head += [f"{names[run.name]} − {names[first.name]} [95 %]", "p (Holm)", "win / tie / loss"]
    rows = []
    cells = table.set_index(["task", "model"])
    for task in table["task"].unique():
        line = [escape(task), f"{cells.loc[(task, first.name), 'items']:,}"]
        for run in runs:
            cell = cells.loc[(task, run.name)]
            line.append(f"{scale * cell['score']:.{digits}f} ± {scale * cell['stderr']:.{digits}f}")
        for run in others:
            cell = cells.loc[(task, run.name)]
            low, high = (f"{scale * cell[end]:+.{digits}f}" for end in ("low", "high"))
            line.append(f"{scale * cell['difference']:+.{digits}f} [{low}, {high}]")
            line.append(f"{cell['p']:.2g} ({cell['p_holm']:.2g})")
            line.append(" / ".join(str(int(cell[count])) for count in ("win", "tie", "loss")))
        rows.append(line)
    lines = [markdown_table(head, rows)]
    sign = -1 if first.bits else 1
    for run in others:
        of_run = table[(table["model"] == run.name) & (table["task"] != first.summary)]
        sure = of_run["p_holm"] < 0.05
        counts = [
            int((sure & (sign * of_run["difference"] > 0)).sum()),
            int((sure & (sign * of_run["difference"] < 0)).sum()),
        ]
        lines += [
            "",
            f"{names[run.name]} against {names[first.name]}, at a corrected p below 0.05: better at {counts[0]} of "
            f"{len(of_run)} {'sources' if first.bits else 'tasks'}, worse at {counts[1]}, undecided at "
            f"{len(of_run) - sum(counts)}.",
        ]
    return "\n".join(lines) + "\n"


def plot(table: pd.DataFrame, runs: list[EvaluationRun], file: Path) -> None:
    """Plots scores with standard errors, and differences with 95 % intervals.

    The marks of differences are filled where the corrected p is below 0.05.
    """
    tasks = list(table["task"].unique())
    scale, unit = (1, "bits per byte") if runs[0].bits else (100, "%")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 1.5 + 0.4 * len(tasks)), sharey=True, constrained_layout=True
    )
    for number, run in enumerate(runs):
        rows = table[table["model"] == run.name]
        at = np.arange(len(tasks)) + (number - (len(runs) - 1) / 2) * 0.5 / len(runs)
        style = {"color": f"C{number}", "label": run.name, "capsize": 2}
        left.errorbar(scale * rows["score"], at, xerr=scale * rows["stderr"], fmt="o", **style)
        if number:
            ends = np.abs(rows[["low", "high"]].sub(rows["difference"], axis=0)).to_numpy().T
            right.errorbar(scale * rows["difference"], at, xerr=scale * ends, fmt="o", mfc="white", **style)
            sure = (rows["p_holm"] < 0.05).to_numpy()
            right.plot(scale * rows["difference"][sure], at[sure], "o", color=f"C{number}")
    left.set(yticks=range(len(tasks)), yticklabels=tasks, xlabel=f"score ({unit}) ± standard error")
    left.invert_yaxis()
    left.legend()
    right.axvline(0, color="grey", linewidth=0.8)
    right.set(xlabel=f"difference to {runs[0].name} ({unit}), 95 % interval")
    figure.savefig(file, dpi=120, metadata={"Source": MARK})
    plt.close(figure)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Reads and compares the runs, and prints and writes the result.

    Raises:
        SystemExit: If a run cannot be read or the runs cannot be compared. The message has the reason.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of run_lm_eval.py or .json of perplexity.py")
    parser.add_argument("--names", nargs="+", help="names of the runs (default: their paths)")
    parser.add_argument("--tasks", help="comma-separated tasks or sources (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="folder for comparison.md, .csv and .png")
    args = parser.parse_args(argv)
    names = args.names or args.runs
    if len(args.runs) < 2:
        parser.error(f"RUN {args.runs[0]}: give at least two runs to compare.")
    if len(set(names)) != len(args.runs) or not all(name.strip() for name in names):
        parser.error(f"--names {' '.join(names)}: give each of the {len(args.runs)} runs a different name.")
    if args.tasks and not all(task.strip() for task in args.tasks.split(",")):
        parser.error(f"--tasks {args.tasks!r}: a name between the commas is missing.")
    for name, mark in (("md", "| task | items |"), ("csv", "task,model,items,"), ("png", MARK)):
        check_writable(args.output / f"comparison.{name}", "--output", mark)
    try:
        runs = [read_run(path, name) for path, name in zip(args.runs, names)]
        if len({run.bits for run in runs}) > 1:
            raise RunError("Some runs are of run_lm_eval.py and some of perplexity.py: compare runs of one kind.")
        if args.tasks:
            for run in runs:
                if absent := set(args.tasks.split(",")) - run.tasks.keys():
                    raise RunError(f"{run.name} has no {', '.join(absent)}: choose from {', '.join(run.tasks)}.")
                run.tasks = {task: run.tasks[task] for task in args.tasks.split(",")}
        table = compare(runs)
    except RunError as error:
        parser.error(str(error))
    text = markdown(table, runs)
    with ExitStack() as stack:  # all of them, or none
        page, rows, picture = (
            stack.enter_context(write_aside(args.output / f"comparison.{name}")) for name in ("md", "csv", "png")
        )
        page.write_text(text, encoding="utf-8")
        table.to_csv(rows, index=False)
        plot(table, runs, picture)
    print(text)
    return table


if __name__ == "__main__":
    run_command(main)
