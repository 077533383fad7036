# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The load-balancing loss of a whole optimizer step, over its micro-batches and ranks (arXiv 2501.11873).

A loss per micro-batch asks that every few sequences use all experts alike, which keeps experts from specialising. The
loss E Σ f P of the global batch has the same value and gradients as if one process computed it in one forward: f, the
share of tokens that choose each expert, must be that of the whole batch before the first backward pass. With one
micro-batch per rank, that takes one small reduction. With more, the step begins with a forward without gradients.
"""

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_pathmoe import load_balancing_loss
from modeling_pathmoe.cache_pathmoe import PathMoECausalLMOutputWithPast
from pathmoe.train.recipe import Recipe, RecipeError


def check_balance(recipe: Recipe, config: PreTrainedConfig):
    """Checks that a recipe with `balance_over="global_batch"` has a load-balancing loss.

    Raises:
        RecipeError: If the loss is off, or belongs to a model that computes it in a way of its own.
    """
    if recipe.balance_over == "global_batch":
        if config.model_type != "pathmoe":
            raise RecipeError(f"balance_over='global_batch' needs a PathMoE, but model is a {config.model_type}.")
        if not config.router_aux_loss_coef:
            raise RecipeError(
                "balance_over='global_batch' has no effect while router_aux_loss_coef is 0: set it in model_overrides."
            )


class GlobalBatchBalance:
    """Replaces the load-balancing loss of a micro-batch by its share of that of the global batch.

    Args:
        model (`PreTrainedModel`): The PathMoE, unwrapped.
        wrapped (`torch.nn.Module`): The model as the engine has wrapped it.
        accelerator (`Accelerator`): The engine.
    """

    def __init__(self, model: PreTrainedModel, wrapped: torch.nn.Module, accelerator: Accelerator):
        self.config, self.wrapped, self.accelerator = model.config, wrapped, accelerator
        self.load: torch.Tensor | None = None

    def begin_step(self, micro_batches: list[dict[str, torch.Tensor]]):
        """Measures the load of a step of several micro-batches, with the random numbers that the step will draw."""
        self.load, self.share = None, 1 / len(micro_batches)
        if len(micro_batches) > 1:
            with torch.random.fork_rng(), torch.no_grad():
                loads = [self.measure(self.wrapped(**self.without_labels(inputs))) for inputs in micro_batches]
            self.load = self.reduce(torch.stack(loads).mean(dim=0))

    @staticmethod
    def without_labels(inputs: dict[str, torch.Tensor]) -> dict:
        others = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        return others | {"use_cache": False, "logits_to_keep": 1, "output_router_logits": True}

    def measure(self, output: PathMoECausalLMOutputWithPast) -> torch.Tensor:
        """Returns the load `(L, E)` of a forward; rows sum to k."""
        top_k, experts = self.config.num_experts_per_tok, self.config.num_experts
        chosen = [logits.float().softmax(dim=-1).topk(top_k, dim=-1).indices for logits in output.router_logits]
        return torch.stack([x.flatten().bincount(minlength=experts).float() / len(x) for x in chosen])

    def reduce(self, load: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(load, reduction="mean") if self.accelerator.num_processes > 1 else load

    def correct(self, output: PathMoECausalLMOutputWithPast, share_of_targets: torch.Tensor) -> torch.Tensor:
        """Returns what to add to the loss of a micro-batch, which has its own load-balancing loss in it.

        Args:
            output (`PathMoECausalLMOutputWithPast`): The output of the model, with router logits.
            share_of_targets (`torch.Tensor`, scalar): The weight of the micro-batch's own loss in the step.
        """
        if self.load is None:
            self.load = self.reduce(self.measure(output).detach())
        config = self.config
        whole = load_balancing_loss(
            output.router_logits, config.num_experts, config.num_experts_per_tok, load=self.load
        )
        return config.router_aux_loss_coef * (self.share * whole - share_of_targets * output.aux_loss)
