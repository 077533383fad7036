# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""An initialization with which a new model uses its experts evenly, without a balancing loss.

A language model first learns how frequent each token is. With the usual initialisation it does so by writing the same
large vector into the hidden state of every token. That vector drowns the small embeddings, the routers see the same
input for every token, and all tokens choose the same experts. With `unigram_start` the model knows the frequencies
before its first step, and with `zero_init_projections` its hidden states are the embeddings until it has learned
something about each token.
"""

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedConfig, PreTrainedModel

from pathmoe.text.batches import Batches, PackedBlocks, PackedStream, Prefetch
from pathmoe.train.recipe import Recipe, RecipeError


SAMPLED_TOKENS = 1 << 20  # each rank counts only the beginning of a stream, which may be too long to count
PROJECTIONS = ("o_proj", "down_proj")


def check_start(recipe: Recipe, config: PreTrainedConfig):
    """Checks that `unigram_start` and `zero_init_projections` can be applied to the model.

    Raises:
        RecipeError: If the model is a checkpoint to continue from, or if its head is tied to its embeddings.
    """
    for name in ("unigram_start", "zero_init_projections"):
        if getattr(recipe, name) and not recipe.model.endswith(".json"):
            raise RecipeError(
                f"{name}=true initialises a new model, but model={recipe.model!r} is a checkpoint whose weights it "
                f"would destroy: set {name}=false, or give a model configuration (a .json file)."
            )
    if recipe.unigram_start and config.tie_word_embeddings:
        raise RecipeError(
            "unigram_start=true needs a head of its own, but tie_word_embeddings is true: set "
            "model_overrides={tie_word_embeddings: false}, or unigram_start=false."
        )


def token_frequencies(batches: Batches | Prefetch, vocab_size: int, accelerator: Accelerator) -> np.ndarray:
    """Returns the share of each token in the training text. The result is the same on all ranks.

    Text in memory is counted as a whole. Of a stream, each rank counts the first million tokens (2**20) and then
    returns to the start. Every count is raised by one, so that a token that the text lacks is merely rare. Sources
    count by their weight.

    Returns:
        `np.ndarray` of shape `(vocab_size,)`, float64: Positive and summing to 1.
    """
    batches = batches.batches if isinstance(batches, Prefetch) else batches
    counts = np.array([count_tokens(source, vocab_size) + 1 for source in batches.sources])
    shares = batches.weights @ (counts / counts.sum(axis=1, keepdims=True))
    return np.mean(gather_object([shares]), axis=0)


def count_tokens(source: PackedBlocks | PackedStream, vocab_size: int) -> np.ndarray:
    """Counts how often each token occurs in a source, or in the first `SAMPLED_TOKENS` tokens of a stream."""
    if isinstance(source, PackedBlocks):
        return np.bincount(source.blocks.reshape(-1), minlength=vocab_size)
    before = source.state_dict()
    blocks = range(-(-SAMPLED_TOKENS // source.sequence_length))
    counts = sum((np.bincount(source.next_block(), minlength=vocab_size) for _ in blocks), np.zeros(vocab_size, int))
    source.load_state_dict(before)
    return counts


@torch.no_grad()
def apply_start(recipe: Recipe, model: PreTrainedModel, frequencies: np.ndarray | None):
    """Sets the weights of a new model as `unigram_start` and `zero_init_projections` ask for.

    `unigram_start` draws the embeddings with standard deviation 1 and makes their first channel a constant 1. Before
    the first step the final norm leaves that channel near 1, so that the first column of the head is added to every
    token's logits. The column is set to the logarithm of the frequencies. Subtracting the mean keeps the column small
    and changes no probability. The rest of the head stays small and random, and the first loss is therefore close to
    the entropy of the frequencies. All of these values can be trained, and a model that has been trained from them is
    an ordinary checkpoint.

    If the configuration of the model has `embedding_initializer_range`, the embeddings and the constant are multiplied
    by it. The first logits stay the same (normalisation removes the factor), but layers then change the hidden state
    faster (below 1) or more slowly (above 1) relative to its size.

    Args:
        recipe (`Recipe`): The recipe, with the two fields and the seed of the embeddings.
        model (`PreTrainedModel`): An unsharded model on one device.
        frequencies (`np.ndarray`, *optional*): The result of [`token_frequencies`]. If `None`, embeddings and head are
            not changed, because a checkpoint is about to replace them.

    Raises:
        RecipeError: If the model has no projections with these names.
    """
    if recipe.unigram_start and frequencies is not None:
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        # A separate generator: models with the same seed that differ only in the routers share all other weights.
        generator = torch.Generator().manual_seed(recipe.seed)
        scale = getattr(model.config, "embedding_initializer_range", None) or 1.0
        embeddings.copy_(scale * torch.randn(embeddings.shape, generator=generator))
        embeddings[:, 0] = scale
        head.copy_(model.config.initializer_range * torch.randn(head.shape, generator=generator))
        logits = np.log(frequencies)
        head[:, 0] = torch.from_numpy(logits - logits.mean()).to(head)
    if recipe.zero_init_projections:
        for projection in PROJECTIONS:
            found = [p for name, p in model.named_parameters() if name.removesuffix(".weight").endswith(projection)]
            if not found:
                raise RecipeError(
                    f"zero_init_projections=true found no {projection} in a {model.config.model_type} model: set it "
                    "to false."
                )
            for parameter in found:
                parameter.zero_()


def parameters_of_start(recipe: Recipe, model: PreTrainedModel) -> set[int]:
    """Returns the `id` of each parameter that must not decay: embeddings and head if `unigram_start` is set.

    Decay pulls weights toward zero, which suits weights that started as small noise. Here it would shrink the
    frequencies in the head and the constant channel. Rare tokens, which get few gradients, would lose their
    embeddings, and the hidden states would become alike again.
    """
    if not recipe.unigram_start:
        return set()
    return {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
