# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The state of a training run, which the training loop updates and checkpoints save."""

from dataclasses import dataclass, field

import torch

from pathmoe.text.batches import Batches, Prefetch


def new_counters() -> dict:
    """Returns the counters before the first step."""
    averages = {"losses_seen": 0, "loss_mean": 0.0, "loss_variance": 0.0}
    return {"skipped_steps": 0, "bad_steps_in_a_row": 0, **averages, "healthy": True, "changes": []}


@dataclass
class TrainState:
    """The state of a run.

    Args:
        model (`torch.nn.Module`): The model returned by `prepare`.
        optimizer (`torch.optim.Optimizer`): The AdamW optimizer returned by `prepare`.
        scheduler (`torch.optim.lr_scheduler.LambdaLR`): The learning rate scheduler.
        batches (`Batches` or `Prefetch`): The training text and the current position in it.
        counters (`dict`): All other values that the run keeps from step to step. They must be JSON-serializable.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    batches: Batches | Prefetch
    counters: dict = field(default_factory=new_counters)
