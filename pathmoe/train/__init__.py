# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What train_accelerate.py is made of."""
