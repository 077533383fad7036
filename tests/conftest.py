# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import os
import socket


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network; read when the libraries are imported

import pytest  # noqa: E402
import torch  # noqa: E402

from modeling_pathmoe import PathMoEConfig  # noqa: E402


torch.set_num_threads(1)  # two workers on two cores must not fight over them


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "router_block_size": 2,
}


@pytest.fixture
def tiny_config():
    """Returns a function that makes a tiny config; keyword arguments override its fields."""

    def make(**overrides):
        return PathMoEConfig(**{**TINY, **overrides})

    return make


@pytest.fixture
def free_port():
    """A port on this machine that nothing listens on, as text."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return str(listener.getsockname()[1])
