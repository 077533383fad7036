# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs a model over the user's text, to measure conversions that are not exact."""

import math
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..command import UserError
from ..text.rows import READERS, check_file, read_all_rows, select_texts
from .checkpoint import Checkpoint


WINDOW = 512
MOST_TOKENS = 10**8


def check_text(file: str | Path, num_tokens: int):
    """Checks that a text file exists and has a known type, and that the number of tokens is in range.

    Raises:
        UserError: If not; the message names the file or the number.
    """
    if not 1 <= num_tokens <= MOST_TOKENS:
        raise UserError(f"--tokens {num_tokens} must be from 1 to {MOST_TOKENS}.")
    check_file(file, "--text", tuple(READERS))


def read_text(file: str | Path) -> str:
    """Reads the documents of a text or JSON file and joins them with blank lines.

    Rows without a text are skipped, and their number is printed.

    Raises:
        UserError: If the file cannot be read, or most of its rows have no text; the message names the line.
    """
    texts = [row.get("text") for row in read_all_rows(file, "--text")]
    kept = [texts[row] for row in select_texts(texts, "text", f"--text {file}")]
    if not any(map(str.strip, kept)):
        raise UserError(f"--text {file}: the column 'text' is blank in all rows.")
    return "\n\n".join(kept)


def read_windows(source: Checkpoint, file: str | Path, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenises a text and cuts it into windows, of which the last fifth is held out for measuring.

    Args:
        source (`Checkpoint`): The checkpoint with the tokenizer.
        file (`str` or `Path`): A text file, or a JSON file with a column `text`.
        num_tokens (`int`): Number of tokens to read from the start.

    Returns:
        `tuple`: token ids of shape `(windows, length)` for fitting, and such token ids for measuring.

    Raises:
        UserError: If the checkpoint has no tokenizer, or the text is too short.
    """
    if source.tokenizer is None:
        raise UserError(f"{source.folder} has no tokenizer, which is needed to read {file}.")
    length = min(WINDOW, source.config.max_position_embeddings)
    if length < 2:
        raise UserError(
            f"{source.config_file}: max_position_embeddings={length} must be at least 2 to measure a text."
        )
    ids = source.tokenizer(read_text(file), add_special_tokens=False, verbose=False)["input_ids"][:num_tokens]
    windows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.long).view(-1, length)
    if len(windows) < 5:
        raise UserError(
            f"{file} gives {len(ids)} tokens (at most {num_tokens} are taken), but at least {5 * length} are needed: "
            "five windows, four to fit and one to measure."
        )
    measured = len(windows) // 5
    return windows[:-measured], windows[-measured:]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Returns exp of the mean cross-entropy of all tokens except the first of each window."""
    losses = [model(window[None], labels=window[None], use_cache=False).loss for window in windows]
    result = torch.stack(losses).double().mean().exp().item()
    if not math.isfinite(result):
        raise UserError(f"The perplexity of the text is {result}: the model computes values that are not finite.")
    return result


@torch.no_grad()
def router_inputs(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Returns the inputs of a PathMoE's routers in float32, of shape `(MoE layers, tokens, D)`."""
    seen = []
    hooks = [
        router.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
        for router in model.base_model.routers.values()
    ]
    for window in windows:
        model.base_model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = len(model.config.moe_layers)
    return torch.stack([torch.cat(seen[layer::layers]) for layer in range(layers)])
