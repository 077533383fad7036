# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from modeling_pathmoe import PathMoEConfig, PathMoEForCausalLM


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("router_block_size", 4),
        ("router_type", "linear"),
        ("norm_topk_prob", True),
        ("qk_norm", True),
        ("router_aux_loss_coef", 0.0),
        ("router_z_loss_coef", 0.0),
        ("output_router_logits", False),
    ],
)
def test_default_is_the_promised_one(field, value):
    assert getattr(PathMoEConfig(), field) == value
    assert type(getattr(PathMoEConfig(), field)) is type(value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "must not exceed num_experts=8"]),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok=0", "must be at least 1"]),
        ({"hidden_size": 0}, ["hidden_size=0", "must be at least 1"]),
        ({"hidden_size": -32}, ["hidden_size=-32", "must be at least 1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "must be at least 1"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "must be at least 1"]),
        ({"num_key_value_heads": -1}, ["num_key_value_heads=-1", "must be at least 1"]),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size=0", "must be at least 1"]),
        ({"vocab_size": -1}, ["vocab_size=-1", "must be at least 1"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "must divide num_attention_heads=4"]),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
            ["num_attention_heads=5", "must divide hidden_size=32", "set head_dim"],
        ),
        ({"head_dim": 7}, ["head_dim=7", "must be even"]),
        ({"router_block_size": 0}, ["router_block_size=0", "must be at least 1"]),
        ({"router_block_size": -2}, ["router_block_size=-2", "must be at least 1"]),
        ({"router_block_size": []}, ["router_block_size=[]", "must be at least 1"]),
        ({"router_block_size": [5, 0]}, ["router_block_size=[5, 0]", "must be at least 1"]),
        ({"router_block_size": [2, 2]}, ["router_block_size=[2, 2]", "must sum to num_hidden_layers=5"]),
        ({"router_block_size": [3, 3]}, ["router_block_size=[3, 3]", "must sum to num_hidden_layers=5"]),
        ({"router_block_size": True}, ["'router_block_size'", "True", "expected int"]),
        ({"router_block_size": "4"}, ["'router_block_size'", "'4'", "expected int"]),
        ({"router_block_size": 2.5}, ["'router_block_size'", "2.5", "expected int"]),
        ({"router_type": "lienar"}, ["router_type='lienar'", "'linear'", "register_router"]),
        ({"norm_topk_prob": "yes"}, ["'norm_topk_prob'", "yes", "expected bool"]),
        ({"num_experts": "8"}, ["'num_experts'", "8", "expected int"]),
        ({"router_aux_loss_coef": -0.01}, ["router_aux_loss_coef=-0.01", "not negative", "0 switches it off"]),
        ({"router_aux_loss_coef": float("nan")}, ["router_aux_loss_coef=nan", "must be finite"]),
        ({"router_z_loss_coef": float("inf")}, ["router_z_loss_coef=inf", "must be finite"]),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_wrong_field_is_refused_with_its_name_its_value_and_the_fix(tiny_config, wrong, says):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**wrong)
    for text in says:
        assert text in str(error.value)


def test_wrong_field_in_a_file_is_refused_on_load(tiny_config, tmp_path):
    fields = {**tiny_config().to_dict(), "router_block_size": [2, 2]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(StrictDataclassError, match="must sum to num_hidden_layers=5"):
        PathMoEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("router_block_size", [1, 2, 64, [2, 3], [1, 1, 1, 1, 1]], ids=str)
def test_save_and_load_keep_every_field(tiny_config, tmp_path, router_block_size):
    config = tiny_config(
        router_block_size=router_block_size,
        qk_norm=False,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PathMoEConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert loaded.router_blocks == config.router_blocks


def test_head_fields_that_are_unset_follow_the_query_heads(tiny_config):
    config = tiny_config(num_key_value_heads=None, head_dim=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)


def test_attribute_map_lets_servers_read_num_local_experts(tiny_config):
    assert tiny_config(num_experts=6).num_local_experts == 6


@given(num_layers=st.integers(1, 40), block_size=st.integers(1, 50))
def test_block_of_a_layer_is_its_index_divided_by_the_block_size(num_layers, block_size):
    config = PathMoEConfig(num_hidden_layers=num_layers, router_block_size=block_size)
    assert config.layer_to_block == [layer // block_size for layer in range(num_layers)]


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=10))
def test_block_list_gives_each_block_its_number_of_next_layers(sizes):
    config = PathMoEConfig(num_hidden_layers=sum(sizes), router_block_size=sizes)
    expected = []
    for block, size in enumerate(sizes):
        for _ in range(size):
            expected.append(block)
    assert config.layer_to_block == expected


@given(
    st.tuples(st.integers(1, 24), st.integers(1, 30))
    | st.lists(st.integers(1, 6), min_size=1, max_size=6).map(lambda sizes: (sum(sizes), sizes))
)
def test_blocks_are_the_layers_that_map_to_them(layers_and_sizes):
    num_layers, block_size = layers_and_sizes
    config = PathMoEConfig(num_hidden_layers=num_layers, router_block_size=block_size)
    to_block = config.layer_to_block
    assert config.router_blocks == [
        [layer for layer in range(num_layers) if to_block[layer] == block] for block in range(max(to_block) + 1)
    ]


@pytest.mark.parametrize(
    ("block_size", "blocks"),
    [
        (1, [[0], [1], [2], [3], [4]]),
        (2, [[0, 1], [2, 3], [4]]),
        (9, [[0, 1, 2, 3, 4]]),
        ([1, 4], [[0], [1, 2, 3, 4]]),
    ],
    ids=str,
)
def test_model_owns_one_router_for_each_block(tiny_config, block_size, blocks):
    routers = PathMoEForCausalLM(tiny_config(router_block_size=block_size)).model.routers
    assert list(routers) == [str(block) for block in range(len(blocks))]
    assert [router.layers for router in routers.values()] == blocks
