# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Exports PathMoE to Qwen3-MoE, Mixtral and OLMoE, by copying the router of a block into its layers."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..command import UserError
from .checkpoint import Checkpoint, Piece, check_request, convert
from .layouts import experts_of, export_config, split
from .shapes import PER_EXPERT


# The values that vLLM's and SGLang's OLMoE assume, whatever config.json says.
SERVED_OLMOE = {"norm_topk_prob": False, "rms_norm_eps": 1e-5, "attention_bias": False}


def export_checkpoint(
    src: str | Path,
    dst: str | Path,
    to: str = "auto",
    *,
    verify: bool = True,
    max_shard_size: int | str = "1GB",
) -> dict:
    """Writes a PathMoE as the Qwen3-MoE, Mixtral or OLMoE that computes the same function, in the published layout.

    Args:
        src (`str` or `Path`): Folder of a PathMoE causal language model.
        dst (`str` or `Path`): Folder to write, which must not exist.
        to (`str`): `"qwen3_moe"`, `"mixtral"`, `"olmoe"`, or `"auto"`, which selects the one with the source's
            attention.
        verify (`bool`): Whether to compare the logits of both; needs the memory of the model in float32.
        max_shard_size (`int` or `str`): Largest size of a shard.

    Returns:
        `dict`: The manifest, as in `DST/conversion.json`.

    Raises:
        UserError: If no model of that architecture computes the same function; states the reason.
    """
    check_request(dst, [src], max_shard_size)
    source = Checkpoint(src)
    if not isinstance(source.config, PathMoEConfig):
        raise UserError(f"{src} is a {source.config.model_type}; export takes a PathMoE.")
    config = export_config(source.config, to)
    source.check_to_convert()
    plan = source.unchanged()
    for layer in source.config.moe_layers:
        block, _ = PER_EXPERT[config.model_type]
        plan[f"model.layers.{layer}.{block}.gate.weight"] = _router_of(source, layer)
        plan |= split(experts_of(source, layer), layer, config.model_type)
    options: dict[str, Any] = {"verify": verify, "exact": True, "max_shard_size": max_shard_size, **_note(config)}
    return convert("export", source, dst, config, plan, **options)


def _note(config: PreTrainedConfig) -> dict[str, str]:
    """Returns an entry of the manifest that names fields of an OLMoE which servers ignore, if there are any."""
    if config.model_type != "olmoe":
        return {}
    fields = [
        f"{name}={getattr(config, name)}" for name, value in SERVED_OLMOE.items() if getattr(config, name) != value
    ]
    ignored = ", ".join(fields)
    note = f"vLLM and SGLang ignore {ignored} of an OLMoE and would compute a different function: use transformers."
    return {"note": note} if ignored else {}


def _router_of(source: Checkpoint, layer: int) -> Piece:
    config = source.config
    block = config.layer_to_block[layer]
    shared = source.piece(f"model.routers.{block}.weight")
    if config.router_type == "linear" or not config.router_rank:
        return shared
    index = config.router_blocks[block].index(layer)
    up = source.piece(f"model.routers.{block}.up", index)
    down = source.piece(f"model.routers.{block}.down", index)

    def merge():
        return shared.read().float() + up.read().float() @ down.read().float()

    # In float32 for any dtype of the model: a rounded sum would route some tokens to different experts.
    return Piece(shared.shape, torch.float32, (*shared.sources, *up.sources, *down.sources), merge)
