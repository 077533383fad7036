# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Expert paths: which experts each token visits, layer by layer, and how concentrated those paths are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


class PathTrace:
    """What [`record_paths`] has recorded so far: an entry per token that is not padding, in reading order.

    Attributes:
        experts (`torch.Tensor` of shape `(tokens, layers, k)`, int16): The experts of each token, best first.
        token_ids (`torch.Tensor` of shape `(tokens,)`, int64): The token ids; -1 where the model was given embeddings.
    """

    def __init__(self):
        self._experts, self._token_ids = [], []

    @property
    def experts(self) -> torch.Tensor:
        return torch.cat(self._experts)

    @property
    def token_ids(self) -> torch.Tensor:
        return torch.cat(self._token_ids)


@contextmanager
def record_paths(model: PreTrainedModel) -> Iterator[PathTrace]:
    """Records the experts of every token that passes through the model, in any forward or `generate`.

    Args:
        model (`PreTrainedModel`): A PathMoE, with or without a head.

    Yields:
        `PathTrace`: Grows with every forward.

    Raises:
        TypeError: If the model owns no PathMoE routers.

    Example:

    ```python
    >>> with record_paths(model) as trace:
    ...     model(**tokenizer("The quick brown fox", return_tensors="pt"))
    >>> trace.experts.shape  # (tokens, layers, k)
    ```
    """
    decoder = model.base_model
    if not hasattr(decoder, "routers"):
        raise TypeError(f"record_paths needs a PathMoE, got {type(model).__name__}, which has no routers of its own.")
    trace, layers, running = PathTrace(), [], False

    def on_start(decoder, args):
        nonlocal running
        layers.clear()
        running = True

    def on_route(router, args, output):
        if running:  # and not when a backward pass computes a layer again
            layers.append(output[2].detach())

    def on_forward(decoder, args, kwargs, output):
        nonlocal running
        running = False
        input_ids = args[0] if args else kwargs.get("input_ids")
        attention_mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        experts = torch.stack([indices.to("cpu", torch.int16) for indices in layers], dim=1)
        layers.clear()
        token_ids = torch.full(experts.shape[:1], -1) if input_ids is None else input_ids.reshape(-1).cpu()
        if getattr(attention_mask, "ndim", None) == 2:  # a static cache makes it 4-D, and then pads nothing
            length = output[0].shape[1]
            real = attention_mask[:, -length:].reshape(-1).bool().cpu()
            experts, token_ids = experts[real], token_ids[real]
        trace._experts.append(experts)
        trace._token_ids.append(token_ids)

    handles = [router.register_forward_hook(on_route) for router in decoder.routers.values()]
    handles.append(decoder.register_forward_pre_hook(on_start))
    handles.append(decoder.register_forward_hook(on_forward, with_kwargs=True))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


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
