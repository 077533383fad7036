# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PathMoE model configuration."""

from difflib import get_close_matches
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import __version__
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .routing_pathmoe import ROUTERS


# Upper limits. Larger values are mistakes, and building such a model would fill the memory before any error is raised.
MOST = {
    "num_hidden_layers": 1024,
    "num_experts": 32767,
    "hidden_size": 2**20,
    "max_position_embeddings": 2**31 - 1,
}
MOST_PARAMETERS = 10**13
MOST_LABELS = 10**6
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
# Upper limits of coefficients, above which they are mistakes; `LARGEST_COEFFICIENT` where no smaller limit is listed.
LARGEST = {"rms_norm_eps": 1.0, "router_bias_update_rate": 1.0, "initializer_range": 100.0}
LARGEST |= {"router_initializer_range": 100.0, "embedding_initializer_range": 100.0}
LARGEST_COEFFICIENT = 1e4
SMALLEST_EPSILON = 2.0**-126  # float32's smallest normal number; with less, the norm of zeros may be NaN
LARGEST_ROPE = 1e15
# Names that other models and papers have for fields, too different from ours to be found as misspelt.
OTHER_NAMES = {
    "block_size": "router_block_size",
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "top_k": "num_experts_per_tok",
}
# Keys of rope_parameters that transformers may not list among its own.
ROPE_KEYS = {"type", "truncate", "mscale", "mscale_all_dim"}


@strict
class PathMoEConfig(PreTrainedConfig):
    r"""Configuration of a PathMoE model (*Path-Constrained Mixture-of-Experts*, arXiv 2603.18297).

    A PathMoE is a Qwen3-MoE whose routers are shared by blocks of consecutive layers. The defaults are the paper's
    0.9B model, PathB4-MoE; widths that the paper does not state are chosen to match its parameter counts.

    Args:
        vocab_size (`int`, defaults to 32000): Size of the vocabulary.
        hidden_size (`int`, defaults to 1152): Width D of the residual stream.
        num_hidden_layers (`int`, defaults to 24): Number of layers L. All are MoE layers except `mlp_only_layers`.
        num_attention_heads (`int`, defaults to 18): Number of query heads.
        num_key_value_heads (`int`, *optional*): Number of key and value heads; `num_attention_heads` when unset.
        head_dim (`int`, *optional*): Width of a head; `hidden_size // num_attention_heads` when unset.
        hidden_act (`str`, defaults to `"silu"`): Activation of the experts' gate.
        moe_intermediate_size (`int`, defaults to 512): Width F of one expert.
        mlp_only_layers (`list[int]`, *optional*): Indices of dense layers, which have one network and no router.
        intermediate_size (`int`, *optional*): Width of that network; required with `mlp_only_layers`, unused without.
        num_experts (`int`, defaults to 16): Number of experts E in an MoE layer.
        num_experts_per_tok (`int`, defaults to 4): Number of experts k that a token visits in a layer.
        norm_topk_prob (`bool`, defaults to `True`): Whether the k weights are scaled to sum to one.
        router_block_size (`int` or `list[int]`, defaults to 4): Number of consecutive MoE layers that share a router:
            one number (the last block may be shorter; L or more means one router for all layers), or a list with the
            size of each block. Dense layers are not counted. 1 is the usual independent routing; 4 is the paper's
            best.
        router_type (`str`, defaults to `"linear"`): How a router scores the experts: `"linear"`, `"cosine"`,
            `"low_rank"`, `"recurrent"`, `"random"`, `"hash"` (by token id), or a name given to `register_router`.
        router_sharing (`str`, defaults to `"parameters"`): Whether a block shares the router's `"parameters"`, so that
            each layer routes its own hidden state (PathMoE), or the `"decision"` of its first layer (Mono).
        router_dim (`int`, *optional*): Width of the cosine router's projection (E / 2 when unset) or of the recurrent
            router's state (128 when unset).
        router_rank (`int`, defaults to 8): Rank of each layer's own term in the low-rank router.
        router_selection_bias (`bool`, defaults to `False`): Whether a bias on the choice of experts balances their
            load without an auxiliary loss (arXiv 2408.15664). Always true when `router_bias_update_rate` is above 0.
        router_bias_update_rate (`float`, defaults to 0.0): Step by which `update_selection_bias` moves that bias after
            each optimizer step (the paper uses 0.001). 0 leaves a trained bias unchanged.
        router_aux_loss_coef (`float`, defaults to 0.0): Coefficient of the load-balancing loss while training. The
            paper trains PathMoE without it; its independent baseline uses 0.01.
        router_z_loss_coef (`float`, defaults to 0.0): Coefficient of the router z-loss while training.
        output_router_logits (`bool`, defaults to `False`): Whether to return each MoE layer's router logits.
        qk_norm (`bool` or `"full"`, defaults to `True`): Whether queries and keys are normalised, per head as in Qwen3
            or with `"full"` over all heads together as in OLMoE. With `False` the attention is that of Llama and
            Mixtral.
        attention_bias (`bool`, defaults to `False`): Whether the attention projections have biases.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities.
        max_position_embeddings (`int`, defaults to 4096): Longest sequence that the model is meant for.
        rope_parameters (`dict`, *optional*): Parameters of the rotary embedding; base 10000 when unset.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of the RMS normalisations.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        router_initializer_range (`float`, *optional*): Standard deviation of the routers' initial weights;
            `initializer_range` when unset. The initial logits of a linear router have a standard deviation of this
            value times the root of `hidden_size`.
        embedding_initializer_range (`float`, *optional*): Standard deviation of the initial input embeddings;
            `initializer_range` when unset. A larger value reduces the first layer's share of the residual stream. With
            `tie_word_embeddings`, it is that of the output embeddings too, and a value of 1 gives the initial logits a
            standard deviation of the root of `hidden_size`.
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
    base_model_ep_plan: ClassVar[dict[str, str]] = {  # type: ignore[assignment]  # transformers' type differs
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
    mlp_only_layers: list[int] | None = None
    intermediate_size: int | None = None
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
    qk_norm: bool | Literal["full"] = True
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float | int = 1e-6
    initializer_range: float | int = 0.02
    router_initializer_range: float | int | None = None
    embedding_initializer_range: float | int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __new__(cls, *args, **kwargs):
        # Once the fields are set, a number of experts that was passed cannot be distinguished from the default.
        experts = [kwargs[name] for name in ("num_experts", "num_local_experts") if name in kwargs]
        if experts[:1] != experts[-1:]:
            raise _two_numbers_of_experts(*experts)
        width = kwargs.get("intermediate_size")
        if width is not None and not kwargs.get("mlp_only_layers") and "moe_intermediate_size" not in kwargs:
            raise _refusal(
                f"intermediate_size={width!r} is the width of the layers in mlp_only_layers, which is empty: did you "
                "mean moe_intermediate_size?"
            )
        return super().__new__(cls)

    def __post_init__(self, **kwargs):
        self._check_names(kwargs)
        self._check_labels({"id2label": self.id2label, "label2id": self.label2id, **kwargs})
        dtype = kwargs.get("torch_dtype", self.dtype)
        if isinstance(dtype, str):
            known = getattr(getattr(torch, dtype, None), "is_floating_point", False)
        else:
            known = dtype is None or isinstance(dtype, torch.dtype)
        if not known:
            raise _refusal(f"dtype={dtype!r} is not a floating-point dtype of torch: use 'float32' or 'bfloat16'.")
        experts = kwargs.pop("num_local_experts", None)
        if experts is not None:
            self.num_experts = experts
        if self.mlp_only_layers is None:
            self.mlp_only_layers = []
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        heads = self.num_attention_heads
        if self.head_dim is None and heads > 0 and self.hidden_size % heads == 0:
            self.head_dim = self.hidden_size // heads
        if self.router_bias_update_rate:
            self.router_selection_bias = True
        if self.mlp_only_layers:  # otherwise transformers would warn of rules that apply to no layer
            styles = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
            dense_plan = {f"layers.*.mlp.{name}": style for name, style in styles.items()}
            self.base_model_tp_plan = self.base_model_tp_plan | dense_plan  # type: ignore[misc]
        router = ROUTERS.get(self.router_type)
        if self.router_sharing == "decision" or (router and (router.carries_state or router.needs_token_ids)):
            # Pipeline stages pass on hidden states only, so routers would lose their state or the tokens between them.
            self.base_model_pp_plan = None  # type: ignore[misc]
        if self.qk_norm == "full":
            # The norms need the values of all heads, so the ranks gather them, and each attends with all, as in OLMoE.
            styles = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")
            styles["o_proj"] = "rowwise_split_input"
            experts = {name: style for name, style in self.base_model_tp_plan.items() if ".mlp." in name}
            attention = {f"layers.*.self_attn.{name}": style for name, style in styles.items()}
            self.base_model_tp_plan = attention | experts  # type: ignore[misc]
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """See `PreTrainedConfig.get_config_dict`. A folder without fields is an error instead of the default model."""
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not fields.keys() - {"_commit_hash"}:  # old versions of transformers always add it
            raise OSError(
                f"{pretrained_model_name_or_path} has no config.json with fields: name the folder of a saved model."
            )
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """See `PreTrainedConfig.from_dict`. Fields that keyword arguments override are checked as well."""
        cls._check_names(kwargs)
        cls._check_labels(kwargs)
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    @classmethod
    def _check_names(cls, given: dict):
        """Refuses the model type of a different architecture, and names that look like a misspelt field."""
        if given.get("model_type", cls.model_type) != cls.model_type:
            raise _refusal(
                f"model_type={given['model_type']!r} is a different architecture than {cls.model_type!r}: convert its "
                "checkpoint with `pathmoe convert`."
            )
        fields = set(cls.__dataclass_fields__)
        for name in given:
            own = name in fields or name.startswith("_") or hasattr(cls, name)
            close = [] if own else get_close_matches(name.lower(), fields, n=1, cutoff=0.82)
            if not own and name in OTHER_NAMES:
                close = [OTHER_NAMES[name]]
            if close:
                raise _refusal(f"{name}={given[name]!r} is not a field of PathMoE: did you mean {close[0]}?")

    @staticmethod
    def _check_labels(given: dict):
        """Refuses classifier labels that would make transformers crash or change the number of classes."""
        labels, ids, count = (given.get(name) for name in ("id2label", "label2id", "num_labels"))
        if count is not None and (type(count) is not int or not 1 <= count <= MOST_LABELS):
            raise _refusal(f"num_labels={count!r} must be a whole number from 1 to {MOST_LABELS}.")
        if labels is not None:
            numbers = {str(number): label for number, label in labels.items()} if isinstance(labels, dict) else {}
            texts = [label for label in numbers.values() if isinstance(label, str)]
            if set(numbers) != set(map(str, range(len(numbers)))) or len(set(texts)) != len(numbers) or not numbers:
                raise _refusal(
                    f"id2label={labels!r:.200} must map the numbers from 0 on to different texts, such as "
                    "{0: 'no', 1: 'yes'}."
                )
            named = any(not label.startswith("LABEL_") for label in texts)  # "LABEL_0" is transformers' default
            if named and count not in (None, len(labels)):
                raise _refusal(f"num_labels={count} contradicts the {len(labels)} labels of id2label: leave it out.")
        if ids is not None:
            whole = isinstance(ids, dict) and all(str(number).isdecimal() for number in ids.values())
            differs = whole and labels and {str(number): label for label, number in ids.items()} != numbers
            if not whole or differs:
                raise _refusal(
                    f"label2id={ids!r:.200} must map texts to numbers, and be the reverse of id2label: leave it out."
                )

    @property
    def moe_layers(self) -> list[int]:
        """The indices of the layers that have experts, in order."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in (self.mlp_only_layers or ())]

    @property
    def router_blocks(self) -> list[list[int]]:
        """The layer indices of each block, in order."""
        sizes, layers = self.router_block_size, self.moe_layers
        if isinstance(sizes, int):
            return [layers[i : i + sizes] for i in range(0, len(layers), sizes)]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [layers[start : start + size] for start, size in zip(starts, sizes)]

    @property
    def layer_to_block(self) -> list[int | None]:
        """The block of each layer, which is also the index of its router; `None` for a dense layer."""
        blocks = {layer: block for block, layers in enumerate(self.router_blocks) for layer in layers}
        return [blocks.get(layer) for layer in range(self.num_hidden_layers)]

    def check_grouped_mm_rows(self, dtype):
        """Refuses widths that the grouped_mm experts do not support.

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
            distributed_config (`DistributedConfig` or `dict`, *optional*): The argument of `from_pretrained`.

        Raises:
            ValueError: If a style of the plan is unknown.
        """
        if distributed_config is None:
            return
        sizes = distributed_config if isinstance(distributed_config, dict) else vars(distributed_config)
        from transformers.integrations import ALL_PARALLEL_STYLES

        plans = (("ep_size", cls.base_model_ep_plan), ("tp_size", cls.base_model_tp_plan))
        styles = {style for size, plan in plans if (sizes.get(size) or 1) > 1 for style in plan.values()}
        if unknown := sorted(styles - set(ALL_PARALLEL_STYLES)):
            raise ValueError(
                f"transformers {__version__} does not know the parallel styles {unknown} of PathMoE's plan: install a "
                "transformers version from pathmoe's README, or leave tp_size and ep_size out."
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
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} must not exceed {most}.")
        dense = self.mlp_only_layers or []
        experts = 3 * self.num_experts * self.moe_intermediate_size * (self.num_hidden_layers - len(dense))
        mlps = 3 * (self.intermediate_size or 0) * len(dense)
        head_dim = self.head_dim or 0
        attention = 2 * head_dim * (self.num_attention_heads + self.num_key_value_heads) * self.num_hidden_layers
        embeddings = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        parameters = self.hidden_size * (embeddings + attention + experts + mlps)
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"hidden_size={self.hidden_size}, vocab_size={self.vocab_size}, "
                f"num_hidden_layers={self.num_hidden_layers}, num_attention_heads={self.num_attention_heads}, "
                f"head_dim={self.head_dim}, num_experts={self.num_experts}, "
                f"moe_intermediate_size={self.moe_intermediate_size} and intermediate_size={self.intermediate_size} "
                f"make {parameters:.1e} parameters, more than the limit of {MOST_PARAMETERS:.0e}: make one of them "
                "smaller."
            )

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
        layers, dense = range(self.num_hidden_layers), self.mlp_only_layers or []
        if len(dense) != len(set(dense) & set(layers)) or len(dense) == len(layers):
            raise ValueError(
                f"mlp_only_layers={dense} must list different layers from 0 to {layers[-1]}, but not all of them: a "
                "PathMoE has at least one MoE layer."
            )
        if dense and (self.intermediate_size or 0) < 1:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} must be at least 1 with mlp_only_layers={dense}: it is "
                "the width of these layers."
            )
        sizes = self.router_block_size
        if min([sizes] if isinstance(sizes, int) else sizes, default=0) < 1:
            raise ValueError(
                f"router_block_size={sizes} must be at least 1, or a list of sizes that are: 1 is independent routing."
            )
        if isinstance(sizes, list) and sum(sizes) != len(layers) - len(dense):
            without = f" without mlp_only_layers={dense}" if dense else ""
            raise ValueError(
                f"router_block_size={sizes} sums to {sum(sizes)} but must sum to num_hidden_layers={len(layers)}"
                f"{without}: give every MoE layer a block."
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
        if self.router_dim is not None and not 1 <= self.router_dim <= 2**20:
            raise ValueError(f"router_dim={self.router_dim} must be from 1 to {2**20}, or None for the default.")
        if not 0 <= self.router_rank <= 2**20:
            raise ValueError(f"router_rank={self.router_rank} must be from 0 (a linear router) to {2**20}.")

    def validate_layers(self):
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act={self.hidden_act!r} is not an activation of transformers, such as 'silu'.")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be at least 0 and below 1.")
        every_layer = (
            "a PathMoE is a decoder whose layers attend to the whole sequence and have experts, or one dense network "
            "if mlp_only_layers lists them"
        )
        for name, supported in (
            ("sliding_window", None),
            ("use_sliding_window", False),
            ("layer_types", ["full_attention"] * self.num_hidden_layers),
            ("decoder_sparse_step", 1),
            ("is_encoder_decoder", False),
            ("n_shared_experts", 0),
            ("num_shared_experts", 0),
            ("shared_expert_intermediate_size", 0),
            ("first_k_dense_replace", 0),
        ):
            value = getattr(self, name, None)
            if value is not None and value != supported:
                raise ValueError(f"{name}={value} is not supported: {every_layer}. Leave it out.")

    def validate_inherited(self):
        """Refuses values of inherited fields that transformers would misread, or fail on later."""
        for name, kind, expected in (
            ("output_hidden_states", bool, "true or false"),
            ("output_attentions", bool, "true or false"),
            ("return_dict", bool, "true or false"),
            ("architectures", list, "a list, such as ['PathMoEForCausalLM']"),
            ("auto_map", dict, "a mapping from Auto classes to ours"),
        ):
            value = getattr(self, name, None)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name}={value!r:.200} must be {expected}, or left out.")
        if isinstance(quantization := getattr(self, "quantization_config", None), str | int | float | list):
            raise ValueError(f"quantization_config={quantization!r:.200} must be a mapping, or left out.")
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise ValueError(f"problem_type={self.problem_type!r} must be None or one of {PROBLEM_TYPES}.")

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
            value, largest = getattr(self, name), LARGEST.get(name, LARGEST_COEFFICIENT)
            if name == "rms_norm_eps" and not SMALLEST_EPSILON <= value <= largest:
                raise ValueError(
                    f"{name}={value} must be above 0 (at least {SMALLEST_EPSILON:.1e}) and at most {largest:g}, such "
                    "as 1e-06."
                )
            if value is not None and not 0 <= value <= largest:
                raise ValueError(
                    f"{name}={value} must be finite, not negative and at most {largest:g}; 0 switches it off."
                )

    def validate_rope(self):
        """Refuses parameters of the rotary embedding that transformers would ignore or compute NaN with."""
        rope: Any = self.rope_parameters
        known = {*RopeParameters.__annotations__, *ROPE_KEYS}
        for name in sorted(rope.keys() - known):
            raise ValueError(f"rope_parameters has the unknown key {name}={rope[name]!r}: use {sorted(known)}.")
        types = sorted({"default", *ROPE_INIT_FUNCTIONS})
        if rope.get("rope_type") not in types:
            raise ValueError(f"rope_parameters: rope_type={rope.get('rope_type')!r} must be one of {types}.")
        for name in rope.keys() - {"rope_type", "type", "truncate"}:
            least = 1 if name in ("rope_theta", "factor") else 0
            value = rope[name]
            if value is None and name != "rope_theta":
                continue
            for number in value if isinstance(value, list) else [value]:
                is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
                if not is_number or not least <= number <= LARGEST_ROPE or number <= 0:
                    raise ValueError(
                        f"rope_parameters: {name}={value!r:.200} must be above 0, at least {least} and at most "
                        f"{LARGEST_ROPE:g}."
                    )
            if isinstance(value, list) and (not name.endswith("_factor") or len(value) != (self.head_dim or 0) // 2):
                raise ValueError(
                    f"rope_parameters: {name}={value!r:.200} must be one number, or for longrope a list of "
                    f"head_dim // 2 = {(self.head_dim or 0) // 2}."
                )
        if rope.get("type", rope["rope_type"]) != rope["rope_type"]:
            raise ValueError(
                f"rope_parameters: type={rope['type']!r} contradicts rope_type={rope['rope_type']!r}: leave it out."
            )
        if not isinstance(rope.get("truncate", True), bool):
            raise ValueError(f"rope_parameters: truncate={rope['truncate']!r} must be true or false.")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if rope.get(low) is not None and rope.get(high) is not None and rope[low] >= rope[high]:
                raise ValueError(f"rope_parameters: {low}={rope[low]} must be below {high}={rope[high]}.")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"rope_parameters: partial_rotary_factor={rope['partial_rotary_factor']} must be 1: PathMoE rotates "
                "whole heads."
            )
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error

    def validate_token_ids(self):
        """Refuses special tokens outside the vocabulary."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value == []:
                raise ValueError(f"{name}=[] must hold a token, or be None.")
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{name}={value} must be None or from 0 to {self.vocab_size - 1}, within vocab_size="
                        f"{self.vocab_size}."
                    )


def _refusal(message: str) -> StrictDataclassClassValidationError:
    return StrictDataclassClassValidationError(validator="fields", cause=ValueError(message))


def _two_numbers_of_experts(num_experts, num_local_experts) -> StrictDataclassClassValidationError:
    return _refusal(
        f"num_local_experts={num_local_experts!r} contradicts num_experts={num_experts!r}, its other name: "
        "leave one of them out."
    )


__all__ = ["PathMoEConfig"]
