# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Routers: which experts does a token visit in a layer?

A router belongs to a block of consecutive layers and is called once per layer of that block. What makes a model a
PathMoE is that the block owns *one* router. Shapes: T tokens, D hidden size, E experts, k chosen experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


class PathMoERouter(nn.Module):
    """Base of all routers: turns the scores of `compute_logits` into a top-k choice.

    A subclass implements `compute_logits` and, when it owns parameters or buffers, `init_weights`; it becomes a
    `router_type` through [`register_router`].

    Args:
        config (`PathMoEConfig`): Model configuration.
        layers (`list[int]`): Indices of the layers that share this router, ascending.
    """

    def __init__(self, config, layers: list[int]):
        super().__init__()
        self.layers = layers
        self.hidden_size = config.hidden_size
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def compute_logits(
        self, hidden_states: torch.Tensor, layer_idx: int, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores every expert for every token.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`, float32): Normalised input of the layer's experts.
            layer_idx (`int`): The layer that asks.
            state (`torch.Tensor` with first dimension T, or `None`): What this method returned for the layer before;
                `None` in the first layer of the model.

        Returns:
            `tuple`: float32 logits of shape `(T, E)` and the state for the next layer.
        """
        raise NotImplementedError

    def init_weights(self, std: float):
        """Initialises all parameters and buffers in place; `std` is the config's `initializer_range`."""

    def forward(
        self, hidden_states: torch.Tensor, layer_idx: int, state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Routes the tokens of one layer. The arithmetic is float32 in any model dtype and under autocast.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Normalised input of the layer's experts.
            layer_idx (`int`): The layer that asks.
            state (`torch.Tensor`, *optional*): The state that this method returned for the layer before.

        Returns:
            `tuple`: logits `(T, E)` in float32, weights `(T, k)` in the dtype of `hidden_states`, expert indices
            `(T, k)` in int64, best first, and the state for the next layer.
        """
        # Autocast would turn a float32 matrix product back into bfloat16.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits, state = self.compute_logits(hidden_states.float(), layer_idx, state)
            weights, indices = torch.topk(logits.softmax(dim=-1), self.top_k, dim=-1)
            if self.norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(hidden_states.dtype), indices, state

    def extra_repr(self) -> str:
        return f"layers={self.layers}, num_experts={self.num_experts}, top_k={self.top_k}"


class LinearRouter(PathMoERouter):
    """logits = W x, with one W for all layers of the block (PathMoE, arXiv 2603.18297; one layer: Indep-MoE)."""

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        # A bare parameter: an `nn.Linear` would be quantised or LoRA-wrapped unasked.
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))

    def compute_logits(self, hidden_states, layer_idx, state):
        return F.linear(hidden_states, self.weight.float()), state

    def init_weights(self, std):
        init.normal_(self.weight, mean=0.0, std=std)


ROUTERS: dict[str, type[PathMoERouter]] = {"linear": LinearRouter}


def register_router(name: str, cls: type[PathMoERouter]):
    """Makes `cls` available as `PathMoEConfig(router_type=name)`.

    Args:
        name (`str`): The `router_type` under which checkpoints will refer to the router.
        cls (`type[PathMoERouter]`): The router class.

    Raises:
        TypeError: If `cls` is not a subclass of `PathMoERouter`.
        ValueError: If `name` already names another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, PathMoERouter)):
        raise TypeError(f"register_router({name!r}, cls): cls must be a subclass of PathMoERouter, got {cls!r}.")
    if ROUTERS.setdefault(name, cls) is not cls:
        raise ValueError(f"router_type {name!r} is already registered as {ROUTERS[name]!r}: choose another name.")


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    num_experts: int,
    top_k: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Switch load-balancing loss, for each layer, then averaged over the layers.

    For one layer it is E · Σ_e f_e · P_e, where f_e is the mean number of times that a token picks expert e among its
    top k and P_e the mean router probability of e (arXiv 2101.03961, equations 4 to 6). It is k when a layer is
    perfectly balanced and grows to E when it collapses onto k experts. transformers' function of the same purpose
    pools all layers first, which calls layers that have each collapsed onto other experts balanced.

    Args:
        router_logits (`tuple[torch.Tensor]`): One `(batch · sequence, E)` tensor per layer.
        num_experts (`int`): E.
        top_k (`int`): k.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 marks padding, which is left out.

    Returns:
        `torch.Tensor`: A float32 scalar on the device of the first layer's logits.
    """
    device = router_logits[0].device
    losses = []
    for logits in router_logits:
        probs = logits.float().softmax(dim=-1)
        picked = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
        load, importance = (_mean_over_tokens(x, attention_mask) for x in (picked, probs))
        losses.append((num_experts * (load * importance).sum()).to(device))
    return torch.stack(losses).mean()


def router_z_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Router z-loss: the mean over tokens and layers of logsumexp(logits)² (ST-MoE, arXiv 2202.08906, equation 5).

    Args:
        router_logits (`tuple[torch.Tensor]`): One `(batch · sequence, E)` tensor per layer.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 marks padding, which is left out.

    Returns:
        `torch.Tensor`: A float32 scalar on the device of the first layer's logits.
    """
    device = router_logits[0].device
    return torch.stack(
        [
            _mean_over_tokens(logits.float().logsumexp(dim=-1, keepdim=True).square(), attention_mask).sum().to(device)
            for logits in router_logits
        ]
    ).mean()


def _mean_over_tokens(values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Means of `values` (T, …) over the tokens that are not padding."""
    if attention_mask is None:
        return values.mean(dim=0)
    mask = attention_mask.reshape(-1, 1).to(values.device, values.dtype)
    # `where`, not a product: a padded row may hold inf or nan.
    return torch.where(mask > 0, values, 0).sum(dim=0) / mask.sum().clamp(min=1)
