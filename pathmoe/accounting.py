# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What a configuration costs: parameters and FLOPs per token.

    python -m pathmoe.accounting configuration/model/indep-moe.json configuration/model/*.json

Parameters and FLOPs are also shown relative to the first file.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from .command import ArgumentParser, UserError, one_line, run_command
from .files import read_json
from .markdown import markdown_table


def _build_on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Counts the parameters of a causal language model without allocating them.

    Args:
        config (`PreTrainedConfig`): The model's configuration: a PathMoE, another MoE or a dense model.

    Returns:
        `dict`: `total`; `active`, those that one token meets (k of E experts, everything else whole, the embedding
        matrices too, as the paper counts); `router`, those of a PathMoE's routers; `embedding`, those of the input
        embedding.
    """
    return _count_parameters(_build_on_meta(config))


def active_parameters(sizes: dict[str, int], config: PreTrainedConfig) -> int:
    """Those of a model's tensors, by name, that one token meets: k of E experts, and everything else whole."""
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    active = experts * config.num_experts_per_tok // config.num_experts if experts else 0
    return sum(sizes.values()) - experts + active


def _count_parameters(model: torch.nn.Module) -> dict[str, int]:
    config = model.config
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "total": sum(sizes.values()),
        "active": active_parameters(sizes, config),
        "router": sum(size for name, size in sizes.items() if ".routers." in name),
        "embedding": model.get_input_embeddings().weight.numel(),
    }


def forward_flops_per_token(config: PreTrainedConfig, sequence_length: int) -> int:
    """Floating-point operations of one token's forward pass; training costs three times that.

    Two per active weight that takes part in a matrix product (the output head does, the lookup in the input embedding
    does not), what the routers do in all their layers, and 4 · heads · head_dim · S / 2 per layer for causal attention
    over S tokens (arXiv 2204.02311, appendix B).

    Args:
        config (`PreTrainedConfig`): The model's configuration.
        sequence_length (`int`): S, in tokens.
    """
    model = _build_on_meta(config)
    count = _count_parameters(model)
    weights = count["active"] - (0 if config.tie_word_embeddings else count["embedding"])
    weights -= sum(p.numel() for name, p in model.named_parameters() if p.ndim < 2 or ".routers." in name)
    router_flops = _router_flops(model) if isinstance(config, PathMoEConfig) else 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim * sequence_length
    return 2 * weights + router_flops + attention


def _router_flops(model: torch.nn.Module) -> int:
    """Floating-point operations of all routers for one token, counted by torch on the routers themselves."""
    with FlopCounterMode(display=False) as counter:
        state = None
        for router in model.model.routers.values():
            for layer_idx in router.layers[:1] if router.shares_decision else router.layers:
                token = torch.empty(1, router.hidden_size, device="meta")
                _, state = router.compute_logits(token, layer_idx, state)
    return counter.get_total_flops()


def read_config(file: str) -> PathMoEConfig:
    """Reads the configuration of a PathMoE.

    Raises:
        UserError: If it cannot be read or is not one of a PathMoE; the message names the file.
    """
    fields = read_json(file)
    if fields.get("model_type") != PathMoEConfig.model_type:
        raise UserError(f"{file}: model_type={fields.get('model_type')!r} must be {PathMoEConfig.model_type!r}.")
    try:
        return PathMoEConfig.from_dict(fields)
    except Exception as error:  # StrictDataclassError, or whatever a wrong type makes a check raise
        raise UserError(f"{file}: {one_line(error)}") from error


def main(argv: list[str] | None = None):
    parser = ArgumentParser(
        prog="python -m pathmoe.accounting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="config.json of a PathMoE")
    configs = {file: read_config(file) for file in parser.parse_args(argv).files}
    first, rows = None, []
    for file, config in configs.items():
        count = count_parameters(config)
        flops = forward_flops_per_token(config, config.max_position_embeddings)
        first = first or (count["total"], flops)
        counts = (f"{count[name]:,}" for name in ("total", "active", "router"))
        relative = (f"{count['total'] / first[0] - 1:+.3%}", f"{flops / first[1] - 1:+.3%}")
        rows.append([Path(file).stem, *counts, f"{flops / 1e6:,.1f}", *relative])
    head = ["configuration", "total", "active", "routers", "MFLOP per token", "total, relative", "FLOP, relative"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    run_command(main)
