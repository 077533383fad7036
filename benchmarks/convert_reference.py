# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Takes a real dense model through conversion and back: upcycled, compared, trained further, exported.

    python -m benchmarks.reference_model --output_dir runs/reference/model
    python -m benchmarks.convert_reference --dense runs/reference/model --text runs/quickstart/data \\
        --output runs/reference

Needs the packages of `configuration/data/*.txt`, 16 GB of memory and 20 GB of disk. Existing outputs are not made
again. Stops if results that must be equal differ. Writes the results to `benchmarks/convert_reference.json`
(`--json`).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.options import check_options
from pathmoe.command import ArgumentParser, run_command
from pathmoe.files import write_text


ROOT = Path(__file__).resolve().parents[1]
TASKS = ("pathmoe_offline_piqa", "pathmoe_offline_arc_easy")
FRESH = """
import sys
sys.modules["modeling_pathmoe"] = sys.modules["pathmoe"] = None  # neither can be imported here
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="eager").eval()
with torch.no_grad():
    difference = model(torch.arange(1000, 1256).view(2, 128)).logits - torch.load(sys.argv[2])
print(type(model).__name__, difference.abs().max().item())
"""
LOGITS = """
import sys
import torch
import pathmoe
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="eager").eval()
with torch.no_grad():
    torch.save(model(torch.arange(1000, 1256).view(2, 128)).logits, sys.argv[2])
"""


def run(*command, unless: Path | None = None) -> str:
    """Runs Python with arguments in the repository, unless the result exists, and returns its output."""
    if unless is not None and unless.exists():
        return ""
    print("python", *[part if "\n" not in str(part) else "…" for part in command], flush=True)
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def log_likelihoods(model: Path, folder: Path, limit: int) -> dict[str, list[float]]:
    """Returns lm-eval's log-likelihood of every choice of every item."""
    run("eval/run_lm_eval.py", "--model", model, "--tasks", ",".join(TASKS), "--limit", limit, "--output", folder,
        "--log_samples", "--device", "cpu", unless=folder)  # fmt: skip
    items = {}
    for file in folder.rglob("samples_*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            # [[[log-likelihood, is greedy]], …], as text in some versions
            items[f"{file.stem.split('_2')[0]} {sample['doc_id']}"] = [
                float(response[0]) for response in sample["filtered_resps"]
            ]
    return items


def main(argv: list[str] | None = None) -> dict:
    """Runs all steps.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; the process's own when unset.

    Returns:
        `dict`: The measurements, as in the JSON file.

    Raises:
        RuntimeError: If results that must be equal differ, or training does not help.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--text", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--limit", type=int, default=25, help="items of each task (25)")
    parser.add_argument("--steps", type=int, default=8, help="training steps of 1024 tokens (8)")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--gguf-converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py; no GGUF when unset")
    args = parser.parse_args(argv)
    check_options(args, {"limit": 1, "steps": 1}, json='"log_likelihoods"')
    for file in (args.dense / "config.json", *(args.text / f"{split}.jsonl" for split in ("train", "validation"))):
        if not file.is_file():
            parser.error(f"{file} is missing: the module's docstring names the commands that make it.")
    args.dense, args.text, out = args.dense.resolve(), args.text.resolve(), args.output.resolve()
    moe, trained, mixtral = out / "moe", out / "run" / "final", out / "mixtral"
    result = {}

    run("-m", "pathmoe.convert", "upcycle", args.dense, moe, "--experts", 8, "--top-k", 2, unless=moe)
    result["upcycle"] = json.loads((moe / "conversion.json").read_text())["verified"]
    result["log_likelihoods"] = compare_log_likelihoods(args.dense, moe, out, args.limit)

    recipe = {
        "model": moe, "dataset": "json", "validation_split": "validation", "output_dir": out / "run",
        "data_files": {split: str(args.text / f"{split}.jsonl") for split in ("train", "validation")},
        "sequence_length": 256, "batch_size": 4, "micro_batch_size": 2, "max_steps": args.steps, "log_every": 1,
        "learning_rate": 1e-4, "warmup_steps": 2, "weight_decay": 0.0, "eval_sequences": 16,
    }  # fmt: skip
    out.joinpath("recipe.json").write_text(json.dumps(recipe, default=str))  # JSON is YAML
    perplexities = []
    for model in (moe, trained):
        if model is trained:
            run("train_accelerate.py", "--config", out / "recipe.json", unless=trained)
        file = out / f"perplexity_{model.name}.json"
        run("eval/perplexity.py", "--model", model, "--data", args.text / "validation.jsonl", "--limit", 4,
            "--max_length", 256, "--stride", 256, "--batch_size", 4, "--output", file, unless=file)  # fmt: skip
        perplexities.append(json.loads(file.read_text())["token_perplexity"])
    losses = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    result["training"] = {
        "tokens": args.steps * 1024,
        "losses": [line["loss"] for line in losses if "loss" in line],
        "held_out_perplexity": {"upcycled": perplexities[0], "trained": perplexities[1]},
    }
    print(result["training"], flush=True)
    if perplexities[1] >= perplexities[0]:
        raise RuntimeError("Held-out perplexity did not fall.")

    run("-m", "pathmoe.convert", "export", trained, mixtral, "--to", "mixtral", unless=mixtral)
    run("-c", LOGITS, trained, out / "logits.pt")
    name, difference = run("-c", FRESH, mixtral, out / "logits.pt").split()[-2:]
    result["export"] = {"class": name, "largest_logit_difference_in_a_fresh_process": float(difference)}
    print(result["export"], flush=True)
    if name != "MixtralForCausalLM" or float(difference) > 1e-4:
        raise RuntimeError("The export does not compute the same without PathMoE.")

    if args.gguf_converter:
        result["gguf"] = to_gguf(mixtral, out / "mixtral.gguf", args.gguf_converter)
    write_text(args.json, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return result


def compare_log_likelihoods(dense: Path, moe: Path, out: Path, limit: int) -> dict:
    """Compares the log-likelihoods that lm-eval computes with the dense and with the upcycled model.

    Raises:
        RuntimeError: If one differs by more than 1e-4.
    """
    dense_items, moe_items = (log_likelihoods(model, out / f"lm_eval_{model.name}", limit) for model in (dense, moe))
    if dense_items.keys() != moe_items.keys() or not dense_items:
        raise RuntimeError("lm-eval returned different items for the upcycled model than for the dense one.")
    gaps = [abs(a - b) for item in dense_items for a, b in zip(dense_items[item], moe_items[item], strict=True)]
    result = {
        "items": len(dense_items), "values": len(gaps), "largest": max(map(abs, sum(dense_items.values(), []))),
        "largest_difference": max(gaps),
    }  # fmt: skip
    print(result, flush=True)
    if max(gaps) > 1e-4:
        raise RuntimeError(f"Log-likelihoods differ by up to {max(gaps)}, more than 1e-4.")
    return result


def to_gguf(mixtral: Path, file: Path, converter: Path) -> dict:
    """Converts with llama.cpp's own script and compares an expert and a router in the file with the source's."""
    run(converter.resolve(), mixtral, "--outfile", file, "--outtype", "f32", unless=file)
    import numpy as np
    from gguf import GGUFReader

    from pathmoe.convert.checkpoint import Checkpoint

    source, written = Checkpoint(mixtral), {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    prefix = "model.layers.5.block_sparse_moe"
    same = np.array_equal(written["blk.5.ffn_gate_inp.weight"], source.read(f"{prefix}.gate.weight").numpy())
    same &= np.array_equal(
        written["blk.5.ffn_down_exps.weight"][3], source.read(f"{prefix}.experts.3.w2.weight").numpy()
    )
    if not same:
        raise RuntimeError("The GGUF file holds different weights than the exported model.")
    return {"tensors": len(written), "bytes": file.stat().st_size, "router_and_expert_equal": bool(same)}


if __name__ == "__main__":
    run_command(main)
