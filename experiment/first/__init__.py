# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""An earlier, smaller comparison of the paper's routers: its settings, programs and results."""
