# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Losses of a language model with routers. The cross-entropy never holds the logits of the whole batch.

torch's `linear_cross_entropy` does not hold them either, but sums a bfloat16 loss in bfloat16: over 4,096 tokens, the
mean was wrong by 0.2.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .routing_pathmoe import autocast_dtype, no_autocast


logger = logging.get_logger(__name__)

# Smaller chunks make the matmul with the head inefficient.
CHUNK_TOKENS = 1024


class LinearCrossEntropy(torch.autograd.Function):
    """Sums the losses chunk by chunk, and computes the gradients in the same pass, in the memory of the logits."""

    @staticmethod
    def forward(ctx, hidden_states, weight, labels, ignore_index):
        needs_hidden_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        grad_hidden_states = torch.empty_like(hidden_states) if needs_hidden_grad else None
        grad_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        for start in range(0, len(labels), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            counted = (labels[chunk] != ignore_index).unsqueeze(1)
            targets = labels[chunk].unsqueeze(1).where(counted, 0)
            # `where` instead of a product: an ignored position may hold inf or nan.
            inputs = hidden_states[chunk].where(counted, 0)
            log_probs = (inputs @ weight.t()).log_softmax(dim=1, dtype=torch.float32)
            total -= (log_probs.gather(1, targets) * counted).sum()
            if not (needs_hidden_grad or needs_weight_grad):
                continue
            grad_logits = log_probs.exp_()
            grad_logits.scatter_add_(1, targets, grad_logits.new_full(targets.shape, -1.0))
            grad_logits = grad_logits.to(weight.dtype)
            if needs_hidden_grad:
                torch.mul(grad_logits @ weight, counted, out=grad_hidden_states[chunk])
            if needs_weight_grad:
                grad_chunk = grad_logits.t() @ inputs
                # Several chunks are summed in float32; a single one needs no sum.
                grad_weight = grad_chunk if grad_weight is None else grad_weight.float().add_(grad_chunk)
        if needs_weight_grad and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.gradients = grad_hidden_states, grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx, grad):
        if ctx.gradients is None or torch.is_grad_enabled():
            raise RuntimeError(
                "The loss without logits keeps no graph for a second backward or a second derivative: compute it from "
                "the logits (skip_logits=False)."
            )
        # Scaled in place and released, because the weight's gradient is as large as the head. `grad` is a scalar and
        # does not promote the gradients; rounding it to bfloat16 would make them less exact.
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.LongTensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.LongTensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Computes the loss of transformers' `ForCausalLMLoss` on `hidden_states @ weight.T` in float32, for one backward.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, sequence, D)`): Input of the head.
        weight (`torch.Tensor` of shape `(vocab_size, D)`): The head's weight.
        labels (`torch.LongTensor` of shape `(batch, sequence)`): Token ids to predict, unshifted.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Divisor of the summed loss; the number of targets
            when unset.
        ignore_index (`int`, defaults to -100): Label of positions that are not predicted.
        shift_labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Labels that are already shifted, in
            place of `labels`.
        **kwargs: Other arguments of the model, which are ignored, as in `ForCausalLMLoss`.

    Returns:
        `torch.Tensor`, a scalar: The loss.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.flatten().to(hidden_states.device)
    device_type = hidden_states.device.type
    dtype = autocast_dtype(device_type) or weight.dtype
    with no_autocast(device_type):
        hidden_states, weight = hidden_states.flatten(0, -2).to(dtype), weight.to(dtype)
        if not torch.is_grad_enabled():  # `needs_input_grad` does not depend on it
            hidden_states, weight = hidden_states.detach(), weight.detach()
        total = LinearCrossEntropy.apply(hidden_states, weight, shift_labels, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def weigh_router_losses(
    config: PreTrainedConfig,
    aux_loss: torch.Tensor,
    z_loss: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """Returns the sum of the router losses, each times its coefficient, as it is added to a cross-entropy.

    Args:
        config (`PreTrainedConfig`): Holds `router_aux_loss_coef` and `router_z_loss_coef`.
        aux_loss (`torch.Tensor`, scalar): The load-balancing loss.
        z_loss (`torch.Tensor`, scalar): The router z-loss.
        labels (`torch.Tensor` of shape `(batch, sequence)`): Labels of the cross-entropy.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): Number of targets of the whole optimizer step. The
            router losses are then weighted by this micro-batch's share of them, as its cross-entropy is.
        shift_labels (`torch.Tensor` of shape `(batch, sequence)`, *optional*): Targets in place of shifted `labels`.

    Returns:
        `torch.Tensor`: A scalar.
    """
    loss = config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
    if num_items_in_batch is None:
        return loss
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return loss * (targets != -100).sum().to(loss.device) / num_items_in_batch


def warn_of_missing_labels(config: PreTrainedConfig, output_router_logits: bool):
    """Warns once if a model is trained without labels although its configuration asks for router losses.

    A trainer that computes the loss from the logits passes no labels, as `Trainer` does with `label_smoothing_factor`.
    Its loss then lacks the router losses, unless it adds `aux_loss` itself, for which it requests the router logits.
    """
    fields = ["router_z_loss_coef"]
    fields += [] if output_router_logits else ["router_aux_loss_coef"]
    unused = [f"{name}={getattr(config, name)}" for name in fields if getattr(config, name)]
    if unused and not torch.compiler.is_compiling():
        logger.warning_once(
            f"PathMoE is trained without labels, so {', '.join(unused)} has no effect: pass labels to the model (with "
            "Trainer, set label_smoothing_factor=0), or set these fields to 0."
        )
