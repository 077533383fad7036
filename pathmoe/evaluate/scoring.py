# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Computes the perplexity of a causal language model in sliding windows that never span two texts."""

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sliding_windows(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Splits a sequence of inputs into overlapping windows that score each position once.

    Args:
        length (`int`): Number of inputs; input i predicts token i + 1.
        max_length (`int`): The largest number of inputs in a window.
        stride (`int`): The largest number of positions that a window after the first scores, at most `max_length`.

    Yields:
        `(start, first, end)`: the window's inputs are `[start, end)`, and it scores the positions `[first, end)`, each
        with `max_length - stride` inputs before it, or all inputs if there are fewer.
    """
    end = 0
    while end < length:
        first, end = end, min(length, end + stride if end else max_length)
        yield max(0, end - max_length), first, end


@torch.no_grad()
def resolve_windows(model: PreTrainedModel, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """Returns the length and the stride of the windows of [`score`], with defaults where they are `None`.

    Raises:
        ValueError: If they are out of range.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    max_length = longest if max_length is None else max_length
    if max_length is None:
        raise ValueError("The model's config has no max_position_embeddings: pass max_length.")
    stride = max(1, max_length // 2) if stride is None else stride
    if max_length < 1 or (longest is not None and max_length > longest):
        raise ValueError(f"max_length={max_length} must be from 1 to the model's max_position_embeddings={longest}.")
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride={stride} must be from 1 to max_length={max_length}, or tokens would not be scored.")
    return max_length, stride


def refuse_foreign_tokens(model: PreTrainedModel, encoded: list[list[int]]):
    """Checks that the model has all token ids, which it does not if the tokenizer belongs to another model."""
    largest, embeddings = max(max(ids, default=0) for ids in encoded), model.get_input_embeddings().num_embeddings
    if largest >= embeddings:
        raise ValueError(
            f"The tokenizer produces token {largest}, but the model has {embeddings} embeddings: use the model's own "
            "tokenizer."
        )


def unscored(text: str, ids: list[int]) -> dict[str, Any]:
    """Returns the entry of a document before its tokens are scored."""
    return {
        "text_sha": hashlib.sha256(text.encode("utf-8")).hexdigest()[:16],
        "nll": 0.0,
        "tokens": max(0, len(ids) - 1),
        "words": len(re.split(r"\s+", text)) if text else 0,
        "bytes": len(text.encode("utf-8")),
    }


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> tuple[list[dict], dict]:
    """Scores every token of every text once, in sliding windows that never span two texts.

    A text is preceded by the BOS token, or by EOS where there is no BOS. With neither, its first token is not scored.
    With `stride=max_length` the windows, and so the results, are those of lm-eval's `loglikelihood_rolling`.

    Args:
        model (`PreTrainedModel`): A causal language model; it is used in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`list[str]`): The documents.
        max_length (`int`, *optional*): The largest number of tokens in a window; by default the model's
            `max_position_embeddings`.
        stride (`int`, *optional*): The distance between windows, by default `max_length // 2`. Each token has at least
            `max_length - stride` tokens of context, or all tokens before it if there are fewer.
        batch_size (`int`): Windows per forward pass. It changes the result by rounding errors only.

    Returns:
        `(documents, settings)`: for each text a dict of `nll`, its negative log-likelihood in nats; the numbers of
        `tokens` that were scored, of `words` as lm-eval counts them (`re.split(r"\\s+", text)`) and of UTF-8 `bytes`;
        and `text_sha`, by which two runs can be paired. Settings hold the resolved arguments and `prefix_token`,
        which is `None` if first tokens were not scored.

    Raises:
        ValueError: If a length is out of range, the tokenizer belongs to another model, there is no text, or no token
            can be scored.
    """
    max_length, stride = resolve_windows(model, max_length, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if not texts:
        raise ValueError("There is no document.")
    if not any(text and not text.isspace() for text in texts):
        raise ValueError(f"All {len(texts)} documents are empty or blank.")

    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = [
        ids if prefix is None else [prefix, *ids]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    rows = [
        (i, *window) for i, ids in enumerate(encoded) for window in sliding_windows(len(ids) - 1, max_length, stride)
    ]
    if not rows:
        raise ValueError("No token can be scored: the documents have one token each and the tokenizer no BOS or EOS.")
    refuse_foreign_tokens(model, encoded)
    # Longest windows first: equal lengths need no padding, and an out-of-memory error occurs in the first batch.
    rows.sort(key=lambda row: row[1] - row[3])

    documents = [unscored(text, ids) for text, ids in zip(texts, encoded)]
    was_training = model.training
    model.eval()
    for start_row in tqdm(range(0, len(rows), batch_size), desc="perplexity", unit="batch"):
        batch = rows[start_row : start_row + batch_size]
        inputs = [torch.tensor(encoded[i][start:end]) for i, start, _, end in batch]
        input_ids = pad_sequence(inputs, batch_first=True).to(model.device)
        mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True).to(model.device)
        logits_BTV = model(input_ids, attention_mask=mask, use_cache=False).logits
        for logits_TV, (i, start, first, end) in zip(logits_BTV, batch):
            scored = logits_TV[first - start : end - start]
            targets = torch.tensor(encoded[i][first + 1 : end + 1], device=scored.device)
            losses = cross_entropy(
                scored.to(torch.promote_types(scored.dtype, torch.float32)), targets, reduction="none"
            )
            documents[i]["nll"] += losses.cpu().double().sum().item()
    model.train(was_training)
    return documents, {
        "max_length": max_length,
        "stride": stride,
        "batch_size": batch_size,
        "prefix_token": None if prefix is None else tokenizer.convert_ids_to_tokens(prefix),
    }


def summarize(documents: list[dict]) -> dict:
    """Sums up the scores of documents.

    Args:
        documents (`list[dict]`): What [`score`] returns.

    Returns:
        `dict`: the sums `nll` (nats), `tokens`, `words` and `bytes`; `token_perplexity = exp(nll / tokens)`,
        `word_perplexity = exp(nll / words)`, `byte_perplexity = exp(nll / bytes)` and
        `bits_per_byte = nll / bytes / ln 2`; the numbers of `documents` that hold text and of `empty_documents`.
    """
    nll, *counts = (sum(document[key] for document in documents) for key in ("nll", "tokens", "words", "bytes"))
    counts = dict(zip(("tokens", "words", "bytes"), counts))
    # torch returns infinity for the exponential of a large number, where Python raises an error.
    per = {unit: torch.tensor(nll, dtype=torch.float64) / count for unit, count in counts.items()}
    empty = sum(not document["bytes"] for document in documents)
    return {
        **{f"{unit.removesuffix('s')}_perplexity": value.exp().item() for unit, value in per.items()},
        "bits_per_byte": per["bytes"].item() / math.log(2),
        "nll": nll,
        **counts,
        "documents": len(documents) - empty,
        "empty_documents": empty,
    }


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], **settings) -> dict:
    """Computes the perplexity of a model on texts: [`summarize`] of [`score`], with the settings added."""
    documents, settings = score(model, tokenizer, texts, **settings)
    return summarize(documents) | {"settings": settings}
