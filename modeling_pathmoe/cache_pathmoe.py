# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Supports both names of the key-value cache: `past_key_values`, and `cache` from transformers 5.24 on."""

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
        f"transformers {transformers.__version__} uses none of the names {CACHE_NAMES} for the key-value cache, so "
        "PathMoE cannot pass it on: install a transformers version from pathmoe's README, or a newer pathmoe."
    )


def take_cache(past_key_values: Cache | None, cache: Cache | None, kwargs: dict) -> Cache | None:
    """Returns the cache that a forward was called with, under either name.

    Args:
        past_key_values (`Cache`, *optional*): The forward's argument of that name.
        cache (`Cache`, *optional*): The forward's argument of that name.
        kwargs (`dict`): The other keyword arguments of the forward. Up to transformers 5.23, the cache of continuous
            batching is also called `cache`, but belongs to the attention function: this function moves it there.

    Raises:
        ValueError: If two different caches are passed.
        TypeError: If a cache is passed under an unknown name, as a newer transformers may do. Ignoring the cache would
            generate wrong text.
    """
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise TypeError(
                f"{name}={type(value).__name__} is a key-value cache under a name that PathMoE does not know "
                f"(transformers {transformers.__version__}): pass it as past_key_values or cache, or install a "
                "transformers version from pathmoe's README."
            )
    if cache is not None and not isinstance(cache, Cache) and CACHE_NAME == "past_key_values":
        kwargs["cache"], cache = cache, None
    if cache is None or cache is past_key_values:
        return past_key_values
    if past_key_values is not None:
        raise ValueError("past_key_values and cache are two names of one argument and got two caches: pass one.")
    return cache


class _BothCacheNames:
    """Makes the cache of an output available under both names; from 5.24 on, transformers does so itself."""

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
        loss (`torch.FloatTensor`, scalar): The cross-entropy. In training, the auxiliary losses are added, each times
            its coefficient.
        aux_loss (`torch.FloatTensor`, scalar): The load-balancing loss before its coefficient, when router logits were
            requested or an auxiliary loss is being trained.
        z_loss (`torch.Tensor`, scalar): The router z-loss before its coefficient, in the same cases.
    """

    z_loss: torch.Tensor | None = None
