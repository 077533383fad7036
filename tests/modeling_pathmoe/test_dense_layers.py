# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Layers with one network instead of experts, by Qwen3-MoE's `mlp_only_layers`."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from modeling_pathmoe import update_selection_bias
from pathmoe import PathMoEForCausalLM, record_paths
from pathmoe.accounting import count_parameters, forward_flops_per_token
from tests.modeling_pathmoe.test_generation import GREEDY, greedy_by_hand
from tests.modeling_pathmoe.test_parity import peer_with_weights_of


DENSE = {"mlp_only_layers": [0, 2], "intermediate_size": 24}
VARIANTS = [
    *({"router_type": kind} for kind in ("linear", "hash", "cosine", "low_rank", "recurrent", "random")),
    {"router_sharing": "decision"},
    {"router_bias_update_rate": 0.1},
]


@pytest.mark.parametrize(
    "fields, blocks",
    [
        ({"mlp_only_layers": [0]}, [[1, 2], [3, 4]]),
        ({"mlp_only_layers": [2, 0]}, [[1, 3], [4]]),
        ({"mlp_only_layers": [4], "router_block_size": 3}, [[0, 1, 2], [3]]),
        ({"mlp_only_layers": [1, 3], "router_block_size": [1, 2]}, [[0], [2, 4]]),
        ({"mlp_only_layers": [0, 1, 2, 3], "router_block_size": 99}, [[4]]),
    ],
    ids=str,
)
def test_blocks_count_moe_layers_only(tiny_config, fields, blocks):
    config = tiny_config(intermediate_size=24, **fields)
    assert config.router_blocks == blocks
    assert config.moe_layers == sum(blocks, [])
    of_layer = {layer: block for block, layers in enumerate(blocks) for layer in layers}
    assert config.layer_to_block == [of_layer.get(layer) for layer in range(5)]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mlp_only_layers": [5]}, r"mlp_only_layers=\[5\] must list different layers from 0 to 4"),
        ({"mlp_only_layers": [-1]}, r"mlp_only_layers=\[-1\]"),
        ({"mlp_only_layers": [1, 1]}, r"mlp_only_layers=\[1, 1\] must list different"),
        ({"mlp_only_layers": [0, 1, 2, 3, 4]}, "at least one MoE layer"),
        ({"mlp_only_layers": [0], "intermediate_size": None}, "intermediate_size=None must be at least 1"),
        ({"mlp_only_layers": [0], "intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"mlp_only_layers": [0], "intermediate_size": 10**13}, "intermediate_size=10000000000000 make"),
        ({"mlp_only_layers": [0], "router_block_size": [2, 3]}, r"without mlp_only_layers=\[0\]: give every MoE"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2.*mlp_only_layers"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace=1.*mlp_only_layers"),
    ],
    ids=str,
)
def test_wrong_dense_layers_are_refused_with_the_fix(tiny_config, fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**{"intermediate_size": 24, **fields})


def without_dense_layers(model):
    """The same model without its dense layers, whose effect is taken away first."""
    config = model.config
    fields = config.to_dict() | {"num_hidden_layers": len(config.moe_layers), "mlp_only_layers": []}
    smaller = PathMoEForCausalLM(type(config).from_dict(fields)).eval()
    with torch.no_grad():
        for layer in config.mlp_only_layers:
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(config.moe_layers):
        for name, tensor in model.model.layers[layer].state_dict().items():
            weights[f"model.layers.{place}.{name}"] = tensor
    smaller.load_state_dict(weights)
    return smaller


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("dense", [[0], [1, 3], [2, 5]], ids=str)
def test_the_routing_passes_dense_layers_as_if_they_were_not_there(tiny_model, tokens, assert_same, fields, dense):
    """Router states, shared decisions, blocks and the load that is counted."""
    model = tiny_model(num_hidden_layers=6, mlp_only_layers=dense, intermediate_size=24, **fields)
    smaller, ids = without_dense_layers(model), tokens()
    outputs = [m.train()(ids, labels=ids, output_router_logits=True) for m in (model, smaller)]
    assert len(outputs[0].router_logits) == 6 - len(dense)
    for name in ("logits", "loss", "aux_loss", "z_loss", "router_logits"):
        assert_same(outputs[0][name], outputs[1][name])
    if "router_bias_update_rate" in fields:
        for m in (model, smaller):
            update_selection_bias(m)
        for ours, theirs in zip(model.model.routers.values(), smaller.model.routers.values(), strict=True):
            assert ours.selection_bias.abs().max() > 0
            assert torch.equal(ours.selection_bias, theirs.selection_bias)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_step_trains_every_parameter_with_and_without_checkpointing(tiny_model, tokens, gradients, fields):
    model, ids = tiny_model(**DENSE, **fields).train(), tokens(8, 16)
    plain = gradients(model, model(ids, labels=ids).loss)
    assert plain.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, model(ids, labels=ids).loss)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_decoding_equals_full_forwards(tiny_model, tokens, fields, cache):
    model, ids = tiny_model(**DENSE, **fields), tokens(2, 6)
    assert torch.equal(model.generate(ids, cache_implementation=cache, **GREEDY), greedy_by_hand(model, ids))


@pytest.mark.parametrize("router_block_size", [1, 2])
def test_paths_are_those_of_qwen3_moe(tiny_model, tokens, router_block_size):
    model, ids = tiny_model(router_block_size=router_block_size, **DENSE), tokens(4, 16)
    traces = []
    for which in (model, peer_with_weights_of(model)):
        with record_paths(which) as trace, torch.no_grad():
            which(ids)
        traces.append(trace)
    assert traces[0].experts.shape == (64, 3, 2)
    assert torch.equal(traces[0].experts, traces[1].experts)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_saved_model_computes_the_same(tiny_model, tokens, assert_same, tmp_path, fields):
    model, ids = tiny_model(**DENSE, **fields), tokens()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.mlp_only_layers == [0, 2] and again.config.intermediate_size == 24
    assert_same(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("removed", [0, 1, 2], ids=["dense", "one of a block", "dense in a block"])
def test_a_saved_model_without_a_layer_routes_as_before(tiny_model, tokens, tmp_path, assert_same, removed):
    model, ids = tiny_model(**DENSE), tokens()
    del model.model.layers[removed]
    model.config.num_hidden_layers = 4
    model.config.mlp_only_layers = [0, 1] if removed == 1 else [1 if removed == 0 else 0]
    for folder in ("once", "twice"):
        model.save_pretrained(tmp_path / folder)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_same(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert again.config.mlp_only_layers == model.config.mlp_only_layers


def test_parameters_and_flops_are_those_of_the_model(tiny_config):
    config = tiny_config(tie_word_embeddings=True, **DENSE)
    model = PathMoEForCausalLM(config).eval()
    count, expert = count_parameters(config), 3 * 32 * 16
    assert count["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert count["active"] == count["total"] - 3 * (8 - 2) * expert
    assert count["router"] == 2 * 8 * 32
    without = count_parameters(tiny_config(tie_word_embeddings=True, num_hidden_layers=3))
    attention = sum(parameter.numel() for parameter in model.model.layers[0].self_attn.parameters())
    assert count["total"] - without["total"] == 2 * (attention + 2 * 32 + 3 * 32 * 24)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    half_attention = 2 * 5 * 4 * 8 * 64  # torch counts attention without the causal half
    assert counter.get_total_flops() / 64 == forward_flops_per_token(config, 64) + half_attention
