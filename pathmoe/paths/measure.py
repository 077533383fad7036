# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures of expert paths, one function each. Entropies and information are in nats.

Shapes: T tokens, L routed layers, E experts, k chosen experts. `experts` is `(T, L, k)`, best first, the k of a layer
all different, in any integer dtype; labels are any integers `(T,)`, one per token. The *path* of a token is its top-1
expert in every layer (arXiv 2603.18297). Numbers of paths, entropies and information grow with the number of tokens:
compare models at equal counts (`subsample_documents`) and information with `permutation_baseline`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from .hooks import check_type


@dataclass(frozen=True)
class Interval:
    """A point estimate with an interval.

    Attributes:
        estimate (`float`): The estimate.
        low (`float`): Lower end.
        high (`float`): Upper end.
    """

    estimate: float
    low: float
    high: float


def _check_values(name: str, values: torch.Tensor, dimensions: int = 3):
    check_type(name, values, torch.Tensor)
    if values.ndim != dimensions:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but must have {dimensions} dimensions.")
    if len(values) == 0:
        raise ValueError(f"{name} is empty: there is nothing to measure. Record some tokens first.")


def _check_experts(experts: torch.Tensor):
    _check_values("experts", experts)
    if experts.is_floating_point() or int(experts.min()) < 0:
        raise ValueError(f"experts ({experts.dtype}) must be indices: integers from 0. Pass a trace's experts.")


def _check_count(name: str, count: int, least: int):
    if count < least:
        raise ValueError(f"{name}={count} must be at least {least}.")


def path_ids(experts: torch.Tensor) -> torch.Tensor:
    """Numbers the distinct top-1 paths in lexicographic order.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices, best first.

    Returns:
        `torch.Tensor` of shape `(T,)`, int64: 0 ≤ id < number of distinct paths; equal where paths are equal.

    Raises:
        ValueError: If there are no tokens.
    """
    _check_experts(experts)
    first, *rest = experts[:, :, 0].T.contiguous()  # layer by layer in memory, which is faster
    base = int(experts.max()) + 1
    ids, size = first.long(), base
    for layer in rest:
        if size * base >= 2**63:  # renumber before int64 overflows
            ids = ids.unique(return_inverse=True)[1]
            size = int(ids.max()) + 1
        ids, size = ids * base + layer, size * base
    return ids.unique(return_inverse=True)[1]


def path_counts(experts: torch.Tensor) -> torch.Tensor:
    """Counts the tokens that take each distinct path, the most frequent path first.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices, best first.

    Returns:
        `torch.Tensor` of shape `(distinct paths,)`, int64: The counts.
    """
    return path_ids(experts).bincount().sort(descending=True).values


def distinct_paths(experts: torch.Tensor) -> int:
    """Returns the number of distinct paths.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices, best first.
    """
    return int(path_ids(experts).max()) + 1


def path_coverage(experts: torch.Tensor, top: int) -> float:
    """Returns the share of tokens that take one of the `top` most frequent paths.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices, best first.
        top (`int`): Number of paths, at least 1.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1.")
    counts = path_counts(experts)
    return (counts[:top].sum() / counts.sum()).item()


def _entropy(weights: torch.Tensor) -> torch.Tensor:
    """Returns the entropy of each row of non-negative weights, in float64."""
    weights = weights.double()
    shares = weights / weights.sum(dim=-1, keepdim=True)
    return torch.special.entr(shares).sum(dim=-1)


def path_entropy(experts: torch.Tensor) -> float:
    """Computes H = -Σ p log p over the shares p of tokens that take each path.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices, best first.

    Returns:
        `float`: In nats; at most log T.
    """
    return _entropy(path_counts(experts)).item()


def path_perplexity(experts: torch.Tensor) -> float:
    """Computes exp(H) of `path_entropy`: the number of equally frequent paths that have the same entropy.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices, best first.
    """
    return float(np.exp(path_entropy(experts)))


def expert_load(experts: torch.Tensor, num_experts: int, layer_to_block: list[int] | None = None) -> torch.Tensor:
    """Computes the share of choices that fall on each expert: f_le = #(tokens that choose e in layer l) / (T k).

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices.
        num_experts (`int`): E.
        layer_to_block (`list[int]` of length L, *optional*): The block of each layer, from 0. The choices of a block's
            layers are then pooled, which is meaningful if they share a router.

    Returns:
        `torch.Tensor` of shape `(L, E)` or `(blocks, E)`, float64: Each row sums to 1.

    Raises:
        ValueError: If there are no tokens, or an expert index is not below `num_experts`.
    """
    _check_experts(experts)
    if layer_to_block is not None and len(layer_to_block) != experts.shape[1]:
        raise ValueError(f"layer_to_block has {len(layer_to_block)} entries for {experts.shape[1]} layers.")
    if (largest := int(experts.max())) >= num_experts:
        raise ValueError(f"experts holds index {largest}, but num_experts={num_experts}.")
    counts = torch.stack([layer.reshape(-1).long().bincount(minlength=num_experts) for layer in experts.unbind(dim=1)])
    if layer_to_block is not None:
        blocks = torch.as_tensor(layer_to_block)
        counts = counts.new_zeros(int(blocks.max()) + 1, num_experts).index_add_(0, blocks, counts)
    return counts.double() / counts.sum(dim=-1, keepdim=True)


def _check_load(load: torch.Tensor):
    check_type("load", load, torch.Tensor)
    if not (load.isfinite().all() and (load >= 0).all() and (load.sum(dim=-1) > 0).all()):
        raise ValueError("load has a negative value, NaN, infinity or a row of zeros: pass that of expert_load.")


def load_variation(load: torch.Tensor) -> torch.Tensor:
    """Computes the coefficient of variation of each row of a load: population standard deviation over mean.

    Args:
        load (`torch.Tensor` of shape `(…, E)`): From `expert_load`.

    Returns:
        `torch.Tensor` of shape `(…,)`: 0 if balanced, sqrt(E - 1) if one expert gets everything.
    """
    _check_load(load)
    return load.std(dim=-1, correction=0) / load.mean(dim=-1)


def load_entropy(load: torch.Tensor) -> torch.Tensor:
    """Computes H = -Σ_e f_e log f_e of each row of a load.

    Args:
        load (`torch.Tensor` of shape `(…, E)`): From `expert_load`.

    Returns:
        `torch.Tensor` of shape `(…,)`: In nats; log E if balanced.
    """
    _check_load(load)
    return _entropy(load)


def routing_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Computes the mean over tokens of a router's entropy -Σ_e p_e log p_e, for each layer.

    Args:
        probabilities (`torch.Tensor` of shape `(T, L, E)`): Router probabilities, for instance those of a trace. Rows
            that do not sum to 1, because of rounding or top-k, are divided by their sum.

    Returns:
        `torch.Tensor` of shape `(L,)`: In nats; log E if routers are undecided, 0 if they are certain.

    Raises:
        ValueError: If there are no tokens.
    """
    _check_values("probabilities", probabilities)
    total = torch.zeros(probabilities.shape[1], dtype=torch.float64)
    for chunk in probabilities.split(2**14):  # a float32 copy of all tokens may not fit
        chunk = chunk.float()
        if (chunk < 0).any() or (chunk > 1.01).any():
            lowest, largest = chunk.aminmax()
            raise ValueError(f"probabilities has values from {lowest:.3g} to {largest:.3g}: pass a softmax.")
        sums = chunk.sum(dim=-1)
        # -Σ (w/s) log(w/s) = log s - Σ w log w / s
        total += (sums.log() + torch.special.entr(chunk).sum(dim=-1) / sums).sum(dim=0).double()
    return total / len(probabilities)


def _expert_sets(experts: torch.Tensor) -> np.ndarray:
    """Returns the expert sets as bit masks `(L, words, T)`, in the smallest unsigned dtype with a bit per expert."""
    _check_experts(experts)
    experts = np.ascontiguousarray(experts.cpu().numpy().transpose(1, 2, 0))
    size = int(experts.max()) + 1
    bits = next((bits for bits in (8, 16, 32) if size <= bits), 64)
    dtype = np.dtype(f"uint{bits}")
    sets = np.zeros((len(experts), -(-size // bits), experts.shape[-1]), dtype)
    for layer, choices in zip(sets, experts):
        for choice in choices:
            bit = np.left_shift(dtype.type(1), (choice % bits).astype(dtype))
            for number, word in enumerate(layer):
                word |= bit if len(layer) == 1 else np.where(choice // bits == number, bit, 0)
    return sets


def _mean_jaccard(first: np.ndarray, second: np.ndarray, k: int) -> float:
    """Returns the mean over tokens of the Jaccard similarity of two sets of k experts, as bit masks `(words, T)`."""
    shared = np.bitwise_count(first & second).sum(axis=0, dtype=np.int16)
    sizes = np.arange(k + 1)
    return float(np.bincount(shared, minlength=k + 1) @ (sizes / (2 * k - sizes)) / len(shared))


def jaccard_matrix(experts: torch.Tensor) -> torch.Tensor:
    """Computes the agreement of each pair of layers: the mean over tokens of |A ∩ B| / |A ∪ B| of the two expert sets.

    The chance level is about [`jaccard_chance`].

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices; k different ones in each layer.

    Returns:
        `torch.Tensor` of shape `(L, L)`, float64: A symmetric matrix with ones on its diagonal.

    Raises:
        ValueError: If there are no tokens.
    """
    sets = _expert_sets(experts)
    matrix = torch.eye(len(sets), dtype=torch.float64)
    for i in range(len(sets)):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = _mean_jaccard(sets[i], sets[j], experts.shape[-1])
    return matrix


def jaccard_chance(num_experts: int, top_k: int) -> float:
    """Returns the approximate agreement of two random sets of `top_k` experts: k / (2E - k)."""
    return top_k / (2 * num_experts - top_k)


def adjacent_jaccard(experts: torch.Tensor) -> float:
    """Computes the agreement of neighbouring layers: the mean of the entries of `jaccard_matrix` beside its diagonal.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices; k different ones in each layer.

    Raises:
        ValueError: If there are no tokens, or fewer than two layers.
    """
    sets = _expert_sets(experts)
    if len(sets) < 2:
        raise ValueError(f"experts has {len(sets)} layer; agreement needs at least 2.")
    return float(np.mean([_mean_jaccard(a, b, experts.shape[-1]) for a, b in zip(sets, sets[1:])]))


def sustained_engagement(experts: torch.Tensor, length: int) -> float:
    """Computes the share of tokens that keep some expert among their k in at least `length` consecutive layers.

    Args:
        experts (`torch.Tensor` of shape `(T, L, k)`): Expert indices.
        length (`int`): n, from 1 to L.

    Raises:
        ValueError: If `length` is not between 1 and L, or there are no tokens.
    """
    layers = experts.shape[1]
    if not 1 <= length <= layers:
        raise ValueError(f"length={length} must be between 1 and the number of layers, {layers}.")
    sets = _expert_sets(experts)
    kept = np.zeros(len(experts), dtype=bool)
    for first in range(layers - length + 1):
        kept |= np.bitwise_and.reduce(sets[first : first + length]).any(axis=0)
    return float(kept.mean())


def _contingency(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the non-empty cells of the contingency table: row, column and count, each `(cells,)`."""
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"Each token needs two labels, got labels of shape {first.shape} and {second.shape}.")
    _check_values("labels", first, dimensions=1)
    if first.is_floating_point() or second.is_floating_point():
        raise ValueError(f"labels of dtype {first.dtype} and {second.dtype} must be integers, one for each class.")
    # 64-bit labels are renumbered from 0, so that a cell has one 64-bit number.
    (_, first), (rows, second) = (labels.unique(return_inverse=True) for labels in (first, second))
    width = len(rows)
    cells, counts = (first * width + second).unique(return_counts=True)
    return cells // width, cells % width, counts


def _information(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float, float]:
    """Returns I(A; B), H(A) and H(B) in nats."""
    rows, columns, counts = _contingency(first, second)
    of_first, of_second = (_entropy(labels.bincount(counts.double())).item() for labels in (rows, columns))
    return max(0.0, of_first + of_second - _entropy(counts).item()), of_first, of_second


def mutual_information(first: torch.Tensor, second: torch.Tensor) -> float:
    """Computes I(A; B) = H(A) + H(B) - H(A, B) of two labellings of the same tokens, from relative frequencies.

    With `path_ids` as one labelling, it is the information that a path carries about the other: token id, part of
    speech, position, source. The estimate is biased upwards for many labels and few tokens: see
    `permutation_baseline`.

    Args:
        first (`torch.Tensor` of shape `(T,)`): Labels.
        second (`torch.Tensor` of shape `(T,)`): Labels.

    Returns:
        `float`: In nats; from 0 to the smaller of the two entropies.

    Raises:
        ValueError: If there are no tokens, or the shapes differ.
    """
    return _information(first, second)[0]


def normalized_mutual_information(first: torch.Tensor, second: torch.Tensor) -> float:
    """Computes NMI = 2 I(A; B) / (H(A) + H(B)), with the arithmetic mean, as in scikit-learn.

    Args:
        first (`torch.Tensor` of shape `(T,)`): Labels.
        second (`torch.Tensor` of shape `(T,)`): Labels.

    Returns:
        `float`: 0 if independent, 1 if both form the same groups (even a single one).

    Raises:
        ValueError: If there are no tokens, or the shapes differ.
    """
    information, *entropies = _information(first, second)
    return 2 * information / sum(entropies) if sum(entropies) else 1.0


def cluster_purity(clusters: torch.Tensor, labels: torch.Tensor) -> float:
    """Computes the share of tokens that have the most frequent label of their cluster: Σ_c max_y n_cy / T.

    Args:
        clusters (`torch.Tensor` of shape `(T,)`): A cluster for each token, for instance `path_ids`.
        labels (`torch.Tensor` of shape `(T,)`): A gold label for each token.

    Raises:
        ValueError: If there are no tokens, or the shapes differ.
    """
    rows, _, counts = _contingency(clusters, labels)
    largest = counts.new_zeros(int(rows.max()) + 1).scatter_reduce_(0, rows, counts, "amax")
    return (largest.sum() / counts.sum()).item()


def permutation_baseline(
    measure: Callable[[torch.Tensor, torch.Tensor], float],
    clusters: torch.Tensor,
    labels: torch.Tensor,
    permutations: int = 20,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Computes the chance level of a measure of two labellings, by shuffling the labels over the tokens.

    Args:
        measure (`Callable`): `(clusters, labels) -> float`, for instance `mutual_information` or `cluster_purity`.
        clusters (`torch.Tensor` of shape `(T,)`): As for `measure`.
        labels (`torch.Tensor` of shape `(T,)`): As for `measure`.
        permutations (`int`, defaults to 20): Number of permutations.
        confidence (`float`, defaults to 0.95): Share of the permutations inside the interval.
        seed (`int`, defaults to 0): Seed of the permutations.

    Returns:
        `Interval`: The mean over the permutations, and their central quantiles.
    """
    generator = torch.Generator().manual_seed(seed)
    _check_count("permutations", permutations, 1)
    values = [measure(clusters, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(permutations)]
    return Interval(float(np.mean(values)), *central(values, confidence))


def bootstrap(
    measure: Callable[..., float],
    document_ids: torch.Tensor,
    *values: torch.Tensor,
    resamples: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Computes a measure and its percentile bootstrap over documents (Efron and Tibshirani 1993, section 13.3).

    Each resample draws the same number of documents, with replacement, and measures all their tokens. Tokens of one
    document are not independent; documents nearly are. A resample repeats documents, which changes measures that count
    distinct items or depend on the number of tokens of a path: use `jackknife` for distinct paths, path entropy and
    perplexity, information and purity.

    Args:
        measure (`Callable`): Maps `values` to a float: `lambda experts: path_coverage(experts, 10)`.
        document_ids (`torch.Tensor` of shape `(T,)`): The document of each token, such as a trace's `sequence_ids`.
        *values (`torch.Tensor` of first dimension T): The arguments of `measure`.
        resamples (`int`, defaults to 200): Number of resamples.
        confidence (`float`, defaults to 0.95): Confidence level of the interval.
        seed (`int`, defaults to 0): Seed of the draws.

    Returns:
        `Interval`: The measure of all tokens, and the ends of the interval.

    Raises:
        ValueError: If there are fewer than two documents, or not one document id per token.
    """
    _check_count("resamples", resamples, 2)
    documents = _documents_of(document_ids, values)
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(resamples):
        drawn = torch.randint(len(documents), (len(documents),), generator=generator)
        tokens = torch.cat([documents[i] for i in drawn.tolist()])
        estimates.append(measure(*(value[tokens] for value in values)))
    return Interval(float(measure(*values)), *central(estimates, confidence))


def jackknife(
    measure: Callable[..., float],
    document_ids: torch.Tensor,
    *values: torch.Tensor,
    groups: int = 50,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Computes a measure and a normal interval from a jackknife over documents, which repeats none of them.

    With θ_g the measure of all documents but those of group g, and G groups, se² = (G - 1) / G Σ_g (θ_g - mean θ)²
    (Efron and Tibshirani 1993, chapter 11). It holds for any measure that does not depend on the order of documents:
    on average it is at least the variance at G - 1 groups (Efron and Stein 1981). The interval is that of the measure
    at this number of documents: measures that grow with the sample are not extrapolated.

    Args:
        measure (`Callable`): Maps `values` to a float: `distinct_paths`, `mutual_information`, `cluster_purity`.
        document_ids (`torch.Tensor` of shape `(T,)`): The document of each token, such as a trace's `sequence_ids`.
        *values (`torch.Tensor` of first dimension T): The arguments of `measure`.
        groups (`int`, defaults to 50): Largest G. Groups are random; if documents are fewer, each is a group.
        confidence (`float`, defaults to 0.95): Confidence level of the interval.
        seed (`int`, defaults to 0): Seed of the groups.

    Returns:
        `Interval`: The measure of all tokens, and the ends of the interval.

    Raises:
        ValueError: If there are fewer than two documents or groups, or not one document id per token.
    """
    documents = _documents_of(document_ids, values)
    _check_count("groups", groups, 2)
    _check_confidence(confidence)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = min(groups, len(documents))
    estimates = []
    for left_out in range(groups):
        tokens = torch.cat([documents[i] for place, i in enumerate(order) if place % groups != left_out])
        estimates.append(measure(*(value[tokens] for value in values)))
    error = np.std(estimates) * (groups - 1) ** 0.5
    estimate, quantile = float(measure(*values)), NormalDist().inv_cdf((1 + confidence) / 2)
    return Interval(estimate, float(estimate - quantile * error), float(estimate + quantile * error))


def subsample_documents(document_ids: torch.Tensor, tokens: int, seed: int = 0) -> torch.Tensor:
    """Draws documents until they have `tokens` tokens, so that models can be compared at equal counts.

    Args:
        document_ids (`torch.Tensor` of shape `(T,)`): The document of each token.
        tokens (`int`): Number of tokens; the last document drawn is cut.
        seed (`int`, defaults to 0): Seed of the draw.

    Returns:
        `torch.Tensor` of shape `(tokens,)`, int64: Indices of the tokens, ascending: `experts[indices]`.

    Raises:
        ValueError: If there are fewer than `tokens` tokens.
    """
    if not 0 < tokens <= len(document_ids):
        raise ValueError(f"tokens={tokens} must be between 1 and the number of tokens, {len(document_ids)}.")
    documents = _tokens_of_documents(document_ids)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.cat([documents[i] for i in order])[:tokens].sort().values


def _documents_of(document_ids: torch.Tensor, values: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Returns the indices of each document's tokens. Refuses values and documents that allow no interval."""
    for value in values:
        if len(value) != len(document_ids):
            raise ValueError(f"document_ids has {len(document_ids)} tokens, but a value has {len(value)}.")
    documents = _tokens_of_documents(document_ids)
    if len(documents) < 2:
        raise ValueError(f"An interval over documents needs at least 2, got {len(documents)}.")
    return documents


def _tokens_of_documents(document_ids: torch.Tensor) -> list[torch.Tensor]:
    """Returns the indices of each document's tokens."""
    _, counts = document_ids.unique(return_counts=True)
    return list(document_ids.argsort(stable=True).split(counts.tolist()))


def _check_confidence(confidence: float):
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, such as 0.95.")


def central(values, confidence: float) -> tuple[float, float]:
    """Returns the ends of the central share `confidence` of the values."""
    _check_confidence(confidence)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
