# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs that `measure.py` has measured, and what their differences are. A difference between two rows is the mean over
the seeds that both have, paired by document; its interval is Student's over documents. What the seeds gave stands
beside it, and [`SeedNoise`] gives the interval over seeds.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from pathmoe.evaluate.compare import compare, interval, read_run
from pathmoe.train.log import read_metrics


BASELINE = "indep-moe-lbl"


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

    @property
    def perturbations(self) -> dict[str, dict]:
        """The perturbation curves by their `name`; empty for a dense model."""
        return {curve["name"]: curve for curve in self.measures.get("perturbations", {}).get("curves", [])}

    def layer_rises(self) -> list[float]:
        """By what share perplexity rises when the experts of each one of the layers are shuffled."""
        return [point["estimate"] for point in self.perturbations["experts shuffled, one_layer"]["rise"]]

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
