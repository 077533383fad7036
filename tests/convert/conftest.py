# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from pathmoe.text.reader import train_tokenizer
from tests.convert_helpers import Place, save_inputs


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Returns a function that saves a tiny PathMoE with random weights; gives its folder."""

    def save(name="source", seed=0, shards=None, **fields):
        tiny_model(seed, **fields).save_pretrained(tmp_path / name, max_shard_size=shards or "5GB")
        return tmp_path / name

    return save


@pytest.fixture
def logits():
    """Returns a function that gives the float32 logits of the model in a folder for fixed tokens; of all architectures
    by the same kernels."""

    @torch.no_grad()
    def compute(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        return model(torch.arange(64).view(2, 32) % model.config.vocab_size).logits

    return compute


@pytest.fixture
def rounding():
    """Returns a function that gives what the same sums may differ by where threads, processors or the alignment of
    loaded weights split them otherwise: half an eps for each of the terms that a logit of a tiny model is summed
    from, five layers of about 64 (attention and experts of width 32). What is converted wrongly is off by 1e-2."""
    return lambda logits: torch.finfo(torch.float32).eps / 2 * 5 * 64 * logits.abs().max().item()


SENTENCES = [f"The {i}th {noun} counts to {i * i}." for i in range(30) for noun in ("line", "town", "river", "bird")]


@pytest.fixture
def tiny_tokenizer():
    """A BPE tokenizer of 320 tokens."""
    return train_tokenizer(SENTENCES, 320)


@pytest.fixture
def text(tmp_path):
    """A .jsonl file of about 4000 of its tokens."""
    lines = random.Random(0).choices(SENTENCES, k=400)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return tmp_path / "text.jsonl"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What every `place` is a copy of."""
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """The working directory of a case, with inputs to damage."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, inputs)
