# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Averages PathMoE checkpoints, and prunes the experts of one."""

import math
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..command import UserError
from ..paths import record_paths
from .checkpoint import FOREIGN_CODE, Checkpoint, Piece, check_request, convert, load
from .layouts import experts_of, fuse
from .shapes import routed_blocks
from .texts import check_text, perplexity, read_windows


# The dimension that indexes experts in a router's tensors. Other tensors have none.
EXPERT_DIM = {
    "linear": {"weight": 0, "selection_bias": 1},
    "random": {"weight": 0, "selection_bias": 1},
    "cosine": {"expert_embeddings": 0, "selection_bias": 1},
    "low_rank": {"weight": 0, "up": 1, "selection_bias": 1},
    "recurrent": {"gate": 1, "selection_bias": 1},
}


def _pathmoe(src: str | Path) -> Checkpoint:
    source = Checkpoint(src)
    if not isinstance(source.config, PathMoEConfig):
        raise UserError(f"{src} is a {source.config.model_type}; only PathMoE checkpoints can be averaged or pruned.")
    source.check_to_convert()
    return source


def average_checkpoints(
    sources: list[str | Path],
    dst: str | Path,
    weights: list[float] | None = None,
    *,
    verify: bool = True,
    max_shard_size: int | str = "1GB",
) -> dict:
    """Writes the average of checkpoints of one model, such as the last ones of a run (arXiv 2203.05482).

    Args:
        sources (`list[str | Path]`): Folders of PathMoE models with the same configuration and tokenizer.
        dst (`str` or `Path`): Folder to write, which must not exist.
        weights (`list[float]`, *optional*): One for each source, summing to one; equal when unset.
        verify (`bool`): Whether to load the average and measure how far its logits are from the first source's.
        max_shard_size (`int` or `str`): Largest size of a shard.

    Returns:
        `dict`: The manifest, as in `DST/conversion.json`.

    Raises:
        UserError: If the sources do not match each other.
    """
    if len(sources) < 2:
        raise UserError(f"sources={[str(source) for source in sources]}: an average needs at least two checkpoints.")
    weights = weights or [1 / len(sources)] * len(sources)
    if len(weights) != len(sources) or not all(map(math.isfinite, weights)) or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"weights={weights} must be {len(sources)} finite numbers, one per source, that sum to 1.")
    check_request(dst, sources, max_shard_size)
    checkpoints = [_pathmoe(source) for source in sources]
    if len({Path(source).resolve() for source in sources}) < len(sources):
        raise UserError(
            f"SRC {' '.join(map(str, sources))} names a checkpoint twice: name each once, and use --weights to count "
            "one more than the others."
        )
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _check_same_model(first, other)

    def mean_of(name):
        pieces = [checkpoint.piece(name) for checkpoint in checkpoints]
        dtype = pieces[0].dtype

        def read():
            if not dtype.is_floating_point:  # equal in all of them
                return pieces[0].read()
            total = torch.zeros(pieces[0].shape)
            for weight, checkpoint, piece in zip(weights, checkpoints, pieces):
                total.add_(piece.read(), alpha=weight)
                checkpoint.close()  # otherwise a shard of every source would be mapped
            return total.to(dtype)

        return Piece(pieces[0].shape, dtype, (f"average of {name}",), read)

    return convert(
        "average",
        first,
        dst,
        first.config,
        {name: mean_of(name) for name in first},
        exact=False,
        verify=verify,
        max_shard_size=max_shard_size,
        averaged=[{"name": Path(c.folder).name, "weight": weight} for c, weight in zip(checkpoints, weights)],
    )


def _check_same_model(first: Checkpoint, other: Checkpoint):
    """Refuses to average checkpoints that differ in configuration, dtype, hashes or tokenizer.

    Raises:
        UserError: If they do; names the folder and the field or tensor.
    """
    fields, other_fields = first.config.to_diff_dict(), other.config.to_diff_dict()
    for name in sorted({*fields, *other_fields} - {"transformers_version", "dtype", *FOREIGN_CODE}):
        if fields.get(name) != other_fields.get(name):
            raise UserError(
                f"{other.folder} has {name}={other_fields.get(name)!r}, but {first.folder} has "
                f"{fields.get(name)!r}: only checkpoints of one model can be averaged."
            )
    for name, dtype in first.dtypes.items():
        if other.dtypes[name] != dtype:
            raise UserError(
                f"{other.folder} has {name} in {other.dtypes[name]}, but {first.folder} has it in {dtype}: save "
                "both in one dtype first."
            )
        if not dtype.is_floating_point and not torch.equal(other.piece(name).read(), first.piece(name).read()):
            raise UserError(f"{other.folder} has other values of {name} than {first.folder}, which have no average.")
    files = [checkpoint.folder / "tokenizer.json" for checkpoint in (first, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        raise UserError(f"{other.folder} has a different tokenizer than {first.folder}: their tokens differ.")


def prune_experts(
    src: str | Path,
    dst: str | Path,
    num_experts: int,
    text: str | Path,
    num_tokens: int = 8192,
    *,
    verify: bool = True,
    max_shard_size: int | str = "1GB",
) -> dict:
    """Writes a PathMoE with fewer experts: each block keeps those that the paths of a text use most.

    Since a block shares its router, all its layers keep the same experts. Tokens that chose a removed expert go to the
    next best one. The function is not preserved; train the model further before you use it.

    Args:
        src (`str` or `Path`): Folder of a PathMoE.
        dst (`str` or `Path`): Folder to write, which must not exist.
        num_experts (`int`): Number of experts to keep in each layer.
        text (`str` or `Path`): A text or JSON file that resembles the model's use.
        num_tokens (`int`): Number of its tokens to use, four fifths for counting and one fifth for measuring.
        verify (`bool`): Whether to load the target and measure it; counting needs the source in memory anyway.
        max_shard_size (`int` or `str`): Largest size of a shard.

    Returns:
        `dict`: The manifest. `kept` lists the experts of each block, and `choices_kept` the share of choices that fell
        on them. `paths_kept` is the share of tokens whose whole path is kept, and `perplexity` is that of held-out
        text before and after.

    Raises:
        UserError: If `num_experts` does not fit the model, or its type of router cannot be pruned.
    """
    check_request(dst, [src], max_shard_size)
    check_text(text, num_tokens)
    source = _pathmoe(src)
    config = source.config
    if config.router_type not in EXPERT_DIM:
        raise UserError(f"router_type={config.router_type!r} cannot be pruned; {', '.join(EXPERT_DIM)} can.")
    if not config.num_experts_per_tok <= num_experts <= config.num_experts:
        raise UserError(
            f"num_experts={num_experts} must be from num_experts_per_tok={config.num_experts_per_tok} to the model's "
            f"num_experts={config.num_experts}."
        )
    count, held_out = read_windows(source, text, num_tokens)
    model = load(src)
    with record_paths(model) as trace, torch.no_grad():
        for window in count:
            model.base_model(window[None], use_cache=False)
    before = perplexity(model, held_out)
    del model

    kept, choices_kept, survives = _most_used(trace.experts, config, num_experts)
    target = PathMoEConfig.from_dict(config.to_dict())
    target.num_experts = num_experts
    if config.router_type == "cosine":
        target.router_dim = config.router_dim or max(2, config.num_experts // 2)
    plan = source.unchanged()
    for layer in config.moe_layers:
        experts = experts_of(source, layer)
        plan |= fuse([experts[expert] for expert in kept[config.layer_to_block[layer]]], layer)
    for name in source:
        if ".routers." in name:
            _, _, block, tensor = name.split(".")
            plan[name] = _keep(source.piece(name), EXPERT_DIM[config.router_type].get(tensor), kept[int(block)])
    return convert(
        "prune",
        source,
        dst,
        target,
        plan,
        exact=num_experts == config.num_experts,
        verify=verify,
        measure=lambda pruned: {
            "perplexity": {"before": before, "after": perplexity(pruned, held_out), "tokens": held_out.numel()}
        },
        max_shard_size=max_shard_size,
        kept=kept,
        choices_kept=choices_kept,
        paths_kept=survives.float().mean().item(),
    )


def _most_used(
    experts: torch.Tensor, config: PreTrainedConfig, num_experts: int
) -> tuple[list[list[int]], list[float], torch.Tensor]:
    """Returns the most used of `experts` (T, L, k) for each block, the share of choices that fell on them, and whether
    each token's whole path is kept (T,)."""
    kept, choices_kept = [], []
    survives = torch.ones(len(experts), dtype=torch.bool)
    for layers in routed_blocks(config):
        chosen = experts[:, layers].long()
        uses = chosen.flatten().bincount(minlength=config.num_experts)
        keep = uses.argsort(descending=True, stable=True)[:num_experts].sort().values
        kept.append(keep.tolist())
        choices_kept.append((uses[keep].sum() / uses.sum()).item())
        survives &= torch.isin(chosen[:, :, 0], keep).all(dim=1)
    return kept, choices_kept, survives


def _keep(piece: Piece, dim: int | None, experts: list[int]) -> Piece:
    if dim is None:
        return piece
    shape = tuple(len(experts) if d == dim else size for d, size in enumerate(piece.shape))
    index = torch.tensor(experts)
    note = f"experts {experts}"
    return Piece(shape, piece.dtype, (*piece.sources, note), lambda: piece.read().index_select(dim, index))
