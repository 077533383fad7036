# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pathmoe import PathMoEConfig, PathMoEForCausalLM
from pathmoe.accounting import count_parameters, forward_flops_per_token


FOLDER = Path(__file__).parents[2] / "configuration" / "model"


@pytest.mark.parametrize(
    ("name", "total", "active", "paper_total", "paper_active"),
    [
        # Totals and the paper's own figures (arXiv 2603.18297), in billions.
        ("pathmoe-0.9b", 880_777_344, 371_169_408, 0.9, 0.37),
        ("indep-moe", 881_109_120, 371_501_184, 0.9, 0.37),
        ("pathmoe-16b", 16_179_520_512, 2_130_699_264, 16.2, 2.13),
        ("indep-moe-16b", 16_182_273_024, 2_133_451_776, 16.2, 2.13),
    ],
)
def test_preset_has_the_papers_size(name, total, active, paper_total, paper_active):
    count = count_parameters(PathMoEConfig.from_json_file(FOLDER / f"{name}.json"))
    assert (count["total"], count["active"]) == (total, active)
    assert count["total"] / 1e9 == pytest.approx(paper_total, abs=0.05)
    assert count["active"] / 1e9 == pytest.approx(paper_active, abs=0.005)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_preset_is_what_the_config_writes_back(file):
    """A preset holds nothing that the config does not know, and survives loading."""
    preset = json.loads(file.read_text())
    assert preset.items() <= PathMoEConfig.from_json_file(file).to_dict().items()


@pytest.mark.parametrize(("shared", "independent"), [("pathmoe-0.9b", "indep-moe"), ("pathmoe-16b", "indep-moe-16b")])
def test_independent_twin_differs_in_the_routers_alone(shared, independent):
    a, b = (PathMoEConfig.from_json_file(FOLDER / f"{name}.json") for name in (shared, independent))
    difference = {key for key, value in a.to_dict().items() if b.to_dict()[key] != value}
    assert difference == {"router_block_size"}
    assert forward_flops_per_token(a, 4096) == forward_flops_per_token(b, 4096)


def test_counted_flops_are_those_that_torch_counts():
    """Matrix products of a forward, counted by torch on the same model; its attention count has no causal half."""
    config = PathMoEConfig.from_json_file(FOLDER / "quickstart.json")
    length = 64
    model = PathMoEForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long), use_cache=False)
    half_attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length
    assert counter.get_total_flops() / length == forward_flops_per_token(config, length) + half_attention
