# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Estimates how well the experts of a layer can be predicted before the layer runs, and simulates expert caches.

If experts are stored in slower memory, an early prediction can hide the transfer. One prediction is to look ahead: to
apply the router of a layer to the input of an earlier layer's router. `path_report.py` shows the estimates.
"""

from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pathmoe.paths import bootstrap
from pathmoe.paths.hooks import Routing


AHEAD = (1, 2, 3)


@torch.no_grad()
def look_ahead(
    model: PreTrainedModel, input_ids: torch.Tensor, ahead: Iterable[int] = AHEAD
) -> tuple[torch.Tensor, dict[int, torch.Tensor], int]:
    """Records the experts of one sequence, and predicts them by applying routers to earlier layers' router inputs.

    A router with a state uses the state that the earlier layer has left. In a block that shares its decision, the
    experts of all layers are known as soon as the first layer has decided.

    Args:
        model (`PreTrainedModel`): A model that `record_paths` supports.
        input_ids (`torch.Tensor` of shape `(T,)`): The sequence.
        ahead (`Iterable[int]`): The distances to the earlier layer.

    Returns:
        `tuple`: The experts `(T, L, k)`, best first; for each distance, the predictions of the same shape, which are
        -1 in the layers that have no layer at that distance before them; and the number of experts of a layer.
    """
    routing, calls = Routing(model), {}

    def on_route(router, args, kwargs, output):
        routing.check_output(router, output)
        calls[routing.layer_of(router, args, kwargs)] = (router, args, kwargs, output)

    handles = [router.register_forward_hook(on_route, with_kwargs=True) for router in routing.routers]
    try:
        model(input_ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    layers = [calls[layer] for layer in sorted(calls)]
    experts = torch.stack([output[2].cpu() for *_, output in layers], dim=1)
    named = {distance: torch.full_like(experts, -1) for distance in ahead}
    for distance, predictions in named.items():
        for layer, (router, args, kwargs, _) in enumerate(layers[distance:], distance):
            _, (earlier_input, *_), _, earlier_output = layers[layer - distance]
            rest = args[1:]
            if len(earlier_output) == 4:  # a PathMoE router: (logits, weights, indices, state)
                rest = (routing.index_of(args, kwargs), earlier_output[3], *args[3:])
            # Call `forward` directly, because `__call__` would run the hooks of other recorders.
            predictions[:, layer] = router.forward(earlier_input, *rest, **kwargs)[2].cpu()
    return experts, named, layers[0][3][0].shape[-1]


def recall(experts: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Returns the share of a token's k experts that are predicted: `(T, L)` from `(T, L, k)` and `(T, L, any)`."""
    return (experts[..., :, None] == predicted[..., None, :]).any(dim=-1).double().mean(dim=-1)


def reuse_distances(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts the other experts of the layer that were used since an expert was last used.

    The k experts of a token are looked up together. They then become the most recently used experts, with the best one
    as the most recent. An expert is in a least-recently-used cache of c experts per layer if and only if its distance
    is below c (Mattson et al. 1970).

    Args:
        experts (`np.ndarray` of shape `(T, L, k)`): Expert indices, best first, in the order in which tokens are run.
        num_experts (`int`): Number of experts E.

    Returns:
        `np.ndarray` of shape `(T, L, k)`: Distances from 0 to E - 1, and E where an expert is used for the first time.
    """
    tokens, layers, k = experts.shape
    last_use = np.full((layers, num_experts), -1, dtype=np.int64)
    distances = np.empty(experts.shape, dtype=np.int64)
    for token, chosen in enumerate(experts.astype(np.int64)):
        when = np.take_along_axis(last_use, chosen, axis=1)
        later = (last_use[:, None, :] > when[:, :, None]).sum(axis=-1)
        distances[token] = np.where(when < 0, num_experts, later)
        np.put_along_axis(last_use, chosen, np.arange((token + 1) * k - 1, token * k - 1, -1)[None], axis=1)
    return distances


def look_ahead_in_all(
    model: PreTrainedModel, pieces: list[list[int]], ahead: list[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor], int]:
    """Runs [`look_ahead`] on all pieces and concatenates the results."""
    recorded, named = [], {distance: [] for distance in ahead}
    for piece in tqdm(pieces, desc="look ahead", disable=None):
        experts, predictions, num_experts = look_ahead(model, torch.tensor(piece), ahead)
        if experts.shape[1] <= ahead[-1]:
            raise ValueError(
                f"ahead={ahead[-1]} needs more than {ahead[-1]} routed layers, the model has {experts.shape[1]}."
            )
        recorded.append(experts)
        for distance, prediction in predictions.items():
            named[distance].append(prediction)
    return torch.cat(recorded), {distance: torch.cat(found) for distance, found in named.items()}, num_experts


def prefetch_estimate(
    model: PreTrainedModel,
    pieces: list[list[int]],
    document_ids: list[int] | None = None,
    ahead: Iterable[int] = AHEAD,
    resamples: int = 200,
    seed: int = 0,
) -> dict:
    """Compares predictors of a layer's experts, and simulates caches of experts.

    Every predictor names k experts. All of them are compared on the same layers (those with `max(ahead)` layers before
    them) and the same tokens (those with a token before them in the piece). The most frequent experts are counted in
    the measured text itself, so they are the best fixed choice in hindsight. Caches start empty and process all tokens
    in order.

    Args:
        model (`PreTrainedModel`): A model that `record_paths` supports.
        pieces (`list[list[int]]`): Token ids of sequences that fit into the model.
        document_ids (`list[int]`, *optional*): The document of each piece, for the bootstrap. By default, each piece
            is a document.
        ahead (`Iterable[int]`): The distances, in layers, at which routers look ahead.
        resamples (`int`): Number of resamples of the bootstrap over documents.
        seed (`int`): Seed of the bootstrap.

    Returns:
        `dict`: `predictors`, a list of `name`, `note`, `recall` (an `Interval` as a dict) and `by_layer` (`None` in
        layers with too few layers before them); `first_layer`, the first layer of the comparison; `cache`, a list of
        `size` (experts kept in each layer) and the hit rates `lru` (least recently used), `most_frequent` (fixed, in
        hindsight) and `lru_and_ahead` (in the cache, or predicted by the router at the smallest distance).

    Raises:
        ValueError: If the model has too few layers, or no piece has two tokens.
    """
    ahead = sorted(ahead)
    first_layer = ahead[-1]
    if not any(len(piece) > 1 for piece in pieces):
        raise ValueError("No sequence has two tokens: give longer pieces.")
    experts, named, num_experts = look_ahead_in_all(model, pieces, ahead)
    lengths = torch.tensor([len(piece) for piece in pieces])
    documents = torch.arange(len(pieces)) if document_ids is None else torch.tensor(document_ids)
    documents = documents.repeat_interleave(lengths)
    has_previous = torch.cat([torch.arange(length) > 0 for length in lengths])
    layers, k = experts.shape[1:]
    load = torch.stack([layer.reshape(-1).bincount(minlength=num_experts) for layer in experts.unbind(dim=1)])
    by_load = load.argsort(dim=-1, descending=True, stable=True)

    given = "the layer's router on the router input of the earlier layer"
    candidates = [(f"its router, {n} layer{'s' * (n > 1)} ahead", given, n, named[n]) for n in ahead]
    candidates += [
        ("the layer before", "experts with the same numbers, which correspond if the layers share a router", 1,
         experts.roll(1, dims=1)),
        ("the token before", "the experts of the previous token in the layer", 0, experts.roll(1, dims=0)),
        ("the most frequent", "the experts that the layer uses most in this text", 0, by_load[:, :k]),
    ]  # fmt: skip
    predictors = []
    for name, note, distance, predicted in candidates:
        hits = recall(experts, predicted)[has_previous]
        compared = hits[:, first_layer:].mean(dim=1)
        interval = bootstrap(
            lambda x: x.mean().item(), documents[has_previous], compared, resamples=resamples, seed=seed
        )
        by_layer = [None] * distance + hits.mean(dim=0)[distance:].tolist()
        predictors.append({"name": name, "note": note, "recall": asdict(interval), "by_layer": by_layer})

    distances = torch.from_numpy(reuse_distances(experts.numpy(), num_experts))
    foreseen = (experts[..., :, None] == named[ahead[0]][..., None, :]).any(dim=-1)
    rank = by_load.argsort(dim=-1).expand(len(experts), -1, -1).gather(-1, experts)
    cache = [
        {
            "size": size,
            "lru": (distances < size).double().mean().item(),
            "most_frequent": (rank < size).double().mean().item(),
            "lru_and_ahead": ((distances < size) | foreseen).double().mean().item(),
        }
        for size in range(k, num_experts + 1)
    ]
    return {"predictors": predictors, "first_layer": first_layer, "cache": cache}
