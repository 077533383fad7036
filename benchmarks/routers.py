# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the cost of the routers: a training step of every preset of the paper's table, side by side.

    python -m benchmarks.routers --json benchmarks/routers.json

The presets keep their routing and depth, and `--shrink` makes them narrower so that they fit the machine. In each
round, every preset makes one step, in a new random order. A figure is the median over rounds of the tokens/s relative
to `pathmoe-0.9b` (linear, block 4) in the same round, with the quartiles.
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from benchmarks.options import check_options
from pathmoe import PathMoEConfig, PathMoEForCausalLM, update_selection_bias
from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import write_text
from pathmoe.markdown import markdown_table


ROOT = Path(__file__).parents[1]
REFERENCE = "pathmoe-0.9b"
MOST_SHRINK = 18
PRESETS = [
    REFERENCE, "indep-moe", "indep-moe-lbl", "rand-moe", "x-moe", "recurrent-moe", "lowrank-moe", "monob8-moe",
    "pathb2-moe", "pathb8-moe", "pathb24-moe", "pathb4x-moe",
]  # fmt: skip


def build(preset: str, shrink: int, device: str):
    config = PathMoEConfig.from_json_file(ROOT / "configuration" / "model" / f"{preset}.json")
    config.hidden_size //= shrink
    config.moe_intermediate_size //= shrink
    config.num_attention_heads = config.num_key_value_heads = max(1, config.num_attention_heads // shrink)
    config.vocab_size = 2048
    model = PathMoEForCausalLM(config).to(device).train()
    return model, torch.optim.AdamW(model.parameters(), fused=True)


def step(model, optimizer, ids) -> float:
    """Runs one training step and returns its seconds."""
    synchronize = torch.cuda.synchronize if ids.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    update_selection_bias(model)
    synchronize()
    return time.perf_counter() - start


def main(args: list[str] | None = None):
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=8, help="divides the hidden size, heads and expert width")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step, in sequences of 512")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(args)
    check_options(options, {"shrink": 1, "tokens": 512, "rounds": 2}, json='"tokens_per_s"')
    if options.shrink > MOST_SHRINK:
        parser.error(f"--shrink {options.shrink} must be at most {MOST_SHRINK}, the heads of the smallest preset.")
    torch.manual_seed(0)
    ids = torch.randint(0, 2048, (options.tokens // 512, 512), device=options.device)
    models = {preset: build(preset, options.shrink, options.device) for preset in PRESETS}
    for model, optimizer in models.values():
        step(model, optimizer, ids)
    times = {preset: [] for preset in PRESETS}
    for _ in tqdm(range(options.rounds), desc="rounds", disable=None):
        for preset in random.sample(PRESETS, len(PRESETS)):
            times[preset].append(step(*models[preset], ids))
    results, rows = {}, []
    for preset in PRESETS:
        ratios = [reference / own for reference, own in zip(times[REFERENCE], times[preset])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        speed = options.tokens / statistics.median(times[preset])
        results[preset] = {"tokens_per_s": speed, "relative": middle, "quartiles": [low, high]}
        rows.append([preset, f"{speed:,.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    print(markdown_table(["preset", "tokens/s", f"relative to {REFERENCE}", "quartiles"], rows))
    if options.json:
        machine = {"device": options.device, "processor": platform.processor(), "threads": torch.get_num_threads()}
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        report = {"machine": machine, "versions": versions, "settings": settings, "results": results}
        write_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
