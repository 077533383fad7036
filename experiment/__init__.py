# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The replication of the paper: plan, runs, statistics and report; see plan.md."""
