# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""A door to pathmoe/evaluate/path_report.py: `--help` says what it does."""

from pathmoe.command import run_command
from pathmoe.evaluate.path_report import main


if __name__ == "__main__":
    run_command(main)
