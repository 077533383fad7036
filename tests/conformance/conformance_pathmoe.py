# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""PathMoE in transformers' own common model tests. `run.py` puts their package, `tests`, on the path and runs this."""

import json
import os
import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from tests.test_fsdp_mixin import FSDPTesterMixin
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers.models.auto import modeling_auto

from pathmoe import (
    PathMoEConfig,
    PathMoEForCausalLM,
    PathMoEForQuestionAnswering,
    PathMoEForSequenceClassification,
    PathMoEForTokenClassification,
    PathMoEModel,
)
from tests import test_expert_parallel_mixin, test_fsdp_mixin, test_tensor_parallel_mixin


TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    # Of eight, the second and third choice of one token come within 1e-6 in an FSDP run that compares two engines to
    # 1e-5, and rounding decides between them.
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "router_block_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY.update(json.loads(os.environ.get("PATHMOE_CONFORMANCE_CONFIG", "{}")))

EXCLUDED = {}
if hasattr(ModelTesterMixin, "test_bc_cache_name_forward"):  # from transformers 5.24 on
    reason = "wants a warning that past_key_values is deprecated, but both names stay (test_doors.py tries them)"
    EXCLUDED["test_bc_cache_name_forward"] = reason
if TINY.get("router_type") == "random":
    EXCLUDED["test_init_weights_can_init_buffers"] = "wants equal buffers in two models; these are random draws"
if TINY.get("router_sharing") == "decision":
    reason = "the model refuses reentrant checkpointing, which would give routers of a shared decision wrong gradients"
    EXCLUDED["test_training_gradient_checkpointing_use_reentrant_true"] = reason

# The distributed mixins run for the model types in these lists alone; `None` means for all.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None

# The mixins look up in these tables, by class name, which labels a head needs. Without an entry they leave it out.
modeling_auto.MODEL_MAPPING_NAMES["pathmoe"] = "PathMoEModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["pathmoe"] = "PathMoEForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["pathmoe"] = "PathMoEForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["pathmoe"] = "PathMoEForTokenClassification"
modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["pathmoe"] = "PathMoEForQuestionAnswering"


class PathMoEModelTester:
    config_class = PathMoEConfig
    base_model_class = PathMoEModel
    causal_lm_class = PathMoEForCausalLM
    sequence_classification_class = PathMoEForSequenceClassification
    token_classification_class = PathMoEForTokenClassification
    question_answering_class = PathMoEForQuestionAnswering

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, parent):
        self.parent = parent
        for name, value in TINY.items():
            setattr(self, name, value)

    def get_config(self):
        return PathMoEConfig(**TINY)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Rows of every length, padded on the right.
        attention_mask = torch.ones_like(input_ids).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class PathMoEModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    FSDPTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (
        PathMoEModel,
        PathMoEForCausalLM,
        PathMoEForSequenceClassification,
        PathMoEForTokenClassification,
        PathMoEForQuestionAnswering,
    )
    model_tester = None
    _torch_compile_train_cls = PathMoEForCausalLM

    def setUp(self):
        self.model_tester = PathMoEModelTester(self)
        self.config_tester = ConfigTester(self, config_class=PathMoEConfig)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _skip_if_insufficient_devices(self, world_size):
        """Never: gloo ranks share cores."""


# Which tests a `--part` of run.py selects: those of its mixins. All others are the common ones.
PARTS = {
    "training": TrainingTesterMixin,
    "fsdp": FSDPTesterMixin,
    "tp": TensorParallelTesterMixin,
    "ep": ExpertParallelTesterMixin,
}


def part_of(test_name: str) -> str:
    """The part to which the test method belongs."""
    return next((part for part, mixin in PARTS.items() if test_name in vars(mixin)), "common")
