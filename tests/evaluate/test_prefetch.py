# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import OlmoeConfig, OlmoeForCausalLM

from pathmoe import PathMoEForCausalLM
from pathmoe.evaluate.prefetch import look_ahead, prefetch_estimate, recall, reuse_distances
from pathmoe.paths import record_paths


def random_experts(tokens, layers, num_experts, k, seed):
    return torch.rand(tokens, layers, num_experts, generator=torch.Generator().manual_seed(seed)).topk(k).indices


@pytest.fixture
def ids():
    return torch.randint(99, (30,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path_model(tiny_config):
    """Returns a function that makes a tiny PathMoE with weights large enough to move the hidden states."""

    def make(**overrides):
        torch.manual_seed(0)
        return PathMoEForCausalLM(tiny_config(initializer_range=0.3, **overrides)).eval()

    return make


@given(st.integers(1, 40), st.integers(1, 3), st.integers(2, 6), st.integers(0, 99))
def test_reuse_distance_decides_the_hits_of_every_cache(tokens, layers, num_experts, seed):
    k = 2
    experts = random_experts(tokens, layers, num_experts, k, seed).numpy()
    distances = reuse_distances(experts, num_experts)
    for size in range(k, num_experts + 1):
        for layer in range(layers):
            kept = []  # the most recently used first
            for token, chosen in enumerate(experts[:, layer].tolist()):
                hits = [expert in kept for expert in chosen]
                assert (distances[token, layer] < size).tolist() == hits
                kept = (chosen + [expert for expert in kept if expert not in chosen])[:size]


@given(st.integers(1, 20), st.integers(0, 99))
def test_recall_is_the_share_of_the_experts_that_were_named(tokens, seed):
    experts, predicted = (random_experts(tokens, 2, 6, 3, s) for s in (seed, seed + 1))
    expected = [
        [len(set(a) & set(b)) / 3 for a, b in zip(*token)] for token in zip(experts.tolist(), predicted.tolist())
    ]
    np.testing.assert_allclose(recall(experts, predicted), expected)


def test_routers_are_applied_to_what_an_earlier_layer_was_given(ids):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    model, inputs = OlmoeForCausalLM(config).eval(), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda gate, args: inputs.append(args[0].reshape(-1, 32)))
    experts, named, num_experts = look_ahead(model, ids)
    assert num_experts == 8
    with record_paths(model) as trace:
        model(ids[None])
    assert torch.equal(experts, trace.experts.long())
    for distance, predicted in named.items():
        assert (predicted[:, :distance] == -1).all()
        for layer in range(distance, 4):
            logits = F.linear(inputs[layer - distance], model.model.layers[layer].mlp.gate.weight)
            expected = logits.topk(2).indices.sort().values
            assert torch.equal(predicted[:, layer].sort().values, expected)
    assert (named[1][:, 1:] != experts[:, 1:]).any()


@pytest.mark.parametrize("router_type", ["linear", "cosine", "low_rank"])
def test_hidden_states_that_stand_still_are_foreseen_within_a_block(path_model, ids, router_type):
    model = path_model(router_type=router_type, router_block_size=3, num_hidden_layers=6)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
    experts, named, _ = look_ahead(model, ids, (1, 2))
    assert torch.equal(named[2][:, 2:], experts[:, 2:])
    assert torch.equal(named[1][:, 1:], experts[:, 1:])


def test_shared_decision_is_known_to_the_layers_that_repeat_it(path_model, ids):
    model = path_model(router_sharing="decision", router_block_size=3, num_hidden_layers=6)
    experts, named, _ = look_ahead(model, ids, (1,))
    agrees = recall(experts, named[1]).mean(dim=0)
    assert agrees[[1, 2, 4, 5]].eq(1).all()
    assert agrees[3] < 1


def test_recurrent_routers_take_the_state_of_the_earlier_layer(path_model, ids):
    model = path_model(router_type="recurrent")
    experts, named, _ = look_ahead(model, ids, (1,))
    router = copy.deepcopy(model.model.routers["0"])
    calls = []
    model.model.routers["0"].register_forward_hook(lambda router, args, output: calls.append((args[0], output[3])))
    with torch.no_grad():
        model(ids[None])
        (first_input, first_state), *_ = calls
        _, _, expected, _ = router(first_input, 1, first_state)
    assert torch.equal(named[1][:, 1], expected)


def test_looking_ahead_leaves_the_model_as_it_was(path_model, ids):
    model = path_model()
    before = model(ids[None]).logits
    look_ahead(model, ids)
    assert torch.equal(model(ids[None]).logits, before)
    assert not any(router._forward_hooks for router in model.model.routers.values())


def test_estimate_agrees_with_counting_by_hand(path_model):
    model = path_model()
    generator = torch.Generator().manual_seed(1)
    pieces = [torch.randint(99, (length,), generator=generator).tolist() for length in (1, 12, 20)]
    result = prefetch_estimate(model, pieces, resamples=10)
    recorded = [look_ahead(model, torch.tensor(piece)) for piece in pieces]
    by_name = {predictor["name"]: predictor for predictor in result["predictors"]}
    by_hand, previous = [], []
    for experts, named, _ in recorded:
        for token in range(1, len(experts)):
            for layer in range(3, 5):
                chosen = set(experts[token, layer].tolist())
                by_hand.append(len(chosen & set(named[2][token, layer].tolist())) / 2)
                previous.append(len(chosen & set(experts[token - 1, layer].tolist())) / 2)
    assert by_name["its router, 2 layers ahead"]["recall"]["estimate"] == pytest.approx(np.mean(by_hand))
    assert by_name["the token before"]["recall"]["estimate"] == pytest.approx(np.mean(previous))
    assert by_name["its router, 2 layers ahead"]["by_layer"][:2] == [None, None]

    experts = torch.cat([experts for experts, _, _ in recorded])
    frequent = np.mean([
        sorted(np.bincount(layer.reshape(-1), minlength=8))[-3:] for layer in experts.unbind(dim=1)
    ]) * 3 / len(experts) / 2  # fmt: skip
    size_3 = next(point for point in result["cache"] if point["size"] == 3)
    assert size_3["most_frequent"] == pytest.approx(frequent)
    assert size_3["lru"] == pytest.approx((reuse_distances(experts.numpy(), 8) < 3).mean())
    assert result["cache"][-1]["most_frequent"] == 1
    assert all(point["lru"] <= point["lru_and_ahead"] for point in result["cache"])


def test_what_cannot_be_estimated_is_named(path_model):
    with pytest.raises(ValueError, match="ahead=3 needs more than 3 routed layers, the model has 3"):
        prefetch_estimate(path_model(num_hidden_layers=3), [[1, 2, 3]])
    with pytest.raises(ValueError, match="No sequence has two tokens"):
        prefetch_estimate(path_model(), [[1], [2]])
