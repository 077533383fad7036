# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PathMoE for transformers. Importing this package registers the model with the Auto classes, and the fast experts."""

from modeling_pathmoe import (
    PathMoEConfig,
    PathMoEForCausalLM,
    PathMoEForQuestionAnswering,
    PathMoEForSequenceClassification,
    PathMoEForTokenClassification,
    PathMoEModel,
    PathMoEPreTrainedModel,
    PathMoERouter,
    load_balancing_loss,
    register,
    register_router,
    router_z_loss,
    update_selection_bias,
)

from . import experts
from .paths import PathTrace, record_paths, replay_paths


__all__ = [
    "PathMoEConfig",
    "PathMoEForCausalLM",
    "PathMoEForQuestionAnswering",
    "PathMoEForSequenceClassification",
    "PathMoEForTokenClassification",
    "PathMoEModel",
    "PathMoEPreTrainedModel",
    "PathMoERouter",
    "PathTrace",
    "experts",
    "load_balancing_loss",
    "record_paths",
    "register",
    "register_router",
    "replay_paths",
    "router_z_loss",
    "update_selection_bias",
]
