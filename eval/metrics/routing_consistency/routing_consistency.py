# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Routing consistency, as a module of `evaluate`: the share of experts that adjacent layers of a PathMoE share.

import evaluate
metric = evaluate.load("eval/metrics/routing_consistency")
metric.compute(predictions=["Some text."], model=model, tokenizer=tokenizer)["routing_consistency"]
"""

import datasets
import evaluate
import torch

from pathmoe.paths import adjacent_jaccard, record_paths


INPUTS = """
Args:
    predictions (`list[str]`): Texts that the model reads, one at a time and without padding.
    model (`PreTrainedModel`): A PathMoE, which is used in evaluation mode.
    tokenizer (`PreTrainedTokenizerBase`): The tokenizer of the model.
    max_length (`int`, *optional*): The most tokens to read of a text; longer texts are truncated. Defaults to the
        model's `max_position_embeddings`.

Returns:
    `dict`: `routing_consistency`, the mean Jaccard similarity of a token's expert sets in adjacent layers, from 0 to 1
    (arXiv 2603.18297); `chance`, approximately the similarity of random sets; the numbers of `tokens` and of
    `truncated` texts.

Raises:
    TypeError: If the model has no known routers.
    ValueError: If no text has a token, or the model has one layer.
"""


class RoutingConsistency(evaluate.Metric):
    """Mean Jaccard similarity of the expert sets of adjacent layers."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer, max_length=None):
        max_length = max_length or model.config.max_position_embeddings
        if model.config.num_hidden_layers < 2:
            raise ValueError("num_hidden_layers=1: there are no adjacent layers to compare.")
        texts = [ids for ids in tokenizer(predictions, verbose=False)["input_ids"] if ids]
        if not texts:
            raise ValueError(f"None of the {len(predictions)} texts has a token.")
        was_training = model.training
        model.eval()
        with record_paths(model) as trace, torch.no_grad():
            for ids in texts:
                model.base_model(torch.tensor([ids[:max_length]], device=model.device), use_cache=False)
        model.train(was_training)
        experts = trace.experts
        k = experts.shape[-1]
        return {
            "routing_consistency": adjacent_jaccard(experts),
            "chance": k / (2 * model.config.num_experts - k),
            "tokens": len(experts),
            "truncated": sum(len(ids) > max_length for ids in texts),
        }
