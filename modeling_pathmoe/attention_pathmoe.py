# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Rotary embedding and grouped-query attention, with the norms of queries and keys of Qwen3, of OLMoE, or without."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, logging

from .cache_pathmoe import take_cache
from .configuration_pathmoe import PathMoEConfig
from .norm_pathmoe import PathMoERMSNorm


logger = logging.get_logger(__name__)


class PathMoERotaryEmbedding(nn.Module):
    """Computes cosines and sines of the positions, for any RoPE type that transformers knows (arXiv 2104.09864)."""

    def __init__(self, config: PathMoEConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        init_function = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = init_function(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: PathMoEConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies theta^(-2i / head_dim), of shape `(head_dim / 2,)`, and a scaling of 1."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cosines and sines of shape `(batch, sequence, head_dim)`, in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def warn_of_long_sequence(config: PathMoEConfig, past: int | torch.Tensor, length: int):
    """Warns once if a sequence is longer than `max_position_embeddings` and the RoPE type does not adapt to that.

    Compiled and traced models do not warn, because they would then be specialised to the length.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(past, torch.Tensor):
        return
    adapts = config.rope_parameters["rope_type"] in ("dynamic", "longrope")
    if past + length > config.max_position_embeddings and not adapts:
        logger.warning_once(
            f"The sequence has {past + length} tokens, more than max_position_embeddings="
            f"{config.max_position_embeddings} of the model: shorten it, or expect poor predictions."
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of `x` (batch, heads, sequence, head_dim) by the positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention in plain torch. Queries have shape (batch, heads, queries, head_dim), the output (batch,
    queries, heads, head_dim), the weights (batch, heads, queries, keys)."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PathMoEAttention(nn.Module):
    """Grouped-query attention with a norm on each head's queries and keys, or on those of all heads together with
    `qk_norm="full"`, or as in Llama with `qk_norm=False`."""

    def __init__(self, config: PathMoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        q_size, k_size = (width, kv_width) if config.qk_norm == "full" else (self.head_dim, self.head_dim)
        self.q_norm = PathMoERMSNorm(q_size, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = PathMoERMSNorm(k_size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = take_cache(past_key_values, cache, kwargs)  # type: ignore[arg-type]  # at run time, a dict
        paged = "cache" in kwargs or not isinstance(cache, Cache | None)  # the cache of continuous batching
        if self.config._attn_implementation.startswith("paged|") and not paged:
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} is for continuous batching and would see "
                "the tokens that follow in this call: load the model with "
                f"{self.config._attn_implementation.removeprefix('paged|')!r}."
            )
        batch, sequence, _ = hidden_states.shape
        heads = (batch, sequence, -1, self.head_dim)  # -1: tensor parallelism gives each rank some of the heads
        rows = (batch, sequence, -1) if self.config.qk_norm == "full" else heads  # the norms' last dimension
        query, key = self.q_proj(hidden_states).view(rows), self.k_proj(hidden_states).view(rows)
        query = rotate(self.q_norm(query).view(heads).transpose(1, 2), *position_embeddings)
        key = rotate(self.k_norm(key).view(heads).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if cache is not None:
            # The cache of continuous batching changes the attention's arguments.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(batch, sequence, -1).contiguous()), weights
