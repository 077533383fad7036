# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Monitors and balances the routing of models that `Trainer` or a trainer of TRL trains."""

import math
from contextlib import ExitStack

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from modeling_pathmoe import PathMoERouter, update_selection_bias
from pathmoe.paths import PathTrace, adjacent_jaccard, expert_load, path_coverage, record_paths, routing_entropy
from pathmoe.paths.hooks import check_type
from pathmoe.train.routing_monitor import find_collapse, measure_load


logger = logging.get_logger(__name__)


class PathMoECallback(TrainerCallback):
    """Adds the routing to the logs of a trainer, warns of collapse, and updates the selection bias of a PathMoE.

    Every `routing_steps` optimizer steps, it measures all micro-batches of the step on all ranks, without padding,
    and adds to the trainer's next log, and so to its trackers:

    - `routing/load_cv`: The coefficient of variation of the experts' load, of the layer with the largest one.
    - `routing/effective_experts`: The exponential of the load's entropy, of the layer with the fewest: k if the layer
      has collapsed, E if it is balanced.
    - `routing/dead_experts`: The number of experts that no token chooses, over all layers.
    - `routing/entropy`: The mean entropy of the routers' probabilities, in bits.
    - `routing/agreement`: The mean Jaccard similarity of the expert sets of adjacent layers, of the main process.
    - `routing/path_coverage_100`: The share of tokens on the 100 most frequent paths, of the main process.

    If a PathMoE has a `router_bias_update_rate`, it counts the load of every step, also where the trainer computes the
    loss itself, and calls [`update_selection_bias`] after every optimizer step.

    Args:
        trainer (`Trainer`): The trainer, or a subclass of it. Its model is any that [`record_paths`] accepts.
        routing_steps (`int`, *optional*): The number of steps between two measurements; 0 means never. By default, the
            trainer's `logging_steps`.

    Raises:
        TypeError: If the model has no routers that are recognised.
        ValueError: If `routing_steps` is negative, or the trainer compiles the model, whose routing is then hidden.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, args, train_dataset=dataset)
    >>> trainer.add_callback(PathMoECallback(trainer))
    >>> trainer.train()
    ```
    """

    def __init__(self, trainer: Trainer, routing_steps: int | None = None):
        check_type("trainer", trainer, Trainer)
        if routing_steps is not None and (not isinstance(routing_steps, int) or routing_steps < 0):
            raise ValueError(f"routing_steps={routing_steps!r} must not be negative or a fraction; 0 means never.")
        if trainer.args.torch_compile:
            raise ValueError("torch_compile=True hides the routing: set it to False, or leave PathMoECallback out.")
        with record_paths(trainer.model):  # refuses models without routers before the training starts
            self.trainer, self.routing_steps = trainer, routing_steps
        self.recording, self.is_due = ExitStack(), False
        self.trace: PathTrace | None = None
        self.biased_routers: list[PathMoERouter] = []
        self.measured: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        # Before the trackers, so that they see what this callback adds to the logs.
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        if self.routing_steps is None:
            self.routing_steps = state.logging_steps
        routers = [module for module in self.trainer.model.modules() if isinstance(module, PathMoERouter)]
        self.biased_routers = [router for router in routers if router.bias_update_rate]

    def on_step_begin(self, args, state, control, **kwargs):
        step = state.global_step + 1
        first = step == 1 and args.logging_first_step
        self.is_due = self.routing_steps > 0 and (first or step % self.routing_steps == 0)
        if self.is_due or self.biased_routers:
            recorder = record_paths(self.trainer.model, probabilities=self.is_due, only_training=True)
            self.trace = self.recording.enter_context(recorder)

    def on_optimizer_step(self, args, state, control, **kwargs):
        # The trace has no dense layers, and PEFT keeps a router beside its trained copy, with the same layers.
        moe_layers = sorted({layer for router in self.biased_routers for layer in router.layers})
        experts = self.trace.experts if self.biased_routers else None  # every access collects the trace anew
        for router in self.biased_routers:
            for layer, load in zip(router.layers, router.load):
                load.copy_(experts[:, moe_layers.index(layer)].flatten().bincount(minlength=len(load)))
        update_selection_bias(self.trainer.model)

    def on_step_end(self, args, state, control, **kwargs):
        self.recording.close()
        trace, self.trace = self.trace, None
        if not self.is_due:
            return
        experts = trace.experts
        load, entropy = self.reduce(trace, experts)
        measured = measure_load(load)
        self.measured = {
            "routing/load_cv": max(measured["load_cv"]),
            "routing/effective_experts": min(measured["effective_experts"]),
            "routing/dead_experts": sum(measured["dead_experts"]),
            "routing/entropy": entropy.mean().item() / math.log(2),
            "routing/path_coverage_100": path_coverage(experts, 100),
        }
        if trace.model.num_layers > 1:
            self.measured["routing/agreement"] = adjacent_jaccard(experts)
        for warning in find_collapse(measured) if state.is_world_process_zero else []:
            logger.warning(f"step {state.global_step}: {warning}")

    def reduce(self, trace: PathTrace, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the load `(L, E)`, whose rows sum to k, and the routers' entropy `(L,)` in nats, over all ranks."""
        accelerator = self.trainer.accelerator
        load = expert_load(experts, trace.model.num_experts) * trace.model.top_k
        means = torch.cat([load, routing_entropy(trace.probabilities)[:, None], torch.ones(len(load), 1)], dim=1)
        sums = accelerator.reduce((means * len(experts)).float().to(accelerator.device), reduction="sum").cpu()
        means = sums / sums[:, -1:]
        return means[:, :-2], means[:, -2]

    def on_log(self, args, state, control, logs=None, **kwargs):
        is_training = logs is not None and "loss" in logs
        if is_training and self.measured:
            logs.update(self.measured)
            state.log_history[-1].update(self.measured)
            self.measured = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.recording.close()
