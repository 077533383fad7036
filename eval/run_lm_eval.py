# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the command `pathmoe eval` as a script for `accelerate launch`; see pathmoe/evaluate/run_lm_eval.py."""

from pathmoe.command import run_command
from pathmoe.evaluate.run_lm_eval import main


if __name__ == "__main__":
    run_command(main)
