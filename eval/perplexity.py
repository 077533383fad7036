# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the command `pathmoe perplexity` as a script; see pathmoe/evaluate/perplexity.py."""

from pathmoe.command import run_command
from pathmoe.evaluate.perplexity import main


if __name__ == "__main__":
    run_command(main)
