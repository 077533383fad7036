# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs a model over texts and records the path and the place of each token."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pathmoe.command import UserError
from pathmoe.evaluate.inputs import (
    check_sources,
    keep_texts,
    load_file,
)
from pathmoe.paths import PathTrace, record_paths


# Tokens that are read and perturbed of each document: a few of many documents are more informative than many of a few.
DOCUMENT_TOKENS = 512
CONTEXT = 45  # characters on each side of an example


@dataclass
class Reading:
    """Holds the T tokens of some documents, which the model read in pieces, and their paths.

    Attributes:
        documents (`list[dict]`): Rows of the data.
        pieces (`list[list[int]]`): Token ids; no piece crosses a document.
        piece_documents (`list[int]`): Index of the document of each piece.
        offsets (`list[tuple[int, int]]` of length T): The characters of each token in its document's text.
        trace (`PathTrace`): The paths of the T tokens, with probabilities.
    """

    documents: list[dict]
    pieces: list[list[int]]
    piece_documents: list[int]
    offsets: list[tuple[int, int]]
    trace: PathTrace

    def __post_init__(self):
        self.experts = self.trace.experts.long()
        lengths = torch.tensor([len(piece) for piece in self.pieces])
        self.document_ids = torch.tensor(self.piece_documents).repeat_interleave(lengths)
        # If several tokens make up one character, the character belongs to the first.
        self.texts, last, taken = [], None, 0
        for document, (start, end) in zip(self.document_ids.tolist(), self.offsets):
            taken = taken if document == last else 0
            self.texts.append(self.documents[document]["text"][max(start, taken) : end])
            last, taken = document, max(end, taken)


def read_documents(files: list[Path]) -> list[list[dict]]:
    """Reads the rows with text of each file.

    Raises:
        UserError: If a file cannot be read, has no column `text`, no text, or tags that do not fit its words.
    """
    result = []
    for file in files:
        rows = load_file(file)
        if "text" not in rows.column_names:
            raise UserError(f"--data {file} has no column 'text', only {', '.join(rows.column_names)}.")
        rows, _ = keep_texts(rows, "text", f"--data {file}")
        if "source" in rows.column_names:
            check_sources(rows["source"], "source", f"--data {file}")
        rows = [row for row in rows if row["text"].strip()]
        if not rows:
            raise UserError(f"--data {file} holds no text: all its rows are empty.")
        for row in rows:
            check_tags(row, file)
        result.append([row | {"source": file.stem if row.get("source") is None else row["source"]} for row in rows])
    return result


def check_tags(row: dict, file: Path):
    """Checks that each gold tag has a place in the text."""
    if row.get("tags") is None:
        return
    columns = [row.get(column) for column in ("starts", "ends", "tags")]
    where = f"--data {file}: in the row that begins {row['text'][:40]!r},"
    if not all(isinstance(values, list) for values in columns) or len({len(values) for values in columns}) > 1:
        raise UserError(f"{where} starts, ends and tags must be lists of one length, with a value for each word.")
    if not all(isinstance(value, kind) for values, kind in zip(columns, (int, int, str)) for value in values):
        raise UserError(f"{where} starts and ends must be whole numbers, and tags texts.")
    if not all(0 <= start <= end <= len(row["text"]) for start, end, _ in zip(*columns)):
        raise UserError(f"{where} a word starts or ends outside the text's {len(row['text'])} characters.")


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: list[dict], max_tokens: int, each: int
) -> list[tuple[dict, list[int], list[tuple[int, int]]]]:
    """Tokenises documents up to `max_tokens` in total and `each` per document.

    Returns:
        `list[tuple]`: `(document, token ids, offsets)` of each document that was reached.

    Raises:
        UserError: If the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} has no character offsets: use a fast tokenizer.")
    result = []
    for document in documents:
        if max_tokens == 0:
            break
        encoded = tokenizer(document["text"], return_offsets_mapping=True, verbose=False)
        ids, offsets = (encoded[key][: min(each, max_tokens)] for key in ("input_ids", "offset_mapping"))
        max_tokens -= len(ids)
        result.append((document, ids, offsets))
    return result


@torch.no_grad()
def record(model: PreTrainedModel, pieces: list[list[int]], probabilities: bool = False) -> PathTrace:
    """Records the paths of the tokens of some pieces, which are run one by one."""
    with record_paths(model, probabilities=probabilities) as trace:
        for piece in tqdm(pieces, desc="paths", disable=None):
            model(torch.tensor([piece], device=model.device), use_cache=False)
    return trace


def read_text(model: PreTrainedModel, encoded: list[tuple], max_length: int) -> Reading:
    """Runs the model over documents in pieces of at most `max_length` tokens and records their paths."""
    documents, pieces, piece_documents, all_offsets = [], [], [], []
    for document, ids, offsets in encoded:
        cut = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        pieces += cut
        piece_documents += [len(documents)] * len(cut)
        all_offsets += offsets
        documents.append(document)
    return Reading(documents, pieces, piece_documents, all_offsets, record(model, pieces, probabilities=True))


def align_tags(offsets: list[tuple[int, int]], document: dict) -> list[str | None]:
    """Returns the gold tag of the word that each token belongs to.

    A token belongs to the word that contains the token's first character that is not white space. So all sub-words of
    a word have the word's tag, and a token that spans two words has the tag of the first.

    Args:
        offsets (`list[tuple[int, int]]`): The characters of each token, end exclusive.
        document (`dict`): `text`, and `starts`, `ends` and `tags` of the words.

    Returns:
        `list[str | None]`: `None` where a token is special, white space, or in no word.
    """
    text, tag_at = document["text"], {}
    for start, end, tag in zip(document["starts"], document["ends"], document["tags"]):
        tag_at.update(dict.fromkeys(range(start, end), tag))
    tags = []
    for start, end in offsets:
        start += len(text[start:end]) - len(text[start:end].lstrip())
        tags.append(tag_at.get(start) if start < end else None)
    return tags


def tags_of(reading: Reading) -> list[str | None]:
    """Returns the gold tag of each token, or `None` if it has none."""
    tags = []
    for number, document in enumerate(reading.documents):
        offsets = [reading.offsets[i] for i in (reading.document_ids == number).nonzero()[:, 0].tolist()]
        tags += align_tags(offsets, document) if document.get("tags") is not None else [None] * len(offsets)
    return tags
