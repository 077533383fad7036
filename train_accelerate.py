# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains a PathMoE from a YAML recipe.

    python train_accelerate.py --config configuration/train/quickstart.yaml --output_dir runs/quickstart
    python train_accelerate.py plot RUN [RUN …]
    python train_accelerate.py plan --config configuration/train/paper-16b.yaml
    accelerate launch --config_file configuration/accelerate/ddp.yaml train_accelerate.py --config … --output_dir …

Any field of the recipe can be given on the command line: `--learning_rate 1e-3 --model_overrides '{num_experts: 8}'`.
The run writes the model to OUTPUT_DIR/final, ready for the Hub, and metrics to OUTPUT_DIR/metrics.jsonl. `--resume
auto` continues an interrupted run from its newest checkpoint, with the same result as if it had not been interrupted.
"""

import os
import signal


# Set before torch is imported, which reads it. Threads that spin while they wait slow a busy machine down.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(75))  # the imports below take seconds

from pathmoe.command import run_command
from pathmoe.train.main import INTERRUPTED, command


if __name__ == "__main__":
    run_command(command, interrupted=INTERRUPTED)
