# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Turns a data source into blocks of token ids: loads it, trains a tokenizer, tokenises and packs the text."""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pathmoe.command import one_line
from pathmoe.files import write_aside
from pathmoe.text.rows import BUILDERS, READERS, DataError, check_file, find_builder


END_OF_TEXT = "<|endoftext|>"
QUICKSTART_HINT = "`python -m pathmoe.text.quickstart` writes the quick start's text."
PEEKED = 1000  # at least one of the first rows of a stream must hold more than white space
PROBLEM = "pathmoe_problem"  # column with the place of a row without text and the reason why it has none


def load_text(
    dataset: str,
    split: str,
    text_column: str = "text",
    config: str | None = None,
    data_files: str | list[str] | dict | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    max_bad_rows: int = 100,
) -> Dataset | IterableDataset:
    """Loads one split of a text data set, checks that it holds text, and removes rows without text.

    Args:
        dataset (`str`): A file (.txt, .md, .jsonl, .json, .parquet, .csv, .arrow; text, JSON and CSV also compressed
            as .gz, .bz2 or .xz; [`pathmoe.text.rows`] states what each holds), a folder written by `save_to_disk`, or
            anything that `datasets.load_dataset` accepts: a builder such as `"json"` with `data_files`, or a Hub name.
        split (`str`): Name of the split; `"train"` for a single file.
        text_column (`str`): Column that holds the text.
        config (`str`, *optional*): Configuration name of a Hub data set.
        data_files (`str`, `list` or `dict`, *optional*): As for `load_dataset`; relative to the working directory.
        streaming (`bool`): Whether to read the rows during training instead of preparing all of them first.
        cache_dir (`str` or `Path`, *optional*): Where `datasets` keeps prepared data.
        max_bad_rows (`int`, defaults to 100): The number of rows without readable text that may be skipped: null,
            another type, no such column, broken JSON, invalid UTF-8. One more raises a `DataError` that names the row.

    Returns:
        `Dataset` or `IterableDataset`: The split, with only its text column.

    Raises:
        DataError: If a file, the split or the column is missing, or holds no text. A stream raises the error when it
            reaches the row.
    """
    path, source = Path(dataset), dataset
    if (kind := find_builder(path)) is not None:
        if data_files is not None:
            raise DataError(
                f"dataset={dataset!r} is a file already: list both files in data_files, with dataset={kind!r}."
            )
        if split != "train":
            raise DataError(
                f"dataset={dataset!r} is one file and has no split {split!r}: add a file for that split to data_files."
            )
        dataset, data_files = kind, {split: dataset}
    elif path.is_file():
        check_file(path, "dataset:")  # which names the types that are read
    files = find_files(data_files, split)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        data = load_saved(dataset, split, streaming)
    else:
        cache_dir = None if cache_dir is None else str(cache_dir)
        if data_files is None and dataset in BUILDERS.values() and not path.is_dir():
            raise DataError(f"dataset={dataset!r} names a type of file: list the files themselves in data_files.")
        if config is not None and dataset in BUILDERS.values():
            raise DataError(f"dataset_config={config!r} has no effect on dataset={dataset!r}: leave it out.")
        try:
            if dataset in READERS and files is not None:
                data = read_files(dataset, files, text_column, streaming, cache_dir)
            else:
                data = load_dataset(
                    dataset, config, data_files=data_files, split=split, streaming=streaming, cache_dir=cache_dir
                )
            next(iter(data), None)
        except Exception as error:
            raise explain_failure(error, dataset, split, data_files, files) from error
    first = next(iter(data), None)
    if first is None:
        raise DataError(f"split {split!r} of {path} is empty.")
    if text_column not in first:
        raise DataError(f"split {split!r} of {path} has no column {text_column!r}, only {sorted(first)!s:.200}.")
    if first[text_column] is not None and not isinstance(first[text_column], str):
        kind = type(first[text_column]).__name__
        raise DataError(f"column {text_column!r} of {path} holds {kind}, not text: choose another text_column.")
    return leave_out_bad_rows(data, source, text_column, max_bad_rows)


def explain_failure(
    error: Exception, dataset: str, split: str, data_files: str | list | dict | None, files: list[str] | None
) -> DataError:
    """Returns the error to raise if `datasets` could not load a split, with the fix where the reason is known."""
    reason = f"{error} {error.__cause__ or ''}".strip() or type(error).__name__
    where = dataset if data_files is None else f"{dataset} {data_files}"
    if "corresponds to no data" in reason:
        return DataError(f"split {split!r} of {where} holds no text: it is empty or blank.")
    kinds = {find_builder(file): file for file in files or ()}
    if "load_from_disk" in reason:
        reason = "it is an incomplete folder of `save_to_disk`, without dataset_info.json. Save it again."
    elif (kind := BUILDERS.get(f".{dataset}")) not in (None, dataset):
        reason = f"for such files, set dataset={kind!r}."
    elif dataset in BUILDERS.values() and (others := kinds.keys() - {None, dataset}):
        kind = min(others)
        reason = f"{kinds[kind]} does not look like {dataset}: for such files, set dataset={kind!r}."
    elif "column names don't match" in reason:
        reason = "its files do not all have the same columns. Give them the same ones."
    elif "://" in where:
        reason = f"{reason}. Download the file and give its path."
    elif data_files is None and not Path(dataset).exists():
        reason = f"it is neither a file nor a folder here, and as a dataset of the Hub: {reason}"
    return DataError(f"could not load split {split!r} of {where}: {reason}")


def find_files(data_files: str | list | dict | None, split: str) -> list[str] | None:
    """Returns the local files of a split in order, or `None` if there are none or some are remote.

    Raises:
        DataError: If the split does not exist, or if a file of any split is missing, empty or a folder.
    """
    if data_files is None:
        return None
    entries = data_files if isinstance(data_files, dict) else {split: data_files}
    found = {}
    for name, entry in entries.items():
        for file in entry if isinstance(entry, list | tuple) else [entry]:
            if not isinstance(file, str) or not file:
                raise DataError(f"data_files has {file!r} where the name of a file should be.")
            if "://" in file:
                return None
            files = [file] if Path(file).exists() else sorted(filter(os.path.exists, glob.glob(file, recursive=True)))
            files = [name for name in files if not (len(files) > 1 and Path(name).is_dir())]
            if not files:
                hint = f" {QUICKSTART_HINT}" if file.startswith("runs/quickstart/data/") else ""
                raise DataError(f"data file {file!r} does not exist (looked in {Path.cwd()}).{hint}")
            if Path(files[0]).is_dir():
                raise DataError(f"data file {file!r} is a folder: list its files, such as {file}/*.jsonl.")
            if not any(Path(name).stat().st_size for name in files):
                raise DataError(f"data file {file!r} is empty.")
            found[name] = found.get(name, []) + files
    if split not in found:
        raise DataError(f"data_files has no split {split!r}, only {sorted(found)}.")
    return found[split]


def load_saved(dataset: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Loads a split of a folder that `save_to_disk` wrote."""
    try:
        data = load_from_disk(dataset)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DataError(f"dataset={dataset!r} is a damaged save_to_disk folder ({reason}): save it again.") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise DataError(f"{dataset} has no split {split!r}, only {sorted(data)}.")
        data = data[split]
    elif split != "train":
        raise DataError(f"dataset={dataset!r} was saved without splits, so it has no split {split!r}.")
    return data.to_iterable_dataset() if streaming else data


def read_files(builder: str, files: list[str], column: str, streaming: bool, cache_dir: str | None):
    """Returns text or JSON files as a data set in which a row without text holds the reason instead."""
    # With the times and sizes, a changed file is a different data set to the cache.
    stamps = [(file, Path(file).stat().st_mtime_ns, Path(file).stat().st_size) for file in files]
    features = Features({column: Value("string"), PROBLEM: Value("string")})
    options = {"features": features, "gen_kwargs": {"files": stamps, "column": column, "builder": builder}}
    if streaming:
        return IterableDataset.from_generator(read_column, **options)
    return Dataset.from_generator(read_column, cache_dir=cache_dir, **options)


def read_column(files: list[tuple], column: str, builder: str) -> Iterator[dict]:
    """Yields the text of each row of some files, or null and the reason why it has none."""
    for file, *_ in files:
        for where, fields, problem in READERS[builder](file):
            # The documents of a plain text file have the name that the user wants for their column.
            text = fields.get("text" if builder == "text" else column)
            if problem is None and not isinstance(text, str):
                problem = (
                    f"has no column {column!r}, only {sorted(fields)}" if column not in fields
                    else "holds null where a text should be" if text is None
                    else f"holds {type(text).__name__}, not text, in column {column!r}"
                )  # fmt: skip
            yield {column: None, PROBLEM: f"{where} {problem}"} if problem else {column: text, PROBLEM: None}


class BadRows:
    """Filters rows without text out of a stream and counts them.

    Args:
        source (`str`): The data set, for the message.
        column (`str`): Column that holds the text.
        limit (`int`): The largest number of such rows.
    """

    def __init__(self, source: str, column: str, limit: int):
        self.source, self.column, self.limit, self.seen = source, column, limit, set()

    def __call__(self, row: dict, index: int) -> bool:
        text = row[self.column]
        if isinstance(text, str):
            return True
        problem = row.get(PROBLEM) or f"row {index + 1} of {self.source} holds {text!r} where a text should be"
        if problem not in self.seen:  # later epochs reach the same row
            self.seen.add(problem)
            tqdm.write(f"WARNING: skipped: {problem}.")
            check_bad_rows(self.source, list(self.seen), problem, self.limit)
        return False


def check_bad_rows(source: str, problems: list[str], last: str, limit: int):
    if len(problems) > limit:
        raise DataError(
            f"dataset={source!r} has more than max_bad_rows={limit} rows without text: {last}. Fix the rows, or "
            "raise max_bad_rows."
        )


def leave_out_bad_rows(data: Dataset | IterableDataset, source: str, column: str, limit: int):
    """Removes the rows without text, and all columns but the text."""
    if isinstance(data, IterableDataset):
        rows = BadRows(source, column, limit)
        data = data.filter(rows, with_indices=True).select_columns([column])
        try:
            if next(iter(data), None) is None:
                raise DataError(f"no row of dataset={source!r} holds text: {next(iter(rows.seen))}.")
            if not any(row[column] and not row[column].isspace() for row in data.take(PEEKED)):
                raise DataError(f"dataset={source!r}: the first rows of the stream hold only blanks in {column!r}.")
        finally:
            rows.seen.clear()
        return data
    if PROBLEM in data.column_names:
        problems = data.data.column(PROBLEM).drop_null().to_pylist()
    else:
        nulls = (text is None for text in data[column]) if data.data.column(column).null_count else ()
        problems = [
            f"row {number} of {source} holds null where a text should be"
            for number, null in enumerate(nulls, 1)
            if null
        ]
    if problems:
        if len(problems) == len(data):
            raise DataError(f"no row of dataset={source!r} holds text: {problems[0]}.")
        check_bad_rows(source, problems, problems[min(limit, len(problems) - 1)], limit)
        tqdm.write(f"WARNING: skipped {len(problems)} rows without text of {source}, the first: {problems[0]}.")
        data = data.filter(has_text, input_columns=[column])
    if not any(text and not text.isspace() for text in data[column]):
        raise DataError(
            f"no row of dataset={source!r} holds text: column {column!r} is blank in all {len(data)} rows."
        )
    return data.select_columns([column])


def has_text(text: str | None) -> bool:
    return text is not None


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with one special token that begins, ends and pads documents.

    Args:
        texts (`Iterable[str]`): Documents.
        vocab_size (`int`): Size of the vocabulary; at least 257, for all bytes and the special token.

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
    """Returns the token ids of each document, followed by the end-of-text token."""
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
    """Tokenises all documents and concatenates them into blocks without padding.

    The token ids are cached in `cache_dir`, and any run with the same text, tokenizer and length uses them. Processes
    that ask for the same text at the same time wait for the first one.

    Args:
        dataset (`Dataset`): Documents.
        tokenizer (`PreTrainedTokenizerBase`): With an end-of-text token, which is appended to every document.
        text_column (`str`): Column that holds the text.
        sequence_length (`int`): Tokens in a block.
        cache_dir (`str` or `Path`): Folder of the cached token ids.

    Returns:
        `np.ndarray` of shape `(blocks, sequence_length)`, int32, memory-mapped. The last tokens, which do not
        fill a block, are dropped.

    Raises:
        DataError: If the text is shorter than one block.
    """
    vocabulary = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, str(tokenizer.backend_tokenizer)]
    identity = json.dumps([dataset._fingerprint, text_column, sequence_length, vocabulary])
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    file = Path(cache_dir) / f"tokens-{name}.npy"
    file.parent.mkdir(parents=True, exist_ok=True)
    # The operating system releases the lock even if the process is killed.
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
                    f"{sequence_length}: use more text or a shorter sequence."
                )
            try:
                with write_aside(file) as partial:
                    np.save(partial, tokens[: blocks * sequence_length].reshape(blocks, sequence_length))
            except OSError as error:  # NumPy raises one without an errno on a full disk
                raise DataError(f"{file} cannot be written: {error}. Choose another cache_dir.") from error
    return read_blocks(file, sequence_length)


def read_blocks(file: Path, sequence_length: int) -> np.ndarray:
    """Opens the memory-mapped blocks of token ids that an earlier run cached.

    Raises:
        DataError: If the file does not hold such blocks.
    """
    try:
        blocks = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}): remove it, and the next run writes it again.") from error
    if not isinstance(blocks, np.ndarray) or blocks.dtype != np.int32 or blocks.shape[1:] != (sequence_length,):
        raise DataError(
            f"{file} does not hold token ids in sequences of sequence_length={sequence_length}: move it away, and "
            "the next run writes it again."
        )
    return blocks
