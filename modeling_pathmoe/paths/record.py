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
        sequence_ids (`torch.Tensor` of shape `(tokens,)`, int64): To come. Number of the sequence (batch row) in the
            order in which sequences began.
        positions (`torch.Tensor` of shape `(tokens,)`, int64): To come. Position in the sequence.
        offsets (`torch.Tensor` of shape `(tokens, 2)`, int64): To come. Character span in the text, from an
            `offset_mapping` that is passed to the model inside `record_paths`; -1 where none was.
        weights (`torch.Tensor` of shape `(tokens, layers, k)`, float16): To come; `record_paths(model, weights=True)`.
        probabilities (`torch.Tensor` of shape `(tokens, layers, experts)`, float16): To come;
            `record_paths(model, probabilities=True)`.
        model: To come. `model_type, num_layers, num_experts, top_k, layer_to_block` of the model.

    To come: `len(trace)`, `trace.save(path)`, `PathTrace.load(path)`, `trace.replace(experts)`.
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


@contextmanager
def edit_paths(model, edit_indices=None, *, edit_logits=None, edit_hidden_states=None, keep_weights=False):
    """Lets functions edit what each layer's router sees, scores or chooses, in any forward or `generate`.

    Args:
        model: A model as [`record_paths`] takes it.
        edit_indices: `(layer_idx, logits (T, E), indices (T, k)) -> indices (T, k)`; weights are recomputed from the
            logits at the new indices in the architecture's own way, unless `keep_weights`.
        edit_logits: `(layer_idx, logits (T, E)) -> logits (T, E)`.
        edit_hidden_states: `(layer_idx, hidden_states) -> hidden_states`, seen by the router only.
        keep_weights: Whether the i-th new expert keeps the weight of the i-th expert of the router.
    """
    raise NotImplementedError
    yield


@contextmanager
def replay_paths(model, trace: PathTrace):
    """Forces the experts of a recorded or edited trace through the model, token by token in the recorded order."""
    raise NotImplementedError
    yield
