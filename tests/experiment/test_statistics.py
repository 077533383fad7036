# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from experiment.statistics import HALF_OF_THE_PAPER, LOOKS, TwoWay, decide, holm, sequential, sign_flip


def drawn(generator, rows=5, seeds=8, deviation=0.002, difference=0.0):
    """A table of y, in which row 1 differs from row 0 by `difference`."""
    effects = np.array([0.0, difference, 0.03, -0.01, 0.02])[:rows]
    y = 3.4 + effects[:, None] + generator.normal(0, 0.02, seeds) + generator.normal(0, deviation, (rows, seeds))
    return {str(row): values.tolist() for row, values in enumerate(y)}


def test_two_way_model_is_that_of_least_squares_on_indicators():
    y = drawn(np.random.default_rng(0), seeds=4)
    model = TwoWay.fit(y)
    cells = [(int(row), seed, value) for row, values in y.items() for seed, value in enumerate(values)]
    design = np.zeros((len(cells), 9))
    for number, (row, seed, _) in enumerate(cells):
        design[number, [row, 5 + seed]] = 1
    values = np.array([value for *_, value in cells])
    fit, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    freedom = len(cells) - rank
    assert model.freedom == freedom == 12
    assert model.deviation == pytest.approx(math.sqrt(np.square(values - design @ fit).sum() / freedom))
    difference, low, high = model.interval("1", "0", 0.05)
    assert difference == pytest.approx(fit[1] - fit[0])
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 12) * model.deviation * math.sqrt(2 / 4))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_interval_covers_the_truth_as_often_as_it_says(alpha):
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        _, low, high = TwoWay.fit(drawn(generator, seeds=3, difference=0.004)).interval("1", "0", alpha)
        covered += low <= 0.004 <= high
    assert covered / 2000 == pytest.approx(1 - alpha, abs=4 * math.sqrt(alpha * (1 - alpha) / 2000))


def test_three_looks_together_find_a_difference_that_is_not_there_at_most_once_in_twenty():
    generator, wrong, runs = np.random.default_rng(2), 0, 1000
    for _ in range(runs):
        # Where the residual is as large as this, no look can exclude the paper's effect and stop early.
        looks, _ = sequential(drawn(generator, deviation=0.1), "1", "0")
        wrong += any(look["low"] > 0 or look["high"] < 0 for look in looks)
    assert 0.02 < wrong / runs < 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    assert sum(LOOKS.values()) == pytest.approx(0.05)


def test_p_value_and_interval_agree():
    model = TwoWay.fit(drawn(np.random.default_rng(3), difference=0.003))
    p = model.p_value("1", "0")
    assert min(map(abs, model.interval("1", "0", p)[1:])) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.02, -0.001, "better"),
        (0.001, 0.02, "worse (an effect of the paper's size is excluded)"),
        (-0.02, 0.01, "an effect of the paper's size is excluded"),
        (-0.03, 0.01, None),
        (-0.03, -0.01, "better"),
    ],
)
def test_verdict_of_an_interval(low, high, verdict):
    assert decide(low, high) == verdict
    assert HALF_OF_THE_PAPER == pytest.approx(-0.0246, abs=5e-5)


def test_first_look_that_decides_gives_the_verdict_whatever_comes_later():
    y = {
        "a": [1.0, 1.001, 0.999] + [3.0] * 5,
        "b": [1.1, 1.101, 1.0995] + [2.0] * 5,
        "c": [1.0, 1.001, 0.999] + [2.5] * 5,
    }
    looks, verdict = sequential(y, "a", "b")
    assert [look["seeds"] for look in looks] == [3, 5, 8] and verdict == looks[0]["verdict"] == "better"
    assert sequential({row: values[:2] for row, values in y.items()}, "a", "b") == ([], None)


def test_undecided_is_said_after_the_last_look_only():
    y = drawn(np.random.default_rng(4), deviation=0.2)
    assert sequential({row: values[:5] for row, values in y.items()}, "1", "0")[1] is None
    assert sequential(y, "1", "0")[1] == "not decided"


def test_holm_is_the_smallest_level_at_which_its_procedure_rejects():
    p = [0.01, 0.04, 0.03, 0.5]

    def rejected(level):
        hypotheses = sorted(range(len(p)), key=p.__getitem__)
        kept = itertools.takewhile(lambda i: p[i] <= level / (len(p) - hypotheses.index(i)), hypotheses)
        return set(kept)

    for index, corrected in enumerate(holm(p)):
        assert index in rejected(corrected + 1e-9)
        assert corrected == 1 or index not in rejected(corrected - 1e-9)


def test_sign_flips_count_all_signs():
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip([0.1] * 8) == pytest.approx(2 / 256)
    assert sign_flip([0.1, -0.1]) == 1.0
