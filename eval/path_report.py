# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the command `pathmoe paths` as a script; see pathmoe/evaluate/path_report.py."""

from pathmoe.command import run_command
from pathmoe.evaluate.path_report import main


if __name__ == "__main__":
    run_command(main)
