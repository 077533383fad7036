# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Maps the tensors and configuration fields of the architectures to each other."""

from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..command import UserError, one_line
from .checkpoint import Checkpoint, Piece
from .shapes import PER_EXPERT


DENSE = ("llama", "mistral", "qwen3")
SAME_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
)  # fmt: skip
# The architecture with the attention of each `qk_norm`, its name in messages, and what its attention does.
TARGETS: dict[bool | Literal["full"], tuple[str, str, str]] = {
    True: ("qwen3_moe", "a Qwen3-MoE", "normalises queries and keys per head"),
    False: ("mixtral", "a Mixtral", "does not normalise queries and keys"),
    "full": ("olmoe", "an OLMoE", "normalises queries and keys over their full width"),
}
QK_NORM = {target: qk_norm for qk_norm, (target, *_) in TARGETS.items()} | {"qwen3": True}
MISFITS = {
    "qwen2_moe": "Qwen2-MoE has a shared expert and attention biases on queries, keys and values alone",
    "deepseek_v2": "DeepSeek has shared experts and latent attention",
    "deepseek_v3": "DeepSeek has shared experts and latent attention",
    "gpt_oss": "GPT-OSS has biases in its experts and attention sinks",
    "qwen2": "Qwen2 has attention biases on queries, keys and values alone",
    "pathmoe": "it is a PathMoE already",
}


class Expert(NamedTuple):
    """One feed-forward network: gate and up (F, D), down (D, F)."""

    gate: Piece
    up: Piece
    down: Piece


def experts_of(source: Checkpoint, layer: int) -> list[Expert]:
    """Returns the experts of a layer, in either layout; of a dense layer, the one feed-forward network."""
    prefix = f"model.layers.{layer}"
    config = source.config
    if f"{prefix}.mlp.experts.gate_up_proj" in source:
        width = source.shapes[f"{prefix}.mlp.experts.gate_up_proj"][1] // 2
        return [
            Expert(
                source.piece(f"{prefix}.mlp.experts.gate_up_proj", expert, slice(0, width)),
                source.piece(f"{prefix}.mlp.experts.gate_up_proj", expert, slice(width, 2 * width)),
                source.piece(f"{prefix}.mlp.experts.down_proj", expert),
            )
            for expert in range(config.num_experts)
        ]
    if config.model_type in DENSE:
        return [Expert(*(source.piece(f"{prefix}.mlp.{name}.weight") for name in PER_EXPERT["qwen3_moe"][1]))]
    block, names = PER_EXPERT[config.model_type]
    return [
        Expert(*(source.piece(f"{prefix}.{block}.experts.{expert}.{name}.weight") for name in names))
        for expert in range(config.num_experts)
    ]


def gate_of(source: Checkpoint, layer: int) -> Piece:
    """Returns the router of a layer in a Qwen3-MoE, Mixtral or OLMoE checkpoint."""
    fused = f"model.layers.{layer}.mlp.gate.weight"
    block, _ = PER_EXPERT[source.config.model_type]
    return source.piece(fused if fused in source else f"model.layers.{layer}.{block}.gate.weight")


def fuse(experts: list[Expert], layer: int) -> dict[str, Piece]:
    """Returns the two 3-D tensors `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F) of a PathMoE layer."""
    (width, hidden), dtype = experts[0].gate.shape, experts[0].gate.dtype
    for expert in experts:
        for piece in expert:
            if piece.dtype != dtype:
                raise UserError(
                    f"{piece.sources[0]} is {piece.dtype}, but {experts[0].gate.sources[0]} is {dtype}: the experts "
                    "of a layer become one tensor, so save them in one dtype first."
                )

    def read_gate_up():
        fused = torch.empty(len(experts), 2 * width, hidden, dtype=dtype)
        for expert, (gate, up, _) in zip(fused, experts):
            expert[:width], expert[width:] = gate.read(), up.read()
        return fused

    def read_down():
        fused = torch.empty(len(experts), hidden, width, dtype=dtype)
        for expert, (_, _, down) in zip(fused, experts):
            expert[:] = down.read()
        return fused

    gate_up = tuple(source for expert in experts for piece in expert[:2] for source in piece.sources)
    down = tuple(source for expert in experts for source in expert.down.sources)
    return {
        f"model.layers.{layer}.mlp.experts.gate_up_proj": Piece(
            (len(experts), 2 * width, hidden), dtype, gate_up, read_gate_up
        ),
        f"model.layers.{layer}.mlp.experts.down_proj": Piece((len(experts), hidden, width), dtype, down, read_down),
    }


def split(experts: list[Expert], layer: int, model_type: str) -> dict[str, Piece]:
    """Returns the per-expert tensors of a layer in the published layout of `model_type`."""
    block, names = PER_EXPERT[model_type]
    return {
        f"model.layers.{layer}.{block}.experts.{index}.{name}.weight": piece
        for index, expert in enumerate(experts)
        for name, piece in zip(names, expert)
    }


def same_fields(config: PreTrainedConfig) -> dict:
    """Returns the fields that have the same meaning in every architecture here."""
    fields = {name: getattr(config, name) for name in SAME_FIELDS}
    head_dim = getattr(config, "head_dim", None)
    return {**fields, "head_dim": head_dim or config.hidden_size // config.num_attention_heads}


def export_config(config: PathMoEConfig, to: str) -> PreTrainedConfig:
    """Returns the configuration of the Qwen3-MoE, Mixtral or OLMoE that computes the same function as a PathMoE.

    Raises:
        UserError: If there is none; names the field, its value and the reason.
    """
    if config.router_type not in ("linear", "low_rank"):
        raise UserError(
            f"router_type={config.router_type!r} cannot be exported: the routers of Qwen3-MoE, Mixtral and OLMoE are "
            "linear. Only 'linear' and 'low_rank' can be exported."
        )
    if config.router_sharing == "decision":
        raise UserError(
            "router_sharing='decision' cannot be exported: every layer of a Qwen3-MoE, Mixtral or OLMoE decides for "
            "itself."
        )
    if config.router_selection_bias:
        raise UserError(
            f"router_selection_bias=True with router_bias_update_rate={config.router_bias_update_rate} cannot be "
            "exported: Qwen3-MoE, Mixtral and OLMoE have no bias on the choice of experts."
        )
    if to not in ("auto", *PER_EXPERT):
        raise UserError(f"to={to!r} must be 'auto' or one of {', '.join(PER_EXPERT)}.")
    target, *_ = TARGETS[config.qk_norm]
    if to not in ("auto", target):
        _, name, attention = TARGETS[QK_NORM[to]]
        raise UserError(f"qk_norm={config.qk_norm!r} cannot become {name}, which {attention}: use {target}.")
    shared = {
        **same_fields(config),
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_local_experts": config.num_experts,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "output_router_logits": config.output_router_logits,
        "intermediate_size": config.moe_intermediate_size,
    }
    options: dict[str, Any] = {"norm_topk_prob": config.norm_topk_prob, "attention_bias": config.attention_bias}
    if target == "qwen3_moe":
        shared["intermediate_size"] = config.intermediate_size or config.moe_intermediate_size
        return Qwen3MoeConfig(
            **shared,
            **options,
            moe_intermediate_size=config.moe_intermediate_size,
            mlp_only_layers=config.mlp_only_layers,
            architectures=["Qwen3MoeForCausalLM"],
        )
    if config.mlp_only_layers:
        raise UserError(
            f"mlp_only_layers={config.mlp_only_layers} cannot be exported: all layers of a Mixtral or OLMoE have "
            "experts."
        )
    if target == "olmoe":
        if config.num_attention_heads * shared.pop("head_dim") != config.hidden_size:
            raise UserError(
                f"head_dim={config.head_dim} with num_attention_heads={config.num_attention_heads} cannot become an "
                f"OLMoE, whose heads together are as wide as hidden_size={config.hidden_size}."
            )
        return OlmoeConfig(**shared, **options, architectures=["OlmoeForCausalLM"])
    if not config.norm_topk_prob:
        raise UserError(
            "qk_norm=False with norm_topk_prob=False cannot be exported: Mixtral always normalises the k weights, and "
            "Qwen3-MoE and OLMoE always normalise queries and keys."
        )
    if config.attention_bias:
        raise UserError("attention_bias=True cannot become a Mixtral, whose attention has no biases.")
    return MixtralConfig(**shared, architectures=["MixtralForCausalLM"])


def refuse_misfits(config: PreTrainedConfig, accepted: tuple[str, ...]):
    """Refuses architectures, and options of accepted architectures, that PathMoE does not support.

    Raises:
        UserError: If there is one; names the field, its value and the reason.
    """
    kind = config.model_type
    if kind not in accepted:
        reason = MISFITS.get(kind, "PathMoE has no counterpart for it")
        raise UserError(f"model_type={kind!r} is not supported: {reason}. Supported are {', '.join(accepted)}.")
    wanted = {
        "sliding_window": (None, "PathMoE attends to the whole sequence"),
        "clip_qkv": (None, "PathMoE does not clip queries, keys and values"),
        "mlp_bias": (False, "PathMoE's experts have no biases"),
        "layer_types": (["full_attention"] * config.num_hidden_layers, "PathMoE attends to the whole sequence"),
    }
    if kind in DENSE:
        wanted["attention_bias"] = (False, "only attention without biases is upcycled")
    for name, (value, reason) in wanted.items():
        found = getattr(config, name, None)
        if found is not None and found != value:
            raise UserError(f"{name}={found!r} is not supported: {reason}.")


def import_config(config: PreTrainedConfig, **fields) -> PathMoEConfig:
    """Returns the PathMoE configuration for a foreign one; `fields` are those of experts and routers.

    Raises:
        UserError: If a field has a value that is not valid; names the field and its value.
    """
    # The other architectures ignore the coefficient unless router logits are returned; PathMoE trains with it.
    uses_coefficient = getattr(config, "output_router_logits", False)
    try:
        return PathMoEConfig(
            **same_fields(config),
            qk_norm=QK_NORM.get(config.model_type, False),
            attention_bias=getattr(config, "attention_bias", False),
            router_aux_loss_coef=config.router_aux_loss_coef if uses_coefficient else 0.0,
            **fields,
        )
    except StrictDataclassError as error:
        raise UserError(f"The source cannot become a PathMoE with these fields: {one_line(error)}") from error
