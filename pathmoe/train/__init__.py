# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""From a recipe to a trained model: recipe → engine → data → model → loop → Hub-ready folder."""
