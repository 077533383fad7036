# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import math
from collections import Counter

import pytest
import torch
from accelerate import Accelerator

from modeling_pathmoe.routing_pathmoe import LinearRouter
from pathmoe import PathMoEForCausalLM, register_router
from pathmoe.train.main import main
from pathmoe.train.routing_monitor import RoutingMonitor
from tests.run_helpers import metrics


@pytest.fixture
def step(tiny_config):
    """A function that runs one training forward and backward and returns the monitor and what it measured from."""

    def run(**overrides):
        torch.manual_seed(0)
        model = PathMoEForCausalLM(tiny_config(**overrides)).train()
        tokens = torch.randint(1, 99, (4, 16))
        output = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
        output.loss.backward()
        return model, RoutingMonitor(model, Accelerator(cpu=True)), output.router_logits

    return run


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"router_bias_update_rate": 0.1},
        {"router_bias_update_rate": 0.1, "mlp_only_layers": [0, 2], "intermediate_size": 24},
        {"router_sharing": "decision"},
        {"router_type": "recurrent"},
    ],
    ids=["linear", "bias", "dense layers", "decision", "recurrent"],
)
def test_statistics_equal_counting_one_by_one(step, overrides):
    model, monitor, router_logits = step(**overrides)
    if "router_bias_update_rate" in overrides:
        for router in model.model.routers.values():
            router.selection_bias.normal_()
    measured = monitor.measure(router_logits)
    paths = [[] for _ in range(64)]
    jaccard = []
    for layer, logits in enumerate(router_logits):
        of_model = model.config.moe_layers[layer]
        router = model.model.routers[str(model.config.layer_to_block[of_model])]
        bias = router.selection_bias[router.layers.index(of_model)] if "router_bias_update_rate" in overrides else 0
        counts, entropy = Counter(), 0.0
        for token, scores in enumerate(logits.softmax(-1)):
            order = (scores + bias).argsort(descending=True)[:2].tolist()
            counts.update(order)
            paths[token].append(order)
            entropy -= sum(p * math.log2(p) for p in scores.tolist() if p > 0) / 64
        load = [counts[expert] / 64 for expert in range(8)]
        mean = sum(load) / 8
        deviation = math.sqrt(sum((x - mean) ** 2 for x in load) / 8)
        assert measured["load"][layer] == pytest.approx(load, abs=1e-5)
        assert measured["load_cv"][layer] == pytest.approx(deviation / mean, abs=1e-4)
        assert measured["dead_experts"][layer] == sum(x == 0 for x in load)
        assert measured["router_entropy"][layer] == pytest.approx(entropy, abs=1e-4)
        shares = [x / sum(load) for x in load if x]
        effective = math.exp(-sum(p * math.log(p) for p in shares))
        assert measured["effective_experts"][layer] == pytest.approx(effective, abs=1e-3)
    for path in paths:
        jaccard += [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(path, path[1:])]
    assert measured["adjacent_jaccard"] == pytest.approx(sum(jaccard) / len(jaccard), abs=1e-5)
    top = Counter(tuple(order[0] for order in path) for path in paths)
    assert measured["distinct_paths"] == len(top)
    covered = sum(count for _, count in top.most_common(100)) / 64
    assert measured["path_coverage_100"] == pytest.approx(covered, abs=1e-5)
    for router, norm in zip(model.model.routers.values(), measured["router_grad_norm"]):
        expected = math.sqrt(sum(p.grad.square().sum().item() for p in router.parameters()))
        assert norm == pytest.approx(expected, rel=1e-4)


def test_router_that_is_never_trained_has_no_gradient(step):
    _, monitor, router_logits = step(router_type="random")
    assert monitor.measure(router_logits)["router_grad_norm"] == [None, None, None]


class CollapsingRouter(LinearRouter):
    """A linear router that sends ever more tokens of layer 2 to experts 5 and 6 as training goes on."""

    def compute_logits(self, hidden_states, layer_idx, state):
        logits, state = super().compute_logits(hidden_states, layer_idx, state)
        if layer_idx == 2 and self.training and logits.device.type != "meta":
            CollapsingRouter.steps += 1
        if layer_idx == 2:
            favour = torch.zeros_like(logits[0])
            favour[5:7] = torch.tensor([2.0, 1.0])
            logits = logits + CollapsingRouter.steps * favour / 10
        return logits, state


register_router("collapsing", CollapsingRouter)


def test_warning_names_layer_and_expert_when_collapse_begins_and_not_before(recipe, tmp_path, capsys):
    CollapsingRouter.steps = 0
    fields = {"max_steps": 12, "routing_every": 1, "learning_rate": 1e-6}
    main(recipe(tmp_path / "run", model_overrides={"router_type": "collapsing"}, **fields))
    warned = metrics(tmp_path / "run", key="warning")
    assert warned and min(warned) > 1
    assert all("collapse in layer 2: expert 5 is chosen by" in warning for warning in warned.values())
    assert "WARNING: routing collapse in layer 2: expert 5" in capsys.readouterr().out
    effective = metrics(tmp_path / "run", key="effective_experts")
    assert effective[12][2] < effective[min(warned) - 1][2]


def test_measuring_changes_nothing_of_the_training(recipe, tmp_path):
    main(recipe(tmp_path / "with", routing_every=1, gradient_checkpointing=True))
    main(recipe(tmp_path / "without", routing_every=0, gradient_checkpointing=True))
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    lines = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
    assert sum("distinct_paths" in json.loads(line) for line in lines) == 6
