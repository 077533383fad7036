# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Counts the parameters and the FLOPs per token of a configuration.

    python -m pathmoe.accounting configuration/model/indep-moe.json configuration/model/*.json

The table also shows parameters and FLOPs relative to the first file.
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
        `dict`: `total`; `active` (the parameters that one token uses: k of E experts and all other parameters,
        including the embedding matrices, as in the paper); `router` (those of a PathMoE's routers); `embedding` (those
        of the input embedding).
    """
    return _count_parameters(_build_on_meta(config))


def active_parameters(sizes: dict[str, int], config: PreTrainedConfig) -> int:
    """Counts the parameters that one token uses: k of E experts, and all other parameters.

    Args:
        sizes (`dict[str, int]`): The number of elements of each parameter of the model.
        config (`PreTrainedConfig`): The model's configuration.
    """
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
    """Counts the floating-point operations of one token's forward pass. A training step takes three times as many.

    The sum has two operations per active weight that takes part in a matrix product (the output head does, the lookup
    in the input embedding does not), the operations of the routers in all layers, and 4 · heads · head_dim · S / 2 per
    layer for causal attention over S tokens (arXiv 2204.02311, appendix B).

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
    """Counts the floating-point operations of all routers for one token by running the routers."""
    with FlopCounterMode(display=False) as counter:
        state = None
        for router in model.model.routers.values():
            for layer_idx in router.layers[:1] if router.shares_decision else router.layers:
                token = torch.empty(1, router.hidden_size, device="meta")
                ids = (torch.empty(1, dtype=torch.int64, device="meta"),) if router.needs_token_ids else ()
                _, state = router.compute_logits(token, layer_idx, state, *ids)
    return counter.get_total_flops()


def read_config(file: str) -> PathMoEConfig:
    """Reads the configuration of a PathMoE.

    Raises:
        UserError: If the file cannot be read or is not the configuration of a PathMoE. The message names the file.
    """
    fields = read_json(file)
    if fields.get("model_type") != PathMoEConfig.model_type:
        raise UserError(f"{file}: model_type={fields.get('model_type')!r} must be {PathMoEConfig.model_type!r}.")
    try:
        return PathMoEConfig.from_dict(fields)
    except Exception as error:  # StrictDataclassError, or any error of a check that gets a wrong type
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
