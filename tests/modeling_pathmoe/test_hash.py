# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The router that sees token ids, and not hidden states."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pathmoe import PathMoEConfig, PathMoEForCausalLM, record_paths
from pathmoe.accounting import forward_flops_per_token
from pathmoe.command import UserError
from pathmoe.convert.exporting import export_checkpoint
from pathmoe.convert.merging import average_checkpoints


PRIME = 2**31 - 1


@pytest.fixture
def model(tiny_model):
    return tiny_model(router_type="hash")


def test_experts_and_weights_equal_integers_computed_one_by_one(model, tokens):
    ids = tokens(2, 7)
    with record_paths(model, weights=True) as trace:
        model(ids)
    for token, experts in zip(ids.flatten().tolist(), trace.experts.tolist()):
        for layer, chosen in enumerate(experts):
            factors, offsets = model.model.routers[str(layer // 2)].coefficients.tolist()
            scores = [(a * token + b) % PRIME for a, b in zip(factors, offsets)]
            assert chosen == sorted(range(8), key=lambda expert: -scores[expert])[:2]
    assert torch.equal(trace.weights, torch.full_like(trace.weights, 0.5))


def test_the_path_follows_from_the_token_alone_with_padding_and_with_a_cache(model, tokens):
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], dim=1)
    mask = (torch.arange(8) >= 2).long()[None]
    with record_paths(model) as plain:
        expected = model(ids).logits
    with record_paths(model) as shifted:
        actual = model(padded, attention_mask=mask, position_ids=(torch.arange(8) - 2).clamp(min=0)[None]).logits
    torch.testing.assert_close(actual[:, 2:], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(shifted.experts, plain.experts)
    with record_paths(model) as generated:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    with record_paths(model) as again:
        model(generated.token_ids.long()[None])
    assert torch.equal(generated.experts, again.experts) and len(generated) == 9


def test_a_reloaded_and_a_half_precision_model_route_alike(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    traces = []
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        with record_paths(loaded) as trace:
            loaded(tokens())
        traces.append(trace.experts)
    assert torch.equal(*traces)


def test_the_vocabulary_may_be_resized(model, tmp_path):
    model.resize_token_embeddings(120)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 119]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_tokens_are_spread_over_the_experts(tiny_config):
    torch.manual_seed(0)
    router = PathMoEForCausalLM(tiny_config(router_type="hash", router_block_size=5)).model.routers["0"]
    _, _, indices, _ = router(torch.zeros(20_000, 32), 0, None, torch.arange(20_000))
    load = indices.flatten().bincount(minlength=8) / 20_000
    assert load.min() > 0.15 and load.max() < 0.35  # 0.25 if they were spread evenly


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_all_parameters_but_no_router(tiny_config, tokens, checkpointing):
    torch.manual_seed(0)
    model = PathMoEForCausalLM(tiny_config(router_type="hash")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(tokens(4, 32), labels=tokens(4, 32)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not list(model.model.routers.parameters())


def test_embeddings_without_tokens_are_refused(model, tokens):
    embeddings = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match="router_type='hash' routes by token ids: pass input_ids, not inputs_embeds"):
        model(inputs_embeds=embeddings)


def test_an_average_needs_equal_hashes(tiny_model, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    models = [tiny_model(seed, router_type="hash") for seed in (0, 1, 2)]
    models[1].model.routers.load_state_dict(models[0].model.routers.state_dict())
    for model, folder in zip(models, folders):
        model.save_pretrained(folder)
    average_checkpoints(folders[:2], tmp_path / "average")
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "average").state_dict()
    for name, value in models[0].state_dict().items():
        expected = value if "routers" in name else (value + models[1].state_dict()[name]) / 2
        torch.testing.assert_close(average[name], expected)
    with pytest.raises(UserError, match="c has other values of model.routers.0.coefficients than"):
        average_checkpoints([folders[0], folders[2]], tmp_path / "other")


def test_no_served_architecture_and_no_pipeline_is_offered(model, tmp_path):
    assert PathMoEConfig(router_type="hash").base_model_pp_plan is None
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="router_type='hash' cannot be exported"):
        export_checkpoint(tmp_path / "model", tmp_path / "exported")


def test_the_router_costs_no_floating_point_products(tiny_config):
    fields = {"router_block_size": 1}
    hashed, linear = (
        forward_flops_per_token(tiny_config(router_type=kind, **fields), 16) for kind in ("hash", "linear")
    )
    assert linear - hashed == 2 * 5 * 8 * 32
