# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Converts checkpoints to and from architectures that common servers support.

    pathmoe convert export SRC DST --to qwen3_moe

A conversion is a plan: a dict from the names of the target's tensors to pieces of the source's tensors. The target is
written shard by shard to a temporary folder, compared with the source, and renamed. Its `conversion.json` lists the
source of every tensor.
"""

from .exporting import export_checkpoint
from .importing import import_checkpoint
from .inspection import inspect_checkpoint
from .merging import average_checkpoints, prune_experts
from .upcycling import upcycle


__all__ = [
    "average_checkpoints",
    "export_checkpoint",
    "import_checkpoint",
    "inspect_checkpoint",
    "prune_experts",
    "upcycle",
]
