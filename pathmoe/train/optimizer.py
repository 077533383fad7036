# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Optimizer and learning rate scheduler of a recipe."""

from collections import defaultdict
from functools import partial

import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from pathmoe.train.muon import Muon
from pathmoe.train.recipe import Recipe
from pathmoe.train.start import parameters_of_start


def build_optimizer(recipe: Recipe, model: torch.nn.Module):
    """Builds the optimizer of a recipe and its scheduler. Weight decay applies to matrices but not to vectors."""
    groups, keeps_start = defaultdict(list), parameters_of_start(recipe, model)
    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_router = "routers." in name
            scale = recipe.router_learning_rate_scale if is_router else 1.0
            muon = recipe.optimizer == "muon" and parameter.ndim >= 2 and not is_router and id(parameter) not in ends
            groups[parameter.ndim >= 2 and id(parameter) not in keeps_start, scale, muon].append(parameter)
    groups = [
        {
            "params": groups[key],
            "weight_decay": recipe.weight_decay if key[0] else 0.0,
            "lr": recipe.learning_rate * key[1],
            **({"muon": key[2]} if recipe.optimizer == "muon" else {}),
        }
        for key in sorted(groups, reverse=True)
    ]
    optimizer_class = partial(Muon, momentum=recipe.muon_momentum) if recipe.optimizer == "muon" else torch.optim.AdamW
    optimizer = optimizer_class(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=recipe.ep_size == 1,  # no kernel supports parameters of several device meshes at once
        foreach=False if recipe.ep_size > 1 else None,
    )
    if recipe.schedule == "cosine":
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, recipe.steps("warmup_steps"), recipe.max_steps, min_lr_rate=recipe.min_lr_ratio
        )
    else:
        scheduler = get_wsd_schedule(
            optimizer,
            recipe.steps("warmup_steps"),
            recipe.steps("decay_steps"),
            num_training_steps=recipe.max_steps,
            min_lr_ratio=recipe.min_lr_ratio,
        )
    return optimizer, scheduler
