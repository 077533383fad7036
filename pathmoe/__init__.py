# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PathMoE for transformers. Importing this package registers the model and the fast experts with transformers."""

import sys
from pathlib import Path


__version__ = "0.1.0"


def _is_command() -> bool:
    """Returns whether Python was started as `pathmoe …` or `python -m pathmoe …`."""
    if sys.argv[:1] == ["-m"]:
        return next((argument for argument in sys.orig_argv[1:] if not argument.startswith("-")), None) == "pathmoe"
    return bool(sys.argv) and Path(sys.argv[0]).stem == "pathmoe"


# The command handles `--help` and Ctrl-C before torch is loaded, and imports the modules that it needs itself.
if not _is_command():
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
    from .train.callback import PathMoECallback


__all__ = [
    "PathMoECallback",
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
