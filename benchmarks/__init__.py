# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Compares PathMoE with its peers. Run from the root of the repository, as `python -m benchmarks.NAME`."""
