# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The PathMoE model for transformers. Importing this package registers it with the Auto classes.

Checkpoints carry the files named `*_pathmoe.py`. The toolkit around the model is the package `pathmoe`, which this
package never imports: add-ons such as the fast experts plug in through the entry point group `modeling_pathmoe`.
"""

from importlib.metadata import entry_points

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_pathmoe import PathMoEConfig
from .modeling_pathmoe import (
    PathMoEForCausalLM,
    PathMoEForQuestionAnswering,
    PathMoEForSequenceClassification,
    PathMoEForTokenClassification,
    PathMoEModel,
    PathMoEPreTrainedModel,
)
from .routing_pathmoe import PathMoERouter, load_balancing_loss, register_router, router_z_loss, update_selection_bias


def register():
    """Registers PathMoE with transformers' Auto classes; runs on import, and as vLLM's plug-in entry point."""
    AutoConfig.register("pathmoe", PathMoEConfig, exist_ok=True)
    PathMoEConfig.register_for_auto_class()
    for auto_class, model_class in (
        (AutoModel, PathMoEModel),
        (AutoModelForCausalLM, PathMoEForCausalLM),
        (AutoModelForSequenceClassification, PathMoEForSequenceClassification),
        (AutoModelForTokenClassification, PathMoEForTokenClassification),
        (AutoModelForQuestionAnswering, PathMoEForQuestionAnswering),
    ):
        auto_class.register(PathMoEConfig, model_class, exist_ok=True)
        # Saved checkpoints carry the code, so that they also load without this package.
        model_class.register_for_auto_class(auto_class.__name__)


register()
for _plugin in entry_points(group="modeling_pathmoe"):
    _plugin.load()


__all__ = [
    "PathMoEConfig",
    "PathMoEForCausalLM",
    "PathMoEForQuestionAnswering",
    "PathMoEForSequenceClassification",
    "PathMoEForTokenClassification",
    "PathMoEModel",
    "PathMoEPreTrainedModel",
    "PathMoERouter",
    "load_balancing_loss",
    "register",
    "register_router",
    "router_z_loss",
    "update_selection_bias",
]
