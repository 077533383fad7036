# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reads, packs and batches text, computes n-grams, and writes the small corpora."""
