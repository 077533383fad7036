# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures of expert paths, one function each. Entropies and information are in nats.

Shapes: T tokens, L routed layers, E experts, k chosen experts. Labels are any integers, one per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Interval:
    """A point estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def path_ids(experts: torch.Tensor) -> torch.Tensor:
    """Numbers the distinct top-1 paths 0, 1, …: int64 labels `(T,)`, equal where paths are equal."""
    raise NotImplementedError


def distinct_paths(experts: torch.Tensor) -> int:
    """The number of distinct top-1 paths."""
    raise NotImplementedError


def path_entropy(experts: torch.Tensor) -> float:
    """H = -Σ p log p over the shares p of the distinct top-1 paths, in nats."""
    raise NotImplementedError


def path_perplexity(experts: torch.Tensor) -> float:
    """exp(path_entropy): how many equally frequent paths would be as spread."""
    raise NotImplementedError


def expert_load(experts: torch.Tensor, num_experts: int, layer_to_block: list[int] | None = None) -> torch.Tensor:
    """Share of the choices that fall on each expert: `(L, E)`, or `(blocks, E)` given `layer_to_block`; rows sum to 1."""
    raise NotImplementedError


def load_variation(load: torch.Tensor) -> torch.Tensor:
    """Coefficient of variation (population standard deviation over mean) of each row of an `expert_load`."""
    raise NotImplementedError


def load_entropy(load: torch.Tensor) -> torch.Tensor:
    """Entropy of each row of an `expert_load`, in nats; log E when balanced."""
    raise NotImplementedError


def routing_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean entropy of a token's router probabilities `(T, L, E)`, for each layer: `(L,)`, in nats."""
    raise NotImplementedError


def jaccard_matrix(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Mean Jaccard similarity of a token's expert sets in each pair of layers: `(L, L)`."""
    raise NotImplementedError


def sustained_engagement(experts: torch.Tensor, length: int) -> float:
    """Share of tokens that keep some expert for at least `length` consecutive layers."""
    raise NotImplementedError


def mutual_information(first: torch.Tensor, second: torch.Tensor) -> float:
    """I(A; B) of two labellings of the same tokens, in nats. With `path_ids` as one of them: path mutual information."""
    raise NotImplementedError


def normalized_mutual_information(first: torch.Tensor, second: torch.Tensor) -> float:
    """2 I(A; B) / (H(A) + H(B)): 0 when independent, 1 when the labellings are the same partition."""
    raise NotImplementedError


def cluster_purity(clusters: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of tokens whose label is the most frequent one of their cluster."""
    raise NotImplementedError


def permutation_baseline(
    measure: Callable, clusters: torch.Tensor, labels: torch.Tensor, permutations: int = 20, seed: int = 0
) -> Interval:
    """What `measure(clusters, labels)` gives when the labels are shuffled: mean, and the central 95 %."""
    raise NotImplementedError


def bootstrap(
    measure: Callable,
    document_ids: torch.Tensor,
    *values: torch.Tensor,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`measure(*values)` with a percentile bootstrap interval over documents, which are drawn with replacement."""
    raise NotImplementedError


def subsample_documents(document_ids: torch.Tensor, tokens: int, seed: int = 0) -> torch.Tensor:
    """Indices of exactly `tokens` tokens of whole documents in random order (the last one cut), in reading order."""
    raise NotImplementedError


def path_counts(experts: torch.Tensor) -> torch.Tensor:
    """How many tokens take each distinct path, the most frequent first. A path is the top-1 expert of every layer.

    Args:
        experts (`torch.Tensor` of shape `(tokens, layers, k)`): Expert indices, best first.

    Returns:
        `torch.Tensor` of shape `(distinct paths,)`, int64: Its length is the number of distinct paths.
    """
    _, counts = experts[:, :, 0].unique(dim=0, return_counts=True)
    return counts.sort(descending=True).values


def path_coverage(experts: torch.Tensor, top: int) -> float:
    """The share of tokens that take one of the `top` most frequent paths.

    Args:
        experts (`torch.Tensor` of shape `(tokens, layers, k)`): Expert indices, best first.
        top (`int`): Number of paths.
    """
    counts = path_counts(experts)
    return (counts[:top].sum() / counts.sum()).item()


def adjacent_jaccard(experts: torch.Tensor) -> float:
    """Agreement of neighbouring layers: the mean Jaccard similarity |A ∩ B| / |A ∪ B| of a token's two expert sets.

    Two sets of k experts out of E that are drawn at random have about k / (2E - k).

    Args:
        experts (`torch.Tensor` of shape `(tokens, layers, k)`): Expert indices; k different ones in each layer.
    """
    shared = (experts[:, :-1, :, None] == experts[:, 1:, None, :]).sum(dim=(-2, -1))
    return (shared / (2 * experts.shape[-1] - shared)).double().mean().item()
