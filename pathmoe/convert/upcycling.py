# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Upcycles dense models to PathMoE: every expert starts as the dense feed-forward network or a slice of it."""

from functools import partial
from pathlib import Path

import torch

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..command import UserError
from .checkpoint import Checkpoint, Piece, check_request, convert
from .layouts import DENSE, Expert, fuse, import_config, refuse_misfits


# In standard deviations of the weights. With more, hardly anything but noise would be left.
MOST_NOISE = 10


def upcycle(
    src: str | Path,
    dst: str | Path,
    num_experts: int,
    num_experts_per_tok: int,
    block_size: int = 4,
    noise: float = 0.0,
    drop: float = 0.0,
    granularity: int = 1,
    seed: int = 0,
    *,
    verify: bool = True,
    max_shard_size: int | str = "1GB",
) -> dict:
    """Writes a dense Llama, Mistral or Qwen3 as a PathMoE (sparse upcycling, arXiv 2212.05055).

    The function is preserved while `noise` and `drop` are 0: the k weights sum to one and all experts are alike. With
    `granularity` g, expert e is the slice e mod g of the network, and the g slices of one copy get the same router
    weights, so that they are chosen together (virtual groups, arXiv 2410.07524). Their output is scaled by g, because
    each gets 1 / g of the weight. Training separates them, and then the chosen slices no longer form a whole network.

    Args:
        src (`str` or `Path`): Folder of the dense model.
        dst (`str` or `Path`): Folder to write, which must not exist.
        num_experts (`int`): E.
        num_experts_per_tok (`int`): k. With k = 1 a normalised weight is always 1, and the routers get no gradient.
        block_size (`int`): Number of layers that share a router.
        noise (`float`): Standard deviation of noise on the experts' weights, relative to that of the weights. Not
            exact.
        drop (`float`): Share of each expert's inner neurons that is redrawn from a normal distribution with the mean
            and standard deviation of the dropped weights (drop-upcycling, arXiv 2502.19261, which uses 0.5). Not
            exact.
        granularity (`int`): Number of experts that one dense network is split into.
        seed (`int`): Seed of routers, noise and drop.
        verify (`bool`): Whether to compare the logits of both; needs the memory of the target in float32.
        max_shard_size (`int` or `str`): Largest size of a shard.

    Returns:
        `dict`: The manifest, as in `DST/conversion.json`.

    Raises:
        UserError: If the source is a different model, or the numbers do not fit each other.
    """
    check_request(dst, [src], max_shard_size)
    if not 0 <= noise <= MOST_NOISE or not 0 <= drop < 1:
        raise UserError(
            f"noise={noise} must be from 0 to {MOST_NOISE}, and drop={drop} must be at least 0 and below 1."
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"seed={seed} must be from 0 to {2**63 - 1}.")
    source = Checkpoint(src)
    refuse_misfits(source.config, DENSE)
    width = source.config.intermediate_size
    for name, value in (
        ("num_experts", num_experts), ("num_experts_per_tok", num_experts_per_tok), ("intermediate_size", width)
    ):  # fmt: skip
        if granularity < 1 or value % granularity:
            raise UserError(f"granularity={granularity} must be at least 1 and divide {name}={value}.")
    config = import_config(
        source.config,
        moe_intermediate_size=width // granularity,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        router_block_size=block_size,
    )
    source.check_to_convert()
    return convert(
        "upcycle",
        source,
        dst,
        config,
        _plan(source, config, noise, drop, granularity, seed),
        exact=not (noise or drop),
        verify=verify,
        max_shard_size=max_shard_size,
        options={"noise": noise, "drop": drop, "granularity": granularity, "seed": seed},
    )


def _plan(
    source: Checkpoint, config: PathMoEConfig, noise: float, drop: float, granularity: int, seed: int
) -> dict[str, Piece]:
    plan = {name: piece for name, piece in source.unchanged().items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        experts = []
        for index in range(config.num_experts):
            expert = _slice(source, layer, index % granularity, granularity)
            generator_seed = (seed, layer, index)
            if drop:
                expert = _redraw(expert, drop, generator_seed)
            if noise:
                expert = _add_noise(expert, noise, generator_seed)
            experts.append(expert)
        plan |= fuse(experts, layer)
    for block in range(len(config.router_blocks)):
        plan[f"model.routers.{block}.weight"] = _new_router(config, block, granularity, seed, experts[0].gate.dtype)
    return plan


def _slice(source: Checkpoint, layer: int, part: int, parts: int) -> Expert:
    prefix, width = f"model.layers.{layer}.mlp", source.config.intermediate_size // parts
    rows = slice(part * width, (part + 1) * width)
    gate, up = (source.piece(f"{prefix}.{name}.weight", rows) for name in ("gate_proj", "up_proj"))
    down = source.piece(f"{prefix}.down_proj.weight", slice(None), rows)
    return Expert(gate, up, down if parts == 1 else down.map(lambda weight: weight * parts, f"times {parts}"))


def _generator(*seeds: int) -> torch.Generator:
    """Returns a separate generator for each part of the model, so that the order of writing does not matter."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed) % 2**63
    return torch.Generator().manual_seed(mixed)


def _redraw(expert: Expert, share: float, seed: tuple[int, ...]) -> Expert:
    """Redraws some inner neurons, the same ones in all three matrices."""
    width = expert.gate.shape[0]
    neurons = torch.randperm(width, generator=_generator(*seed, 0))[: round(share * width)]

    def redraw(weight, dim, matrix):
        old = weight.index_select(dim, neurons).float()
        new = old.mean() + old.std() * torch.randn(old.shape, generator=_generator(*seed, 1, matrix))
        return weight.index_copy(dim, neurons, new.to(weight.dtype))

    note = f"{len(neurons)} of {width} neurons redrawn"
    return Expert(
        *(
            piece.map(partial(redraw, dim=dim, matrix=matrix), note)
            for matrix, (piece, dim) in enumerate(zip(expert, (0, 0, 1)))
        )
    )


def _add_noise(expert: Expert, noise: float, seed: tuple[int, ...]) -> Expert:
    def add(weight, matrix):
        drawn = torch.randn(weight.shape, generator=_generator(*seed, 2, matrix))
        return (weight.float() + noise * weight.float().std() * drawn).to(weight.dtype)

    return Expert(
        *(
            piece.map(partial(add, matrix=matrix), f"noise of {noise} standard deviations")
            for matrix, piece in enumerate(expert)
        )
    )


def _new_router(config, block: int, granularity: int, seed: int, dtype: torch.dtype) -> Piece:
    def draw():
        shape = (config.num_experts // granularity, config.hidden_size)
        copies = config.initializer_range * torch.randn(shape, generator=_generator(seed, block, -1))
        return copies.repeat_interleave(granularity, dim=0).to(dtype)

    return Piece((config.num_experts, config.hidden_size), dtype, ("drawn at random",), draw)
