# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reads and packs text, draws batches, hashes n-grams, and writes small corpora."""
