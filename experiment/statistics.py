# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The statistics of plan.md: a two-way model of row and seed, sequential looks, Holm's correction and sign flips."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy import stats


LOOKS = {3: 0.01, 5: 0.015, 8: 0.025}  # number of seeds: two-sided α, in total 0.05
HALF_OF_THE_PAPER = math.log(12.29 / 12.91) / 2  # -0.0246


@dataclass(frozen=True)
class TwoWay:
    """An additive model of row and seed: y = row + seed + residual.

    Args:
        means (`dict[str, float]`): The mean of each row over the seeds.
        seeds (`int`): The number of seeds.
        deviation (`float`): The standard deviation of the residual, pooled over the rows.
        freedom (`int`): The degrees of freedom of the residual, `(rows - 1) · (seeds - 1)`.
    """

    means: dict[str, float]
    seeds: int
    deviation: float
    freedom: int

    @classmethod
    def fit(cls, y: dict[str, list[float]]) -> "TwoWay":
        """Fits the model by least squares.

        Args:
            y (`dict[str, list[float]]`): The values of each of at least two rows, in the same order of the seeds.
        """
        values = np.array(list(y.values()))
        rows, seeds = values.shape
        rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + values.mean()
        freedom = (rows - 1) * (seeds - 1)
        deviation = math.sqrt(np.square(rest).sum() / freedom) if freedom else math.nan
        return cls(dict(zip(y, values.mean(axis=1).tolist())), seeds, deviation, freedom)

    @property
    def standard_error(self) -> float:
        """The standard error of the difference of two rows."""
        return self.deviation * math.sqrt(2 / self.seeds)

    def interval(self, row: str, base: str, alpha: float) -> tuple[float, float, float]:
        """Returns the difference of two rows and the ends of its two-sided interval of confidence `1 - alpha`."""
        middle = self.means[row] - self.means[base]
        half = stats.t.ppf(1 - alpha / 2, self.freedom) * self.standard_error if self.freedom else math.inf
        return middle, middle - half, middle + half

    def p_value(self, row: str, base: str) -> float:
        """Returns the two-sided p-value of the difference of two rows."""
        if not self.freedom:
            return 1.0
        return float(2 * stats.t.sf(abs(self.means[row] - self.means[base]) / self.standard_error, self.freedom))


def decide(low: float, high: float) -> str | None:
    """Returns the verdict that an interval of the primary contrast allows, or `None` if it allows none."""
    excluded = "an effect of the paper's size is excluded" if low > HALF_OF_THE_PAPER else None
    if high < 0:
        return "better"
    if low > 0:
        return f"worse ({excluded})"
    return excluded


def sequential(y: dict[str, list[float]], row: str, base: str) -> tuple[list[dict], str | None]:
    """Takes the looks that the finished seeds allow, in order.

    Args:
        y (`dict[str, list[float]]`): The values of each row, in the order of the seeds in the plan.
        row, base (`str`): The primary contrast is `row` minus `base`.

    Returns:
        `tuple`: For each look `seeds`, `alpha`, `difference`, `low`, `high` and `verdict`; and the verdict of the
        first look that has one. Without one, it is `"not decided"` after the last look and `None` before.
    """
    finished, looks = min(map(len, y.values())), []
    for seeds, alpha in LOOKS.items():
        if seeds <= finished:
            model = TwoWay.fit({name: values[:seeds] for name, values in y.items()})
            difference, low, high = model.interval(row, base, alpha)
            looks.append({"seeds": seeds, "alpha": alpha, "difference": difference, "low": low, "high": high,
                          "verdict": decide(low, high)})  # fmt: skip
    verdict = next((look["verdict"] for look in looks if look["verdict"]), None)
    return looks, verdict or ("not decided" if len(looks) == len(LOOKS) else None)


def holm(p_values: list[float]) -> list[float]:
    """Corrects p-values for multiple testing by Holm's method (1979)."""
    order, corrected, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, (len(p_values) - place) * p_values[index])
        corrected[index] = min(1.0, largest)
    return corrected


def sign_flip(differences: list[float]) -> float:
    """Returns the exact two-sided p-value of the mean of paired differences under all choices of signs."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    means = np.abs(signs @ np.array(differences))
    return float((means >= means[0] * (1 - 1e-12)).mean())
