# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Compares the planner with real runs: a few steps of a small model on each engine, and the memory that they took.

    python -m benchmarks.memory --json benchmarks/memory.json

On a CPU, the memory of a run is its peak resident size minus that of a run with a minimal model, which leaves out the
libraries; the ranks are gloo processes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.options import check_options
from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import write_text
from pathmoe.train.model import build_config
from pathmoe.train.plan import plan_memory
from pathmoe.train.recipe import parse_recipe


ROOT = Path(__file__).parents[1]


MODEL = {
    "model_type": "pathmoe", "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 16,
    "num_experts_per_tok": 4, "max_position_embeddings": 1024, "router_block_size": 4,
}  # fmt: skip
NOTHING = {"hidden_size": 8, "head_dim": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 2,
           "num_experts_per_tok": 1, "moe_intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 300,
           "router_block_size": 1}  # fmt: skip
RUNS = [
    ("cpu", 1, {}),
    ("cpu", 1, {"gradient_checkpointing": True}),
    ("cpu", 1, {"precision": "bf16", "micro_batch_size": 4}),
    ("ddp", 2, {}),
    ("fsdp", 2, {}),
    ("fsdp", 2, {"gradient_checkpointing": True}),
    ("fsdp", 2, {"precision": "bf16", "micro_batch_size": 4}),
    ("fsdp_ep", 2, {"ep_size": 2}),
]


def recipe_args(folder: Path, name: str, **fields) -> list[str]:
    values = {
        "model": str(folder / "model.json"), "dataset": str(folder / "text.jsonl"), "sequence_length": 1024,
        "batch_size": 4, "micro_batch_size": 2, "max_steps": 3, "log_every": 1, "eval_sequences": 1,
        "routing_every": 0, "output_dir": str(folder / name),
    } | fields  # fmt: skip
    file = folder / f"{name}.json"
    file.write_text(json.dumps(values))
    return ["--config", str(file)]


def measure(args: list[str], engine: str, output: Path) -> int:
    """Runs a training and returns its peak memory in bytes, up to the last step."""
    file = "ddp" if engine == "fsdp_ep" else engine
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "configuration" / "accelerate" / f"{file}.yaml"), "--main_process_port", "29777"]
    # Freed memory must leave the process, or its size includes the allocator's pool. oneDNN would keep a thousand
    # bfloat16 kernels, one for each number of tokens of an expert: half a gigabyte that a GPU does not need.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    env["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1"
    command += [str(ROOT / "train_accelerate.py"), *args]
    subprocess.run(command, check=True, cwd=ROOT, env=env, capture_output=True)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return max(line["peak_memory"] for line in lines if "peak_memory" in line)


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_options(options, json='"planned"')
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "model.json").write_text(json.dumps(MODEL))
        texts = [f"{i}: " + "".join(chr(33 + j * j % 90) for j in range(3000)) for i in range(200)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for number, (engine, ranks, fields) in enumerate(tqdm(RUNS, desc="memory")):
            fields = fields | {"batch_size": fields.get("micro_batch_size", 2) * ranks}
            args = recipe_args(folder, f"run-{number}", **fields)
            planned = plan_memory(parse_recipe(args), build_config(parse_recipe(args)), engine, ranks).total
            found = measure(args, engine, folder / f"run-{number}")
            base_args = recipe_args(folder, f"base-{number}", model_overrides=NOTHING, **fields)
            found -= measure(base_args, engine, folder / f"base-{number}")
            shown = {key: value for key, value in fields.items() if key != "batch_size"}
            recorded = {"model_overrides": MODEL, "sequence_length": 1024, "micro_batch_size": 2} | fields
            recorded["model_overrides"] = {k: v for k, v in MODEL.items() if k != "model_type"}
            results.append(
                {"engine": engine, "ranks": ranks, "fields": recorded, "planned": planned, "measured": found}
            )
            tqdm.write(f"{engine} x {ranks} {shown}: planned {planned / 1e9:.2f}, measured {found / 1e9:.2f} GB, "
                       f"ratio {planned / found:.2f}")  # fmt: skip
    if options.json:
        write_text(options.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
