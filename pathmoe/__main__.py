# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the command `pathmoe` as `python -m pathmoe`."""

from .cli import main


if __name__ == "__main__":
    main()
