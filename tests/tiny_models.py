# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3PreTrainedModel

from pathmoe import PathMoEForCausalLM


def randomize(model, seed=0, std=0.3):
    """Draws every parameter anew, norms around one, so that routing is spread and no term hides behind a default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model.eval()


@pytest.fixture
def tiny_model(tiny_config):
    """Returns a function that makes a tiny causal LM with random weights; keyword arguments override config fields."""

    def make(seed=0, **overrides):
        return randomize(PathMoEForCausalLM(tiny_config(**overrides)), seed)

    return make


COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 16,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
PEERS = {
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [1],  # a dense layer between routed ones
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 8},
    "mixtral": {"num_local_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}


PATHMOE = [
    *({"router_type": router_type} for router_type in ("linear", "cosine", "low_rank", "recurrent", "random", "hash")),
    {"router_sharing": "decision"},
    {"router_bias_update_rate": 0.1},
    {"norm_topk_prob": False},
    {"mlp_only_layers": [1], "intermediate_size": 16},  # a dense layer within a block
]


@pytest.fixture(params=[*PATHMOE, *PEERS], ids=str)
def kind(request):
    """Each architecture whose paths can be looked at, as `any_model` takes it."""
    if request.param == "deepseek_v3" and "router_logits" not in DeepseekV3PreTrainedModel._can_record_outputs:
        pytest.skip(f"transformers {transformers.__version__} does not say which modules route DeepSeek-V3")
    return request.param


@pytest.fixture
def peer_model():
    """Returns a function that makes a tiny causal LM of another architecture, with random weights."""

    def make(model_type, seed=0):
        config = AutoConfig.for_model(model_type, **COMMON | PEERS[model_type])
        return randomize(AutoModelForCausalLM.from_config(config), seed)

    return make


@pytest.fixture
def any_model(tiny_model, peer_model):
    """Returns a function that makes a tiny causal LM: a `model_type` of `PEERS`, or a PathMoE with these overrides."""

    def make(kind, seed=0):
        return peer_model(kind, seed) if isinstance(kind, str) else tiny_model(seed, **kind)

    return make


@pytest.fixture
def tokens():
    """Returns a function that draws token ids of shape (batch, length)."""

    def make(batch=2, length=7, seed=1):
        return torch.randint(99, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def gradients():
    """Returns a function that gives a copy of every gradient after the backward pass of `loss`."""

    def compute(model, loss):
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    return compute


@pytest.fixture
def assert_same():
    """Returns a function that compares tensors, or dicts of them, at 1e-5 of the largest value, or of 1."""

    def check(actual, expected, tolerance=1e-5):
        if isinstance(expected, dict):
            assert actual.keys() == expected.keys()
            for name in expected:
                check(actual[name], expected[name], tolerance)
        elif isinstance(expected, (list, tuple)):
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected):
                check(one, other, tolerance)
        else:
            # Rounding follows the size of the terms, not of a sum in which they cancel.
            scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)

    return check
