# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PathMoE model configuration."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import __version__
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .routing_pathmoe import ROUTERS


@strict
class PathMoEConfig(PreTrainedConfig):
    r"""Configuration of a PathMoE model (*Path-Constrained Mixture-of-Experts*, arXiv 2603.18297).

    A PathMoE is a Qwen3-MoE whose routers are shared by blocks of consecutive layers. The defaults are the paper's
    0.9B model, PathB4-MoE; widths that the paper does not state are chosen to match its parameter counts.

    Args:
        vocab_size (`int`, defaults to 32000): Size of the vocabulary.
        hidden_size (`int`, defaults to 1152): Width D of the residual stream.
        num_hidden_layers (`int`, defaults to 24): Number of layers L. Every layer is an MoE layer.
        num_attention_heads (`int`, defaults to 18): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key and value heads; `num_attention_heads` when unset.
        head_dim (`int`, *optional*): Width of a head; `hidden_size // num_attention_heads` when unset.
        hidden_act (`str`, defaults to `"silu"`): Activation of the experts' gate.
        moe_intermediate_size (`int`, defaults to 512): Width F of one expert.
        num_experts (`int`, defaults to 16): Number of experts E in a layer.
        num_experts_per_tok (`int`, defaults to 4): Number of experts k that a token visits in a layer.
        norm_topk_prob (`bool`, defaults to `True`): Whether the k weights are scaled to sum to one.
        router_block_size (`int` or `list[int]`, defaults to 4): How many consecutive layers share a router: one
            number (a last block may be shorter; at least L means one router for all), or the size of each block. 1 is
            the usual independent routing. 4 is the paper's best.
        router_type (`str`, defaults to `"linear"`): How a router scores the experts: `"linear"`, `"cosine"`,
            `"low_rank"`, `"recurrent"`, `"random"`, or a name given to `register_router`.
        router_sharing (`str`, defaults to `"parameters"`): What a block shares: the router's `"parameters"`, so that
            each layer routes its own hidden state (PathMoE), or the `"decision"` of its first layer (Mono).
        router_dim (`int`, *optional*): Width of the cosine router's projection (E / 2 when unset) or of the recurrent
            router's state (128 when unset).
        router_rank (`int`, defaults to 8): Rank of each layer's own term in the low-rank router.
        router_selection_bias (`bool`, defaults to `False`): Whether a bias on the choice of experts balances their
            load without an auxiliary loss (arXiv 2408.15664). Always true when `router_bias_update_rate` is above 0.
        router_bias_update_rate (`float`, defaults to 0.0): How far `update_selection_bias` moves that bias after each
            optimizer step (the paper uses 0.001). 0 leaves a trained bias as it is.
        router_aux_loss_coef (`float`, defaults to 0.0): Coefficient of the load-balancing loss while training. The
            paper trains PathMoE without it; its independent baseline uses 0.01.
        router_z_loss_coef (`float`, defaults to 0.0): Coefficient of the router z-loss while training.
        output_router_logits (`bool`, defaults to `False`): Whether to return the L router-logit tensors.
        qk_norm (`bool`, defaults to `True`): Whether queries and keys are normalised per head, as in Qwen3. Without it
            the attention is that of Llama and Mixtral.
        attention_bias (`bool`, defaults to `False`): Whether the attention projections have biases.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities.
        max_position_embeddings (`int`, defaults to 4096): Longest sequence that the model is meant for.
        rope_parameters (`dict`, *optional*): Parameters of the rotary embedding; base 10000 when unset.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the RMS normalisations.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        router_initializer_range (`float`, *optional*): That of the routers' initial weights; `initializer_range` when
            unset. A linear router's first logits have this times the root of `hidden_size` as standard deviation.
        embedding_initializer_range (`float`, *optional*): That of the input embeddings; `initializer_range` if unset.
            A larger one leaves less of the stream to the first layer. With `tie_word_embeddings` it is the output's
            too, and then 1 makes the first logits as wide as the root of `hidden_size`.
        use_cache (`bool`, defaults to `True`): Whether to return the key-value cache.
        tie_word_embeddings (`bool`, defaults to `False`): Whether input and output embeddings are one matrix.

    Raises:
        huggingface_hub.errors.StrictDataclassError: If a field has the wrong type or a value that cannot work; the
            message names the field, the value and the fix.

    Example:

    ```python
    >>> from modeling_pathmoe import PathMoEConfig, PathMoEForCausalLM
    >>> config = PathMoEConfig(num_hidden_layers=8, hidden_size=128, num_attention_heads=4, moe_intermediate_size=64)
    >>> config.router_blocks
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    >>> model = PathMoEForCausalLM(config)
    ```
    """

    model_type = "pathmoe"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "aux_loss", "z_loss", "router_logits"]
    attribute_map = {"num_local_experts": "num_experts"}

    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 1152
    num_hidden_layers: int = 24
    num_attention_heads: int = 18
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    moe_intermediate_size: int = 512
    num_experts: int = 16
    num_experts_per_tok: int = 4
    norm_topk_prob: bool = True
    router_block_size: int | list[int] = 4
    router_type: str = "linear"
    router_sharing: Literal["parameters", "decision"] = "parameters"
    router_dim: int | None = None
    router_rank: int = 8
    router_selection_bias: bool = False
    router_bias_update_rate: float | int = 0.0
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    qk_norm: bool = True
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    router_initializer_range: float | None = None
    embedding_initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        heads = self.num_attention_heads
        if self.head_dim is None and heads > 0 and self.hidden_size % heads == 0:
            self.head_dim = self.hidden_size // heads
        if self.router_bias_update_rate:
            self.router_selection_bias = True
        router = ROUTERS.get(self.router_type)
        if self.router_sharing == "decision" or (router is not None and router.carries_state):
            # A stage of a pipeline passes on hidden states alone, and the routing would lose its state there.
            self.base_model_pp_plan = None
        super().__post_init__(**kwargs)

    @property
    def router_blocks(self) -> list[list[int]]:
        """The layer indices of each block, in order."""
        sizes, layers = self.router_block_size, list(range(self.num_hidden_layers))
        if isinstance(sizes, int):
            return [layers[i : i + sizes] for i in range(0, len(layers), sizes)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [layers[start : start + size] for start, size in zip(starts, sizes)]

    @property
    def layer_to_block(self) -> list[int]:
        """The block of each layer, which is the index of its router."""
        return [block for block, layers in enumerate(self.router_blocks) for _ in layers]

    def check_grouped_mm_rows(self, dtype):
        """Refuses experts whose rows grouped_mm cannot take.

        Args:
            dtype (`torch.dtype`): The dtype in which the experts compute.

        Raises:
            ValueError: If a row of the hidden or the intermediate states is not a multiple of 16 bytes in `dtype`.
        """
        for name in ("hidden_size", "moe_intermediate_size"):
            width = getattr(self, name)
            if width * dtype.itemsize % 16:
                raise ValueError(
                    f"{name}={width} in {dtype} makes rows of {width * dtype.itemsize} bytes, but the grouped_mm "
                    f"experts need multiples of 16: choose a multiple of {16 // dtype.itemsize}, or pass "
                    'experts_implementation="eager".'
                )

    @classmethod
    def check_parallel_styles(cls, distributed_config):
        """Refuses tensor or expert parallelism whose plan the installed transformers does not know.

        Args:
            distributed_config (`DistributedConfig` or `dict`, *optional*): What `from_pretrained` was called with.

        Raises:
            ValueError: If a style of the plan is unknown; the message names it.
        """
        if distributed_config is None:
            return
        asked = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config)
        from transformers.integrations import ALL_PARALLEL_STYLES

        plans = (("ep_size", cls.base_model_ep_plan), ("tp_size", cls.base_model_tp_plan))
        styles = {style for size, plan in plans if (asked.get(size) or 1) > 1 for style in plan.values()}
        if unknown := sorted(styles - set(ALL_PARALLEL_STYLES)):
            raise ValueError(
                f"transformers {__version__} does not know the parallel styles {unknown} of PathMoE's plan: install a "
                "transformers of the range that pathmoe's README states, or leave tp_size and ep_size out."
            )

    @property
    def trains_router_balance(self) -> bool:
        """Whether training needs the router logits: for an auxiliary loss or for the load of a selection bias."""
        return any((self.router_aux_loss_coef, self.router_z_loss_coef, self.router_bias_update_rate))

    def validate_sizes(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "moe_intermediate_size",
            "num_experts",
            "num_experts_per_tok",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def validate_attention_heads(self):
        self.validate_sizes()  # validators run in the order of their names
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}: every key and value head "
                "serves the same number of query heads."
            )
        if self.head_dim is None:
            raise ValueError(
                f"num_attention_heads={heads} must divide hidden_size={self.hidden_size}, or set head_dim explicitly."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even and at least 2, because rotary embeddings rotate pairs."
            )

    def validate_routing(self):
        self.validate_sizes()
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must not exceed num_experts={self.num_experts}."
            )
        sizes = self.router_block_size
        if min([sizes] if isinstance(sizes, int) else sizes, default=0) < 1:
            raise ValueError(
                f"router_block_size={sizes} must be at least 1, or a list of sizes that are: 1 is independent routing."
            )
        if isinstance(sizes, list) and sum(sizes) != self.num_hidden_layers:
            raise ValueError(
                f"router_block_size={sizes} sums to {sum(sizes)} but must sum to "
                f"num_hidden_layers={self.num_hidden_layers}: give every layer a block."
            )
        if self.router_type not in ROUTERS:
            raise ValueError(
                f"router_type={self.router_type!r} is not one of {sorted(ROUTERS)}. If it is a router of your own, "
                "call modeling_pathmoe.register_router(name, cls) before the config is created or loaded."
            )
        if self.router_sharing == "decision" and not ROUTERS[self.router_type].can_share_decision:
            raise ValueError(
                f"router_sharing='decision' has no meaning with router_type={self.router_type!r}, whose layers route "
                "differently by design: use 'parameters', or router_type='linear'."
            )
        if self.router_dim is not None and self.router_dim < 1:
            raise ValueError(f"router_dim={self.router_dim} must be at least 1, or None for the router's default.")
        if self.router_rank < 0:
            raise ValueError(f"router_rank={self.router_rank} must not be negative; 0 is the linear router.")

    def validate_layers(self):
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is no activation of transformers, such as 'silu'.")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be at least 0 and below 1.")

    def validate_coefficients(self):
        for name in (
            "router_aux_loss_coef",
            "router_z_loss_coef",
            "router_bias_update_rate",
            "initializer_range",
            "router_initializer_range",
            "embedding_initializer_range",
            "rms_norm_eps",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be finite and not negative; 0 switches it off.")


__all__ = ["PathMoEConfig"]
