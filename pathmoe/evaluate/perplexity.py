# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the perplexity of a causal language model on text.

    pathmoe perplexity --model runs/demo --data validation.parquet --output runs/demo/perplexity.json
    pathmoe perplexity --model runs/demo --data notes.txt --max_length 1024 --stride 256 --output out.json
    pathmoe perplexity --model runs/demo --data Salesforce/wikitext --name wikitext-2-raw-v1 --output out.json

The data is a .jsonl, .json, .parquet, .csv or .arrow file with one document a row, a .txt or .md file whose documents
blank lines separate, a folder that `datasets` saved, or the name of a dataset; text, JSON and CSV files may be
compressed as .gz, .bz2 or .xz. Rows without text are skipped and counted. Each document is scored on its own. Beside
`out.json` with the sums, in total and for each value of `--source_column`, `out.jsonl` has a line for each document.
"""

import argparse
import json
import math
import os
from collections import defaultdict
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from pathmoe import experts  # noqa: F401  registers PathMoE and its fast experts
from pathmoe.command import ArgumentParser, UserError, first_line, run_command
from pathmoe.evaluate.inputs import (
    add_device_arguments,
    check_device_arguments,
    check_model_folder,
    check_sources,
    explained,
    keep_texts,
    load_config,
    load_file,
    load_tokenizer,
)
from pathmoe.evaluate.scoring import score, summarize
from pathmoe.files import check_writable, write_aside
from pathmoe.loading import load_model
from pathmoe.text.rows import find_builder


def load_documents(
    data: str,
    columns: list[str],
    split: str | None = None,
    name: str | None = None,
    limit: int | None = None,
    default_split: str = "validation",
) -> Dataset:
    """Reads documents.

    Args:
        data (`str`): A file, a folder written by `save_to_disk`, or the name of a dataset.
        columns (`list[str]`): The columns to read; a .txt file has only `text`.
        split (`str`, *optional*): The split, if the data has several.
        name (`str`, *optional*): The configuration of a named dataset.
        limit (`int`, *optional*): Number of documents to read from the start; by default all.
        default_split (`str`, defaults to `"validation"`): The split if the data has several and `split` is unset.

    Returns:
        `Dataset`: The documents, with these columns.

    Raises:
        UserError: If the data cannot be read, there is no such split or column, or `limit` is not positive.
    """
    path = Path(data)
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} must be at least 1.")
    if find_builder(path) and not path.is_dir() or path.is_file():
        dataset = load_file(path)
    else:
        try:
            dataset = load_from_disk(data) if path.is_dir() else load_dataset(data, name)
        except Exception as error:  # `datasets` may raise anything for a folder or name that it does not know
            raise UserError(
                f"--data {data}: not a file, a folder that `save_to_disk` wrote, or a dataset that can be "
                f"loaded: {first_line(error)}"
            ) from error
        if isinstance(dataset, DatasetDict):
            split = default_split if split is None else split
            if split not in dataset:
                raise UserError(f"--split {split}: {data} has no split {split!r}: choose one of {', '.join(dataset)}.")
            dataset, split = dataset[split], None
    for option, value in (("--split", split), ("--name", name if path.exists() else None)):
        if value is not None:
            raise UserError(f"{option} {value}: {data} has nothing to choose from: leave {option} out.")
    for column in columns:
        if column not in dataset.column_names:
            raise UserError(
                f"--data {data} has no column {column!r}: choose one of {', '.join(dataset.column_names)}."
            )
    return dataset.select_columns(columns).select(range(len(dataset))[:limit])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parses the options and checks them before anything is loaded."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved model and its tokenizer")
    parser.add_argument("--data", required=True, help="file, folder or name of a dataset")
    parser.add_argument("--name", help="configuration of a named dataset")
    parser.add_argument("--split", help="split, if the data has several; by default validation")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--source_column", help="also report the results of each value of this column")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result, with a .jsonl beside it")
    parser.add_argument(
        "--max_length", type=int, help="largest number of tokens in a window; by default the model's longest"
    )
    parser.add_argument("--stride", type=int, help="distance between windows; by default half of max_length")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="only the first documents")
    add_device_arguments(parser)
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        parser.error(f"--output {args.output} must end in .json.")
    for option in ("max_length", "stride", "batch_size", "limit"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"--{option} {value} must be at least 1.")
    if args.stride and args.max_length and args.stride > args.max_length:
        parser.error(
            f"--stride {args.stride} must be at most --max_length {args.max_length}: some tokens would not be scored."
        )
    for file, mark in ((args.output, '"bits_per_byte"'), (args.output.with_suffix(".jsonl"), '"text_sha"')):
        if os.path.realpath(file) == os.path.realpath(args.data):
            raise UserError(f"--output {args.output} would overwrite the data, {file}: choose another name.")
        check_writable(file, "--output", mark)
    check_device_arguments(args)
    check_model_folder(args.model)
    return args


def check_lengths(args: argparse.Namespace, longest: int | None):
    """Checks that the model can read the windows."""
    if args.max_length is None and longest is None:
        raise UserError(f"--max_length is needed: the config of {args.model} states no max_position_embeddings.")
    if longest is not None and (args.max_length or 0) > longest:
        raise UserError(
            f"--max_length {args.max_length} must be at most the model's max_position_embeddings, {longest}."
        )
    if longest is not None and args.max_length is None and (args.stride or 0) > longest:
        raise UserError(f"--stride {args.stride} must be at most the {longest} tokens of a window.")


def main(argv: list[str] | None = None) -> dict:
    """Scores the data, prints the result and writes it.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; by default those of the process.

    Returns:
        `dict`: The sums over all documents, those of each source, and the settings.

    Raises:
        UserError: If the model or the data cannot be used, or the model's losses are not finite.
    """
    args = parse_arguments(argv)
    columns = [column for column in (args.text_column, args.source_column) if column is not None]
    check_lengths(args, getattr(load_config(args.model), "max_position_embeddings", None))
    tokenizer = load_tokenizer(args.model)
    data = load_documents(args.data, list(dict.fromkeys(columns)), args.split, args.name, args.limit)
    data, skipped = keep_texts(data, args.text_column, f"--data {args.data}")
    if args.source_column is not None:
        check_sources(data[args.source_column], args.source_column, f"--data {args.data}")
    model = load_model(args.model, allow_missing=args.allow_missing, dtype=args.dtype).to(args.device)
    texts = list(data[args.text_column])
    try:
        documents, settings = score(model, tokenizer, texts, args.max_length, args.stride, args.batch_size)
    except ValueError as error:
        raise UserError(f"--model {args.model}, --data {args.data}: {error}") from error
    for number, document in enumerate(documents, 1):
        if not math.isfinite(document["nll"]):
            raise UserError(
                f"--model {args.model}: the loss of document {number} is {document['nll']}: the model is damaged, "
                f"diverged, or overflows in {model.dtype}. Check it, or try --dtype float32."
            )
    by_source = defaultdict(list)
    if args.source_column is not None:
        for document, source in zip(documents, data[args.source_column]):
            document["source"] = source
            by_source[source].append(document)
    settings |= {key: getattr(args, key) for key in ("name", "text_column", "limit", "device", "allow_missing")} | {
        "split": args.split or "validation"
    }  # as in older results, with which this one is compared
    result = summarize(documents) | {
        "skipped_documents": skipped,
        "sources": {source: summarize(of_source) for source, of_source in by_source.items()},
        "model": args.model,
        "data": args.data,
        "settings": settings | {"dtype": str(model.dtype)},
    }
    text = json.dumps(explained(result), indent=2, allow_nan=False) + "\n"
    lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in documents)
    with write_aside(args.output) as whole, write_aside(args.output.with_suffix(".jsonl")) as items:
        whole.write_text(text, encoding="utf-8")
        items.write_text(lines, encoding="utf-8")
    print(text, end="")
    return result


if __name__ == "__main__":
    run_command(main)
