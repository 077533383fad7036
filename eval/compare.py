# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the command `pathmoe compare` as a script; see pathmoe/evaluate/compare.py."""

from pathmoe.command import run_command
from pathmoe.evaluate.compare import main


if __name__ == "__main__":
    run_command(main)
