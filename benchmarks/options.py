# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Checks of the options that the benchmarks share."""

import argparse
import math
from pathlib import Path

from pathmoe.command import UserError
from pathmoe.files import check_writable, read_json
from pathmoe.loading import check_device


def check_options(options: argparse.Namespace, least: dict[str, int] | None = None, **outputs: str):
    """Refuses what would stop a benchmark after its measurements, or replace a file that is not an earlier result.

    Args:
        options (`argparse.Namespace`): The options.
        least (`dict[str, int]`, *optional*): The smallest value of each option that is a number.
        **outputs (`str`): For each option that names a file to write, a text that every such file holds.

    Raises:
        UserError: With the option and its value.
    """
    for name, smallest in (least or {}).items():
        value = getattr(options, name)
        if value is not None and not smallest <= value < math.inf:
            raise UserError(f"--{name} {value} must be at least {smallest}.")
    for name, mark in outputs.items():
        if getattr(options, name) is not None:
            check_writable(getattr(options, name), f"--{name}", mark)
    if "device" in options:
        check_device(options.device)


def read_report(file: Path, field: str) -> dict:
    """Reads the figures of an earlier run.

    Raises:
        UserError: If the file cannot be read, or lacks the list `field`.
    """
    report = read_json(file, "--table")
    if not isinstance(report.get(field), list):
        raise UserError(f"--table {file} has no list {field!r}: name a file that this benchmark wrote.")
    return report
