# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Monitors how a training run uses the experts, and warns of routing collapse."""

import math

import torch
from accelerate import Accelerator

from pathmoe.paths import adjacent_jaccard, path_counts
from pathmoe.train.engine import gather_full


SAMPLE = 8192  # tokens of each rank's first micro-batch: enough to resolve shares of a percent, and quick


class RoutingMonitor:
    """Measures the routing of a PathMoE from the router logits of a training step.

    Args:
        model (`PreTrainedModel`): A PathMoE with a language-modelling head, unwrapped.
        accelerator (`Accelerator`): The engine.
    """

    def __init__(self, model, accelerator: Accelerator):
        self.config, self.routers, self.accelerator = model.config, model.base_model.routers, accelerator

    @torch.no_grad()
    def measure(self, router_logits: tuple[torch.Tensor, ...]) -> dict:
        """Measures which experts are chosen. All ranks must call it, between the backward pass and gradient clipping.

        Args:
            router_logits (`tuple[torch.Tensor]`): One `(tokens, E)` tensor for each MoE layer.

        Returns:
            `dict`: With one entry per MoE layer, `load` (the share of the tokens that choose each of the E experts,
            which sums to k), `load_cv` (coefficient of variation of the load), `dead_experts` (number of experts that
            no token chooses), `effective_experts` (exponential of the load's entropy, from k or less if collapsed to E
            if balanced) and `router_entropy` (mean entropy of the router's probabilities, in bits). With one entry per
            block, `router_grad_norm`. For the main process's tokens only, `sampled_tokens`, `adjacent_jaccard`,
            `distinct_paths` and `path_coverage_100`.
        """
        config = self.config
        loads, entropies, experts = [], [], []
        for layer, logits in zip(config.moe_layers, router_logits, strict=True):
            logits = logits[:SAMPLE].float()
            # If a block shares its decision, all of its layers use the logits and the bias of the first layer.
            block = config.router_blocks[config.layer_to_block[layer]]
            decides = block[0] if config.router_sharing == "decision" else layer
            _, indices = self.routers[str(config.layer_to_block[layer])].choose(logits, decides)
            loads.append(torch.bincount(indices.flatten(), minlength=config.num_experts) / len(logits))
            entropies.append(torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean() / math.log(2))
            experts.append(indices)
        load, entropy = torch.stack(loads), torch.stack(entropies)
        if self.accelerator.num_processes > 1:
            load, entropy = self.accelerator.reduce((load, entropy), reduction="mean")
        experts = torch.stack(experts, dim=1).to("cpu", torch.int16)
        paths = path_counts(experts)
        return {
            **measure_load(load),
            "router_entropy": rounded(entropy),
            "router_grad_norm": [router_gradient_norm(router) for router in self.routers.values()],
            "sampled_tokens": len(experts),
            "adjacent_jaccard": round(adjacent_jaccard(experts), 5) if len(router_logits) > 1 else None,
            "distinct_paths": len(paths),
            "path_coverage_100": round((paths[:100].sum() / paths.sum()).item(), 5),
        }


def measure_load(load: torch.Tensor) -> dict[str, list]:
    """Measures how evenly the experts of each layer are used.

    Args:
        load (`torch.Tensor` of shape `(L, E)`): The share of the tokens that choose each expert; rows sum to k.

    Returns:
        `dict`: With one entry per layer, `load`, `load_cv`, `dead_experts` and `effective_experts`, as in
        [`RoutingMonitor.measure`].
    """
    share = load / load.sum(dim=-1, keepdim=True)
    return {
        "load": rounded(load),
        "load_cv": rounded(load.std(dim=-1, correction=0) / load.mean(dim=-1)),
        "dead_experts": (load == 0).sum(dim=-1).tolist(),
        "effective_experts": rounded(torch.special.entr(share).sum(dim=-1).exp()),
    }


def find_collapse(measured: dict[str, list]) -> list[str]:
    """Returns a warning for each layer that is collapsing. The warning names the busiest expert.

    A layer counts as collapsing when it has fewer than k + (E - k) / 4 effective experts.

    Args:
        measured (`dict`): The result of [`measure_load`].
    """
    warnings = []
    for layer, (load, effective) in enumerate(zip(measured["load"], measured["effective_experts"])):
        experts, top_k = len(load), round(sum(load))
        limit = top_k + (experts - top_k) / 4
        if experts > top_k and effective < limit:
            busiest = max(range(experts), key=load.__getitem__)
            warnings.append(
                f"routing collapse in layer {layer}: expert {busiest} is chosen by {load[busiest]:.0%} of the "
                f"tokens, {measured['dead_experts'][layer]} of {experts} experts by none; the load is that of "
                f"{effective:.1f} experts (limit {limit:.1f})."
            )
    return warnings


def router_gradient_norm(router: torch.nn.Module) -> float | None:
    """Returns the 2-norm of a router's gradient, or `None` if the router has no gradient."""
    gradients = [gather_full(parameter.grad) for parameter in router.parameters() if parameter.grad is not None]
    return float(f"{torch.nn.utils.get_total_norm(gradients).item():.6g}") if gradients else None


def rounded(values: torch.Tensor) -> list:
    return [[round(x, 5) for x in row] if isinstance(row, list) else round(row, 5) for row in values.tolist()]
