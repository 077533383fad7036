# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs pathmoe/evaluate/report.py; `--help` describes it."""

from pathmoe.command import run_command
from pathmoe.evaluate.report import main


if __name__ == "__main__":
    run_command(main)
