# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Handling of losses, gradients, weights and evaluations that are not finite."""

import math

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from modeling_pathmoe import PathMoERouter
from pathmoe.command import UserError
from pathmoe.train.engine import gather_full
from pathmoe.train.log import Log
from pathmoe.train.recipe import Recipe


WAY_OUT = (
    "Resume from an older checkpoint with a lower learning rate: --resume OUTPUT_DIR/checkpoints/step-… "
    "--learning_rate …"
)


class Diverged(UserError, ArithmeticError):
    """The training has diverged to values that are not finite. Checkpoints that were saved before are intact."""


def skip_bad_step(recipe: Recipe, model, counters: dict, log: Log, step: int, loss: float, norm: float):
    """Logs a step that is skipped because its loss or gradients are not finite.

    Raises:
        Diverged: After `max_bad_steps` such steps in a row.
    """
    counters["skipped_steps"] += 1
    counters["bad_steps_in_a_row"] += 1
    counters["healthy"] = False
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not math.isfinite(gather_full(parameter.grad.norm()).item())
    ]
    where = (
        f"gradients of {', '.join(bad[:4])}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}" if bad else "loss"
    )
    log.write(
        f"step {step} | WARNING: skipped because of non-finite {where} (loss {loss}, gradient norm {norm})",
        step=step,
        skipped_steps=counters["skipped_steps"],
        not_finite=bad[:16] or ["loss"],
    )
    for module in model.modules():
        if isinstance(module, PathMoERouter) and module.bias_update_rate:
            module.load.zero_()
    if counters["bad_steps_in_a_row"] >= recipe.max_bad_steps:
        raise Diverged(
            f"{recipe.max_bad_steps} steps in a row were not finite, most recently step {step} (loss {loss}, gradient "
            f"norm {norm}, non-finite {where}). Lower learning_rate={recipe.learning_rate}. {WAY_OUT}"
        )


def check_weights(model: torch.nn.Module, step: int):
    """Checks that all weights are finite before they are saved.

    Raises:
        Diverged: On all ranks, if any rank has weights that are not finite.
    """
    bad = [
        name
        for name, parameter in model.named_parameters()
        if not torch.isfinite(parameter.to_local() if isinstance(parameter, DTensor) else parameter).all()
    ]
    if bad := sorted(set(gather_object(bad))):
        raise Diverged(f"step {step}: {bad[0]} has values that are not finite. {WAY_OUT}")


def check_evaluation(metrics: dict[str, float], step: int):
    """Checks that the final evaluation is finite.

    Raises:
        Diverged: If it is not.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name}={value} is not finite, so no result is written. {WAY_OUT}")
