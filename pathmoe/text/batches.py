# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Endless batches of packed blocks, in memory or streamed, mixed from several sources and resumable at any batch."""

import copy
import queue
import threading
from collections.abc import Iterator

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from pathmoe.text.reader import DataError, encode


class PackedBlocks:
    """Endless packed blocks in memory, in a different order in each epoch.

    Args:
        blocks (`np.ndarray` of shape `(blocks, sequence_length)`): Token ids from [`pathmoe.text.reader.pack`].
        seed (`int`): Seed of the order.
    """

    def __init__(self, blocks: np.ndarray, seed: int):
        self.blocks, self.seed, self.position = blocks, seed, 0
        self._epoch: int | None = None
        self._order: np.ndarray | None = None

    def next_block(self) -> np.ndarray:
        epoch, index = divmod(self.position, len(self.blocks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        self.position += 1
        return self.blocks[self._order[index]]

    def skip_block(self):
        self.position += 1

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict):
        self.position = state["position"]


class PackedStream:
    """Endless packed blocks of a stream, whose documents are shuffled within windows.

    The windows follow the order of the stream. If `shuffle_window` is above 1, the order of the stream's shards is
    different in each epoch. A resumed stream reads the current window again, but nothing before it.

    Args:
        dataset (`IterableDataset`): This rank's part of the documents.
        tokenizer (`PreTrainedTokenizerBase`): A tokenizer with an end-of-text token, which ends every document.
        text_column (`str`): The column that holds the text.
        sequence_length (`int`): Number of tokens in a block.
        seed (`int`): Seed of the order.
        shuffle_window (`int`): Number of documents in a window. 1 keeps the order of the stream.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        text_column: str,
        sequence_length: int,
        seed: int = 0,
        shuffle_window: int = 1,
    ):
        # With a buffer of one document, only the shards are shuffled. Larger buffers of `datasets` would be lost when
        # a stream is resumed.
        self.dataset = dataset.shuffle(seed=seed, buffer_size=1) if shuffle_window > 1 else dataset
        self.tokenizer, self.text_column, self.sequence_length = tokenizer, text_column, sequence_length
        self.seed, self.shuffle_window = seed, shuffle_window
        self._rest, self._windows, self._start = [], 0, self.dataset.state_dict()
        self._taken = 0
        self._documents: Iterator[list[int]] | None = None

    def _read(self) -> Iterator[list[int]]:
        """Yields the token ids of the remaining documents of this epoch."""
        stream, skip = iter(self.dataset), self._taken
        while True:
            try:
                texts = [row[self.text_column] for _, row in zip(range(self.shuffle_window), stream)]
            except DataError:
                raise
            except Exception as error:  # such as a damaged file or a broken connection
                raise DataError(f"the stream could not be read: {error}") from error
            if not texts:
                return
            order = np.random.default_rng([self.seed, self._windows]).permutation(len(texts))
            for self._taken in range(skip + 1, len(texts) + 1):
                yield encode([texts[order[self._taken - 1]]], self.tokenizer)[0]
            self._taken, skip = 0, 0
            self._windows += 1
            self._start = copy.deepcopy(self.dataset.state_dict())

    def next_block(self) -> np.ndarray:
        epochs = 0
        while len(self._rest) < self.sequence_length:
            if self._documents is None:
                self._documents = self._read()
            if (document := next(self._documents, None)) is not None:
                self._rest += document
                continue
            if (epochs := epochs + 1) == 2:
                raise DataError(
                    f"the whole stream has less than one sequence of {self.sequence_length} tokens: give more text."
                )
            # Start a new epoch: in the same epoch, a resumed stream would start again where it was resumed.
            self._documents = None
            self.dataset.set_epoch(self.dataset.epoch + 1)
        block, self._rest = self._rest[: self.sequence_length], self._rest[self.sequence_length :]
        return np.array(block)

    def state_dict(self) -> dict:
        state = {"start": self._start, "taken": self._taken, "windows": self._windows, "rest": self._rest}
        return copy.deepcopy(state | {"epoch": self.dataset.epoch})

    def load_state_dict(self, state: dict):
        self.dataset.set_epoch(state["epoch"])
        self.dataset.load_state_dict(state["start"])
        self._start, self._taken = state["start"], state["taken"]
        self._windows, self._rest, self._documents = state["windows"], state["rest"], None


class Batches:
    """Endless batches of one rank, drawn from weighted sources.

    Each sequence is drawn from the source that is furthest behind its share, so that any stretch of training has the
    requested mixture.

    Args:
        sources (`list` of `PackedBlocks` or of `PackedStream`): The sources of the sequences.
        weights (`list[float]`): The share of each source, up to a common factor.
        rank (`int`): Index of this process.
        world_size (`int`): Number of processes.
        split (`bool`): Whether each rank has its own part of the sources (streams). Otherwise all ranks go through the
            same sequences and take turns, so that the data of a run does not depend on the number of ranks.
    """

    def __init__(self, sources: list, weights: list[float], rank: int = 0, world_size: int = 1, split: bool = False):
        self.sources, self.weights = sources, np.array(weights) / sum(weights)
        self.rank, self.world_size = (0, 1) if split else (rank, world_size)
        self.drawn = np.zeros(len(sources), dtype=np.int64)

    def next_batch(self, rows: int) -> torch.Tensor:
        """Returns the next `rows` sequences of this rank, an int64 tensor of shape `(rows, sequence_length)`."""
        blocks = []
        for turn in range(rows * self.world_size):
            number = int(np.argmax(self.weights * (self.drawn.sum() + 1) - self.drawn))
            self.drawn[number] += 1
            if turn // rows == self.rank:
                blocks.append(self.sources[number].next_block())
            else:
                self.sources[number].skip_block()
        return torch.from_numpy(np.stack(blocks).astype(np.int64))

    def state_dict(self) -> dict:
        return {"drawn": self.drawn.tolist(), "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict):
        self.drawn = np.array(state["drawn"])
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(source_state)


class Prefetch:
    """Draws batches ahead in a thread, so that a training step does not have to wait for the tokenizer.

    Args:
        batches (`Batches`): The source of the batches.
        depth (`int`): Number of batches to draw ahead.
    """

    def __init__(self, batches: Batches, depth: int = 4):
        self.batches, self.depth = batches, depth
        self._state = batches.state_dict()
        self._queue: queue.Queue | None = None

    def next_batch(self, rows: int) -> torch.Tensor:
        """Returns the next batch, like [`Batches.next_batch`]. `rows` must be the same in every call."""
        if self._queue is None:
            self._queue = queue.Queue(self.depth)
            threading.Thread(target=self._draw, args=(rows,), daemon=True).start()
        batch, state = self._queue.get()
        if isinstance(batch, Exception):
            raise batch
        self._state = state
        return batch

    def _draw(self, rows: int):
        try:
            while True:
                self._queue.put((self.batches.next_batch(rows), self.batches.state_dict()))
        except Exception as error:  # `next_batch` raises it
            self._queue.put((error, None))

    def state_dict(self) -> dict:
        """Returns the state after the last batch that `next_batch` returned, not after the last one drawn ahead."""
        return self._state

    def load_state_dict(self, state: dict):
        """Restores a state. It must be called before the first batch."""
        self.batches.load_state_dict(state)
        self._state = state


def document_positions(tokens: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Computes the position of each token in its document.

    In a sequence that starts inside a document, the positions of that document count from the start of the sequence.

    Args:
        tokens (`torch.Tensor` of shape `(batch, sequence)`): Packed documents, each of which ends with `end_of_text`.
        end_of_text (`int`): The token id that ends a document.

    Returns:
        `torch.Tensor` of shape `(batch, sequence)`, int64: The positions. Passed to the model as `position_ids`, they
        keep attention within the documents.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(tokens)
    starts[:, 1:] = torch.where(tokens[:, :-1] == end_of_text, index[:, 1:], 0)
    return index - starts.cummax(dim=1).values
