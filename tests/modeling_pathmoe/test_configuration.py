# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from pathmoe import PathMoEConfig, PathMoEForCausalLM


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
        ({"qk_norm": "head"}, ["'qk_norm'", "'head'", "expected bool", "expected one of ('full',)"]),
        ({"qk_norm": 1}, ["'qk_norm'", "1", "expected bool", "expected one of ('full',)"]),
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


NAN, INF = float("nan"), float("inf")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
# Fields that a person or a stranger's config.json may hold, and what the message must name.
REFUSED = [
    *(({"rope_theta": theta}, f"rope_theta={theta!r}") for theta in (-1, 0, NAN, INF, "a", True, None, [1])),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta=-1"),
    ({"rope_parameters": {"theta": 1}}, "unknown key theta=1"),
    ({"rope_parameters": {"rope_typ": "yarn"}}, "unknown key rope_typ='yarn'"),
    ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "rope_type='nope'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": NAN}}, "factor=nan"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor=0"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2'"),
    ({"rope_parameters": {**YARN, "beta_fast": "x"}}, "beta_fast='x'"),
    ({"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    *(({name: {"rope_type": "foo"}}, "rope_type='foo'") for name in ("rope_parameters", "rope_scaling")),
    ({"rope_scaling": {"type": "foo", "factor": 2.0}}, "rope_type='foo'"),
    ({"rope_parameters": {**YARN, "type": "linear"}}, "type='linear' contradicts rope_type='yarn'"),
    ({"rope_parameters": {**YARN, "truncate": "x"}}, "truncate='x'"),
    ({"rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 32.0}}, "beta_slow=32.0 must be below"),
    ({"rope_parameters": {**YARN, "factor": [2.0]}}, "factor=[2.0] must be one number"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 1e300}}, "factor=1e+300"),
    ({"rope_theta": 10**400}, "rope_theta=1000"),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}},
        "a list of head_dim // 2 = 4",
    ),
    (
        {"rope_parameters": {**YARN, "rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "low_freq_factor=4.0 must be below high_freq_factor=1.0",
    ),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_parameters": "x"}, "rope_parameters"),
    *(({"initializer_range": value}, "initializer_range") for value in (1e30, NAN, True, "a", -1)),
    ({"embedding_initializer_range": True}, "embedding_initializer_range"),
    ({"router_initializer_range": INF}, "router_initializer_range=inf"),
    *(({"rms_norm_eps": value}, f"rms_norm_eps={value}") for value in (0, -1e-6, NAN, 1e-300)),
    ({"router_bias_update_rate": 5}, "router_bias_update_rate=5"),
    ({"rms_norm_eps": 10.0}, "rms_norm_eps=10.0"),
    ({"router_aux_loss_coef": 1e30}, "router_aux_loss_coef=1e+30"),
    ({"router_z_loss_coef": True}, "router_z_loss_coef"),
    ({"num_experts": 8, "num_local_experts": 6}, "num_local_experts=6 contradicts num_experts=8"),
    ({"num_experts": 16, "num_local_experts": 8}, "num_local_experts=8 contradicts num_experts=16"),
    ({"num_local_experts": "8"}, "num_local_experts='8'"),
    *(
        ({"id2label": labels}, "id2label")
        for labels in ("x", ["a"], {}, {"a": "b"}, {"0": 1}, {"0": "a", "2": "c"}, {"-1": "a"}, {"0": "a", "1": "a"})
    ),
    ({"id2label": {"0": "a"}, "label2id": {"b": 0}}, "label2id"),
    ({"label2id": {"a": "x"}}, "label2id"),
    *(({"num_labels": value}, f"num_labels={value!r}") for value in (0, -1, "3", 2.5, True, 10**12)),
    ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, "num_labels=3 contradicts the 2 labels"),
    ({"problem_type": "nonsense"}, "problem_type"),
    ({"router_block_sizes": 2}, "did you mean router_block_size?"),
    ({"num_expert": 3}, "did you mean num_experts?"),
    ({"n_layers": 3}, "did you mean num_hidden_layers?"),
    ({"top_k": 2}, "did you mean num_experts_per_tok?"),
    ({"block_size": 2}, "did you mean router_block_size?"),
    ({"hidden_sizes": 3}, "did you mean hidden_size?"),
    ({"Hidden_Size": 3}, "did you mean hidden_size?"),
    ({"num_experts_per_token": 2}, "did you mean num_experts_per_tok?"),
    ({"num_key_values_heads": 2}, "did you mean num_key_value_heads?"),
    ({"attn_dropout": 0.1}, "did you mean attention_dropout?"),
    *(({name: -1}, f"{name}=-1") for name in ("pad_token_id", "bos_token_id", "eos_token_id")),
    ({"pad_token_id": 99}, "pad_token_id=99 must be None or from 0 to 98"),
    ({"eos_token_id": [1, 99]}, "eos_token_id=[1, 99]"),
    ({"eos_token_id": []}, "eos_token_id=[]"),
    ({"bos_token_id": True}, "bos_token_id"),
    ({"num_hidden_layers": 1_000_000}, "num_hidden_layers=1000000 must not exceed 1024"),
    ({"num_experts": 10**9}, "num_experts=1000000000 must not exceed 32767"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
    ({"hidden_size": 10**9}, "hidden_size=1000000000"),
    ({"moe_intermediate_size": 10**12}, "moe_intermediate_size=1000000000000"),
    ({"head_dim": 10**12}, "head_dim=1000000000000"),
    ({"max_position_embeddings": 10**12}, "max_position_embeddings=1000000000000"),
    ({"router_rank": 10**9}, "router_rank=1000000000"),
    ({"router_dim": 10**10}, "router_dim=10000000000"),
    ({"attention_dropout": NAN}, "attention_dropout=nan"),
    ({"attention_dropout": True}, "attention_dropout"),
    ({"sliding_window": 128}, "sliding_window=128"),
    ({"layer_types": ["sliding_attention"] * 5}, "layer_types="),
    ({"mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"output_hidden_states": "yes"}, "output_hidden_states"),
    ({"architectures": "x"}, "architectures"),
    ({"auto_map": "x"}, "auto_map='x'"),
    ({"quantization_config": "x"}, "quantization_config='x'"),
    ({"dtype": 3}, "dtype"),
    ({"dtype": ["float32"]}, "dtype"),
    ({"dtype": "float99"}, "dtype='float99'"),
    ({"dtype": "int8"}, "dtype='int8'"),
    ({"num_experts": NAN}, "num_experts"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"router_block_size": [True] * 5}, "router_block_size"),
]  # fmt: skip


@pytest.mark.parametrize("loader", ["direct", "from_pretrained", "AutoConfig"])
@pytest.mark.parametrize(("wrong", "says"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_nonsense_is_refused_by_every_door(tiny_config, tmp_path, loader, wrong, says):
    fields = {**tiny_config().to_dict(), "rope_parameters": None, **wrong}
    if "rope_scaling" in wrong:
        del fields["rope_parameters"]
    with pytest.raises(StrictDataclassError) as error:
        if loader == "direct":
            PathMoEConfig(**fields)
        else:
            (tmp_path / "config.json").write_text(json.dumps(fields))
            (PathMoEConfig if loader == "from_pretrained" else AutoConfig).from_pretrained(tmp_path)
    assert says in str(error.value)


@pytest.mark.parametrize("wrong", [{"model_type": "bert"}, {"model_type": None}], ids=str)
def test_another_architecture_is_refused(tiny_config, wrong):
    with pytest.raises(StrictDataclassError, match="is a different architecture"):
        PathMoEConfig(**{**tiny_config().to_dict(), **wrong})


def test_a_folder_without_a_config_is_refused_instead_of_the_default_model(tmp_path):
    for content in (None, "{}"):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(OSError, match="has no config.json with fields"):
            PathMoEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"router_type": "nope"}, {"num_expert": 2}, {"pad_token_id": 99}, {"num_labels": 0}], ids=str
)
def test_overrides_on_loading_are_checked(tiny_config, tmp_path, wrong):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=next(iter(wrong))):
        AutoConfig.from_pretrained(tmp_path, **wrong)


def test_width_of_dense_layers_alone_is_taken_for_a_mistake(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pathmoe", "intermediate_size": 64}))
    for build in (lambda: PathMoEConfig(intermediate_size=64), lambda: PathMoEConfig.from_pretrained(tmp_path)):
        with pytest.raises(StrictDataclassError, match="did you mean moe_intermediate_size"):
            build()


ACCEPTED = [
    {"embedding_initializer_range": 1, "router_initializer_range": 1, "initializer_range": 1},
    {"num_local_experts": 8},
    {"rope_theta": 10000},
    {"rope_parameters": {**YARN, "original_max_position_embeddings": 16, "truncate": False}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"torch_dtype": "bfloat16"},
    {"architectures": ["PathMoEForCausalLM"], "transformers_version": "5.23.0", "_name_or_path": "x"},
    {"auto_map": {"AutoConfig": "configuration_pathmoe.PathMoEConfig"}},
    {"sliding_window": None, "layer_types": ["full_attention"] * 5},
    {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False},
    {"intermediate_size": 128, "moe_intermediate_size": 16},
    {"num_labels": 3},
    {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}},
    {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}, "problem_type": "regression"},
    {"eos_token_id": [1, 2], "note": "of our own"},
]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_what_transformers_and_people_write_is_accepted(tiny_config, tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps({**tiny_config().to_dict(), **fields}))
    AutoConfig.from_pretrained(tmp_path)


def test_wrong_field_in_a_file_is_refused_on_load(tiny_config, tmp_path):
    fields = {**tiny_config().to_dict(), "router_block_size": [2, 2]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(StrictDataclassError, match="must sum to num_hidden_layers=5"):
        PathMoEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("qk_norm", [True, False, "full"])
@pytest.mark.parametrize("router_block_size", [1, 2, 64, [2, 3], [1, 1, 1, 1, 1]], ids=str)
def test_save_and_load_keep_every_field(tiny_config, tmp_path, router_block_size, qk_norm):
    config = tiny_config(
        router_block_size=router_block_size,
        qk_norm=qk_norm,
        norm_topk_prob=False,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
        rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is PathMoEConfig
    assert loaded.base_model_tp_plan == config.base_model_tp_plan
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
