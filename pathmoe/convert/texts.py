# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Running a model over the user's text: what the conversions measure that are not exact."""

import json
import math
import os
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..command import UserError, one_line
from .checkpoint import Checkpoint


WINDOW = 512
MOST_TOKENS = 10**8


def check_text(file: str | Path, num_tokens: int):
    """Refuses a text that is not there or of another kind, and a number of tokens that cannot be.

    Raises:
        UserError: With the file or the number.
    """
    if not 1 <= num_tokens <= MOST_TOKENS:
        raise UserError(f"--tokens {num_tokens} must be from 1 to {MOST_TOKENS}.")
    if Path(file).suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"--text {file} must end in .txt or .jsonl.")
    if not os.path.isfile(file):  # Path.is_file() fails on a name that is too long
        raise UserError(f"--text {file}: there is no such file.")


def read_text(file: str | Path) -> str:
    """The text of a .txt file, or of the rows of a .jsonl file. Rows without a text are left out, which is reported.

    Raises:
        UserError: If the file cannot be read, or most of its rows have no text; names the line.
    """
    try:
        content = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {file} is not UTF-8 (byte {error.start}: {error.reason}): convert it.") from error
    except OSError as error:
        raise UserError(f"--text {file} cannot be read: {error.strerror}.") from error
    if not content.strip():
        raise UserError(f"--text {file} is empty.")
    if Path(file).suffix.lower() == ".txt":
        return content
    lines = ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())
    texts = [_text_of(line, f"--text {file}: line {number}") for number, line in lines]
    found = [text for text in texts if text is not None]
    if 2 * len(found) < len(texts) or not any(map(str.strip, found)):
        raise UserError(
            f"--text {file}: {len(texts) - len(found)} of {len(texts)} lines have no column 'text', or all are empty."
        )
    if skipped := len(texts) - len(found):
        print(f"--text {file}: skipped {skipped} of {len(texts)} lines, which have no text.", file=sys.stderr)
    return "\n\n".join(found)


def _text_of(line: str, where: str) -> str | None:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # JSON can hold half of a character, which is not text
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({one_line(error)}).") from error
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(row, dict) or not isinstance(text, str | None):
        raise UserError(f"{where} must be a JSON object with text, but is {line.strip():.60}")
    return text


def read_windows(source: Checkpoint, file: str | Path, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenises a text and cuts it into windows, the last fifth of which is for measuring.

    Args:
        source (`Checkpoint`): Whose tokenizer to use.
        file (`str` or `Path`): A .jsonl file with a column `text`, or a text file.
        num_tokens (`int`): How many tokens to take from the start.

    Returns:
        `tuple`: token ids `(windows, length)` for fitting, and as many columns of others for measuring.

    Raises:
        UserError: If there is no tokenizer, or too little text.
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
    """exp of the mean cross-entropy of all tokens but each window's first."""
    losses = [model(window[None], labels=window[None], use_cache=False).loss for window in windows]
    result = torch.stack(losses).double().mean().exp().item()
    if not math.isfinite(result):
        raise UserError(f"The perplexity of the text is {result}: the model computes values that are not finite.")
    return result


@torch.no_grad()
def router_inputs(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """What the routers of a PathMoE see, `(layers, tokens, D)`, in float32."""
    seen = []
    hooks = [
        router.register_forward_pre_hook(lambda module, args: seen.append(args[0].float()))
        for router in model.base_model.routers.values()
    ]
    for window in windows:
        model.base_model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = model.config.num_hidden_layers
    return torch.stack([torch.cat(seen[layer::layers]) for layer in range(layers)])
