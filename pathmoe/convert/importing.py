# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Imports Qwen3-MoE, Mixtral and OLMoE as PathMoE: exactly with a router per layer, or with fitted shared routers."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..command import UserError
from .checkpoint import EXACT, Checkpoint, Piece, check_request, convert, difference, load, logits_of, sample_tokens
from .layouts import Expert, experts_of, fuse, gate_of, import_config, refuse_misfits
from .shapes import PER_EXPERT, moe_layers, routed_blocks
from .texts import check_text, perplexity, read_windows, router_inputs


HEALING = (
    "The router of each block was fitted to the routers that it replaces, which is not exact. Train the model further "
    "before you use it."
)


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    block_size: int = 1,
    text: str | Path | None = None,
    num_tokens: int = 8192,
    *,
    verify: bool = True,
    max_shard_size: int | str = "1GB",
) -> dict:
    """Writes a Qwen3-MoE, Mixtral or OLMoE as a PathMoE.

    With blocks of one layer, or where the layers of each block hold the same router already (an exported PathMoE),
    the function is preserved. Otherwise, the experts of each layer are reordered, which preserves the function, so
    that the same hidden states choose the same indices in all layers of a block, and one router per block is fitted.

    Args:
        src (`str` or `Path`): Folder of a Qwen3-MoE, Mixtral or OLMoE, with per-expert or fused tensors.
        dst (`str` or `Path`): Folder to write, which must not exist.
        block_size (`int`): Number of layers that share a router.
        text (`str` or `Path`, *optional*): A text or JSON file; required if routers are fitted.
        num_tokens (`int`): Number of its tokens to use, four fifths for fitting and one fifth for measuring.
        verify (`bool`): Whether to compare the logits of source and target; fitting needs the model in memory anyway.
        max_shard_size (`int` or `str`): Largest size of a shard.

    Returns:
        `dict`: The manifest. After fitting, `agreement` is the share of a token's k experts that the shared router
        keeps, for each block, on held-out text, and `perplexity` is that of the held-out text before and after.

    Raises:
        UserError: If PathMoE does not support a feature of the source, or if routers must be fitted and `text` or
            scipy is missing.
    """
    check_request(dst, [src], max_shard_size)
    if text is not None:
        check_text(text, num_tokens)
    source = Checkpoint(src)
    refuse_misfits(source.config, tuple(PER_EXPERT))
    kind, routed = source.config.model_type, moe_layers(source.config)
    dense = [layer for layer in range(source.config.num_hidden_layers) if layer not in routed]
    width = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    config = import_config(
        source.config,
        moe_intermediate_size=getattr(source.config, width),
        mlp_only_layers=dense,
        intermediate_size=source.config.intermediate_size if dense else None,
        num_experts=source.config.num_experts,
        num_experts_per_tok=source.config.num_experts_per_tok,
        norm_topk_prob=kind == "mixtral" or source.config.norm_topk_prob,
        router_block_size=block_size,
    )
    source.check_to_convert()
    gates = [gate_of(source, layer) for layer in routed]
    experts = [experts_of(source, layer) for layer in routed]
    settings: dict[str, Any] = {"verify": verify, "max_shard_size": max_shard_size}
    if all(_equal(gates[layer] for layer in layers) for layers in routed_blocks(config)):
        routers = [gates[layers[0]] for layers in routed_blocks(config)]
        return convert("import", source, dst, config, _plan(source, config, experts, routers), exact=True, **settings)

    if text is None:
        raise UserError(
            f"block_size={block_size}: the layers of a block have different routers, so one must be fitted: pass a "
            "text that resembles the model's use (--text FILE), or block_size=1, which is exact."
        )
    return _import_fitted(source, dst, config, gates, experts, read_windows(source, text, num_tokens), settings)


def _import_fitted(
    source: Checkpoint,
    dst: str | Path,
    config: PathMoEConfig,
    gates: list[Piece],
    experts: list[list[Expert]],
    windows: tuple[torch.Tensor, torch.Tensor],
    settings: dict[str, Any],
) -> dict:
    """Imports as [`import_checkpoint`] does, with a router for each block that is fitted on the first windows and
    measured on the others."""
    fit, held_out = windows
    with tempfile.TemporaryDirectory() as folder:
        import_checkpoint(source.folder, Path(folder) / "independent", 1, **settings)
        model = load(Path(folder) / "independent")
    before = perplexity(model, held_out)
    blocks = routed_blocks(config)
    orders, measured = share_routers(model, blocks, fit, held_out)
    reference = logits_of(model, sample_tokens(config))
    after = perplexity(model, held_out)

    experts = [[of_layer[expert] for expert in order] for of_layer, order in zip(experts, orders)]

    def fitted(layers: list[int]) -> Piece:
        weight = model.model.routers[str(layers[0])].weight.detach().to(gates[0].dtype)
        sources = tuple(f"fitted to {source}" for layer in layers for source in gates[layer].sources)
        return Piece(tuple(weight.shape), weight.dtype, sources, lambda: weight)

    return convert(
        "import",
        source,
        dst,
        config,
        _plan(source, config, experts, [fitted(layers) for layers in blocks]),
        # Unlike those of the reference, the routers are rounded to the checkpoint's dtype.
        exact=gates[0].dtype == torch.float32,
        reference=reference,
        **settings,
        **measured,
        perplexity={"before": before, "after": after, "tokens": held_out.numel()},
        note=HEALING,
    )


def _equal(gates: Iterable[Piece]) -> bool:
    first, *others = (gate.read() for gate in gates)
    return all(torch.equal(first, other) for other in others)


def _plan(
    source: Checkpoint, config: PathMoEConfig, experts: list[list[Expert]], routers: list[Piece]
) -> dict[str, Piece]:
    plan = source.unchanged()
    for layer, of_layer in zip(config.moe_layers, experts):
        plan |= fuse(of_layer, layer)
    return plan | {f"model.routers.{block}.weight": router for block, router in enumerate(routers)}


def share_routers(
    model: PreTrainedModel, blocks: list[list[int]], fit: torch.Tensor, held_out: torch.Tensor
) -> tuple[list[list[int]], dict]:
    """Aligns the experts of the layers of each block, and replaces the routers by one fitted router, in place.

    Args:
        model (`PreTrainedModel`): A PathMoE with `router_block_size=1`.
        blocks (`list[list[int]]`): The layers of each block. Here and below, dense layers are not counted.
        fit (`torch.Tensor` of shape `(windows, length)`): Token ids to fit on.
        held_out (`torch.Tensor` of shape `(windows, length)`): Token ids to measure on.

    Returns:
        `tuple`: for each layer the old indices of its experts in their new order; and the measurements.

    Raises:
        UserError: If the reordering changed the function.
    """
    tokens = sample_tokens(model.config)
    original = logits_of(model, tokens)
    hidden, routers = router_inputs(model, fit), model.model.routers
    orders = [list(range(model.config.num_experts))] * len(hidden)
    for layers in blocks:
        seen = hidden[layers].flatten(0, 1)
        logits = [seen @ routers[str(layer)].weight.T for layer in layers]
        for layer, order in zip(layers, align(logits)):
            orders[layer] = order
            _reorder(model, layer, order)
    moved = difference(logits_of(model, tokens), original)
    if not moved["largest_logit_difference"] <= EXACT * max(1.0, moved["largest_logit"]):
        raise UserError(f"Reordering the experts changed the function: {moved}.")

    unseen, k, agreement = router_inputs(model, held_out), model.config.num_experts_per_tok, []
    for layers in blocks:
        weights = torch.stack([routers[str(layer)].weight.detach() for layer in layers])
        shared = fit_router(hidden[layers], weights)
        wanted = (unseen[layers] @ weights.transpose(1, 2)).topk(k).indices
        chosen = (unseen[layers] @ shared.T).topk(k).indices
        agreement.append((wanted[..., :, None] == chosen[..., None, :]).any(-1).float().mean().item())
        for layer in layers:
            routers[str(layer)].weight.data.copy_(shared)
    return orders, {
        "reordering": moved,
        "agreement": {"of_blocks": agreement, "by_chance": k / model.config.num_experts},
    }


def align(logits: list[torch.Tensor]) -> list[list[int]]:
    """Orders the experts of several layers so that those of the same index are chosen for the same hidden states.

    Each layer is matched with the sum of the previous layers, by the covariance of the routing probabilities over the
    hidden states (an assignment problem).

    Args:
        logits (`list[torch.Tensor]`): The router logits of each layer, `(states, E)`, for the same hidden states.

    Returns:
        `list[list[int]]`: For each layer, the old indices in their new order; the first layer keeps its own.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise UserError("Aligning experts needs scipy: pip install 'pathmoe[convert]'.") from error

    orders, so_far = [], torch.zeros(())
    for layer_logits in logits:
        probs = layer_logits.detach().softmax(dim=-1)
        probs = probs - probs.mean(dim=0)
        if not orders:
            order = list(range(probs.shape[1]))
        else:
            order = linear_sum_assignment((so_far.T @ probs).numpy(), maximize=True)[1].tolist()
        orders.append(order)
        so_far = so_far + probs[:, order]
    return orders


def _reorder(model: PreTrainedModel, layer: int, order: list[int]):
    experts = model.model.layers[model.config.moe_layers[layer]].mlp.experts
    for parameter in (experts.gate_up_proj, experts.down_proj, model.model.routers[str(layer)].weight):
        parameter.data = parameter.data[order]


def fit_router(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Fits one linear router for several layers, by logistic regression on the probabilities of the replaced routers.

    Args:
        hidden (`torch.Tensor` of shape `(layers, tokens, D)`): Inputs of the routers.
        weights (`torch.Tensor` of shape `(layers, E, D)`): The routers, aligned.

    Returns:
        `torch.Tensor` of shape `(E, D)`.
    """
    targets = (hidden @ weights.transpose(1, 2)).softmax(dim=-1)
    shared = weights.mean(dim=0).requires_grad_()
    optimizer = torch.optim.LBFGS([shared], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy((hidden @ shared.T).flatten(0, 1), targets.flatten(0, 1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return shared.detach()
