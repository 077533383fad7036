# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What a model does with texts: their tokens, the paths of these, and where each comes from."""

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


# Of a document that has as many, at least so many tokens are read, and perturbed: few of many documents tell more.
DOCUMENT_TOKENS = 512
CONTEXT = 45  # characters on each side of an example


@dataclass
class Reading:
    """What a model made of the text: T tokens of some documents, read piece by piece.

    Attributes:
        documents (`list[dict]`): Rows of the data.
        pieces (`list[list[int]]`): Token ids; no piece crosses a document.
        piece_documents (`list[int]`): Index of the document that each piece is of.
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
        # Where several tokens make up a character, the first one has it.
        self.texts, last, taken = [], None, 0
        for document, (start, end) in zip(self.document_ids.tolist(), self.offsets):
            taken = taken if document == last else 0
            self.texts.append(self.documents[document]["text"][max(start, taken) : end])
            last, taken = document, max(end, taken)


def read_documents(files: list[Path]) -> list[list[dict]]:
    """The rows of each file that hold text.

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
    """Refuses gold tags without a place for each in the text."""
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
    """The first tokens of some documents, at most `each` of each: `(document, token ids, offsets)` of those reached.

    Raises:
        UserError: If the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed.")
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
    """The paths of the tokens of some pieces, which are run one by one."""
    with record_paths(model, probabilities=probabilities) as trace:
        for piece in tqdm(pieces, desc="paths", disable=None):
            model(torch.tensor([piece], device=model.device), use_cache=False)
    return trace


def read_text(model: PreTrainedModel, encoded: list[tuple], max_length: int) -> Reading:
    """Runs the model over documents, in pieces of `max_length` tokens at most, and records their paths."""
    documents, pieces, piece_documents, all_offsets = [], [], [], []
    for document, ids, offsets in encoded:
        cut = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        pieces += cut
        piece_documents += [len(documents)] * len(cut)
        all_offsets += offsets
        documents.append(document)
    return Reading(documents, pieces, piece_documents, all_offsets, record(model, pieces, probabilities=True))


def align_tags(offsets: list[tuple[int, int]], document: dict) -> list[str | None]:
    """The gold tag of the word that each token belongs to.

    A token belongs to the word that holds its first character that is not white space; so all sub-words of a word have
    its tag, and a token that spans two words has the first one's.

    Args:
        offsets (`list[tuple[int, int]]`): The characters of each token, end exclusive.
        document (`dict`): `text`, and of each word `starts`, `ends` and `tags`.

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
    """The gold tag of each token, or `None` where there is none."""
    tags = []
    for number, document in enumerate(reading.documents):
        offsets = [reading.offsets[i] for i in (reading.document_ids == number).nonzero()[:, 0].tolist()]
        tags += align_tags(offsets, document) if document.get("tags") is not None else [None] * len(offsets)
    return tags
