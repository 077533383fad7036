# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import itertools
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given
from hypothesis import strategies as st

from pathmoe import PathMoEForCausalLM
from pathmoe.text.batches import Batches, PackedBlocks, PackedStream, Prefetch, document_positions
from pathmoe.text.reader import DataError, pack, train_tokenizer


TEXTS = [f"Document {i}: the quick brown fox jumps {i * 7 % 13} times over it.\n" * (1 + i % 4) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def stream(tokenizer, texts=TEXTS, length=16, window=7, rank=0, world_size=1, shards=3):
    data = Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=shards)
    return PackedStream(split_dataset_by_node(data, rank, world_size), tokenizer, "text", length, 5, window)


@given(blocks=st.integers(1, 30), rows=st.integers(1, 5), world=st.integers(1, 3), seed=st.integers(0, 9))
def test_ranks_together_read_each_block_once_an_epoch_in_one_order(blocks, rows, world, seed):
    data = np.arange(blocks)[:, None]
    readers = [Batches([PackedBlocks(data, seed)], [1.0], rank, world) for rank in range(world)]
    single = Batches([PackedBlocks(data, seed)], [1.0])
    batches = -(-2 * blocks // (rows * world))
    together = [row for _ in range(batches) for reader in readers for row in reader.next_batch(rows)[:, 0].tolist()]
    assert together == single.next_batch(batches * rows * world)[:, 0].tolist()
    assert sorted(together[:blocks]) == sorted(together[blocks : 2 * blocks]) == list(range(blocks))


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4), st.integers(1, 200))
def test_any_stretch_has_the_mixture_that_was_asked_for(weights, drawn):
    sources = [PackedBlocks(np.full((2, 1), number), 0) for number in range(len(weights))]
    numbers = Batches(sources, weights).next_batch(drawn)[:, 0]
    for number, weight in enumerate(weights):
        share = drawn * weight / sum(weights)
        assert abs((numbers == number).sum().item() - share) < len(weights)


def test_mixture_resumes_from_its_state():
    def new():
        return Batches([PackedBlocks(np.arange(n)[:, None] + 100 * n, 1) for n in (5, 7)], [0.3, 0.7], 1, 2)

    batches, resumed = new(), new()
    batches.next_batch(9)
    resumed.load_state_dict(json.loads(json.dumps(batches.state_dict())))
    assert resumed.next_batch(30).tolist() == batches.next_batch(30).tolist()


def test_stream_without_shuffling_gives_the_blocks_of_packing(tokenizer, tmp_path):
    blocks = pack(Dataset.from_dict({"text": TEXTS}), tokenizer, "text", 16, tmp_path)
    packed = stream(tokenizer, window=1)
    assert [packed.next_block().tolist() for _ in blocks] == blocks.tolist()


def documents(packed, tokenizer, count):
    """The first documents of a stream, put together again from its blocks."""
    tokens = (token for _ in itertools.count() for token in packed.next_block().tolist())
    text, found = [], []
    while len(found) < count:
        if (token := next(tokens)) == tokenizer.eos_token_id:
            found.append(tokenizer.decode(text))
            text = []
        else:
            text.append(token)
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_of_a_stream_share_an_epoch_without_overlap_or_loss(tokenizer, world_size):
    parts = [
        documents(stream(tokenizer, rank=rank, world_size=world_size), tokenizer, len(TEXTS) // world_size)
        for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*parts)) == sorted(TEXTS)


def test_stream_is_shuffled_anew_in_each_epoch_and_the_same_in_each_run(tokenizer):
    found = documents(stream(tokenizer), tokenizer, 2 * len(TEXTS))
    first, second = found[: len(TEXTS)], found[len(TEXTS) :]
    assert TEXTS != first != second and sorted(first) == sorted(second) == sorted(TEXTS)
    assert documents(stream(tokenizer), tokenizer, 2 * len(TEXTS)) == found


@pytest.mark.parametrize("before", [0, 1, 5, 40, 90, 230])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_stream_resumes_from_its_state(tokenizer, before, window):
    packed = stream(tokenizer, window=window)
    for _ in range(before):
        packed.next_block()
    state = json.loads(json.dumps(packed.state_dict()))
    resumed = stream(tokenizer, window=window)
    resumed.load_state_dict(state)
    # Far enough to pass into the next epochs.
    expected = [packed.next_block().tolist() for _ in range(400)]
    assert [resumed.next_block().tolist() for _ in range(400)] == expected


def test_resumed_stream_does_not_read_from_the_start(tokenizer):
    read = []

    def new():
        data = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
        return PackedStream(data.map(lambda row: read.append(row) or row), tokenizer, "text", 16, 5, 4)

    packed = new()
    while len(read) < 40:
        packed.next_block()
    resumed = new()
    resumed.load_state_dict(packed.state_dict())
    read.clear()
    resumed.next_block()
    assert len(read) <= 8


def test_prefetched_batches_are_those_drawn_one_by_one_and_so_is_their_state(tokenizer):
    def new():
        return Batches([stream(tokenizer)], [1.0], split=True)

    plain, ahead = new(), Prefetch(new())
    for _ in range(10):
        assert ahead.next_batch(3).tolist() == plain.next_batch(3).tolist()
    resumed = Prefetch(new())
    resumed.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
    assert resumed.next_batch(3).tolist() == ahead.next_batch(3).tolist() == plain.next_batch(3).tolist()


def test_stream_that_is_too_short_is_reported_also_from_a_thread(tokenizer):
    def short():
        return stream(tokenizer, texts=["x"], length=64, shards=1)

    for batches in (Batches([short()], [1.0], split=True), Prefetch(Batches([short()], [1.0], split=True))):
        with pytest.raises(DataError, match="less than one sequence of 64 tokens"):
            batches.next_batch(1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 20))
def test_positions_count_from_the_start_of_each_document(lengths, cut):
    tokens = list(itertools.chain(*([1] * (length - 1) + [0] for length in lengths))) + [1] * cut
    expected = list(itertools.chain(*(range(length) for length in lengths))) + list(range(cut))
    assert document_positions(torch.tensor([tokens]), end_of_text=0).tolist() == [expected]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_sees_another_document(tiny_config, attention):
    model = PathMoEForCausalLM._from_config(tiny_config(initializer_range=0.3), attn_implementation=attention).eval()
    tokens = torch.randint(1, 99, (2, 20))
    tokens[0, 6] = tokens[1, 11] = 0
    changed = tokens.clone()
    changed[0, :6] += 1 - 2 * (changed[0, :6] > 50).long()
    with torch.no_grad():
        one, other = (
            model(t, position_ids=document_positions(t, 0), use_cache=False).logits for t in (tokens, changed)
        )
        alone = model(tokens[:1, 7:]).logits
        leaky = model(changed, use_cache=False).logits
    assert not torch.allclose(one[0, 6], other[0, 6], atol=0.1)
    assert not torch.allclose(one[0, 7:], leaky[0, 7:], atol=0.1)
    # Other tokens in the first document make other groups for the experts, whose sums may round otherwise.
    torch.testing.assert_close(one[0, 7:], other[0, 7:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one[:1, 7:], alone, rtol=1e-4, atol=1e-4)
