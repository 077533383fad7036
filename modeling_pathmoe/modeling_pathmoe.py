# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PyTorch PathMoE model: Qwen3-MoE with the routers lifted out of the layers and shared by blocks of them."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, install_all_output_capturing_hooks

from .attention_pathmoe import PathMoEAttention, PathMoERotaryEmbedding, warn_of_long_sequence
from .cache_pathmoe import CACHE_NAME, PathMoECausalLMOutputWithPast, PathMoEModelOutputWithPast, take_cache
from .configuration_pathmoe import PathMoEConfig
from .loss_pathmoe import linear_cross_entropy, warn_of_missing_labels, weigh_router_losses
from .mlp_pathmoe import PathMoEMLP
from .norm_pathmoe import PathMoERMSNorm
from .routing_pathmoe import (
    ROUTERS,
    PathMoERouter,
    autocast_dtype,
    load_balancing_loss,
    match_config_to_layers,
    refuse_reentrant_checkpointing,
    router_z_loss,
    token_mask,
)


# transformers looks for this decorator in the source of the model's own file, and runs experts eagerly without it.
@use_experts_implementation
class PathMoEExperts(nn.Module):
    """SwiGLU experts, held as `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F)."""

    def __init__(self, config: PathMoEConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Runs one expert after the other in plain torch: the `"eager"` implementation.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Hidden states.
            top_k_index (`torch.Tensor` of shape `(T, k)`): Experts; ids from E on, of other ranks, add nothing.
            top_k_weights (`torch.Tensor` of shape `(T, k)`): Their weights.

        Returns:
            `torch.Tensor` of shape `(T, D)`: Weighted sums of the experts' outputs.
        """
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, tokens, (rows * top_k_weights[tokens, slots, None]).to(output.dtype))
        return output


class PathMoESparseMoeBlock(nn.Module):
    """The experts of one layer. The router that chooses among them belongs to the layer's block."""

    def __init__(self, config: PathMoEConfig):
        super().__init__()
        self.config = config
        self.experts = PathMoEExperts(config)

    def forward(
        self, hidden_states: torch.Tensor, route: Callable, router_state: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape
        hidden_states = hidden_states.view(-1, shape[-1])
        top_k_weights, top_k_index, router_state = route(hidden_states, router_state)
        return self._run_experts(hidden_states, top_k_index, top_k_weights).view(shape), router_state

    def _run_experts(self, hidden_states, top_k_index, top_k_weights):
        experts, dtype = self.experts, autocast_dtype(hidden_states.device.type)
        parameter = next(experts.parameters(), None)  # none in DataParallel's copy of the module for one forward
        # Weights that accelerate has offloaded are on the meta device until the experts' own hook fetches them.
        if dtype is None or (parameter is not None and parameter.device.type == "meta"):
            return experts(hidden_states, top_k_index, top_k_weights)
        # The experts' kernels ignore autocast, and would silently run float32 weights in slow float32.
        if self.config._experts_implementation == "grouped_mm":
            self.config.check_grouped_mm_rows(dtype)
        inputs = (hidden_states.to(dtype), top_k_index, top_k_weights.to(dtype))
        if parameter is None:
            for name in ("gate_up_proj", "down_proj"):
                setattr(experts, name, getattr(experts, name).to(dtype))
            return experts(*inputs)
        weights = {name: parameter.to(dtype) for name, parameter in experts.named_parameters()}
        return torch.func.functional_call(experts, weights, inputs)


class PathMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts. `router_block` is the index of the layer's router, `None` in dense layers, and
    `router_layer` the layer index passed to it. Both stay when layers before it are skipped, removed or repeated."""

    def __init__(self, config: PathMoEConfig, layer_idx: int, router_block: int | None):
        super().__init__()
        self.router_block, self.router_layer = router_block, layer_idx
        self.self_attn = PathMoEAttention(config, layer_idx)
        self.mlp = PathMoEMLP(config) if router_block is None else PathMoESparseMoeBlock(config)
        self.input_layernorm = PathMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = PathMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        route: Callable | None,
        router_state: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states, router_state = self.mlp(hidden_states, route, router_state)
        hidden_states = residual + hidden_states
        # Pipeline stages replace layers by modules that return their first input, so return a tuple only if needed.
        return hidden_states if router_state is None else (hidden_states, router_state)


class PathMoEPreTrainedModel(PreTrainedModel):
    config: PathMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PathMoEDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(PathMoERouter, index=0),
        "hidden_states": PathMoEDecoderLayer,
        "attentions": PathMoEAttention,
    }

    def __init__(self, config: PathMoEConfig, *inputs, **kwargs):
        # The rate may have been set after the config was built.
        config.router_selection_bias |= bool(config.router_bias_update_rate)
        super().__init__(config, *inputs, **kwargs)
        # From a local folder, transformers loads the config's file a second time under a different name. The
        # generic heads build their decoder through `AutoModel`, which must know that copy of the class too.
        if not isinstance(config, PathMoEConfig):
            AutoModel.register(type(config), PathMoEModel, exist_ok=True)
        if config.router_selection_bias:
            self._keep_in_fp32_modules_strict = ["selection_bias"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, PathMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, PathMoERouter):
            router_std = self.config.router_initializer_range
            module.init_weights(std if router_std is None else router_std)
            module.init_selection_bias()
        elif isinstance(module, nn.Embedding) and self.config.embedding_initializer_range is not None:
            init.normal_(module.weight, mean=0.0, std=self.config.embedding_initializer_range)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        # The toolkit registers "pathmoe" when it is imported; code from the Hub runs without it.
        if requested_experts is None and "pathmoe" in ALL_EXPERTS_FUNCTIONS:
            requested_experts = "pathmoe"
        implementation = super().get_correct_experts_implementation(requested_experts)
        if implementation == "grouped_mm":
            # During construction, the model's dtype is torch's default; afterwards it is that of the weights.
            dtype = self.dtype if next(self.parameters(), None) is not None else torch.get_default_dtype()
            self.config.check_grouped_mm_rows(dtype)
        return implementation

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        PathMoEConfig.check_parallel_styles(kwargs.get("distributed_config"))
        return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        match_config_to_layers(self.config, list(self.base_model.layers), self.base_model.routers)
        # transformers would list only the saved class, but servers load `AutoModel`, and users load other heads.
        heads = "CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"
        self.config.auto_map = {
            "AutoConfig": "configuration_pathmoe.PathMoEConfig",
            "AutoModel": "modeling_pathmoe.PathMoEModel",
            **{f"AutoModelFor{head}": f"modeling_pathmoe.PathMoEFor{head}" for head in heads},
        }
        super().save_pretrained(*args, **kwargs)


class PathMoEModel(PathMoEPreTrainedModel):
    """The decoder without a head. `routers` holds one router per block, keyed by the block's index.

    Args:
        config (`PathMoEConfig`): Model configuration.
    """

    def __init__(self, config: PathMoEConfig):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([PathMoEDecoderLayer(config, i, b) for i, b in enumerate(config.layer_to_block)])
        # Only this dict owns the routers; a second `ModuleList` would confuse servers that split a model by its first.
        router_class = ROUTERS[config.router_type]
        self.routers = nn.ModuleDict({str(b): router_class(config, ls) for b, ls in enumerate(config.router_blocks)})
        self.norm = PathMoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PathMoERotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()
        if config.output_router_logits or config.trains_router_balance:
            # Otherwise the first forward would install the hooks, and a compiled forward cannot.
            install_all_output_capturing_hooks(self)

    def _route_of_layer(self, index: int, token_ids: torch.Tensor | None = None) -> Callable | None:
        """Returns the function that routes a layer. A layer that held its router would register it a second time.

        Returns:
            `Callable`: `(hidden_states (T, D), state) -> (weights (T, k), indices (T, k), state)`, all on the device
            of `hidden_states`, which may not be the router's when the layers are spread over devices. `None` for a
            dense layer, and for the placeholder of a layer that is in another stage of a pipeline.
        """
        layer = self.layers[index]
        if getattr(layer, "router_block", None) is None:
            return None
        router = self.routers[str(layer.router_block)]

        def route(hidden_states, state):
            _, weights, indices, state = router(hidden_states, layer.router_layer, state, token_ids)
            device = hidden_states.device
            if isinstance(state, tuple):
                state = tuple(tensor.to(device) for tensor in state)
            elif state is not None:
                state = state.to(device)
            return weights.to(device), indices.to(device), state

        return route

    @merge_with_config_defaults
    @capture_outputs
    def forward(  # type: ignore[misc]  # transformers' kwargs name position_ids a second time
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PathMoEModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Token ids.
            attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, *optional*): 0 marks padding.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Positions; when unset, they
                continue after the cache.
            past_key_values (`Cache`, *optional*): Keys and values of earlier tokens; `cache` is its other name.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, sequence, D)`, *optional*): Replaces `input_ids`.
            use_cache (`bool`, *optional*): Whether to return the cache.
            **kwargs: `output_router_logits`, `output_hidden_states`, `output_attentions`; attention arguments.

        Returns:
            `PathMoEModelOutputWithPast`: `last_hidden_state` of shape `(batch, sequence, D)`, and on request
            `router_logits`, a float32 tensor for each MoE layer, of shape `(batch · sequence, E)`.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is passed, if two caches are passed, or
                if reentrant gradient checkpointing would corrupt the routers' gradients.
            TypeError: If a cache is passed under an unknown name.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        refuse_reentrant_checkpointing(self)

        cache = take_cache(past_key_values, cache, kwargs)
        token_ids = None if input_ids is None else input_ids.flatten()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            warn_of_long_sequence(self.config, past, inputs_embeds.shape[1])
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        kwargs[CACHE_NAME] = cache
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states, router_state, block = inputs_embeds, None, None
        for index, layer in zip(range(self.config.num_hidden_layers), self.layers):
            layer_block = getattr(layer, "router_block", None)
            if self.config.router_sharing == "decision" and layer_block not in (None, block):
                block, router_state = layer_block, None  # each block decides for itself
            # Pass tensors that need gradients positionally; as keyword arguments, reentrant checkpointing would
            # backpropagate through them twice.
            outputs = layer(
                hidden_states,
                self._route_of_layer(index, token_ids),
                router_state,
                attention_mask=causal_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            hidden_states, router_state = outputs if isinstance(outputs, tuple) else (outputs, None)
        return PathMoEModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})  # type: ignore[arg-type]


class PathMoEForCausalLM(PathMoEPreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head.

    Args:
        config (`PathMoEConfig`): Model configuration.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: PathMoEConfig):
        super().__init__(config)
        self.model, self.vocab_size = PathMoEModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def can_skip_logits(self) -> bool:
        """Whether `skip_logits` works. It reads the head's weight outside of the head's forward, so the weight must be
        neither sharded nor offloaded."""
        head = self.lm_head
        if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
            return False
        return not isinstance(head.weight, torch.distributed.tensor.DTensor)

    def _check_skip_logits(self, skip_logits: bool, labels: torch.LongTensor | None):
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True returns only the loss, but labels is None: pass labels.")
        if skip_logits and not self.can_skip_logits:
            raise ValueError(
                f"skip_logits=True needs a plain, whole lm_head, but it is a {type(self.lm_head).__name__} that is "
                "sharded, offloaded or wrapped: leave skip_logits out."
            )

    def _router_losses(self, router_logits, attention_mask, hidden_states, count_load: bool):
        """Returns the load-balancing loss and the z-loss; `count_load` also counts the load for the selection bias."""
        mask = token_mask(attention_mask, sequence_length=hidden_states.shape[1])
        aux_loss = load_balancing_loss(router_logits, self.config.num_experts, self.config.num_experts_per_tok, mask)
        if count_load:
            routed = (layer for layer in self.model.layers if layer.router_block is not None)
            for layer, of_layer in zip(routed, router_logits):
                self.model.routers[str(layer.router_block)].count_load(of_layer, layer.router_layer, mask)
        return aux_loss, router_z_loss(router_logits, mask)

    @can_return_tuple
    def forward(  # type: ignore[misc]
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> PathMoECausalLMOutputWithPast:
        """Predicts the next token. Arguments that are not listed are those of [`PathMoEModel.forward`].

        Args:
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Unshifted targets; -100 is ignored.
            output_router_logits (`bool`, *optional*): Whether to return router logits and losses; or as configured.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Number of last positions that get logits, or their
                indices; 0 means all.
            skip_logits (`bool`, defaults to `False`): Whether to compute the loss faster and in less memory, without
                the logits of the whole batch. `logits` is then `None`, and the loss supports one backward.
            **kwargs: `num_items_in_batch`, the number of targets in an optimizer step, and arguments of the model.

        Returns:
            `PathMoECausalLMOutputWithPast`: `logits` have shape `(batch, sequence, vocab_size)`. In evaluation mode,
            `loss` is the cross-entropy without router losses.

        Raises:
            ValueError: If auxiliary losses are needed and `attention_mask` is not two-dimensional, if `skip_logits` is
                set without `labels` or where `can_skip_logits` is false, or as in [`PathMoEModel.forward`].
        """
        self._check_skip_logits(skip_logits, labels)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        balance = self.training and labels is not None and self.config.trains_router_balance
        trained = self.training and (labels is not None or torch.is_grad_enabled())
        count_load = trained and self.config.router_bias_update_rate > 0
        if trained and labels is None:
            warn_of_missing_labels(self.config, output_router_logits)

        outputs: PathMoEModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            output_router_logits=output_router_logits or balance or count_load,
            return_dict=True,
            **kwargs,
        )
        hidden_states, logits, loss, aux_loss, z_loss = outputs.last_hidden_state, None, None, None, None
        if skip_logits:
            loss = linear_cross_entropy(hidden_states, self.lm_head.weight, labels, **kwargs)
        else:
            slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, slice_indices, :])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        # Without labels no loss is needed, and a server's mask may not mark the padding.
        mask_is_known = attention_mask is None or getattr(attention_mask, "ndim", None) == 2
        if outputs.router_logits is not None and (mask_is_known or labels is not None or count_load):
            aux_loss, z_loss = self._router_losses(outputs.router_logits, attention_mask, hidden_states, count_load)
        if balance and (self.config.router_aux_loss_coef or self.config.router_z_loss_coef):
            loss = loss + weigh_router_losses(self.config, aux_loss, z_loss, labels, **kwargs).to(loss.device)

        return PathMoECausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits if output_router_logits else None,
            **{CACHE_NAME: outputs.cache},
        )


class PathMoEForSequenceClassification(GenericForSequenceClassification, PathMoEPreTrainedModel):
    """The decoder with a classifier on the last token. No auxiliary router loss is added."""


class PathMoEForTokenClassification(GenericForTokenClassification, PathMoEPreTrainedModel):
    """The decoder with a classifier on every token. No auxiliary router loss is added."""


class PathMoEForQuestionAnswering(GenericForQuestionAnswering, PathMoEPreTrainedModel):
    """The decoder with start and end scores on every token. No auxiliary router loss is added."""


# The generic heads build their decoder through `AutoModel`, also when this file was loaded from the Hub.
AutoModel.register(PathMoEConfig, PathMoEModel, exist_ok=True)


__all__ = [
    "PathMoEForCausalLM",
    "PathMoEForQuestionAnswering",
    "PathMoEForSequenceClassification",
    "PathMoEForTokenClassification",
    "PathMoEModel",
    "PathMoEPreTrainedModel",
]
