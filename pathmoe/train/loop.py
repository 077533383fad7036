# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The training loop: batch → step → log → evaluate → checkpoint."""

import math
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from modeling_pathmoe import update_selection_bias
from pathmoe.train.balance import GlobalBatchBalance
from pathmoe.train.checkpoints import Checkpoints
from pathmoe.train.data import count_targets, make_inputs
from pathmoe.train.divergence import check_evaluation, check_weights, skip_bad_step
from pathmoe.train.engine import StopOnSignal, accumulate, clip_gradients, gradient_norm
from pathmoe.train.evaluation import evaluate, loss_only_kwargs
from pathmoe.train.log import Log, is_spike
from pathmoe.train.recipe import Recipe
from pathmoe.train.routing_monitor import RoutingMonitor, find_collapse
from pathmoe.train.state import TrainState
from pathmoe.train.throughput import Throughput, measure_peak_memory


@dataclass
class Step:
    """The result of one optimizer step.

    Args:
        number (`int`): The number of the step, counted from 1.
        loss (`float`): The mean cross-entropy over the targets of the step, in nats.
        grad_norm (`float`): The 2-norm of the gradients before clipping.
        lr (`float`): The learning rate of the step.
        routing (`dict`, *optional*): The result of [`RoutingMonitor.measure`], if the routing was measured.
        stopping (`bool`): Whether any rank was asked to stop.
    """

    number: int
    loss: float
    grad_norm: float
    lr: float
    routing: dict | None
    stopping: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainingLoop:
    """Runs the optimizer steps, and logs, evaluates and saves between them.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        state (`TrainState`): The state that is trained.
        held_out (`np.ndarray` of shape `(blocks, sequence_length)`): The validation text.
        checkpoints (`Checkpoints`): The checkpoints of `state`.
        log (`Log`): The log of the metrics.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        state: TrainState,
        held_out: np.ndarray,
        checkpoints: Checkpoints,
        log: Log,
    ):
        self.recipe, self.accelerator, self.state = recipe, accelerator, state
        self.held_out, self.checkpoints, self.log = held_out, checkpoints, log
        self.model = accelerator.unwrap_model(state.model)
        self.config = self.model.config
        self.accumulation = recipe.batch_size // (recipe.micro_batch_size * accelerator.num_processes)
        self.monitor = RoutingMonitor(self.model, accelerator) if self.config.model_type == "pathmoe" else None
        self.balance = None
        if recipe.balance_over == "global_batch":
            self.balance = GlobalBatchBalance(self.model, state.model, accelerator)
        self.stop = StopOnSignal()
        self.throughput = Throughput(recipe, accelerator, self.config)

    def train(self, first_step: int) -> bool:
        """Runs the steps after `first_step`.

        Returns:
            `bool`: Whether all steps are done. `False` if a signal stopped the run.

        Raises:
            Diverged: After `max_bad_steps` consecutive steps with a loss or gradients that are not finite, or if the
                weights of a checkpoint or the last evaluation are not finite.
        """
        self.state.model.train()
        bar = tqdm(
            range(first_step + 1, self.recipe.max_steps + 1),
            initial=first_step,
            total=self.recipe.max_steps,
            desc="train",
            disable=None if self.accelerator.is_main_process else True,
        )
        with self.stop:
            for number in bar:
                micro_batches = self.next_batch(number)
                step = self.train_step(number, micro_batches)
                self.report(step)
                with self.throughput.paused():
                    self.evaluate(step)
                    self.save(step)
                if step.stopping and number < self.recipe.max_steps:
                    return False
        return True

    def next_batch(self, number: int) -> list[dict[str, torch.Tensor]]:
        """Returns the model inputs of this rank's micro-batches of a step."""
        recipe, device = self.recipe, self.accelerator.device
        with self.throughput.timed("data"):
            drawn = self.checkpoints.draw_step(number, self.accumulation)
            if device.type == "cuda":
                drawn = [tokens.pin_memory() for tokens in drawn]
        end_of_text = self.config.eos_token_id
        return [make_inputs(tokens.to(device, non_blocking=True), recipe, end_of_text) for tokens in drawn]

    def train_step(self, number: int, micro_batches: list[dict[str, torch.Tensor]]) -> Step:
        """Takes one optimizer step. Skips the update if the loss or the gradients are not finite."""
        state, counters = self.state, self.state.counters
        monitored = self.monitor is not None and is_due(number, self.recipe.routing_every)
        loss, router_logits = self.forward_backward(micro_batches, monitored)
        norm = gradient_norm(self.model)
        loss, norm, stopping = reduce_step_stats(self.accelerator, loss, norm, self.stop.signalled)
        with self.throughput.timed("routing"):
            routing = self.monitor.measure(router_logits) if monitored else None
        del router_logits  # free the memory before the optimizer allocates its states
        lr = float(state.scheduler.get_last_lr()[0])
        step = Step(number, loss, norm, lr, routing, stopping)
        if step.finite:
            clip_gradients(self.model, self.recipe.max_grad_norm, norm)
            state.optimizer.step()
            update_selection_bias(self.model)
            counters["bad_steps_in_a_row"] = 0
            counters["healthy"] = not is_spike(counters, loss)
            if not counters["healthy"]:
                self.log.write(f"step {number} | loss spike: {loss:.4f}, running mean {counters['loss_mean']:.4f}",
                               step=number, loss_spike=loss, grad_norm=norm)  # fmt: skip
        else:
            skip_bad_step(self.recipe, self.model, counters, self.log, number, loss, norm)
        state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        return step

    def forward_backward(self, micro_batches: list[dict[str, torch.Tensor]], monitored: bool):
        """Accumulates the gradients of the micro-batches.

        Returns:
            `tuple`: this rank's share of the cross-entropy (a scalar tensor), and the router logits of the first
            micro-batch (`None` unless `monitored`).
        """
        accelerator, loss_only = self.accelerator, loss_only_kwargs(self.model)
        targets = torch.stack([count_targets(inputs) for inputs in micro_batches]).sum()
        if accelerator.num_processes > 1:
            # Gradients are averaged over the ranks, so the loss is divided by the mean number of targets per rank.
            targets = accelerator.reduce(targets.float(), reduction="mean")
        loss_sum, router_logits = torch.zeros((), device=accelerator.device), None
        if self.balance:
            self.balance.begin_step(micro_batches)
        for number, inputs in enumerate(micro_batches):
            measured = monitored and number == 0
            wanted = {"output_router_logits": True} if measured or self.balance else {}
            with accumulate(accelerator, self.state.model, last=number == len(micro_batches) - 1):
                output = self.state.model(**inputs, num_items_in_batch=targets, use_cache=False, **loss_only, **wanted)
                loss, share = output.loss, count_targets(inputs) / targets
                loss_sum += cross_entropy(output, self.config, share)
                if self.balance:
                    loss = loss + self.balance.correct(output, share)
                router_logits = output.router_logits if measured else router_logits
                del output  # free the logits, the largest tensor in most models
                accelerator.backward(loss)
        return loss_sum, router_logits

    def report(self, step: Step):
        """Logs the step and its routing if they are due. A skipped step has already been logged."""
        recipe, number = self.recipe, step.number
        self.throughput.steps += 1
        if not step.finite:
            return
        if number == recipe.max_steps or is_due(number, recipe.log_every):
            with self.throughput.timed("log"):
                speed = self.throughput.measure()
                eta = timedelta(seconds=int(speed.seconds_per_step * (recipe.max_steps - number)))
                self.log.write(
                    f"step {number}/{recipe.max_steps} | loss {step.loss:.4f} | lr {step.lr:.2e} | "
                    f"{speed.tokens_per_s:,.0f} tokens/s | MFU {speed.mfu:.1%} | ETA {eta}",
                    step=number,
                    loss=step.loss,
                    lr=step.lr,
                    tokens=number * recipe.batch_size * recipe.sequence_length,
                    tokens_per_s=speed.tokens_per_s,
                    mfu=speed.mfu,
                    grad_norm=step.grad_norm,
                    skipped_steps=self.state.counters["skipped_steps"],
                    peak_memory=measure_peak_memory(self.accelerator),
                    **speed.shares,
                )
        if step.routing is not None:
            with self.throughput.timed("log"):
                report_routing(step.routing, find_collapse(step.routing), self.log, number)

    def evaluate(self, step: Step):
        """Measures the validation loss if it is due."""
        last = step.number == self.recipe.max_steps
        if last or is_due(step.number, self.recipe.eval_every):
            metrics = evaluate(self.state.model, self.held_out, self.recipe, self.accelerator)
            self.log.write("step {step} | validation loss {eval_loss:.4f} | perplexity {eval_perplexity:.2f}".format(
                step=step.number, **metrics), step=step.number, **metrics)  # fmt: skip
            if last:
                check_evaluation(metrics, step.number)

    def save(self, step: Step):
        """Writes a checkpoint if one is due or the run has to stop."""
        last = step.number == self.recipe.max_steps
        if last or step.stopping or is_due(step.number, self.recipe.checkpoint_every):
            check_weights(self.model, step.number)
            self.checkpoints.save(step.number)


def is_due(step: int, every: int) -> bool:
    """Returns whether `step` is a multiple of `every`. 0 means never."""
    return bool(every) and step % every == 0


def reduce_step_stats(
    accelerator: Accelerator, loss: torch.Tensor, norm: torch.Tensor, signalled: bool
) -> tuple[float, float, bool]:
    """Averages loss and gradient norm over the ranks, and returns whether any rank was asked to stop.

    All three values share one collective and one device synchronization per step.
    """
    values = torch.stack([loss, norm.to(loss), torch.tensor(float(signalled), device=loss.device)])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="mean")
    loss, norm, signalled = values.tolist()
    return loss, norm, signalled > 0


def report_routing(measured: dict, collapse: list[str], log: Log, step: int):
    effective = measured["effective_experts"]
    agreement = "" if measured["adjacent_jaccard"] is None else f"agreement {measured['adjacent_jaccard']:.2f}, "
    log.write(
        f"step {step} | routing: {agreement}{measured['distinct_paths']} paths of {measured['sampled_tokens']} "
        f"tokens, effective experts {min(effective):.1f} to {max(effective):.1f}, "
        f"{sum(measured['dead_experts'])} dead",
        step=step,
        **measured,
    )
    for warning in collapse:
        log.write(f"step {step} | WARNING: {warning}", step=step, warning=warning)


def cross_entropy(output, config: PreTrainedConfig, share: torch.Tensor) -> torch.Tensor:
    """Subtracts the auxiliary router losses from a micro-batch's loss, so that the cross-entropy is reported.

    Args:
        output: The model's output.
        config (`PreTrainedConfig`): The model's configuration.
        share (`torch.Tensor`): The micro-batch's share of the step's targets. PathMoE weights its router losses by
            this share; other models do not.
    """
    loss = output.loss.detach()
    for name, coefficient in (("aux_loss", "router_aux_loss_coef"), ("z_loss", "router_z_loss_coef")):
        value = getattr(output, name, None)
        if value is not None:
            loss = loss - getattr(config, coefficient, 0.0) * value * (share if config.model_type == "pathmoe" else 1)
    return loss.detach()
