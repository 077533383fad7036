# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The key-value cache under both of its names: `past_key_values`, and `cache` from transformers 5.24 on."""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast


CACHE_NAMES = ("past_key_values", "cache")
# The name that the installed transformers uses in its own functions and outputs.
CACHE_NAME = next((name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters), None)
if CACHE_NAME is None:
    raise ImportError(
        f"transformers {transformers.__version__} calls the key-value cache by neither of {CACHE_NAMES}, so PathMoE "
        "cannot pass it on: install a transformers of the range that pathmoe's README states, or a newer pathmoe."
    )


def take_cache(past_key_values: Cache | None, cache: Cache | None, kwargs: dict) -> Cache | None:
    """Returns the cache that a forward was called with, under whichever of its names.

    Args:
        past_key_values (`Cache`, *optional*): What came under that name.
        cache (`Cache`, *optional*): What came under that name.
        kwargs (`dict`): The other keyword arguments of the forward. Up to transformers 5.23, the cache of continuous
            batching is called `cache` too, but belongs to the attention function: it is put back here.

    Raises:
        ValueError: If there are two caches.
        TypeError: If a cache came under a name that this model does not know: transformers has moved on, and to
            ignore the cache would give wrong text.
    """
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise TypeError(
                f"A key-value cache arrived as {name}={type(value).__name__}, a name that this PathMoE does not know "
                f"(transformers {transformers.__version__}): pass it as past_key_values or cache, or install a "
                "transformers of the range that pathmoe's README states."
            )
    if cache is not None and not isinstance(cache, Cache) and CACHE_NAME == "past_key_values":
        kwargs["cache"], cache = cache, None
    if cache is None or cache is past_key_values:
        return past_key_values
    if past_key_values is not None:
        raise ValueError("past_key_values and cache are two names of one argument and got two caches: pass one.")
    return cache


class _BothCacheNames:
    """Gives the cache of an output under both names; from 5.24 on, transformers does so itself."""

    if not TYPE_CHECKING and CACHE_NAME == "past_key_values":

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

        def __getitem__(self, key):
            return super().__getitem__("past_key_values" if key == "cache" else key)


@dataclass
class PathMoEModelOutputWithPast(_BothCacheNames, MoeModelOutputWithPast):
    """[`~transformers.modeling_outputs.MoeModelOutputWithPast`] with both names of the cache."""


@dataclass
class PathMoECausalLMOutputWithPast(_BothCacheNames, MoeCausalLMOutputWithPast):
    """[`~transformers.modeling_outputs.MoeCausalLMOutputWithPast`] with the router z-loss and both names of the cache.

    Args:
        loss (`torch.FloatTensor`, scalar): Cross-entropy; while training, plus the auxiliary losses, each times its
            coefficient.
        aux_loss (`torch.FloatTensor`, scalar): The load-balancing loss before its coefficient, when router logits were
            requested or an auxiliary loss is being trained.
        z_loss (`torch.Tensor`, scalar): The router z-loss before its coefficient, likewise.
    """

    z_loss: torch.Tensor | None = None
