# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Replays recorded paths."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .hooks import Routing, check_type, edit_paths
from .record import ForwardTokens, PathTrace


@contextmanager
def replay_paths(model: nn.Module, trace: PathTrace, *, check_routers: bool = True) -> Iterator[None]:
    """Sends the tokens of a trace through the experts of the trace, recorded or edited.

    The model must get the same tokens in the same forwards as when the trace was recorded. Its routers compute the
    weights of the trace's experts from the logits of this pass, so replaying the trace of an unchanged model
    reproduces its logits.

    Args:
        model (`torch.nn.Module`): The recorded model.
        trace (`PathTrace`): From [`record_paths`], [`PathTrace.load`] or [`PathTrace.replace`].
        check_routers (`bool`, defaults to `True`): Whether to refuse a trace of a model whose routers have different
            parameters. Pass `False` for a different model of the same shape, such as one that was trained further.

    Raises:
        TypeError: If the model has no routers that are recognised, or computes weights in a way that replay cannot
            follow.
        ValueError: If the trace is empty or of a different model, or the model gets different tokens than the trace's.

    Example:

    ```python
    >>> with record_paths(model) as trace:
    ...     model(**inputs)
    >>> with replay_paths(model, trace.replace(trace.experts.flip(0))):  # each token on another token's path
    ...     model(**inputs)
    ```
    """
    routing = Routing(model)
    check_type("trace", trace, PathTrace)
    experts, token_ids = trace.experts, trace.token_ids
    described = routing.describe(trace.model.num_experts, trace.model.top_k)
    trace.model.check_same(described)
    if check_routers:
        trace.model.check_routers(
            described,
            "Record a trace of this model, or pass check_routers=False to replay this one anyway, for instance if the "
            "model was trained further.",
        )
    done = 0
    tokens: ForwardTokens | None = None

    def on_start(decoder, args, kwargs):
        nonlocal done, tokens
        tokens = ForwardTokens(routing.arguments(args, kwargs))
        count = int(tokens.real.sum())
        if done + count > len(experts):
            raise ValueError(f"The trace has {len(experts)} tokens, but the model is given {done + count}.")
        if tokens.input_ids is not None:
            given = tokens.input_ids.cpu()[tokens.real.cpu()]
            recorded = token_ids[done : done + count]
            if (different := (given != recorded) & (recorded >= 0)).any():
                first = int(different.nonzero()[0])
                raise ValueError(
                    f"Token {done + first} of the trace is {int(recorded[first])}, but the model is given "
                    f"{int(given[first])}: replay the tokens that were recorded, in the same forwards."
                )
        tokens.experts = experts[done : done + count]
        done += count

    def forced(layer_idx, logits, indices):
        trace.model.check_same(routing.describe(logits.shape[-1], indices.shape[-1]))
        flat = indices.flatten(0, -2).clone()
        flat[tokens.real.reshape(-1).to(flat.device)] = tokens.experts[:, layer_idx].to(flat)
        return flat.view_as(indices)

    with edit_paths(model, forced):
        handle = routing.decoder.register_forward_pre_hook(on_start, with_kwargs=True)
        try:
            yield
            if 0 < done < len(experts):
                warnings.warn(
                    f"The trace has {len(experts)} tokens, but the model was given only {done}.", stacklevel=3
                )
        finally:
            handle.remove()
