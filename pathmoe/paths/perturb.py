# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Perturbations of routing, which show how much perplexity rises when tokens take different paths.

All functions run the documents one by one, and split documents longer than `max_length` into windows that do not
overlap. They do not change the model's mode: call `model.eval()` first. Perplexity is
exp(Σ loss / Σ predicted tokens) over all documents. Intervals are 95 % percentile bootstraps over documents; the rise
over the baseline is resampled in pairs. Random numbers are drawn separately for each document, so that intervals
include their variation.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from .hooks import Routing, edit_paths
from .measure import Interval, central, path_ids
from .record import PathTrace


_RESAMPLES = 1000


@dataclass(frozen=True)
class PerturbationCurve:
    """Perplexity under a perturbation of growing strength; `dataclasses.asdict` makes it JSON.

    Attributes:
        name (`str`): The perturbation.
        axis (`str`): The meaning of `values`.
        values (`list`): Strengths, one per point.
        baseline (`Interval`): Perplexity per token of the unperturbed model.
        perplexity (`list[Interval]`): Perplexity per token at each point.
        rise (`list[Interval]`): Perplexity at each point over the baseline, minus 1; documents are paired.
    """

    name: str
    axis: str
    values: list
    baseline: Interval
    perplexity: list[Interval]
    rise: list[Interval]


@torch.no_grad()
def document_losses(
    model: PreTrainedModel,
    documents: list[list[int]],
    max_length: int = 1024,
    edit: Callable[[int], AbstractContextManager] = lambda document: nullcontext(),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the cross-entropy of each document.

    Args:
        model (`PreTrainedModel`): A causal language model.
        documents (`list[list[int]]`): Token ids.
        max_length (`int`, defaults to 1024): Longest window, in tokens. Its first token is not predicted.
        edit (`Callable`, *optional*): Maps the number of a document to the context manager under which the model runs
            that document.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Summed loss in nats (float64) and number of predicted tokens (int64), each
        of shape `(documents,)`.

    Raises:
        ValueError: If there are no documents, one has fewer than two tokens, or a token id is not in the vocabulary.
    """
    if not documents:
        raise ValueError("documents is empty: pass lists of token ids.")
    if max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no token to predict: it must be at least 2.")
    vocab_size = model.get_input_embeddings().num_embeddings
    for number, document in enumerate(documents):
        if isinstance(document, str):
            raise TypeError(f"documents[{number}]={document!r:.80} is text: pass its token ids.")
        if len(document) < 2:
            raise ValueError(f"documents[{number}] has {len(document)} tokens; at least 2 are needed to predict one.")
        if not 0 <= min(document) <= max(document) < vocab_size:
            raise ValueError(
                f"documents[{number}] has token ids from {min(document)} to {max(document)}, but the model's "
                f"vocabulary has {vocab_size}: tokenize the document for this model."
            )
    losses, counts = [], []
    for number, document in enumerate(documents):
        loss, count = 0.0, 0
        with edit(number):
            for start in range(0, len(document) - 1, max_length):
                window = torch.tensor([document[start : start + max_length]], device=model.device)
                logits = model(window, use_cache=False).logits[0, :-1].float()
                loss += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
                count += len(logits)
        losses.append(loss)
        counts.append(count)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(counts)


def _curve(
    name: str,
    axis: str,
    values: list,
    model: PreTrainedModel,
    documents: list[list[int]],
    max_length: int,
    edit: Callable[[Any, int], AbstractContextManager],
    seed: int = 0,
) -> PerturbationCurve:
    """Measures perplexity at each value; `edit` is called with the value and the number of a document."""
    if len(documents) < 2:
        raise ValueError(f"An interval over documents needs at least 2 of them, got {len(documents)}.")
    if not values:
        raise ValueError(f"There are no values of {axis!r}: pass at least one.")
    loss, count = document_losses(model, documents, max_length)
    draws = np.random.default_rng(seed).multinomial(len(documents), [1 / len(documents)] * len(documents), _RESAMPLES)
    weights = torch.from_numpy(np.vstack([np.ones(len(documents)), draws]))  # the first row is the estimate itself
    log_perplexity = (weights @ loss) / (weights @ count.double())

    def interval(samples: torch.Tensor) -> Interval:
        return Interval(samples[0].item(), *central(samples[1:].numpy(), confidence=0.95))

    perplexity, rise = [], []
    for value in values:
        perturbed, _ = document_losses(model, documents, max_length, partial(edit, value))
        log_perturbed = (weights @ perturbed) / (weights @ count.double())
        perplexity.append(interval(log_perturbed.exp()))
        rise.append(interval((log_perturbed - log_perplexity).expm1()))
    return PerturbationCurve(name, axis, list(values), interval(log_perplexity.exp()), perplexity, rise)


def _generator(seed: int, document: int) -> torch.Generator:
    """Returns the generator of a document. It is on the CPU, so that its numbers are the same on every device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, document]).generate_state(1)[0]))


def shuffle_experts(
    model: PreTrainedModel,
    documents: list[list[int]],
    scope: str = "each_layer",
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
    max_length: int = 1024,
    seed: int = 0,
) -> PerturbationCurve:
    """Replaces expert e by π(e), with a uniformly random permutation π of the experts.

    A replacement gets the weight of the expert that it replaces, as if the experts of a layer had changed places. (If
    weights were recomputed, routers that do not renormalise would also mute the experts.)

    Args:
        model (`PreTrainedModel`): A causal language model that [`record_paths`] accepts.
        documents (`list[list[int]]`): Token ids, at least two documents.
        scope (`str`, defaults to `"each_layer"`): `"each_layer"` draws a π for each layer, `"same"` uses one π in all
            layers, `"one_layer"` shuffles a single layer, and the points of the curve are the layers.
        shares (`tuple[float]`): Shares of randomly drawn tokens that are shuffled; all tokens with `"one_layer"`.
        max_length (`int`, defaults to 1024): Longest window, in tokens.
        seed (`int`, defaults to 0): Seed of permutations, drawn tokens and bootstrap.

    Raises:
        ValueError: If `scope`, a share or the documents are not valid.
    """
    if scope not in ("each_layer", "same", "one_layer"):
        raise ValueError(f"scope={scope!r} must be 'each_layer', 'same' or 'one_layer'.")
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares={shares} must be above 0 and at most 1.")

    def edit(value, document):
        generator = _generator(seed, document)
        share, only = (1.0, value) if scope == "one_layer" else (value, None)
        permutations, shuffled = {}, None

        def permute(layer_idx, logits, indices):
            nonlocal shuffled
            permutation = permutations.get(layer := 0 if scope == "same" else layer_idx)
            if permutation is None:
                permutation = permutations[layer] = torch.randperm(logits.shape[-1], generator=generator)
            if layer_idx == 0:  # the same tokens in all layers
                shuffled = torch.rand(indices.shape[:-1], generator=generator) < share
            if only not in (None, layer_idx):
                return indices
            return torch.where(
                shuffled[..., None].to(indices.device), permutation.to(indices.device)[indices], indices
            )

        return edit_paths(model, permute, keep_weights=True)

    axis, values = ("layer", range(_layers(model))) if scope == "one_layer" else ("share of tokens", shares)
    return _curve(f"experts shuffled, {scope}", axis, list(values), model, documents, max_length, edit, seed)


def noise_router(
    model: PreTrainedModel,
    documents: list[list[int]],
    on: str = "logits",
    strengths: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0),
    max_length: int = 1024,
    seed: int = 0,
) -> PerturbationCurve:
    """Adds Gaussian noise to the logits or the input of routers; the input of the experts has no noise.

    The noise's standard deviation is the strength times that of the token's logits over the experts, or times the root
    mean square of the token's hidden state, so that models of different scale can be compared. The router chooses
    experts and computes weights from the noisy values.

    Args:
        model (`PreTrainedModel`): A causal language model that [`record_paths`] accepts.
        documents (`list[list[int]]`): Token ids, at least two documents.
        on (`str`, defaults to `"logits"`): `"logits"` or `"hidden_states"`.
        strengths (`tuple[float]`): Points of the curve.
        max_length (`int`, defaults to 1024): Longest window, in tokens.
        seed (`int`, defaults to 0): Seed of noise and bootstrap.

    Raises:
        ValueError: If `on`, a strength or the documents are not valid.
    """
    if on not in ("logits", "hidden_states"):
        raise ValueError(f"on={on!r} must be 'logits' or 'hidden_states'.")
    if not all(0 <= strength < np.inf for strength in strengths):
        raise ValueError(f"strengths={strengths} must be finite and not negative.")

    def edit(strength, document):
        generator = _generator(seed, document)

        def add_noise(layer_idx, values):
            values_float = values.float()
            scale = values_float.std(dim=-1, keepdim=True, correction=0)
            if on == "hidden_states":
                scale = values_float.square().mean(dim=-1, keepdim=True).sqrt()
            noise = torch.randn(values.shape, generator=generator).to(values.device)
            return (values_float + strength * scale * noise).to(values.dtype)

        if on == "logits":
            return edit_paths(model, edit_logits=add_noise)
        return edit_paths(model, edit_hidden_states=add_noise)

    axis = "noise relative to the token's " + ("logits" if on == "logits" else "hidden state")
    return _curve(f"noise on {on}", axis, list(strengths), model, documents, max_length, edit, seed)


def freeze_routing(
    model: PreTrainedModel,
    documents: list[list[int]],
    spans: tuple[int, ...] = (2, 4, 8),
    max_length: int = 1024,
    seed: int = 0,
) -> PerturbationCurve:
    """Lets layers repeat the experts of the previous layer: in each span of n layers, only the first one chooses.

    Each layer computes the weights of these experts from its own logits. With a span as long as the model, the first
    layer chooses for all.

    Args:
        model (`PreTrainedModel`): A causal language model that [`record_paths`] accepts.
        documents (`list[list[int]]`): Token ids, at least two documents.
        spans (`tuple[int]`): Values of n, the points of the curve.
        max_length (`int`, defaults to 1024): Longest window, in tokens.
        seed (`int`, defaults to 0): Seed of the bootstrap.

    Raises:
        ValueError: If a span is below 1, or the documents are not valid.
    """
    if min(spans, default=1) < 1:
        raise ValueError(f"spans={spans} must be at least 1.")

    def edit(span, document):
        decision = None

        def repeat(layer_idx, logits, indices):
            nonlocal decision
            if layer_idx % span == 0:
                decision = indices
            return decision.to(indices.device)

        return edit_paths(model, repeat)

    return _curve("routing frozen", "layers per decision", list(spans), model, documents, max_length, edit, seed)


def restrict_paths(
    model: PreTrainedModel,
    documents: list[list[int]],
    trace: PathTrace,
    tops: tuple[int | None, ...] = (10, 100, 500, None),
    others: str = "allowed",
    max_length: int = 1024,
    seed: int = 0,
) -> PerturbationCurve:
    """Allows only the K most frequent top-1 paths of a trace (arXiv 2603.18297; the mechanism is our reading of it).

    In each layer, a token's top-1 expert must continue its path so far to a prefix of an allowed path. Of the experts
    that do, the one with the largest logit is chosen, so each token ends up on an allowed path. The other k - 1
    experts are those with the largest logits among the experts on any allowed path in this layer, and if these are
    fewer than k - 1, among the rest. A token whose own choice meets these conditions keeps it. The router computes
    weights from the logits of the chosen experts, so the top-1 expert does not always have the largest weight.

    Args:
        model (`PreTrainedModel`): A causal language model that [`record_paths`] accepts.
        documents (`list[list[int]]`): Token ids, at least two documents.
        trace (`PathTrace`): The trace whose paths are counted. It should be of different text than `documents`.
        tops (`tuple[int | None]`): Values of K, the points of the curve. `None` allows all paths of the trace.
        others (`str`, defaults to `"allowed"`): `"any"` leaves the other k - 1 experts to the router.
        max_length (`int`, defaults to 1024): Longest window, in tokens.
        seed (`int`, defaults to 0): Seed of the bootstrap.

    Raises:
        ValueError: If the trace is empty or of a different model, or `others`, a K or the documents are not valid.
    """
    if others not in ("allowed", "any"):
        raise ValueError(f"others={others!r} must be 'allowed' or 'any'.")
    if not all(top is None or top >= 1 for top in tops):
        raise ValueError(f"tops={tops} must be at least 1, or None for all paths.")
    paths, counts = trace.experts[:, :, 0].long().unique(dim=0, return_counts=True)
    described = Routing(model).describe(trace.model.num_experts, trace.model.top_k)
    trace.model.check_same(described)
    trace.model.check_routers(described)
    paths = paths[counts.argsort(descending=True, stable=True)]
    tries = {top: _PathTrie(paths[:top], trace.model.num_experts).to(model.device) for top in tops}

    def edit(top, document):
        trie = tries[top]
        node = None

        def constrain(layer_idx, logits, indices):
            nonlocal node
            shape, logits, indices = indices.shape, logits.flatten(0, -2).float(), indices.flatten(0, -2)
            if layer_idx == 0:
                node = logits.new_zeros(len(logits), dtype=torch.long)
            following = trie.children[layer_idx][node]
            admissible = following >= 0
            first = logits.masked_fill(~admissible, -math.inf).argmax(dim=-1, keepdim=True)
            own = admissible.gather(-1, indices[:, :1])
            first = torch.where(own, indices[:, :1], first)
            node = following.gather(-1, first)[:, 0]
            in_layer = trie.experts[layer_idx] if others == "allowed" else torch.ones_like(trie.experts[layer_idx])
            # Rank by three keys: the top-1 expert, then experts on allowed paths, then the logit.
            rank = logits.argsort(dim=-1).argsort(dim=-1) + len(in_layer) * in_layer
            rank = rank.scatter(-1, first, 2 * len(in_layer))
            chosen = rank.topk(shape[-1], dim=-1).indices
            kept = own[:, 0] & in_layer[indices].all(dim=-1)
            return torch.where(kept[:, None], indices, chosen).view(shape)

        return edit_paths(model, constrain)

    name = f"most frequent paths only, other experts {others}"
    return _curve(name, "paths allowed", list(tops), model, documents, max_length, edit, seed)


class _PathTrie:
    """Stores which experts continue each prefix of the paths.

    Args:
        paths (`torch.Tensor` of shape `(paths, L)`, int64): Distinct paths.
        num_experts (`int`): E.

    Attributes:
        children (`list[torch.Tensor]`): For each layer, `(prefixes, E)`: the number of the prefix that results from
            adding the expert to a prefix of the previous layer, or -1 if no path has that prefix.
        experts (`list[torch.Tensor]`): For each layer, `(E,)`, bool: whether the expert is on a path.
    """

    def __init__(self, paths: torch.Tensor, num_experts: int):
        self.children, self.experts = [], []
        prefixes = torch.zeros(len(paths), dtype=torch.long)
        for length in range(1, paths.shape[1] + 1):
            longer = path_ids(paths[:, :length, None])
            children = torch.full((int(prefixes.max()) + 1, num_experts), -1)
            children[prefixes, paths[:, length - 1]] = longer
            self.children.append(children)
            self.experts.append((children >= 0).any(dim=0))
            prefixes = longer

    def to(self, device: torch.device) -> "_PathTrie":
        self.children = [tensor.to(device) for tensor in self.children]
        self.experts = [tensor.to(device) for tensor in self.experts]
        return self


def _layers(model: PreTrainedModel) -> int:
    return len(Routing(model).layer_to_block)
