# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Running a model over the user's text: what the conversions measure that are not exact."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .checkpoint import Checkpoint


WINDOW = 512


def read_windows(source: Checkpoint, file: str | Path, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenises a text and cuts it into windows, the last fifth of which is for measuring.

    Args:
        source (`Checkpoint`): Whose tokenizer to use.
        file (`str` or `Path`): A .jsonl file with a column `text`, or a text file.
        num_tokens (`int`): How many tokens to take from the start.

    Returns:
        `tuple`: token ids `(windows, length)` for fitting, and as many columns of others for measuring.

    Raises:
        ValueError: If there is no tokenizer, or too little text.
    """
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{source.folder} has no tokenizer, which is needed to read {file}.")
    text = Path(file).read_text(encoding="utf-8")
    if Path(file).suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all("text" in row for row in rows):
            raise ValueError(f"{file} has lines without a column 'text'.")
        text = "\n\n".join(row["text"] for row in rows)
    length = min(WINDOW, source.config.max_position_embeddings)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:num_tokens])
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) < 5:
        raise ValueError(
            f"{file} gives {len(ids)} tokens (at most {num_tokens} are taken), but at least {5 * length} are needed: "
            "five windows, four to fit and one to measure."
        )
    measured = len(windows) // 5
    return windows[:-measured], windows[-measured:]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """exp of the mean cross-entropy of all tokens but each window's first."""
    losses = [model(window[None], labels=window[None], use_cache=False).loss for window in windows]
    return torch.stack(losses).mean().exp().item()


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
