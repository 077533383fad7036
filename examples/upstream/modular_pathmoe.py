# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PathMoE as a modular file of transformers: the difference to Qwen3-MoE, and nothing else (see docs/upstream.md).

It holds the published method, linear routers that blocks of layers share, and no other router. It is written for
transformers 5.24. In the repository of transformers it would be `models/pathmoe/modular_pathmoe.py`, import its
neighbours relatively, and `utils/modular_model_converter.py` would write `modeling_pathmoe.py` and
`configuration_pathmoe.py` from it.

Shapes: T tokens, D hidden size, k chosen experts.
"""

from collections.abc import Callable

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


@strict
class PathmoeConfig(Qwen3MoeConfig):
    r"""
    router_block_size (`int` or `list[int]`, *optional*, defaults to 4):
        The number of consecutive layers that share a router, or the size of each block of layers.
    """

    model_type = "pathmoe"

    num_experts: int = 16
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0
    router_block_size: int | list[int] = 4

    def validate_router_blocks(self):
        """Blocks are positive, and a list of them covers the layers."""
        sizes = self.router_block_size
        wrong = sizes < 1 if isinstance(sizes, int) else min(sizes) < 1 or sum(sizes) != self.num_hidden_layers
        if wrong:
            raise ValueError(
                f"router_block_size={sizes} must be positive; the sizes in a list must sum to "
                f"num_hidden_layers={self.num_hidden_layers}."
            )

    @property
    def layer_to_block(self) -> list[int]:
        """The index of the router of each layer."""
        if isinstance(self.router_block_size, int):
            return [layer // self.router_block_size for layer in range(self.num_hidden_layers)]
        return [block for block, size in enumerate(self.router_block_size) for _ in range(size)]


class PathmoeTopKRouter(Qwen3MoeTopKRouter):
    pass


class PathmoeSparseMoeBlock(Qwen3MoeSparseMoeBlock):
    """The experts of one layer. The router belongs to the layer's block, and so to the model."""

    def __init__(self, config: PathmoeConfig):
        super().__init__(config)
        del self.gate

    def forward(self, hidden_states: torch.Tensor, route: Callable) -> torch.Tensor:
        batch_size, sequence_length, hidden_dim = hidden_states.shape
        hidden_states_reshaped = hidden_states.view(-1, hidden_dim)  # (T, D)
        _, routing_weights, selected_experts = route(hidden_states_reshaped)  # (T, k) each
        final_hidden_states = self.experts(hidden_states_reshaped, selected_experts, routing_weights)
        return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)


class PathmoeDecoderLayer(Qwen3MoeDecoderLayer):
    def __init__(self, config: PathmoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mlp = PathmoeSparseMoeBlock(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        route: Callable,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states, route)
        return residual + hidden_states


class PathmoeModel(Qwen3MoeModel):
    def __init__(self, config: PathmoeConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [PathmoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        # The only owner of the routers. A router that was registered in several layers would lose its sharing under
        # FSDP2, PEFT and `cpu_ram_efficient_loading`.
        self.routers = nn.ModuleList([PathmoeTopKRouter(config) for _ in range(config.layer_to_block[-1] + 1)])

        # Initialize weights and apply final processing
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)

        for decoder_layer, block in zip(self.layers, self.config.layer_to_block):
            hidden_states = decoder_layer(
                hidden_states,
                # A bound method: accelerate's hooks would move a module to the layer's device.
                route=self.routers[block].__call__,
                attention_mask=causal_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )

        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)


class PathmoeForCausalLM(Qwen3MoeForCausalLM):
    def __init__(self, config: PathmoeConfig):
        super().__init__(config)
        self.model = PathmoeModel(config)

        # Initialize weights and apply final processing
        self.post_init()


__all__ = ["PathmoeConfig", "PathmoeForCausalLM", "PathmoeModel"]
