# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Conversion of checkpoints to and from the architectures that the world serves.

    pathmoe convert export SRC DST --to qwen3_moe

A conversion is a plan, a dict from the names of the target's tensors to pieces of the source's, that is written shard
by shard. The target is written aside, compared with its source and renamed; `conversion.json` in it says what became
what.
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
