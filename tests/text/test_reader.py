# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pathmoe.text.quickstart import DOCUMENT_LENGTH, split_document
from pathmoe.text.reader import DataError, load_text, pack, train_tokenizer


TEXTS = [f"Document {i}: the quick brown fox jumps {i * 7 % 13} times over it.\n" * (1 + i % 4) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def flat_tokens(tokenizer):
    ids = []
    for text in TEXTS:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids


def test_trained_tokenizer_survives_saving_and_gives_back_any_text(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße,\t世界! 🙂\n\nthe quick fox"
    assert reloaded.decode(reloaded(text)["input_ids"]) == text
    assert len(reloaded) <= 300


@pytest.mark.parametrize("length", [2, 7, 64])
def test_packing_lays_documents_end_to_end_and_drops_only_the_tail(tokenizer, tmp_path, length):
    blocks = pack(Dataset.from_dict({"text": TEXTS}), tokenizer, "text", length, tmp_path)
    expected = flat_tokens(tokenizer)
    assert blocks.reshape(-1).tolist() == expected[: len(expected) // length * length]


def test_packed_tokens_are_kept_for_the_same_text_and_not_for_another(tokenizer, tmp_path):
    data = Dataset.from_dict({"text": TEXTS})
    pack(data, tokenizer, "text", 16, tmp_path)
    (file,) = tmp_path.glob("tokens-*.npy")
    written = file.stat().st_mtime_ns
    pack(data, tokenizer, "text", 16, tmp_path)
    assert file.stat().st_mtime_ns == written
    pack(Dataset.from_dict({"text": TEXTS[1:]}), tokenizer, "text", 16, tmp_path)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 2


def test_two_processes_that_pack_the_same_text_share_one_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    Dataset.from_dict({"text": TEXTS * 20}).to_json(tmp_path / "text.jsonl")
    code = """
from transformers import AutoTokenizer
from pathmoe.text.reader import load_text, pack
data = load_text("text.jsonl", "train", cache_dir="cache")
print(pack(data, AutoTokenizer.from_pretrained("tokenizer"), "text", 16, "tokens").sum())
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stdout=subprocess.PIPE) for _ in range(2)
    ]
    sums = [process.communicate()[0] for process in both]
    assert sums[0] == sums[1] and all(process.returncode == 0 for process in both)
    assert len(list((tmp_path / "tokens").glob("*.npy"))) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt", ".csv", "folder"])
def test_every_local_format_loads_the_same_text(tmp_path, suffix):
    texts = ["one paragraph", "another paragraph"]
    data = Dataset.from_dict({"text": texts, "source": ["a", "b"]})
    path = tmp_path / ("folder" if suffix == "folder" else f"file{suffix}")
    {
        ".jsonl": lambda: data.to_json(path),
        ".parquet": lambda: data.to_parquet(path),
        ".txt": lambda: path.write_text("\n\n".join(texts)),
        ".csv": lambda: data.to_csv(path),
        "folder": lambda: data.save_to_disk(path),
    }[suffix]()
    for streaming in (False, True):
        loaded = load_text(str(path), "train", streaming=streaming, cache_dir=tmp_path / "cache")
        assert [document["text"] for document in loaded] == texts


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    for source, complaint in (
        ("missing.jsonl", "missing.jsonl' does not exist"),
        ("empty.jsonl", "empty.jsonl' is empty"),
        ("wrong.jsonl", r"no column 'text', only \['body'\]"),
        ("numbers.jsonl", "holds int, not text"),
    ):
        with pytest.raises(DataError, match=complaint):
            load_text(str(tmp_path / source), "train", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"no split 'test', only \['train'\]"):
        load_text("json", "test", data_files={"train": str(tmp_path / "wrong.jsonl")})
    with pytest.raises(DataError, match="is one file and has no split 'validation'"):
        load_text(str(tmp_path / "wrong.jsonl"), "validation")
    with pytest.raises(DataError, match="is a file already"):
        load_text(str(tmp_path / "wrong.jsonl"), "train", data_files={"validation": "x.jsonl"})


def test_row_without_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="holds None where a text should be"):
        pack(Dataset.from_dict({"text": ["some text", None]}), tokenizer, "text", 4, tmp_path)


def test_text_shorter_than_a_sequence_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match="fewer than one sequence of sequence_length=64"):
        pack(Dataset.from_dict({"text": ["short"]}), tokenizer, "text", 64, tmp_path)


@given(st.lists(st.text("ab ", max_size=3000), max_size=12))
def test_splitting_a_document_loses_no_word(paragraphs):
    text = "\n".join(paragraphs)
    parts = list(split_document(text))
    assert " ".join(parts).split() == text.split()
    longest = max(map(len, paragraphs), default=0)
    assert all(len(part) <= max(DOCUMENT_LENGTH, longest) + 1 for part in parts)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_compressed_file_is_named(tmp_path, streaming):
    file = tmp_path / "a.jsonl.gz"
    lines = "".join(json.dumps({"text": f"{number} and more"}) + "\n" for number in range(5000))
    file.write_bytes(gzip.compress(lines.encode())[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read after line \d"):
        list(load_text(str(file), "train", streaming=streaming))
