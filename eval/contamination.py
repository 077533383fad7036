# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs pathmoe/evaluate/contamination.py; `--help` describes it."""

from pathmoe.command import run_command
from pathmoe.evaluate.contamination import main


if __name__ == "__main__":
    run_command(main)
