# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What happens when a loss, a gradient, a weight or an evaluation is not finite."""

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
    "Go on from an older checkpoint with a lower learning rate: --resume OUTPUT_DIR/checkpoints/step-… "
    "--learning_rate …"
)


class Diverged(UserError, ArithmeticError):
    """The loss or the gradients have not been finite for several steps. What was saved before that is whole."""


def skip_bad_step(recipe: Recipe, model, counters: dict, log: Log, step: int, loss: float, norm: float):
    """Notes a step whose loss or gradients are not finite, which is not taken, and gives up after several in a row."""
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
        f"step {step} | WARNING: skipped, not finite: {where} (loss {loss}, gradient norm {norm})",
        step=step,
        skipped_steps=counters["skipped_steps"],
        not_finite=bad[:16] or ["loss"],
    )
    for module in model.modules():
        if isinstance(module, PathMoERouter) and module.bias_update_rate:
            module.load.zero_()
    if counters["bad_steps_in_a_row"] >= recipe.max_bad_steps:
        raise Diverged(
            f"{recipe.max_bad_steps} steps in a row were not finite, the last at step {step} (loss {loss}, gradient "
            f"norm {norm}); not finite: {where}. Lower learning_rate={recipe.learning_rate}. {WAY_OUT}"
        )


def check_weights(model: torch.nn.Module, step: int):
    """Refuses to save weights that are not finite.

    Raises:
        Diverged: On all ranks, if any of them has such weights.
    """
    bad = [
        name
        for name, parameter in model.named_parameters()
        if not torch.isfinite(parameter.to_local() if isinstance(parameter, DTensor) else parameter).all()
    ]
    if bad := sorted(set(gather_object(bad))):
        raise Diverged(f"step {step}: {bad[0]} holds values that are not finite. {WAY_OUT}")


def check_evaluation(metrics: dict[str, float], step: int):
    """Refuses a result whose evaluation is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name}={value} is not finite, so that no result is written. {WAY_OUT}")
