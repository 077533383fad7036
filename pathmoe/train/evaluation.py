# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of the validation loss."""

import math

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from pathmoe.train.data import count_targets, make_inputs
from pathmoe.train.recipe import Recipe


def loss_only_kwargs(model) -> dict[str, bool]:
    """Returns the arguments with which PathMoE computes the loss without holding all logits.

    The result is empty for other models and when the head is sharded.
    """
    return {"skip_logits": True} if getattr(model, "can_skip_logits", False) else {}


@torch.no_grad()
def evaluate(model, held_out: np.ndarray, recipe: Recipe, accelerator: Accelerator) -> dict[str, float]:
    """Measures the mean cross-entropy of the next token (in nats) over the validation blocks, and its exponential.

    Every rank runs the same number of forwards, because the forward of a sharded model is a collective operation.
    """
    model.eval()
    # Other MoE models add a balancing loss whenever they return router logits.
    unwrapped = accelerator.unwrap_model(model)
    plain = {"output_router_logits": False} if hasattr(unwrapped.config, "output_router_logits") else {}
    plain |= loss_only_kwargs(unwrapped)
    rows = recipe.micro_batch_size
    stride = rows * accelerator.num_processes
    totals = torch.zeros(2, dtype=torch.float64)
    starts = range(accelerator.process_index * rows, -(-len(held_out) // stride) * stride, stride)
    for start in tqdm(starts, desc="validate", leave=False, disable=None if accelerator.is_main_process else True):
        real = held_out[start : start + rows]
        tokens = torch.from_numpy(np.array(real if len(real) else held_out[:1], dtype=np.int64))
        inputs = make_inputs(tokens.to(accelerator.device), recipe, unwrapped.config.eos_token_id)
        total = model(**inputs, num_items_in_batch=1, use_cache=False, **plain).loss
        totals += torch.stack([total.double().cpu(), count_targets(inputs).double().cpu()]) * bool(len(real))
    total, count = accelerator.reduce(totals.to(accelerator.device, torch.float32), reduction="sum").tolist()
    model.train()
    loss = total / count if count else math.nan
    return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss))}
