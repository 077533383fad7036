# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reads the inputs of the evaluation commands. Each mistake of a user ends in one line that states how to fix it."""

import argparse
import glob
import math
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pathmoe.command import UserError, first_line, one_line
from pathmoe.files import read_json
from pathmoe.loading import check_device
from pathmoe.text.rows import READERS, check_file, find_undecodable, read_all_rows, read_lines, select_texts


def load_file(file: str | Path, option: str = "--data") -> Dataset:
    """Reads a data file; the documents of a .txt file, which blank lines separate, are in the column `text`.

    Raises:
        UserError: If the file is missing, of another kind, empty, or damaged; the message names the file and, where
            there are lines, the line.
    """
    builder = check_file(file, option)
    if builder in READERS:
        rows = read_all_rows(file, option)
        columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))}
        for name, values in columns.items():
            first_rows = {type(value).__name__: row for row, value in reversed([*enumerate(values, 1)])}
            first_rows.pop("NoneType", None)
            if len(first_rows) > 1 and first_rows.keys() != {"int", "float"}:
                found = " and ".join(f"{kind} in row {row}" for kind, row in sorted(first_rows.items()))
                raise UserError(f"{option} {file}: column {name!r} holds {found}: make them one type.")
        try:
            return Dataset.from_dict(columns)
        except (ValueError, TypeError, OverflowError) as error:  # Arrow's errors are of these types
            raise UserError(f"{option} {file} cannot be read as a table: {first_line(error)}.") from error
    try:
        rows = load_dataset(builder, data_files=glob.escape(str(file)), split="train")
    except Exception as error:  # a damaged file can make the readers of three formats raise anything
        cause = error.__cause__ or error
        reason = "holds no rows" if isinstance(cause, StopIteration) else f"cannot be read: {first_line(cause)}"
        if builder == "csv" and (line := find_undecodable(read_lines(file))) is not None:
            reason = f"line {line + 1} is not valid UTF-8"
        raise UserError(f"{option} {file} {reason}.") from error
    if not len(rows):
        raise UserError(f"{option} {file} holds no rows.")
    return rows


def keep_texts(rows: Dataset, column: str, what: str) -> tuple[Dataset, int]:
    """Removes the rows whose text is null or missing, with the messages of [`select_texts`].

    Returns:
        `(rows, skipped)`: the rows with a text, and the number of the others.
    """
    kept = select_texts(rows[column], column, what)
    skipped = len(rows) - len(kept)
    return (rows.select(kept) if skipped else rows), skipped


def check_sources(values: list, column: str, what: str):
    """Checks that sources are texts or numbers.

    Raises:
        UserError: If a source has another type; the message names the column and the value.
    """
    for value in values:
        if value is not None and not isinstance(value, str | int | float):
            raise UserError(f"{what}: column {column!r} holds {value!r:.60}, which is neither text nor a number.")


def add_device_arguments(parser: argparse.ArgumentParser):
    """Adds the options that state how a model is loaded."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16; by default that of the checkpoint")
    parser.add_argument(
        "--allow_missing", action="store_true", help="initialise weights that the checkpoint lacks at random"
    )


def check_device_arguments(options: argparse.Namespace):
    """Checks that torch has the `--device` and the `--dtype`.

    Raises:
        UserError: If it has not; the message names the option and its value.
    """
    dtype = getattr(torch, options.dtype, None)
    if options.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"--dtype {options.dtype}: choose auto, float32, bfloat16 or float16.")
    check_device(options.device)


def load_config(source: str, option: str = "--model", **options) -> PreTrainedConfig:
    """Reads the configuration of a model.

    Raises:
        UserError: If the configuration cannot be read, its model type is unknown, or the index of the weights is
            damaged.
    """
    switch = " without --trust_remote_code" if "trust_remote_code" in options else ""
    options = {"trust_remote_code": False} | options  # by default, transformers would ask the user
    model_type = None
    if Path(source).is_dir():
        model_type = read_json(Path(source) / "config.json", option).get("model_type")
        for file in sorted(Path(source).glob("*.safetensors")):
            if not file.is_file():
                raise UserError(f"{option}: {file} is a folder or a broken link: download the checkpoint again.")
        for file in sorted(Path(source).glob("*.index.json")):
            shards = read_json(file, option).get("weight_map")
            if not isinstance(shards, dict):
                raise UserError(f"{option}: {file} has no weight_map: download the file again.")
            for shard in sorted(set(map(str, shards.values()))):
                if Path(shard).name != shard or not (Path(source) / shard).is_file():
                    raise UserError(
                        f"{option}: {file} lists {shard!r}, which is not a file in the same folder: download "
                        "the checkpoint again, or remove the index if the weights are in one file."
                    )
    try:
        return AutoConfig.from_pretrained(source, **options)
    except ValueError as error:
        if model_type in CONFIG_MAPPING or options["trust_remote_code"] or "trust_remote_code" not in str(error):
            raise UserError(f"{option} {source}: its config.json cannot be used: {one_line(error)}") from error
        raise UserError(
            f"{option} {source}: config.json has the model_type {model_type!r}, which transformers does not know, "
            f"and refers to code in the checkpoint, which is not run{switch}."
        ) from error
    except Exception as error:  # a damaged or foreign config can make transformers raise anything
        raise UserError(f"{option} {source}: its config.json cannot be used: {one_line(error)}") from error


def load_tokenizer(source: str, option: str = "--model", **options) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Raises:
        UserError: If the tokenizer cannot be loaded.
    """
    options = {"trust_remote_code": False} | options
    files = [Path(source) / "tokenizer.json", Path(source) / "tokenizer_config.json"]
    for file in filter(Path.is_file, files):
        read_json(file, option)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # damaged or missing files can make transformers and tokenizers raise anything
        absent = Path(source).is_dir() and not files[0].is_file()
        reason = "it holds no tokenizer.json" if absent else first_line(error)
        fix = "Copy its files into that folder" if Path(source).is_dir() else "Name a folder that holds its files"
        reason = reason.rstrip(".")
        raise UserError(f"{option} {source}: the tokenizer could not be loaded: {reason}. {fix}.") from error


def check_model_folder(folder: str, option: str = "--model"):
    """Checks that a model is a folder.

    Raises:
        UserError: If it is not; the message names the option and its value.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{option} {folder}: this folder does not exist. Download a model from the Hub first.")


def check_whole(settings: dict, what: str):
    """Checks that results do not come from randomly initialised weights.

    Args:
        settings (`dict`): The settings of an evaluation.
        what (`str`): The name of its results, for the message.

    Raises:
        UserError: If the evaluation was run with `--allow_missing`.
    """
    if settings.get("allow_missing"):
        raise UserError(
            f"{what} was evaluated with --allow_missing, so its scores may come from random weights: evaluate "
            "a whole checkpoint without that option."
        )


def finite(figures, undefined: list[str] | None = None, place: str = ""):
    """Replaces numbers that are not finite, which JSON cannot express, by `None`.

    Args:
        figures: Nested dicts, lists and values.
        undefined (`list[str]`, *optional*): Receives `place: value` of each number that is replaced.
        place (`str`): Path of the figures within the whole result.
    """
    if isinstance(figures, dict):
        return {key: finite(value, undefined, f"{place}.{key}".lstrip(".")) for key, value in figures.items()}
    if isinstance(figures, (list, tuple)):
        return [finite(value, undefined, f"{place}[{i}]") for i, value in enumerate(figures)]
    if isinstance(figures, float) and not math.isfinite(figures):
        if undefined is not None:
            undefined.append(f"{place}: {figures}")
        return None
    return figures


def explained(figures: dict) -> dict:
    """Applies [`finite`], and lists the places and values of the replaced numbers under `undefined`."""
    undefined = []
    figures = finite(figures, undefined)
    return figures | {"undefined": undefined} if undefined else figures
