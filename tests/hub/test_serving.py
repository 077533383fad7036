# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What vLLM's and SGLang's Transformers backends ask of a model, on a checkpoint folder as they see it."""

import inspect
import json
import re

import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from modeling_pathmoe import PathMoEForCausalLM


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The base model of a saved causal language model, loaded the way the backends do: by `AutoModel`."""
    from modeling_pathmoe import PathMoEConfig
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("served")
    PathMoEForCausalLM(PathMoEConfig(**TINY)).save_pretrained(folder)
    assert "AutoModel" in json.loads((folder / "config.json").read_text())["auto_map"]
    return AutoModel.from_pretrained(folder)


def test_every_moe_block_names_its_experts_experts(served):
    """The backends replace modules of that name by their fused kernels, and read two 3-D parameters from them."""
    blocks = [module for name, module in served.named_modules() if name.endswith(".mlp")]
    assert len(blocks) == 5
    for block in blocks:
        assert {name: p.ndim for name, p in block.experts.named_parameters()} == {"gate_up_proj": 3, "down_proj": 3}
        parameters = list(inspect.signature(type(block.experts).forward).parameters)
        assert parameters[1:4] == ["hidden_states", "top_k_index", "top_k_weights"]


def test_a_replaced_experts_module_is_what_runs(served):
    """A fused kernel gets the hidden states, the experts and the weights by position, and its output is used."""
    calls = []

    class Kernel(torch.nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.w13_weight = experts.gate_up_proj

        def forward(self, hidden_states, top_k_index, top_k_weights):
            calls.append((hidden_states.shape, top_k_index.shape, top_k_weights.dtype))
            return torch.zeros_like(hidden_states)

    originals = [layer.mlp.experts for layer in served.layers]
    for layer in served.layers:
        layer.mlp.experts = Kernel(layer.mlp.experts)
    served(torch.arange(6)[None])
    for layer, experts in zip(served.layers, originals):
        layer.mlp.experts = experts
    assert calls == [((6, 32), (6, 2), torch.float32)] * 5


def test_attention_takes_the_backends_own_implementation(served):
    assert served._supports_attention_backend
    source = inspect.getsource(type(served.layers[0].self_attn).forward)
    assert "ALL_ATTENTION_FUNCTIONS" in source and "**kwargs" in source


def test_plans_name_modules_that_exist(served):
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in served.named_modules()}
    parameters = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in served.named_parameters()}
    for plan in (served.config.base_model_tp_plan, served.config.base_model_ep_plan, served.config.base_model_pp_plan):
        assert plan and plan.keys() <= names | parameters
    pipeline = list(served.config.base_model_pp_plan)
    assert pipeline == ["embed_tokens", "layers", "norm"]
    # What the backends split into stages is the one module list; the routers are in no list.
    lists = [name for name, module in served.named_modules() if isinstance(module, torch.nn.ModuleList)]
    assert lists == ["layers"] and isinstance(served, PreTrainedModel)
