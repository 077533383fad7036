# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures how far round trips through PathMoE change the logits of small random models, in float32.

python -m benchmarks.conversions --json benchmarks/conversions.json
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3Config, Qwen3MoeConfig

from benchmarks.options import check_options
from pathmoe import PathMoEConfig
from pathmoe.command import ArgumentParser, run_command
from pathmoe.convert import export_checkpoint, import_checkpoint, upcycle
from pathmoe.convert.checkpoint import difference, load, logits_of, sample_tokens
from pathmoe.files import write_text
from pathmoe.markdown import markdown_table


SIZES = {
    "vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.1,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 8}
OURS = {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "router_block_size": 4}


def imported(src, dst):
    return import_checkpoint(src, dst, 1)


def imported_in_blocks(src, dst):
    return import_checkpoint(src, dst, 4)


def upcycled(src, dst):
    return upcycle(src, dst, 8, 2)


def upcycled_finely(src, dst):
    return upcycle(src, dst, 16, 4, granularity=2)


TRIPS = {
    "Qwen3-MoE → PathMoE (block 1) → Qwen3-MoE": (
        Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=64, norm_topk_prob=True),
        imported, export_checkpoint,
    ),
    "Mixtral → PathMoE (block 1) → Mixtral": (
        MixtralConfig(**SIZES, **EXPERTS, intermediate_size=64), imported, export_checkpoint
    ),
    "OLMoE → PathMoE (block 1) → OLMoE": (
        OlmoeConfig(**SIZES, **EXPERTS, intermediate_size=64, eos_token_id=2), imported, export_checkpoint
    ),
    "PathMoE (block 4) → Qwen3-MoE → PathMoE (block 4)": (
        PathMoEConfig(**OURS), export_checkpoint, imported_in_blocks
    ),
    "PathMoE (block 4, no QK-norm) → Mixtral → PathMoE (block 4)": (
        PathMoEConfig(**OURS, qk_norm=False), export_checkpoint, imported_in_blocks
    ),
    "PathMoE (block 4, QK-norm over the full width) → OLMoE → PathMoE (block 4)": (
        PathMoEConfig(**OURS, qk_norm="full"), export_checkpoint, imported_in_blocks
    ),
    "PathMoE (low-rank routers) → Qwen3-MoE": (
        PathMoEConfig(**OURS, router_type="low_rank"), export_checkpoint
    ),
    "Llama → PathMoE (8 experts, top-2) → Mixtral": (
        LlamaConfig(**SIZES, intermediate_size=256), upcycled, export_checkpoint
    ),
    "Qwen3 → PathMoE (16 experts of half width, top-4) → Qwen3-MoE": (
        Qwen3Config(**SIZES, intermediate_size=256), upcycled_finely, export_checkpoint
    ),
}  # fmt: skip


def main(argv: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    check_options(args, json='"largest_logit"')
    results, rows = {}, []
    for name, (config, *steps) in TRIPS.items():
        with tempfile.TemporaryDirectory() as folder:
            first = last = Path(folder) / "0"
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith(".up") and "routers" in parameter_name:  # these start at zero
                    torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(first)
            for number, step in enumerate(steps, start=1):
                step(last, Path(folder) / str(number))
                last = Path(folder) / str(number)
            tokens = sample_tokens(config)
            results[name] = difference(logits_of(load(last), tokens), logits_of(load(first), tokens))
        found = results[name]
        rows.append([name, f"{found['largest_logit']:.1f}", f"{found['largest_logit_difference']:.1e}"])
    print(markdown_table(["round trip", "largest logit", "largest difference"], rows))
    if args.json:
        write_text(args.json, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_command(main)
