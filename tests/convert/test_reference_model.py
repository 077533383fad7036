# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest

from benchmarks import convert_reference, reference_model
from pathmoe.text import quickstart


@pytest.mark.slow
def test_a_real_dense_model_goes_through_conversion_training_and_back(tmp_path):
    """SmolLM2-135M; `make convert-reference` does the same with more items and tokens, and keeps the figures."""
    reference_model.main(["--output_dir", str(tmp_path / "dense")])
    quickstart.main(["--output_dir", str(tmp_path / "text")])
    folders = ["--dense", tmp_path / "dense", "--text", tmp_path / "text", "--output", tmp_path / "out"]

    result = convert_reference.main(
        [*map(str, folders), "--limit", "4", "--steps", "4", "--json", str(tmp_path / "w.json")]
    )

    assert result["log_likelihoods"]["items"] == 8 and result["log_likelihoods"]["largest_difference"] <= 1e-4
    assert result["training"]["held_out_perplexity"]["trained"] < result["training"]["held_out_perplexity"]["upcycled"]
    assert result["export"]["class"] == "MixtralForCausalLM"
    assert result["export"]["largest_logit_difference_in_a_fresh_process"] <= 1e-4
