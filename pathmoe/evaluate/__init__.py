# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Evaluates models: lm-eval's tasks, perplexity, comparison item by item, contamination, reports."""
