# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Records the experts that each token visits."""

import json
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ..files import check_writable, write_aside
from .hooks import RoutedModel, Routing, check_indices, check_limit, check_token_ids


# The fields of a token that a trace always has, besides its experts.
_TOKEN_FIELDS = ("token_ids", "sequence_ids", "positions", "offsets")
_METADATA = b"pathmoe_trace"
_CHECKSUM = b"pathmoe_crc32"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # ends an Arrow stream; without it, the reader takes the stream for a shorter one
# A trace holds up to this many forwards or bytes unconverted on their device, so that the many short forwards of a
# generation are converted together, without waiting for the device each time.
_HELD_FORWARDS = 256
_HELD_BYTES = 2**20


def _pyarrow():
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "Traces on disk need pyarrow: pip install 'pathmoe[paths]', or raise memory_limit to stay in memory."
        ) from error
    return pyarrow


class PathTrace:
    """The tokens that [`record_paths`] has recorded, without padding, in the order of the forwards.

    A trace is held in memory up to a limit, beyond which it is moved to a temporary Arrow file. Reading an attribute
    collects it from both; [`~PathTrace.batches`] iterates over a trace piece by piece.

    Attributes:
        experts (`torch.Tensor` of shape `(T, L, k)`, uint8, or int16 for more than 256 experts): The experts of each
            token, best first.
        weights (`torch.Tensor` of shape `(T, L, k)`, float16): The weights of these experts, if recorded.
        probabilities (`torch.Tensor` of shape `(T, L, E)`, float16): Softmax of the router's logits, if recorded.
        token_ids (`torch.Tensor` of shape `(T,)`, int32): The token ids; -1 where the model got embeddings.
        sequence_ids (`torch.Tensor` of shape `(T,)`, int32): The number of the token's sequence, in the order in which
            sequences began. A sequence is a row of a batch, or a document of a packed row whose `position_ids` restart
            from 0. Tokens that `generate` adds belong to the sequence of their prompt (of their row, if a beam search
            reorders).
        positions (`torch.Tensor` of shape `(T,)`, int32): Position in the sequence, not counting padding.
        offsets (`torch.Tensor` of shape `(T, 2)`, int32): Start and end in the text, from the tokenizer's
            `offset_mapping` if it was passed to the model or to `generate`; otherwise, and for tokens that `generate`
            adds, -1.
        model (`RoutedModel`): The properties of the recorded model: `model_type`, `num_layers`, `num_experts`,
            `top_k`, `layer_to_block`, `router_hash`.
    """

    def __init__(self, memory_limit: int = 2**28):
        self.model: RoutedModel | None = None
        self._memory_limit = check_limit(memory_limit)
        self._held: list[tuple[dict[str, torch.Tensor], ForwardTokens, torch.Tensor | None]] = []
        self._held_bytes = 0
        self._sequences = _Sequences()
        self._pending: list[dict[str, np.ndarray]] = []
        self._pending_bytes = 0
        self._file: Path | None = None
        self._checked = False  # whether the file has been read to its end and its checksums are right
        self._writer: Any = None

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
        """Iterates over the trace without collecting it in memory.

        Yields:
            `dict[str, numpy.ndarray]`: The recorded attributes of some tokens.
        """
        self._convert()
        if self._file is not None:
            pa = _pyarrow()
            try:
                with pa.memory_map(str(self._file)) as source, pa.ipc.open_stream(source) as reader:
                    for batch, metadata in reader.iter_batches_with_custom_metadata():
                        batch.validate()  # a damaged length would have us read beyond the file
                        values = {name: _to_numpy(batch[name], name, self.model) for name in batch.schema.names}
                        checksum = (metadata or {}).get(_CHECKSUM)  # older traces have none
                        if not self._checked and checksum not in (None, _checksum(values, self.model)):
                            raise ValueError("its checksum is wrong")
                        yield values
                self._checked = self._writer is None
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ValueError(f"{self._file} is truncated or damaged: {error}. Record or copy it again.") from error
        yield from self._pending

    def _hold(self, values: dict[str, torch.Tensor], tokens: "ForwardTokens", offsets: torch.Tensor | None):
        """Stores the values `(T, L, …)` and the offsets `(T, 2)` of a forward, to be converted later."""
        self._held.append((values, tokens, offsets))
        self._held_bytes += sum(tensor.nbytes for tensor in values.values())
        if len(self._held) >= _HELD_FORWARDS or self._held_bytes > min(_HELD_BYTES, self._memory_limit):
            self._convert()

    def _convert(self):
        """Converts and appends the forwards that are held; consecutive steps of one token per row form one batch."""
        held, self._held, self._held_bytes = self._held, [], 0

        def kind(number: int):
            _, tokens, offsets = held[number]
            batch, length = tokens.real.shape
            is_step = length == 1 and tokens.past > 0 and offsets is None
            return (batch, tokens.input_ids is None) if is_step else number

        for _, numbers in groupby(range(len(held)), kind):
            values, forwards, offsets = zip(*(held[number] for number in numbers))
            batch, length = forwards[0].real.shape

            shape = batch, len(forwards), length

            real = _cat([tokens.real for tokens in forwards], dim=1).cpu().numpy()
            starts = _cat([tokens.starts for tokens in forwards], dim=1).cpu().numpy()
            sequence_ids, positions = self._sequences.number(real, starts, forwards[0].past)
            ids = np.full(real.shape, -1)
            if forwards[0].input_ids is not None:
                ids = _cat([tokens.input_ids for tokens in forwards], dim=1).cpu().numpy()
            appended = {}
            for name in values[0]:
                column = _cat([forward[name] for forward in values], dim=0)
                if name == "probabilities":
                    column = column.float().softmax(dim=-1)
                dtype = _index_dtype(self.model.num_experts) if name == "experts" else torch.float16
                appended[name] = column.to(dtype).cpu().numpy()
            appended |= {
                "token_ids": _in_order(ids, shape),
                "sequence_ids": _in_order(sequence_ids, shape),
                "positions": _in_order(positions, shape),
                "offsets": np.full((real.size, 2), -1) if offsets[0] is None else offsets[0].cpu().numpy(),
            }
            for name in _TOKEN_FIELDS:
                appended[name] = appended[name].astype(np.int32)
            real = _in_order(real, shape)
            self._append({name: array if real.all() else array[real] for name, array in appended.items()})

    def _append(self, batch: dict[str, np.ndarray]):
        self._pending.append(batch)
        self._pending_bytes += sum(array.nbytes for array in batch.values())
        if self._pending_bytes > self._memory_limit:
            self._spill()

    def _spill(self):
        if self._writer is None:
            self._folder = tempfile.TemporaryDirectory(prefix="paths_")  # removed with the trace
            self._file = Path(self._folder.name) / "trace.arrow"
            self._sink = self._file.open("wb")
            self._writer = _pyarrow().ipc.new_stream(self._sink, _schema(self._pending[0], self.model))
        self._writer.write_batch(_to_arrow(self._pending))
        self._sink.flush()
        self._pending, self._pending_bytes = [], 0

    def save(self, path: str | Path):
        """Writes the trace to an Arrow stream, which `datasets.Dataset.from_file` reads as well.

        Args:
            path (`str` or `Path`): The file; its folder is created. An existing file is replaced only when the new one
                is complete, so a trace may be saved to the file that it was loaded from.

        Raises:
            ValueError: If the trace is empty.
        """
        first = next(self.batches(), None)
        if first is None:
            raise ValueError("This trace is empty: there is nothing to save.")
        schema = _schema(first, self.model)
        check_writable(path, "path", _METADATA.decode())
        with write_aside(path) as partial:
            with partial.open("wb") as sink, _pyarrow().ipc.new_stream(sink, schema) as writer:
                for batch in self.batches():
                    checksum = _checksum(batch, self.model)
                    writer.write_batch(_to_arrow([batch]), custom_metadata={_CHECKSUM: checksum})

    @classmethod
    def load(cls, path: str | Path) -> "PathTrace":
        """Opens a saved trace. The file is memory-mapped; reading an attribute reads it and verifies its checksums.

        Args:
            path (`str` or `Path`): A file that `save` has written.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not a saved trace, or its end is missing.
        """
        pa = _pyarrow()
        trace = cls()
        if Path(path).exists() and not Path(path).is_file():  # opening a pipe would wait for its other end
            raise ValueError(f"{path} is not a trace that PathTrace.save has written, but a folder or a device.")
        try:
            with pa.memory_map(str(path)) as source:
                metadata = json.loads(pa.ipc.open_stream(source).schema.metadata[_METADATA])
            trace.model = RoutedModel(**metadata | {"layer_to_block": tuple(metadata["layer_to_block"])})
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a trace that PathTrace.save has written.") from error
        with open(path, "rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                raise ValueError(f"{path} is truncated or damaged: its end is missing. Record or copy it again.")
        trace._file = Path(path)
        return trace

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[torch.Tensor | np.ndarray],
        token_ids: Sequence[Sequence[int] | torch.Tensor | np.ndarray],
        model: nn.Module,
        num_experts: int | None = None,
    ) -> "PathTrace":
        """Makes a trace of experts that another program has recorded, such as vLLM's `routed_experts`.

        vLLM records no experts for the last token that it generates, because that token passes through no layer: leave
        it out of `token_ids`.

        Args:
            experts (`list` of arrays of shape `(T, L, k)`): The experts of each sequence, best first, in an integer
                dtype. L counts the layers that have a router.
            token_ids (`list` of integers or arrays of shape `(T,)`): The tokens of each sequence.
            model (`torch.nn.Module`): The model that was recorded. The trace takes its description, so that
                [`replay_paths`] refuses other models.
            num_experts (`int`, *optional*): The number of experts of a layer, by default that of the configuration.

        Raises:
            TypeError: If the model has no routers that are recognised.
            ValueError: If the arrays do not fit the model or each other, or a token has an expert twice in a layer.

        Example:

        ```python
        >>> outputs = llm.generate(prompts)  # vLLM with enable_return_routed_experts=True
        >>> experts = [output.outputs[0].routed_experts for output in outputs]
        >>> tokens = [output.prompt_token_ids + output.outputs[0].token_ids[:-1] for output in outputs]
        >>> trace = PathTrace.from_experts(experts, tokens, model)
        ```
        """
        if not len(experts) or len(experts) != len(token_ids):
            raise ValueError(f"experts has {len(experts)} sequences and token_ids {len(token_ids)}: pass one of each.")
        routing = Routing(model)
        for name in ("num_experts", "num_local_experts", "n_routed_experts"):
            num_experts = num_experts or getattr(routing.decoder.config, name, None)
        if num_experts is None:
            raise ValueError(
                f"The configuration of {routing.name} does not state the number of experts: pass num_experts."
            )
        trace, arrays = cls(), [torch.as_tensor(array) for array in experts]
        top_k = arrays[0].shape[-1] if arrays[0].ndim == 3 else 0
        trace.model = routing.describe(num_experts, top_k)
        for number, (array, ids) in enumerate(zip(arrays, map(torch.as_tensor, token_ids))):
            shape = len(ids), trace.model.num_layers, trace.model.top_k
            check_indices(f"experts[{number}]", array, shape, num_experts, different=True)
            check_token_ids(f"token_ids[{number}]", ids, getattr(routing.decoder.config, "vocab_size", None))
            trace._append(
                {
                    "experts": array.cpu().to(_index_dtype(num_experts)).numpy(),
                    "token_ids": ids.cpu().numpy().astype(np.int32),
                    "sequence_ids": np.full(len(ids), number, dtype=np.int32),
                    "positions": np.arange(len(ids), dtype=np.int32),
                    "offsets": np.full((len(ids), 2), -1, dtype=np.int32),
                }
            )
        return trace

    def replace(self, experts: torch.Tensor) -> "PathTrace":
        """Returns a copy of the trace with different experts, for [`replay_paths`], without weights and probabilities.

        Args:
            experts (`torch.Tensor` of shape `(T, L, k)`): The experts of each token, in any integer dtype.

        Raises:
            ValueError: If the shape is not that of the trace, or an index is out of range or twice in a token's k.
        """
        tokens = {name: getattr(self, name).numpy() for name in _TOKEN_FIELDS}
        shape = (len(tokens["token_ids"]), self.model.num_layers, self.model.top_k)
        check_indices("experts", experts, shape, self.model.num_experts, different=True)
        trace = PathTrace()
        trace.model = self.model
        trace._append({"experts": experts.cpu().to(_index_dtype(self.model.num_experts)).numpy(), **tokens})
        return trace


def _index_dtype(num_experts: int) -> torch.dtype:
    return torch.uint8 if num_experts <= 256 else torch.int16


def _in_order(rows: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Reorders values from row by row to forward by forward; `shape` is (batch, forwards, length of a forward)."""
    return rows.reshape(shape).swapaxes(0, 1).reshape(-1)


def _schema(batch: dict[str, np.ndarray], model: RoutedModel):
    return _to_arrow([batch]).schema.with_metadata({_METADATA: json.dumps(asdict(model))})


def _checksum(batch: dict[str, np.ndarray], model: RoutedModel) -> bytes:
    """CRC-32 of a batch and of what identifies the model."""
    checksum = zlib.crc32(json.dumps(asdict(model)).encode())
    for name, values in batch.items():
        checksum = zlib.crc32(
            np.ascontiguousarray(values).data, zlib.crc32(f"{name} {values.dtype}".encode(), checksum)
        )
    return b"%08x" % checksum


def _to_arrow(batches: list[dict[str, np.ndarray]]):
    """Returns one record batch, in which several values of a token become a list of fixed length."""
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
    model: nn.Module,
    *,
    weights: bool = False,
    probabilities: bool = False,
    memory_limit: int = 2**28,
    only_training: bool = False,
) -> Iterator[PathTrace]:
    """Records the experts of every token that passes through the model, in any forward or `generate`.

    Args:
        model (`torch.nn.Module`): Any mixture-of-experts model whose routers return `(logits, weights, indices)`.
        weights (`bool`, defaults to `False`): Whether to record the weights of the experts.
        probabilities (`bool`, defaults to `False`): Whether to record the probabilities of all experts.
        memory_limit (`int`, defaults to 2**28): Bytes in memory beyond which a trace moves to a file in `TMPDIR`.
        only_training (`bool`, defaults to `False`): Whether to record only the forwards that are trained: in training
            mode and with gradients, so without evaluation, generation and reference models.

    Yields:
        `PathTrace`: The trace, which grows with every forward.

    Raises:
        TypeError: If the model has no routers that are recognised.

    Example:

    ```python
    >>> with record_paths(model) as trace:
    ...     model(**tokenizer("The quick brown fox", return_tensors="pt", return_offsets_mapping=True))
    >>> trace.experts.shape  # (tokens, layers, k)
    ```
    """
    routing, trace, layers, tokens, offsets = Routing(model), PathTrace(memory_limit), {}, None, None
    # The index of each requested value in a router's output. Nothing else is kept until the forward ends.
    places = {"experts": 2} | ({"weights": 1} if weights else {}) | ({"probabilities": 0} if probabilities else {})

    def on_call(module, args, kwargs):
        nonlocal offsets
        if module is model:  # a failed forward may have left its own
            offsets = None
        if "offset_mapping" in kwargs:
            offsets = torch.as_tensor(kwargs.pop("offset_mapping")).reshape(-1, 2)
        return args, kwargs

    def on_start(decoder, args, kwargs):
        nonlocal tokens, offsets
        layers.clear()
        tokens = None
        if only_training and not (decoder.training and torch.is_grad_enabled()):
            return
        tokens = ForwardTokens(routing.arguments(args, kwargs))
        if prompt_offsets:
            offsets = _offsets_of_prompt(prompt_offsets[0], tokens)
        if offsets is not None and len(offsets) != tokens.real.numel():
            raise ValueError(f"offset_mapping has {len(offsets)} tokens, but input_ids has {tokens.real.numel()}.")

    def on_route(router, args, kwargs, output):
        if tokens is None:  # a backward pass recomputes the layer, or the forward is not trained
            return
        if trace.model is None:
            routing.check_output(router, output)
            trace.model = routing.describe(output[0].shape[-1], output[2].shape[-1])
        layers[routing.layer_of(router, args, kwargs)] = [output[place] for place in places.values()]

    def on_forward(decoder, args, output):
        nonlocal tokens, offsets
        if tokens is None:
            return
        routing.check_layers(len(layers))
        in_order = [layers[layer] for layer in sorted(layers)]
        trace._hold({name: _stack(column) for name, column in zip(places, zip(*in_order))}, tokens, offsets)
        layers.clear()
        tokens = offsets = None

    hooks = routing.hooked(model, on_call, on_start, on_route, on_forward)
    try:
        with _generate_with_offsets(model) as prompt_offsets, hooks:
            yield trace
    finally:
        trace._convert()


@contextmanager
def _generate_with_offsets(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Lets the model's `generate` accept `offset_mapping`; yields a list that holds it while `generate` runs."""
    own_generate, generate = vars(model).get("generate"), getattr(model, "generate", None)
    held: list[torch.Tensor] = []
    if generate is None:
        yield held
        return

    @wraps(generate)
    def generate_with_offsets(*args, offset_mapping=None, **kwargs):
        if offset_mapping is not None:
            held[:] = [_check_prompt_offsets(offset_mapping, args, kwargs)]
        try:
            return generate(*args, **kwargs)
        finally:
            held.clear()

    model.generate = generate_with_offsets
    try:
        yield held
    finally:
        if own_generate is not None:
            model.generate = own_generate
        else:
            del model.generate


def _check_prompt_offsets(offset_mapping, args: tuple, kwargs: dict) -> torch.Tensor:
    """Returns the offsets in the shape `(batch, sequence, 2)` of the prompt.

    Raises:
        ValueError: If the prompt has a different number of tokens, or part of it is already in a cache.
    """
    given = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    shape = next(tensor.shape[:2] for tensor in given if tensor is not None)
    offsets = torch.as_tensor(offset_mapping).reshape(-1, 2)
    if len(offsets) != shape.numel():
        raise ValueError(f"offset_mapping has {len(offsets)} tokens, but the prompt has {shape.numel()}.")
    if past := _cached_tokens(kwargs):
        raise ValueError(
            f"generate got both an offset_mapping and a cache with {past} tokens, so it is not clear which tokens the "
            "offsets belong to: leave one of the two out."
        )
    return offsets.view(*shape, 2)


def _cached_tokens(arguments: dict) -> int:
    """Returns the number of tokens in the key-value cache, under any name of that argument.

    Raises:
        ValueError: Under continuous batching, whose forwards mix tokens of several requests.
    """
    if type(arguments.get("cache")).__name__ == "PagedAttentionCache":
        raise ValueError("Paths cannot be recorded under continuous batching: use generate, or plain forwards.")
    caches = [value for value in arguments.values() if isinstance(value, Cache)]
    return int(caches[0].get_seq_length()) if caches else 0


def _offsets_of_prompt(prompt_offsets: torch.Tensor, tokens: "ForwardTokens") -> torch.Tensor | None:
    """Returns the offsets `(T, 2)` of one forward of `generate`: -1 for added tokens, `None` if all are added."""
    batch, length = tokens.real.shape
    if tokens.past >= prompt_offsets.shape[1]:
        return None
    rows = prompt_offsets.repeat_interleave(batch // len(prompt_offsets), dim=0)  # beams or several answers
    rows = rows[:, tokens.past : tokens.past + length]
    return F.pad(rows, (0, 0, 0, length - rows.shape[1]), value=-1).flatten(0, 1)


@torch.no_grad()
def _stack(layers: tuple[torch.Tensor]) -> torch.Tensor:
    """Stacks the values of the layers to `(T, L, …)`, on the device of the first layer."""
    return torch.stack([layer.to(layers[0].device) for layer in layers], dim=-2).flatten(0, -3)


def _cat(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenates tensors on the device of the first one."""
    return torch.cat([tensor.to(tensors[0].device) for tensor in tensors], dim=dim) if tensors[1:] else tensors[0]


class ForwardTokens:
    """The tokens of one forward of a decoder. Token ids are copied, since a caller may overwrite them.

    Args:
        arguments (`dict`): The arguments of the decoder, by name.

    Attributes:
        input_ids (`torch.Tensor` of shape `(batch, sequence)` or `None`): Token ids.
        past (`int`): Tokens in the cache before this forward.
        real (`torch.Tensor` of shape `(batch, sequence)`, bool): True for tokens that are not padding.
        starts (`torch.Tensor` of shape `(batch, sequence)`, bool): True where `position_ids` are 0.
        experts (`torch.Tensor` of shape `(T, L, k)`): In a replay, the experts of the tokens that are not padding.
    """

    experts: torch.Tensor

    def __init__(self, arguments: dict):
        self.input_ids = arguments.get("input_ids")
        if self.input_ids is None:
            batch, length = arguments["inputs_embeds"].shape[:2]
        else:
            self.input_ids = self.input_ids.clone()
            batch, length = self.input_ids.shape
        self.past = _cached_tokens(arguments)
        mask = arguments.get("attention_mask")
        if getattr(mask, "ndim", None) == 2:
            self.real = mask[:, -length:] != 0
        elif getattr(mask, "ndim", None) == 4:
            # With a static cache, (batch, 1, sequence, cache). A padding token does not even attend to itself.
            own = mask.diagonal(self.past, dim1=-2, dim2=-1)[:, 0, :length]
            self.real = (own == (1 if own.dtype == torch.bool else 0)).expand(batch, length)
        else:
            self.real = torch.ones(batch, length, dtype=torch.bool)
        positions = arguments.get("position_ids")
        if getattr(positions, "ndim", None) == 2:
            self.starts = (positions == 0).expand(batch, length)
        else:
            self.starts = torch.zeros(batch, length, dtype=torch.bool)


class _Sequences:
    """Numbers sequences over many forwards, where a later forward may continue the sequences of an earlier one."""

    def __init__(self):
        self.begun = 0
        self.last_ids = self.next_positions = np.zeros(0, dtype=int)

    def number(self, real: np.ndarray, starts: np.ndarray, past: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sequence and the position of each token, in the shape of `real`; arbitrary values at padding."""
        count = real.cumsum(axis=1)
        continues = past > 0 and len(self.last_ids) == len(count)
        positions = count - 1 + (self.next_positions[:, None] if continues else past)
        starts = real & starts
        if starts.any():
            positions -= np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
        not_begun = self.next_positions[:, None] == 0 if continues else True  # only padding so far
        starts |= real & (count == 1) & not_begun
        started = starts.cumsum().reshape(starts.shape)
        ids = self.begun - 1 + started
        if continues:
            ids = np.where(starts.cumsum(axis=1) == 0, self.last_ids[:, None], ids)
        self.begun += int(started[-1, -1])
        self.last_ids, self.next_positions = ids[:, -1], positions[:, -1] + 1
        return ids, positions
