# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest

from pathmoe.accounting import count_parameters
from pathmoe.train.main import main
from pathmoe.train.model import build_config
from pathmoe.train.plan import plan_memory
from pathmoe.train.recipe import RecipeError, parse_recipe


MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.json"


@pytest.mark.parametrize(
    "run", json.loads(MEMORY.read_text()), ids=lambda run: f"{run['engine']}x{run['ranks']}-{run['fields']}"
)
def test_planned_memory_is_within_a_tenth_of_what_runs_took(recipe, tmp_path, run):
    parsed = parse_recipe(recipe(tmp_path, **run["fields"]))
    planned = plan_memory(parsed, build_config(parsed), run["engine"], run["ranks"]).total
    assert planned == pytest.approx(run["measured"], rel=0.1)


def test_planned_states_are_sixteen_bytes_a_parameter_over_the_shards(recipe, tmp_path):
    parsed = parse_recipe(recipe(tmp_path, batch_size=64))
    config = build_config(parsed)
    total = count_parameters(config)["total"]
    assert plan_memory(parsed, config, "cpu", 1).states == 16 * total
    assert plan_memory(parsed, config, "ddp", 2).states == 16 * total
    assert plan_memory(parsed, config, "fsdp", 4).states == 4 * total


def test_checkpointing_and_smaller_micro_batches_take_less(recipe, tmp_path):
    def working(**fields):
        parsed = parse_recipe(recipe(tmp_path, model_overrides={"num_hidden_layers": 6}, **fields))
        return plan_memory(parsed, build_config(parsed), "fsdp", 2).working

    assert working(gradient_checkpointing=True) < 0.9 * working()
    assert working(micro_batch_size=2) == pytest.approx(working(micro_batch_size=8) / 4, rel=0.1)


def test_plan_counts_what_dense_layers_keep_and_gathers_the_largest_layer(recipe, tmp_path):
    def planned(engine, ranks, **overrides):
        parsed = parse_recipe(recipe(tmp_path, model_overrides={"num_hidden_layers": 6} | overrides, batch_size=64))
        return plan_memory(parsed, build_config(parsed), engine, ranks)

    dense = {"mlp_only_layers": [0, 3], "intermediate_size": 32}
    narrow, wide = planned("cpu", 1, **dense), planned("cpu", 1, **dense | {"intermediate_size": 64})
    # Backward needs the gate, its activation, up and their product: in 2 layers, float32, 32 more of 8 x 32 tokens.
    assert wide.working - narrow.working == pytest.approx(2 * 4 * 4 * 32 * 8 * 32, rel=0.1)
    assert planned("fsdp", 2, **dense).gathered == pytest.approx(planned("fsdp", 2).gathered, rel=0.01)
    huge = dense | {"intermediate_size": 2000}
    assert planned("fsdp", 2, **huge).gathered > 2 * planned("fsdp", 2).gathered


def test_plan_runs_with_dense_layers(recipe, tmp_path, capsys):
    dense = {"mlp_only_layers": [0], "intermediate_size": 32}
    assert main(["plan", *recipe(tmp_path, micro_batch_size=1, model_overrides=dense), "--gpus", "8"]) == 0
    assert "FSDP2 x EP 8" in capsys.readouterr().out


def test_plan_is_a_table_of_gpus_and_engines(recipe, tmp_path, capsys):
    assert main(["plan", *recipe(tmp_path, micro_batch_size=1), "--gpus", "2", "8", "--memory", "80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "fits 80 GB" in lines[2] and any("FSDP2 x EP 8" in line and line.endswith("| yes |") for line in lines)
    assert len(lines) == 4 + 2 + 4
    with pytest.raises(RecipeError, match=r"micro_batch_size=1 times the number of GPUs \(--gpus 3\)"):
        main(["plan", *recipe(tmp_path, micro_batch_size=1), "--gpus=3"])
