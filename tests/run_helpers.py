# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Starts training runs as a user would, and reads what they left."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[1]


def launch(args, *launcher, script=(str(ROOT / "train_accelerate.py"),)):
    """Starts the script as a user would."""
    return subprocess.Popen(
        [sys.executable, *launcher, *script, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


HELD = """
import signal, sys, time
from pathmoe.train.log import Log
from pathmoe.train.main import main

step, write = int(sys.argv[1]), Log.write

def write_and_wait(log, line, **values):
    write(log, line, **values)
    stop = signal.getsignal(signal.SIGTERM).__self__
    while values["step"] == step and log.accelerator.is_main_process and not stop.signalled:
        time.sleep(0.01)

Log.write = write_and_wait
sys.exit(main(sys.argv[2:]))
"""


def held_at(step, folder):
    """A script for `launch` that stays at the end of a step until the run is asked to stop, however late that is."""
    (folder / "held.py").write_text(HELD)
    return [str(folder / "held.py"), str(step)]


def wait_for_step(process, folder, step):
    """Waits until a run has written the metrics of a step."""
    while not (Path(folder) / "metrics.jsonl").exists() or step not in metrics(folder):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def start_with_accelerate(args, engine, port, **options):
    """Starts two processes through one of the shipped Accelerate files."""
    file = ROOT / "configuration" / "accelerate" / f"{engine}.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", port]
    return launch(args, *launcher, **options)


def accelerate_launch(args, engine, port, **options):
    """Runs two processes to their end and returns what they printed."""
    process = start_with_accelerate(args, engine, port, **options)
    output, _ = process.communicate(timeout=600)  # minutes for a busy machine; a run that hangs has to end
    assert process.returncode == 0, output
    return output


def metrics(folder, *, key="loss"):
    # What comes after the last line break is a line that a run is still writing.
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().split("\n")[:-1]]
    return {line["step"]: line[key] for line in lines if key in line}


def weights(folder):
    return load_file(Path(folder) / "final" / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    torch.testing.assert_close(weights(a), weights(b), **tolerance)
