# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The names and shapes of the tensors that a configuration requires."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..command import UserError


# The block of a layer, and its experts' gate, up and down projections, in published checkpoints.
PER_EXPERT = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "olmoe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
COUNTED = {
    "num_hidden_layers": re.compile(r"^model\.layers\.(\d+)\."),
    "num_experts": re.compile(r"\.experts\.(\d+)\."),
}


def moe_layers(config: PreTrainedConfig) -> list[int]:
    """Returns the indices of the layers with experts, by Qwen3-MoE's rule, in order."""
    dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    if step < 1:
        raise UserError(f"decoder_sparse_step={step} must be at least 1.")
    return [layer for layer in range(config.num_hidden_layers) if layer not in dense and (layer + 1) % step == 0]


def routed_blocks(config: PreTrainedConfig) -> list[list[int]]:
    """Returns the layers of each block of a PathMoE, counting MoE layers only."""
    return [[config.moe_layers.index(layer) for layer in layers] for layers in config.router_blocks]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Builds the causal language model of a configuration, without memory for its tensors."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager", trust_remote_code=False)


def expected_shapes(config: PreTrainedConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors that a checkpoint with this configuration must have.

    Args:
        config (`PreTrainedConfig`): A PathMoE, or an architecture that can be converted.
        names (`Iterable[str]`): The tensors of the checkpoint. They decide, for each layer of a Qwen3-MoE, Mixtral or
            OLMoE, between the layouts with fused experts and with a tensor for each expert.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    if config.model_type not in PER_EXPERT:
        return shapes
    names = set(names)
    block, (gate, up, down) = PER_EXPERT[config.model_type]
    for layer in moe_layers(config):
        fused, single = f"model.layers.{layer}.mlp", f"model.layers.{layer}.{block}"
        if f"{fused}.gate.weight" not in names:
            shapes[f"{single}.gate.weight"] = shapes.pop(f"{fused}.gate.weight")
        if _experts(layer) not in names:
            del shapes[_experts(layer)]
            experts, hidden, width = shapes.pop(f"{fused}.experts.down_proj")
            for expert in range(experts):
                prefix = f"{single}.experts.{expert}"
                shapes[f"{prefix}.{gate}.weight"] = shapes[f"{prefix}.{up}.weight"] = width, hidden
                shapes[f"{prefix}.{down}.weight"] = hidden, width
    return shapes


def _experts(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts.gate_up_proj"


def check_tensors(config_file: Path, config: PreTrainedConfig, actual: dict[str, tuple[int, ...]]):
    """Compares the names and shapes of tensors with those that the configuration requires.

    Raises:
        UserError: If they differ; lists the missing, extra and misshapen tensors.
    """
    for field, pattern in COUNTED.items():  # first, because these counts limit the model that is built below
        found = 1 + max((int(match[1]) for match in map(pattern.search, actual) if match), default=-1)
        if found and found != getattr(config, field, found):
            raise UserError(
                f"{config_file} does not match the tensors: {field}={getattr(config, field)}, but they have {found}."
            )
    if config.model_type in PER_EXPERT:
        layers = [layer for layer in moe_layers(config) if _experts(layer) not in actual]
        if len(layers) * config.num_experts > len(actual):
            raise UserError(
                f"{config_file}: num_hidden_layers={config.num_hidden_layers} and num_experts={config.num_experts} "
                f"require more than the {len(actual)} tensors of the checkpoint."
            )
    expected = expected_shapes(config, actual)
    wrong = {
        "missing": sorted(expected.keys() - actual.keys()),
        "extra": sorted(actual.keys() - expected.keys()),
        "misshapen": [
            f"{name} {actual[name]} instead of {expected[name]}"
            for name in sorted(actual.keys() & expected.keys())
            if actual[name] != expected[name]
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:4])}{', …' * (len(names) > 4)})"
            for kind, names in wrong.items()
            if names
        ]
        raise UserError(
            f"{config_file}, of a {config.model_type}, does not match the tensors: {'; '.join(parts)}. Check its "
            "fields, and that no file of the checkpoint is missing."
        )
