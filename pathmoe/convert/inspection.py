# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Describes checkpoints by their configuration and the headers of their files."""

from collections import Counter
from pathlib import Path

import torch

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..accounting import active_parameters
from ..command import UserError
from ..files import read_json
from .checkpoint import Checkpoint
from .layouts import DENSE, export_config, gate_of
from .shapes import PER_EXPERT, moe_layers


def inspect_checkpoint(src: str | Path) -> dict:
    """Describes a checkpoint without loading it.

    Args:
        src (`str` or `Path`): Folder of a causal language model.

    Returns:
        `dict`: `model_type`; the numbers of `parameters`, of `active` ones (those that one token uses) and of those of
        `routers`; `bytes`; `dtypes`; `layers`; for a mixture of experts `experts`, `top_k` and `blocks`, the layers
        that share a router; for a PathMoE `router_type`, `router_sharing` and `exports_to`, an architecture or the
        reason why the model cannot be exported; `made_by`, the conversion that wrote the checkpoint.
    """
    source = Checkpoint(src)
    config = source.config
    known = config.model_type in ("pathmoe", *PER_EXPERT, *DENSE)
    if known:
        source.check_fit()
    sizes = {name: torch.Size(shape).numel() for name, shape in source.shapes.items()}
    result = {
        "model_type": config.model_type,
        "parameters": sum(sizes.values()),
        "active": active_parameters(sizes, config),
        "routers": sum(size for name, size in sizes.items() if ".routers." in name or ".gate.weight" in name),
        "bytes": sum(sizes[name] * dtype.itemsize for name, dtype in source.dtypes.items()),
        "dtypes": dict(Counter(str(dtype).removeprefix("torch.") for dtype in source.dtypes.values())),
        "layers": config.num_hidden_layers,
    }
    if any(".experts." in name for name in sizes):
        result |= {"experts": config.num_experts, "top_k": config.num_experts_per_tok}
    if isinstance(config, PathMoEConfig):
        result |= {name: getattr(config, name) for name in ("router_type", "router_sharing")}
        result["blocks"] = config.router_blocks
        try:
            result["exports_to"] = export_config(config, "auto").model_type
        except ValueError as error:
            result["exports_to"] = str(error)
    elif config.model_type in PER_EXPERT:
        result["blocks"] = equal_routers(source)
    manifest = source.folder / "conversion.json"
    if manifest.is_file():
        written = read_json(manifest)
        if missing := {"operation", "source", "verified"} - written.keys():
            raise UserError(f"{manifest} lacks {', '.join(sorted(missing))}: remove it.")
        result["made_by"] = {name: written[name] for name in ("operation", "source", "verified")}
    if not known:
        result["not checked"] = f"whether the tensors are those of a {config.model_type}"
    return result


def equal_routers(source: Checkpoint) -> list[list[int]]:
    """Returns the runs of consecutive MoE layers of a foreign model whose routers are equal to the bit."""
    first, *others = moe_layers(source.config)
    blocks = [[first]]
    for layer in others:
        if torch.equal(gate_of(source, blocks[-1][-1]).read(), gate_of(source, layer).read()):
            blocks[-1].append(layer)
        else:
            blocks.append([layer])
    return blocks
