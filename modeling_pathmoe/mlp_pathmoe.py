# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The feed-forward network of dense layers, as in Qwen3."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_pathmoe import PathMoEConfig


class PathMoEMLP(nn.Module):
    """SwiGLU of width `intermediate_size`, which passes the routers' state on unchanged."""

    def __init__(self, config: PathMoEConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, route: Callable | None = None, router_state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        gated = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated), router_state
