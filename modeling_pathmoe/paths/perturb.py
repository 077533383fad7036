# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Perturbations of routing: how much perplexity rises when tokens are sent down other paths."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .measure import Interval
from .record import PathTrace


@dataclass(frozen=True)
class PerturbationCurve:
    """Perplexity under a perturbation of growing strength; `dataclasses.asdict` makes it JSON.

    Attributes:
        name (`str`): The perturbation.
        axis (`str`): What `values` are.
        values (`list`): Strengths, one per point.
        baseline (`Interval`): Perplexity of the model as it is.
        perplexity (`list[Interval]`): Perplexity at each point.
        rise (`list[Interval]`): Perplexity at each point over the baseline, minus 1; documents are paired.
    """

    name: str
    axis: str
    values: list
    baseline: Interval
    perplexity: list[Interval]
    rise: list[Interval]


def document_losses(
    model: PreTrainedModel, documents: list[list[int]], max_length: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy in nats and number of predicted tokens of each document: two tensors `(documents,)`."""
    raise NotImplementedError


def shuffle_experts(
    model: PreTrainedModel,
    documents: list[list[int]],
    scope: str = "each_layer",
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
    max_length: int = 1024,
    seed: int = 0,
) -> PerturbationCurve:
    """Expert indices replaced through a random permutation; scope `"each_layer"`, `"same"` or `"one_layer"`."""
    raise NotImplementedError


def noise_router(
    model: PreTrainedModel,
    documents: list[list[int]],
    on: str = "logits",
    strengths: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
    max_length: int = 1024,
    seed: int = 0,
) -> PerturbationCurve:
    """Gaussian noise on the router `"logits"`, or on the `"hidden_states"` that the router sees."""
    raise NotImplementedError


def freeze_routing(
    model: PreTrainedModel, documents: list[list[int]], spans: tuple[int, ...] = (2, 4, 8), max_length: int = 1024
) -> PerturbationCurve:
    """Layers repeat the decision of the layer before; in each span of n layers only the first decides."""
    raise NotImplementedError


def restrict_paths(
    model: PreTrainedModel,
    documents: list[list[int]],
    trace: PathTrace,
    tops: tuple[int | None, ...] = (10, 100, 500, None),
    others: str = "allowed",
    max_length: int = 1024,
) -> PerturbationCurve:
    """Only the K most frequent top-1 paths of `trace` are allowed; `None` means all of them."""
    raise NotImplementedError
