# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""From a data source to blocks of token ids: load, train a tokenizer, tokenise, pack."""

import glob
import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv", ".arrow": "arrow"}


class DataError(ValueError):
    """The data cannot be used as asked. The message says what was found and what to do."""


def load_text(
    dataset: str,
    split: str,
    text_column: str = "text",
    config: str | None = None,
    data_files: str | list[str] | dict | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """Loads one split of a text data set and checks that it holds text.

    Args:
        dataset (`str`): A file (.txt, .jsonl, .json, .parquet, .csv, .arrow), a folder written by `save_to_disk`, or
            whatever `datasets.load_dataset` takes: a builder such as `"json"` with `data_files`, or a Hub name.
        split (`str`): Name of the split; `"train"` for a lone file. In .txt files, blank lines part the documents.
        text_column (`str`): Column that holds the text.
        config (`str`, *optional*): Configuration name of a Hub data set.
        data_files (`str`, `list` or `dict`, *optional*): As for `load_dataset`; relative to the working directory.
        streaming (`bool`): Whether to read as it goes instead of preparing all of it first.
        cache_dir (`str` or `Path`, *optional*): Where `datasets` keeps what it prepares.

    Returns:
        `Dataset` or `IterableDataset`: The split, with only its text column.

    Raises:
        DataError: If a file or the split or the column is missing, or there is no text in it.
    """
    path, options = Path(dataset), {}
    if path.suffix in BUILDERS:
        if data_files is not None:
            raise DataError(
                f"dataset={dataset!r} is a file already: name both files in data_files, with dataset="
                f"{BUILDERS[path.suffix]!r}."
            )
        if split != "train":
            raise DataError(
                f"dataset={dataset!r} is one file and has no split {split!r}: name a file for it in data_files."
            )
        dataset, data_files = BUILDERS[path.suffix], {split: dataset}
    if dataset == "text":
        options["sample_by"] = "paragraph"
    for entry in data_files.values() if isinstance(data_files, dict) else [data_files]:
        for file in [entry] if isinstance(entry, str) else entry or []:
            if "://" in file:
                continue
            if not (found := glob.glob(file, recursive=True)):
                raise DataError(f"data file {file!r} does not exist (looked in {Path.cwd()}).")
            if not any(Path(name).stat().st_size for name in found):
                raise DataError(f"data file {file!r} is empty.")
    if isinstance(data_files, dict) and split not in data_files:
        raise DataError(f"data_files has no split {split!r}, only {sorted(data_files)}.")

    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise DataError(f"{dataset} has no split {split!r}, only {sorted(data)}.")
            data = data[split]
        elif split != "train":
            raise DataError(f"dataset={dataset!r} was saved without splits, so it has no split {split!r}.")
        if streaming:
            data = data.to_iterable_dataset()
    else:
        try:
            data = load_dataset(
                dataset,
                config,
                data_files=data_files,
                split=split,
                streaming=streaming,
                cache_dir=None if cache_dir is None else str(cache_dir),
                **options,
            )
        except Exception as error:
            reason = f"{error} {error.__cause__ or ''}".strip() or type(error).__name__
            source = dataset if data_files is None else f"{dataset} {data_files}"
            raise DataError(f"could not load split {split!r} of {source}: {reason}") from error

    first = next(iter(data), None)
    if first is None:
        raise DataError(f"split {split!r} of {path} is empty.")
    if text_column not in first:
        raise DataError(f"split {split!r} of {path} has no column {text_column!r}, only {sorted(first)}.")
    if not isinstance(first[text_column], str):
        kind = type(first[text_column]).__name__
        raise DataError(f"column {text_column!r} of {path} holds {kind}, not text: choose another text_column.")
    return data.select_columns([text_column])


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer whose one special token begins, ends and pads.

    Args:
        texts (`Iterable[str]`): Documents.
        vocab_size (`int`): Size of the vocabulary; at least 257, the bytes and the special token.

    Raises:
        DataError: If `vocab_size` cannot hold all bytes.
    """
    if vocab_size < 257:
        raise DataError(f"vocab_size={vocab_size} is too small for a byte-level tokenizer: it needs at least 257.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each document, with the end-of-text token after it."""
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"the text column holds {text!r} where a text should be: remove or fill such rows.")
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [document + [tokenizer.eos_token_id] for document in ids]


def pack(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    sequence_length: int,
    cache_dir: str | Path,
) -> np.ndarray:
    """Tokenises all documents and lays them end to end in blocks, with nothing padded.

    The token ids are kept in `cache_dir` and used again for the same text, tokenizer and length, by any run. Processes
    that want the same text at the same time wait for the first.

    Args:
        dataset (`Dataset`): Documents.
        tokenizer (`PreTrainedTokenizerBase`): With an end-of-text token, which ends every document.
        text_column (`str`): Column that holds the text.
        sequence_length (`int`): Tokens in a block.
        cache_dir (`str` or `Path`): Where the token ids are kept.

    Returns:
        `np.ndarray` of shape `(blocks, sequence_length)`, int32, memory-mapped. The last tokens that do not fill a
        block are left out.

    Raises:
        DataError: If the text is shorter than one block.
    """
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, str(tokenizer.backend_tokenizer)]
    identity = json.dumps([dataset._fingerprint, text_column, sequence_length, vocabulary])
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    file = Path(cache_dir) / f"tokens-{name}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    # The lock goes away with its process, however that ends.
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            batches = tqdm(dataset.iter(1000), total=-(-len(dataset) // 1000), desc="tokenise", disable=None)
            tokens = np.concatenate(
                [np.fromiter(chain(*encode(batch[text_column], tokenizer)), np.int32) for batch in batches]
            )
            blocks = len(tokens) // sequence_length
            if blocks == 0:
                raise DataError(
                    f"the text has {len(tokens)} tokens, fewer than one sequence of sequence_length="
                    f"{sequence_length}: give more text or shorten the sequence."
                )
            partial = file.with_suffix(".partial.npy")
            np.save(partial, tokens[: blocks * sequence_length].reshape(blocks, sequence_length))
            partial.rename(file)
    return np.load(file, mmap_mode="r")
