# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What changes while a model is trained: the loop changes it, and a checkpoint holds it."""

from dataclasses import dataclass, field

import torch

from pathmoe.text.batches import Batches, Prefetch


def new_counters() -> dict:
    """The counters before the first step."""
    averages = {"losses_seen": 0, "loss_mean": 0.0, "loss_variance": 0.0}
    return {"skipped_steps": 0, "bad_steps_in_a_row": 0, **averages, "healthy": True, "changes": []}


@dataclass
class TrainState:
    """The state of a run.

    Args:
        model (`torch.nn.Module`): The model, as it was after `prepare`.
        optimizer (`torch.optim.Optimizer`): AdamW, as it was after `prepare`.
        scheduler (`torch.optim.lr_scheduler.LambdaLR`): The learning rate.
        batches (`Batches` or `Prefetch`): The training text, and the place in it.
        counters (`dict`): What else the run remembers from step to step, in JSON's types.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    batches: Batches | Prefetch
    counters: dict = field(default_factory=new_counters)
