# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains a model from a recipe: recipe → engine → data → model → loop → Hub-ready folder."""
