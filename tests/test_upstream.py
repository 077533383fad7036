# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The modular file for transformers is the model of this package: same tensors, logits, gradients and generation."""

import pytest
import torch
import transformers
from packaging.version import Version

from pathmoe import PathMoEForCausalLM


if Version(transformers.__version__) < Version("5.24"):
    pytest.skip("a modular file is written for one version of transformers, here 5.24", allow_module_level=True)

from examples.upstream.modular_pathmoe import PathmoeConfig, PathmoeForCausalLM  # noqa: E402


SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob", "max_position_embeddings",
    "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "attention_bias", "router_block_size",
)  # fmt: skip


@pytest.fixture(params=[2, [1, 3, 1], 5], ids=["blocks-of-2", "blocks-1-3-1", "one-block"])
def pair(tiny_config, request):
    """A model of this package, and the upstream model with its weights; loading is strict."""
    torch.manual_seed(0)
    model = PathMoEForCausalLM(tiny_config(router_block_size=request.param, initializer_range=0.2)).eval()
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    upstream = PathmoeForCausalLM(PathmoeConfig(**fields)).eval()
    upstream.load_state_dict(model.state_dict())
    return model, upstream


def test_logits_loss_and_gradients_are_those_of_our_model(pair):
    ids = torch.randint(0, 99, (2, 17))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    ours, theirs = (model(ids, attention_mask=mask, labels=ids, output_router_logits=True) for model in pair)
    torch.testing.assert_close(ours.logits[mask > 0], theirs.logits[mask > 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    assert len(theirs.router_logits) == 5
    for output in (ours, theirs):
        output.loss.backward()
    expected = {name: parameter.grad for name, parameter in pair[0].named_parameters()}
    for name, parameter in pair[1].named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-4)


def test_generation_with_a_cache_chooses_the_same_tokens(pair):
    ids = torch.randint(0, 99, (2, 6))
    ours, theirs = (model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0) for model in pair)
    assert ours.tolist() == theirs.tolist()


def test_blocks_that_do_not_cover_the_layers_are_refused():
    with pytest.raises(Exception, match="must sum to num_hidden_layers=5"):
        PathmoeConfig(num_hidden_layers=5, router_block_size=[2, 2])
