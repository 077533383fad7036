# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Records which experts each token visits, and sends tokens down recorded paths again."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .routers import RoutedModel, Routing, check_indices, edit_paths


# What a trace holds of each token, besides its experts and what was asked for.
_TOKEN_FIELDS = ("token_ids", "sequence_ids", "positions", "offsets")
_METADATA = b"pathmoe_trace"


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "Traces on disk need pyarrow: pip install 'pathmoe[paths]'; or raise memory_limit to keep one in memory."
        ) from error
    return pyarrow


class PathTrace:
    """What [`record_paths`] has recorded so far: an entry per token that is not padding, in the order of the forwards.

    A trace is held in memory up to a limit; what goes beyond is moved to a temporary Arrow file. Attributes are put
    together when they are read, from both; [`~PathTrace.batches`] goes through a trace piece by piece.

    Attributes:
        experts (`torch.Tensor` of shape `(T, L, k)`, uint8, or int16 for more than 256 experts): The experts of each
            token, best first.
        weights (`torch.Tensor` of shape `(T, L, k)`, float16): Their weights, when recorded.
        probabilities (`torch.Tensor` of shape `(T, L, E)`, float16): Softmax of the router's logits, when recorded.
        token_ids (`torch.Tensor` of shape `(T,)`, int32): The token ids; -1 where the model was given embeddings.
        sequence_ids (`torch.Tensor` of shape `(T,)`, int32): Which sequence the token is of, numbered as they began:
            a row of a batch, or a document of a packed row, when its `position_ids` start again from 0. The tokens
            that `generate` adds belong to the sequence of their prompt (of their row, when a beam search reorders).
        positions (`torch.Tensor` of shape `(T,)`, int32): Position in the sequence, padding not counted.
        offsets (`torch.Tensor` of shape `(T, 2)`, int32): Start and end in the text, from the tokenizer's
            `offset_mapping` when it was passed to the model along with the rest; else -1.
        model (`RoutedModel`): The shape of the recorded model: `model_type`, `num_layers`, `num_experts`, `top_k`,
            `layer_to_block`.
    """

    def __init__(self, memory_limit: int = 2**28):
        self.model: RoutedModel | None = None
        self._memory_limit = memory_limit
        self._pending: list[dict[str, np.ndarray]] = []
        self._pending_bytes = 0
        self._file: Path | None = None
        self._writer = None

    def __getattr__(self, name: str) -> torch.Tensor:
        if name in ("experts", "weights", "probabilities", *_TOKEN_FIELDS):
            return self._column(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __len__(self) -> int:
        return sum(len(batch["token_ids"]) for batch in self.batches())

    def _column(self, name: str) -> torch.Tensor:
        batches = list(self.batches())
        if not batches:
            raise ValueError("This trace is empty: run the model inside `with record_paths(model) as trace`.")
        if name not in batches[0]:
            raise ValueError(f"This trace has no {name}: ask for them with record_paths(model, {name}=True).")
        return torch.from_numpy(np.concatenate([batch[name] for batch in batches]))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Goes through the trace without putting it together in memory.

        Yields:
            `dict[str, numpy.ndarray]`: The recorded attributes of some tokens.
        """
        if self._file is not None:
            pa = _pyarrow()
            with pa.memory_map(str(self._file)) as source, pa.ipc.open_stream(source) as reader:
                for batch in reader:
                    yield {name: _to_numpy(batch[name], name, self.model) for name in batch.schema.names}
        yield from self._pending

    def _append(self, batch: dict[str, np.ndarray]):
        self._pending.append(batch)
        self._pending_bytes += sum(array.nbytes for array in batch.values())
        if self._pending_bytes > self._memory_limit:
            self._spill()

    def _spill(self):
        if self._writer is None:
            self._folder = tempfile.TemporaryDirectory(prefix="paths_")  # goes when the trace goes
            self._file = Path(self._folder.name) / "trace.arrow"
            self._sink = self._file.open("wb")
            self._writer = _pyarrow().ipc.new_stream(self._sink, _schema(self._pending[0], self.model))
        self._writer.write_batch(_to_arrow(self._pending))
        self._sink.flush()
        self._pending, self._pending_bytes = [], 0

    def save(self, path: str | Path):
        """Writes the trace to an Arrow stream, which `datasets.Dataset.from_file` reads as well.

        Args:
            path (`str` or `Path`): The file; its folder must exist.

        Raises:
            ValueError: If the trace is empty.
        """
        first = next(self.batches(), None)
        if first is None:
            raise ValueError("This trace is empty: there is nothing to save.")
        with Path(path).open("wb") as sink, _pyarrow().ipc.new_stream(sink, _schema(first, self.model)) as writer:
            for batch in self.batches():
                writer.write_batch(_to_arrow([batch]))

    @classmethod
    def load(cls, path: str | Path) -> "PathTrace":
        """Opens a saved trace. The file is mapped, and read when an attribute is.

        Args:
            path (`str` or `Path`): A file that `save` has written.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is not a saved trace.
        """
        pa = _pyarrow()
        with pa.memory_map(str(path)) as source:
            try:
                metadata = json.loads(pa.ipc.open_stream(source).schema.metadata[_METADATA])
            except (pa.ArrowInvalid, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not a trace that PathTrace.save has written.") from error
        trace = cls()
        trace.model = RoutedModel(**metadata | {"layer_to_block": tuple(metadata["layer_to_block"])})
        trace._file = Path(path)
        return trace

    def replace(self, experts: torch.Tensor) -> "PathTrace":
        """A copy of the trace with other experts, for [`replay_paths`]. Weights and probabilities are left out.

        Args:
            experts (`torch.Tensor` of shape `(T, L, k)`): The experts of each token, in any integer dtype.

        Raises:
            ValueError: If the shape is another than that of the trace, or an index names no expert.
        """
        tokens = {name: getattr(self, name).numpy() for name in _TOKEN_FIELDS}
        shape = (len(tokens["token_ids"]), self.model.num_layers, self.model.top_k)
        check_indices("experts", experts, shape, self.model.num_experts)
        trace = PathTrace()
        trace.model = self.model
        trace._append({"experts": experts.cpu().to(_index_dtype(self.model.num_experts)).numpy(), **tokens})
        return trace


def _index_dtype(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int16


def _schema(batch: dict[str, np.ndarray], model: RoutedModel):
    return _to_arrow([batch]).schema.with_metadata({_METADATA: json.dumps(asdict(model))})


def _to_arrow(batches: list[dict[str, np.ndarray]]):
    """One record batch. What a token has several of becomes a list of fixed length."""
    pa = _pyarrow()
    columns = {}
    for name in batches[0]:
        values = np.concatenate([batch[name] for batch in batches])
        column = pa.array(values.reshape(-1))
        if values.ndim > 1:
            column = pa.FixedSizeListArray.from_arrays(column, values[0].size)
        columns[name] = column
    return pa.RecordBatch.from_pydict(columns)


def _to_numpy(column, name: str, model: RoutedModel) -> np.ndarray:
    shapes = {
        "experts": (model.num_layers, model.top_k),
        "weights": (model.num_layers, model.top_k),
        "probabilities": (model.num_layers, model.num_experts),
        "offsets": (2,),
    }
    values = column.flatten() if name in shapes else column
    return values.to_numpy().reshape(len(column), *shapes.get(name, ()))


@contextmanager
def record_paths(
    model: nn.Module, *, weights: bool = False, probabilities: bool = False, memory_limit: int = 2**28
) -> Iterator[PathTrace]:
    """Records the experts of every token that passes through the model, in any forward or `generate`.

    Args:
        model (`torch.nn.Module`): A PathMoE, or any mixture-of-experts model of transformers whose routers return
            `(logits, weights, indices)`; with or without a head.
        weights (`bool`, defaults to `False`): Whether to record the weights of the experts.
        probabilities (`bool`, defaults to `False`): Whether to record the probabilities of all experts.
        memory_limit (`int`, defaults to 2**28): Bytes that a trace may take in memory; what goes beyond is moved to
            the folder for temporary files, which `TMPDIR` names.

    Yields:
        `PathTrace`: Grows with every forward.

    Raises:
        TypeError: If the model has no routers that are recognised.

    Example:

    ```python
    >>> with record_paths(model) as trace:
    ...     model(**tokenizer("The quick brown fox", return_tensors="pt", return_offsets_mapping=True))
    >>> trace.experts.shape  # (tokens, layers, k)
    ```
    """
    routing, trace = Routing(model), PathTrace(memory_limit)
    layers, tokens, offsets = {}, None, None
    sequences = _Sequences()

    def on_call(module, args, kwargs):
        nonlocal offsets
        if "offset_mapping" in kwargs:
            offsets = torch.as_tensor(kwargs.pop("offset_mapping"))
        return args, kwargs

    def on_start(decoder, args, kwargs):
        nonlocal tokens
        layers.clear()
        tokens = ForwardTokens(routing.arguments(args, kwargs))

    def on_route(router, args, kwargs, output):
        if tokens is None:  # a backward pass computes a layer again
            return
        if trace.model is None:
            routing.check_output(router, output)
            trace.model = routing.describe(output[0].shape[-1], output[2].shape[-1])
        logits, chosen_weights, indices = output[:3]
        # Kept until the forward ends, so nothing but what is asked for.
        kept = {"experts": indices}
        if weights:
            kept["weights"] = chosen_weights
        if probabilities:
            kept["probabilities"] = logits
        layers[routing.layer_of(router, args, kwargs)] = kept

    def on_forward(decoder, args, output):
        nonlocal tokens, offsets
        if len(layers) != len(routing.layer_to_block):
            raise ValueError(
                f"{routing.name} has {len(routing.layer_to_block)} routed layers, but this forward passed through "
                f"{len(layers)}: its paths cannot be recorded."
            )
        batch = {}
        for name in layers[0]:
            values = _stack([layers[layer][name] for layer in sorted(layers)])
            if name == "probabilities":
                values = values.float().softmax(dim=-1)
            dtype = _index_dtype(trace.model.num_experts) if name == "experts" else torch.float16
            batch[name] = values.to(dtype).cpu().numpy()
        real = tokens.real.reshape(-1)
        sequence_ids, positions = sequences.number(tokens)
        ids = np.full(real.shape, -1) if tokens.input_ids is None else tokens.input_ids.reshape(-1).cpu().numpy()
        spans = np.full((len(real), 2), -1) if offsets is None else offsets.reshape(-1, 2).cpu().numpy()
        if len(spans) != len(real):
            raise ValueError(f"offset_mapping has {len(spans)} tokens, but input_ids has {len(real)}.")
        batch |= {"token_ids": ids, "sequence_ids": sequence_ids, "positions": positions, "offsets": spans}
        for name in _TOKEN_FIELDS:
            batch[name] = batch[name].astype(np.int32)
        trace._append({name: values if real.all() else values[real] for name, values in batch.items()})
        layers.clear()
        tokens = offsets = None

    handles = [module.register_forward_pre_hook(on_call, with_kwargs=True) for module in {model, routing.decoder}]
    handles += [router.register_forward_hook(on_route, with_kwargs=True) for router in routing.routers]
    handles.append(routing.decoder.register_forward_pre_hook(on_start, with_kwargs=True))
    handles.append(routing.decoder.register_forward_hook(on_forward))
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _stack(layers: list[torch.Tensor]) -> torch.Tensor:
    """`(T, L, …)` on the device of the first layer, so that the host waits for it once."""
    device = layers[0].device
    return torch.stack([layer.detach().flatten(0, -2).to(device) for layer in layers], dim=1)


class ForwardTokens:
    """The tokens of one forward of a decoder.

    Args:
        arguments (`dict`): What the decoder was called with, by name.

    Attributes:
        input_ids (`torch.Tensor` of shape `(batch, sequence)` or `None`): Token ids.
        past (`int`): Tokens in the cache before this forward.
        real (`numpy.ndarray` of shape `(batch, sequence)`, bool): Which tokens are no padding.
        starts (`numpy.ndarray` of shape `(batch, sequence)`, bool): Where `position_ids` begin from 0.
    """

    def __init__(self, arguments: dict):
        arguments = arguments | arguments.get("kwargs", {})
        self.input_ids = arguments.get("input_ids")
        batch, length = (arguments["inputs_embeds"] if self.input_ids is None else self.input_ids).shape[:2]
        cache = arguments.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        mask = arguments.get("attention_mask")
        if getattr(mask, "ndim", None) == 2:
            self.real = mask[:, -length:].bool().cpu().numpy()
        elif getattr(mask, "ndim", None) == 4:
            # As a static cache gets it: (batch, 1, sequence, cache). A padding token may not even attend to itself.
            own = mask.diagonal(self.past, dim1=-2, dim2=-1)[:, 0, :length]
            self.real = (own if own.dtype == torch.bool else own == 0).expand(batch, length).cpu().numpy()
        else:
            self.real = np.ones((batch, length), dtype=bool)
        positions = arguments.get("position_ids")
        if getattr(positions, "ndim", None) == 2:
            self.starts = (positions == 0).expand(batch, length).cpu().numpy()
        else:
            self.starts = np.zeros((batch, length), dtype=bool)


class _Sequences:
    """Numbers sequences over many forwards, of which later ones may go on with the sequences of earlier ones."""

    def __init__(self):
        self.begun = 0
        self.last_ids = self.next_positions = np.zeros(0, dtype=int)

    def number(self, tokens: ForwardTokens) -> tuple[np.ndarray, np.ndarray]:
        """The sequence and the position of each token, both `(batch · sequence,)`; of padding, anything."""
        count = tokens.real.cumsum(axis=1)
        goes_on = tokens.past > 0 and len(self.last_ids) == len(count)
        positions = count - 1 + (self.next_positions[:, None] if goes_on else tokens.past)
        starts = tokens.real & tokens.starts
        if starts.any():
            positions -= np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
        if not goes_on:
            starts |= tokens.real & (count == 1)
        started = starts.cumsum().reshape(starts.shape)
        ids = self.begun - 1 + started
        if goes_on:
            ids = np.where(starts.cumsum(axis=1) == 0, self.last_ids[:, None], ids)
        self.begun += int(started[-1, -1])
        self.last_ids, self.next_positions = ids[:, -1], positions[:, -1] + 1
        return ids.reshape(-1), positions.reshape(-1)


@contextmanager
def replay_paths(model: nn.Module, trace: PathTrace) -> Iterator[None]:
    """Sends the tokens of a trace through the experts of the trace, recorded or edited.

    The model must get the same tokens in the same forwards as when the trace was recorded. Weights come from the
    logits of this pass at the trace's experts, in the architecture's own way, so that the trace of an unchanged model
    gives its logits again.

    Args:
        model (`torch.nn.Module`): The recorded model, or one of the same shape.
        trace (`PathTrace`): From [`record_paths`], [`PathTrace.load`] or [`PathTrace.replace`].

    Raises:
        TypeError: If the model has no routers that are recognised, or computes weights in a way that replay cannot
            follow.
        ValueError: If the trace is empty or of another model, or if other tokens come than those of the trace.

    Example:

    ```python
    >>> with record_paths(model) as trace:
    ...     model(**inputs)
    >>> with replay_paths(model, trace.replace(trace.experts.flip(0))):  # each token on another one's path
    ...     model(**inputs)
    ```
    """
    routing = Routing(model)
    experts, token_ids = trace.experts, trace.token_ids
    trace.model.check_same(routing.describe(trace.model.num_experts, trace.model.top_k))
    done, tokens = 0, None

    def on_start(decoder, args, kwargs):
        nonlocal done, tokens
        tokens = ForwardTokens(routing.arguments(args, kwargs))
        count = int(tokens.real.sum())
        if done + count > len(experts):
            raise ValueError(f"The trace has {len(experts)} tokens, but the model is given {done + count}.")
        if tokens.input_ids is not None:
            given = tokens.input_ids.cpu()[torch.from_numpy(tokens.real)]
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
        real = torch.from_numpy(tokens.real.reshape(-1))
        flat = indices.flatten(0, -2).clone()
        flat[real.to(flat.device)] = tokens.experts[:, layer_idx].to(flat)
        return flat.view_as(indices)

    with edit_paths(model, forced):
        handle = routing.decoder.register_forward_pre_hook(on_start, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
