# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest

from benchmarks import operators
from benchmarks.contenders import Case


@pytest.mark.parametrize(("suite", "mode"), [("experts", "forward + backward"), ("train_step", "step")])
def test_shares_are_those_of_a_real_call(suite, mode):
    case = Case(suite, "quickstart", "float32", False, mode, 1, 64)
    measured = operators.measure(case, "PathMoE", "pathmoe", calls=2)
    shares = measured["shares"]
    assert 0 < shares["products"] < 1 and 0 < shares["moved rows"] < 1 and sum(shares.values()) < 1
    assert (shares["attention"] > 0) == (shares["optimizer"] > 0) == (suite == "train_step")
    row = {"suite": suite, "shape": "quickstart", "dtype": "float32", "model": "PathMoE", **measured}
    assert f"| {shares['products']:.0%} |" in operators.make_table({"results": [row]})
