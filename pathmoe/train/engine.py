# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The engine under a run: Accelerate's, or transformers' own FSDP2 with expert parallelism."""

import contextlib
import os
import signal
from collections import defaultdict
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from pathmoe.command import STOPPING, handle_signal
from pathmoe.train.recipe import Recipe, RecipeError


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Starts Accelerate and checks that it runs the engine that the recipe requests.

    Accelerate falls back silently. In the worst case, the processes of one launch do not know of each other.

    Raises:
        RecipeError: If Accelerate runs a different engine, or if its settings do not fit the recipe.
    """
    trackers = [str(name) for name in get_available_trackers()]
    if recipe.tracker not in (None, "all", *trackers):
        raise RecipeError(
            f"tracker={recipe.tracker!r} is not installed: install it, or use one of {trackers} or none."
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        # The other processes wait while the first one prepares the text. If that takes more than an hour, prepare it
        # in a run with one process: the next run reuses the cached tokens.
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # or DDP holds all gradients twice
        ],
    )
    on_cpu = accelerator.device.type == "cpu"
    asks_for_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    if asks_for_fsdp and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.print("Accelerate ignores FSDP on CPU; enabling it here with the gloo backend.")
        plugin = FullyShardedDataParallelPlugin()
        # Both states must be set: Accelerate copies the second one over the first one on every access.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    engines = {
        DistributedType.NO: "cpu" if on_cpu else "gpu",
        DistributedType.MULTI_CPU: "ddp",
        DistributedType.MULTI_GPU: "ddp",
        DistributedType.FSDP: "fsdp",
    }
    found = engines.get(accelerator.distributed_type, accelerator.distributed_type.value)
    if recipe.ep_size > 1 and found == "ddp":
        found = "fsdp_ep"
    wanted = recipe.engine
    if wanted == "auto":
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        wanted = "ddp" if world_size > 1 else "cpu" if on_cpu else "gpu"
        wanted = "fsdp" if asks_for_fsdp else "fsdp_ep" if recipe.ep_size > 1 else wanted
        if world_size != accelerator.num_processes:
            raise RecipeError(
                f"{world_size} processes were launched but each would train alone: use `accelerate launch "
                "--config_file` with a file of configuration/accelerate/."
            )
    if found != wanted:
        file = "ddp" if wanted == "fsdp_ep" else wanted
        raise RecipeError(
            f"engine={wanted!r} was requested (ep_size={recipe.ep_size}) but Accelerate runs {found!r} on "
            f"{accelerator.device.type}: launch with `accelerate launch --config_file configuration/accelerate/"
            f"{file}.yaml` on a machine that supports it, or set engine={found!r}."
        )
    if found == "fsdp":
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise RecipeError(f"fsdp_version={plugin.fsdp_version} of the Accelerate configuration must be 2.")
        if plugin.activation_checkpointing:
            raise RecipeError(
                "fsdp_activation_checkpointing of the Accelerate configuration renames parameters: turn it off and "
                "set gradient_checkpointing=true in the recipe."
            )
        if recipe.precision == "bf16":
            # By default, Accelerate would reduce the gradients and return the loss in bfloat16, too.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32
            )
    if accelerator.num_processes % recipe.ep_size:
        raise RecipeError(
            f"ep_size={recipe.ep_size} must divide the number of processes, {accelerator.num_processes}."
        )
    return accelerator


def accumulate(accelerator: Accelerator, model: torch.nn.Module, last: bool):
    """Returns the context manager for the backward pass of one micro-batch.

    Replicas exchange gradients only with the last micro-batch of a step. Sharded models do so with every micro-batch,
    because full gradients do not fit into memory where a model has to be sharded.
    """
    if last or isinstance(model, FSDPModule):
        return contextlib.nullcontext()
    return accelerator.no_sync(model)


def by_mesh(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Groups the parameters that have a gradient by device mesh."""
    groups = defaultdict(list)
    for parameter in model.parameters():
        if parameter.grad is not None:
            groups[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter)
    return list(groups.values())


@torch.no_grad()
def gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """Computes the 2-norm of all gradients. They are not clipped, as a norm that is not finite would destroy them.

    Returns:
        `torch.Tensor`: A scalar, the same on all ranks.
    """
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in by_mesh(model)]
    return torch.linalg.vector_norm(torch.stack([gather_full(norm) for norm in norms]))


@torch.no_grad()
def clip_gradients(model: torch.nn.Module, max_norm: float, norm: float):
    """Scales all gradients in place so that their norm, as returned by [`gradient_norm`], is at most `max_norm`."""
    scale = max_norm / (norm + 1e-6)
    if scale >= 1:
        return
    for group in by_mesh(model):
        torch._foreach_mul_([p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in group], scale)


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the full tensor of a `DTensor`, and any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class StopOnSignal:
    """Records SIGINT, SIGTERM and SIGHUP, so that the run can stop after the current step."""

    def __init__(self):
        self.signalled, self._before = False, {}

    def __enter__(self):
        for number in STOPPING:
            with contextlib.suppress(ValueError):  # raised outside of the main thread: the caller handles signals
                self._before[number] = handle_signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self.signalled = True
