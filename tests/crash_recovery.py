# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares the end with an
uninterrupted run, bit by bit.

    python tests/crash_recovery.py --kills 20            # one process, then two (DDP), then two (FSDP2)

Half of the kills fall between steps or in one, half inside the writing of a checkpoint.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]
TIMINGS = {"tokens_per_s", "mfu", "data_share", "log_share", "routing_share", "peak_memory"}
ENGINES = {"one process": None, "two processes, DDP": "ddp", "two processes, FSDP2": "fsdp"}


def start(args: list[str], engine: str | None = None, port: int = 29600) -> subprocess.Popen:
    launcher = []
    if engine is not None:
        file = ROOT / "configuration" / "accelerate" / f"{engine}.yaml"
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", str(port)]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_accelerate.py"), *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_with_kills(args: list[str], run: Path, kills: int, seed: int, engine: str | None = None) -> list[dict]:
    """Trains to the end in spite of `kills` kills and returns what each of them hit."""
    rng, hits = random.Random(seed), []
    while True:
        process = start([*args, "--resume", "auto"], engine, 29600 + len(hits))
        if len(hits) < kills:
            hit = wait_for_a_moment(process, run, rng)
            if hit is not None:
                kill_all(process)
                unfinished = [path.name for path in (run / "checkpoints").glob("*.partial")]
                hits.append(hit | {"unfinished checkpoint": unfinished[0] if unfinished else None})
                continue
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(output.decode())
        return hits


def kill_all(process: subprocess.Popen):
    """Kills a run, whose launcher keeps its processes in sessions of their own."""
    for member in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.communicate()


def wait_for_a_moment(process: subprocess.Popen, run: Path, rng: random.Random) -> dict | None:
    """Waits until the run has gone some random way; `None` if it ended before."""
    moment, amount, delay = rng.choice(("step", "save")), rng.randint(1, 3), rng.uniform(0, 0.02)
    before = lines(run)
    seen = set()
    while process.poll() is None:
        if moment == "step" and lines(run) >= before + 5 * amount:
            time.sleep(delay)
            return {"during": "step", "after lines of metrics": lines(run)}
        seen |= {path.name for path in (run / "checkpoints").glob("step-*.partial")}
        if moment == "save" and len(seen) >= amount:
            time.sleep(delay)
            return {"during": "save", "after lines of metrics": lines(run)}
        time.sleep(0.0005)
    return None


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def fingerprint(run: Path) -> dict[str, str]:
    """Hashes of all that a run has made: final weights, and weights, optimizer, schedule, place in the data and random
    state of its last checkpoint, and its metrics, timings aside."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name not in TIMINGS} for line in metrics]
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    return {
        "final weights": hash_tensors([run / "final" / "model.safetensors"]),
        "weights and optimizer": hash_tensors(sorted(checkpoint.glob("*.safetensors"))),
        "schedule and counters": hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest(),
        "data order and random state": hashlib.sha256(
            b"".join(file.read_bytes() for file in sorted(checkpoint.glob("rank-*.json")))
        ).hexdigest(),
        "metrics": hashlib.sha256(json.dumps(metrics).encode()).hexdigest(),
    }


def hash_tensors(files: list[Path]) -> str:
    """A hash of all tensors by name; their order in the files is no part of it."""
    found = {}
    for number, file in enumerate(files):
        for name, tensor in load_file(file).items():
            found[name, number if len(files) > 1 else 0] = tensor.numpy().tobytes()
    return hashlib.sha256(b"".join(str(name).encode() + found[name] for name in sorted(found))).hexdigest()


def write_recipe(folder: Path, **fields) -> list[str]:
    """A recipe for a tiny model with dropout and a selection bias on streamed text, so that all there is to restore is
    at work."""
    model = {
        "model_type": "pathmoe", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64, "router_block_size": 2,
        "attention_dropout": 0.1, "router_bias_update_rate": 0.001,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model))
    texts = [f"{i} plus {j} is {i + j}; " * 6 for i in range(20) for j in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "model": str(folder / "model.json"), "dataset": str(folder / "text.jsonl"), "streaming": True,
        "sequence_length": 64, "batch_size": 8, "micro_batch_size": 4, "max_steps": 300, "learning_rate": 3e-3,
        "log_every": 1, "routing_every": 10, "checkpoint_every": 4, "keep_every": 40, "eval_every": 40,
        "eval_sequences": 8, "shuffle_window": 50,
    } | fields  # fmt: skip
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe))
    return ["--config", str(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=[str(engine) for engine in ENGINES.values()], action="append")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    args, equal = write_recipe(folder), True
    for name, engine in ENGINES.items():
        if options.engine and str(engine) not in options.engine:
            continue
        whole, killed = folder / f"whole-{engine}", folder / f"killed-{engine}"
        run_with_kills([*args, "--output_dir", str(whole)], whole, 0, options.seed, engine)
        hits = run_with_kills([*args, "--output_dir", str(killed)], killed, options.kills, options.seed, engine)
        print(f"{name}: {len(hits)} kills")
        for number, hit in enumerate(hits, start=1):
            print(f"  {number:2}: " + ", ".join(f"{key} {value}" for key, value in hit.items()))
        equal &= len(hits) == options.kills and any(hit["unfinished checkpoint"] for hit in hits)
        expected, found = fingerprint(whole), fingerprint(killed)
        for key, value in expected.items():
            same = found[key] == value
            equal &= same
            print(f"  {key}: {value[:16]} {'=' if same else '!='} {found[key][:16]}")
    shutil.rmtree(folder)
    print("bit-identical" if equal else "NOT identical")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
