# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Text: one reader for everybody, packing, batches, n-grams, and what makes the small corpora."""
