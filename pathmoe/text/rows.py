# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reads the rows of text files: one meaning of each file type for training, evaluation and conversion.

A `.txt` or `.md` file holds documents that blank lines separate. A `.jsonl` or `.ndjson` file holds one JSON object on
each line, and a `.json` file either that or one list of objects. All of these may be compressed.
"""

import bz2
import gzip
import json
import logging
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pathmoe.command import UserError


BUILDERS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text",
    ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
OPENERS: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIBLE = ("json", "text", "csv")
# The builders of `datasets` print what they cannot read before they raise it.
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
# If a larger share of the rows has no text, the wrong column or a damaged file is likelier than stray dirt.
MOST_SKIPPED = 0.5


class DataError(UserError, ValueError):
    """The data cannot be used as asked. The message states what was found and what to do."""


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        where (`str`): The file, and the line or the number of the row in it.
        fields (`dict`): Its columns; empty if there is a problem.
        problem (`str`, *optional*): Why the row cannot be read, as the end of a sentence that begins with `where`.
    """

    where: str
    fields: dict
    problem: str | None = None


def find_builder(path: str | Path) -> str | None:
    """Returns the builder of `datasets` that reads a file of this name, or `None` if it is not that of a text file."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in Path(path).suffixes)]
    if last in OPENERS:
        builder = BUILDERS.get(before)
        return builder if builder in COMPRESSIBLE else None
    return BUILDERS.get(last)


def check_file(file: str | Path, option: str, builders: tuple[str, ...] = tuple(BUILDERS.values())) -> str:
    """Checks that a file exists, is not empty and has a type that can be read.

    Args:
        file (`str` or `Path`): The file.
        option (`str`): What the user called it, such as `--data`.
        builders (`tuple[str]`): The types that the caller can read.

    Returns:
        `str`: The builder of `datasets` that reads the file.

    Raises:
        UserError: If the file is missing, empty or of another type.
    """
    builder = find_builder(file)
    if builder not in builders:
        kinds = [ending for ending, kind in BUILDERS.items() if kind in builders]
        packed = [ending for ending in kinds if BUILDERS[ending] in COMPRESSIBLE]
        raise UserError(
            f"{option} {file} must end in one of {', '.join(kinds)}; {', '.join(packed)} files may be compressed as "
            f"{', '.join(OPENERS)}."
        )
    if not os.path.isfile(file):  # Path.is_file() fails on a name that is too long
        raise UserError(f"{option} {file}: there is no such file.")
    if not os.path.getsize(file):
        raise UserError(f"{option} {file} is empty.")
    return builder


def read_lines(file: str | Path) -> Iterator[bytes]:
    """Yields the lines of a file, which may be compressed.

    Raises:
        DataError: If the file cannot be read to its end.
    """
    number = 0
    try:
        with OPENERS.get(Path(file).suffix.lower(), open)(file, "rb") as stream:
            for line in stream:
                number += 1
                yield line
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file} cannot be read after line {number}: {error}. Repair or replace the file.") from error


def read_json_rows(file: str | Path) -> Iterator[Row]:
    """Yields the rows of a file of JSON lines, or of a file that holds one JSON list.

    Raises:
        DataError: If the file cannot be read to its end.
    """
    lines = read_lines(file)
    first = next(lines, b"").removeprefix(b"\xef\xbb\xbf")
    if first.lstrip()[:1] == b"[":
        content = first + b"".join(lines)
        try:
            rows = json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            yield Row(str(file), {}, f"is not valid JSON ({error})")
            return
        for number, fields in enumerate(rows, 1):
            yield check_row(f"{file} row {number}", fields)
        return
    for number, line in enumerate(chain([first], lines), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            fields = json.loads(line.decode())
        except UnicodeDecodeError:
            yield Row(where, {}, "is not valid UTF-8")
        except (ValueError, RecursionError) as error:
            yield Row(where, {}, f"is not valid JSON ({error})")
        else:
            yield check_row(where, fields)


def check_row(where: str, fields) -> Row:
    """Returns a row of a JSON file, with a problem if it is not an object or cannot be stored as UTF-8."""
    if not isinstance(fields, dict):
        return Row(where, {}, f"holds {type(fields).__name__}, not an object")
    try:
        for text in fields.values():
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        return Row(where, {}, "holds half of a surrogate pair")
    return Row(where, fields)


def read_paragraphs(file: str | Path) -> Iterator[Row]:
    """Yields the documents of a text file, which blank lines separate, in the column `text`.

    Raises:
        DataError: If the file cannot be read to its end.
    """
    lines, start = [], 1
    for number, line in enumerate(chain(read_lines(file), [b""]), 1):
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            content = b"".join(lines).replace(b"\r\n", b"\n").removesuffix(b"\n")
            try:
                yield Row(f"{file} line {start}", {"text": content.decode("utf-8-sig")})
            except UnicodeDecodeError:
                yield Row(f"{file} line {start + (find_undecodable(lines) or 0)}", {}, "is not valid UTF-8")
            lines = []


def find_undecodable(lines: Iterable[bytes]) -> int | None:
    """Returns the index of the first line that is not valid UTF-8."""
    for number, line in enumerate(lines):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return None


READERS: dict[str, Callable[[str | Path], Iterator[Row]]] = {"json": read_json_rows, "text": read_paragraphs}


def read_all_rows(file: str | Path, option: str) -> list[dict]:
    """Reads all rows of a text or JSON file.

    Args:
        file (`str` or `Path`): The file, of a type in `READERS`.
        option (`str`): What the user called it, such as `--data`.

    Returns:
        `list[dict]`: The columns of each row.

    Raises:
        UserError: If the file cannot be read, a row is damaged (the message names its line), or there are no rows.
    """
    rows = []
    try:
        for row in READERS[find_builder(file)](file):
            if row.problem is not None:
                raise UserError(f"{option} {row.where} {row.problem}. Fix or remove it.")
            rows.append(row.fields)
    except DataError as error:
        raise UserError(f"{option} {error}") from error
    if not rows:
        raise UserError(f"{option} {file} holds no rows.")
    return rows


def select_texts(texts: list, column: str, what: str) -> list[int]:
    """Selects the rows that have a text, and reports on stderr how many have none.

    Args:
        texts (`list`): The values of the column.
        column (`str`): The column of the text, for messages.
        what (`str`): The name of the data, for messages.

    Returns:
        `list[int]`: The indices of the rows whose value is not null.

    Raises:
        UserError: If a row holds something other than text, no row has text, or most rows have none.
    """
    kept = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            kept.append(number)
        elif text is not None:
            raise UserError(f"{what}: column {column!r} holds {text!r:.60} in row {number + 1}, which is not text.")
    if skipped := len(texts) - len(kept):
        if skipped > MOST_SKIPPED * len(texts):
            raise UserError(
                f"{what}: {skipped} of {len(texts)} rows have no text in column {column!r}: check the data."
            )
        print(
            f"{what}: skipped {skipped} of {len(texts)} rows, which have no text in column {column!r}.",
            file=sys.stderr,
        )
    return kept
