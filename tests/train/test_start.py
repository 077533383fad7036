# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The start without a collapse: what it sets, what it refuses, and that runs with it are like any other."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pathmoe.train.start
from pathmoe.convert import export_checkpoint
from pathmoe.train.main import main
from pathmoe.train.model import build_config
from pathmoe.train.optimizer import build_optimizer
from pathmoe.train.recipe import RecipeError, parse_recipe
from pathmoe.train.start import apply_start
from tests.run_helpers import accelerate_launch, assert_same_weights, metrics, weights


START = {"unigram_start": True, "zero_init_projections": True, "document_mask": False}
UNTIED = {"tie_word_embeddings": False}


@pytest.fixture
def started(recipe, tmp_path):
    """A function that builds a new model with the start, from made-up frequencies."""

    def make(frequencies=None, **overrides):
        parsed = parse_recipe(recipe(tmp_path / "run", **START, model_overrides=UNTIED | overrides))
        config = build_config(parsed)
        torch.manual_seed(parsed.seed)
        model = AutoModelForCausalLM.from_config(config)
        apply_start(parsed, model, np.full(300, 1 / 300) if frequencies is None else frequencies)
        return parsed, model

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_first_loss_is_the_entropy_of_the_unigrams_of_the_text(recipe, tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(pathmoe.train.start, "SAMPLED_TOKENS", 20_000)
    seen = []
    monkeypatch.setattr("pathmoe.train.model.apply_start", lambda *args: (seen.append(args[2]), apply_start(*args)))
    overrides = UNTIED | {"hidden_size": 256, "num_attention_heads": 4}  # wide enough for a steady norm
    fields = START | {"streaming": streaming, "model_overrides": overrides, "learning_rate": 1e-9}
    main(recipe(tmp_path / "run", **fields, max_steps=1, eval_sequences=100))
    (frequencies,) = seen
    assert frequencies.sum() == pytest.approx(1) and frequencies.min() > 0
    entropy = -(frequencies * np.log(frequencies)).sum()
    assert entropy < 0.9 * np.log(300)
    assert metrics(tmp_path / "run", key="eval_loss")[1] == pytest.approx(entropy, abs=0.15)


def test_scale_of_the_embeddings_leaves_the_first_logits_alone(started):
    frequencies = np.random.default_rng(0).dirichlet(np.ones(300))
    tokens = torch.arange(8)[None]
    _, plain = started(frequencies)
    _, scaled = started(frequencies, embedding_initializer_range=4.0)
    torch.testing.assert_close(scaled.get_input_embeddings().weight, 4 * plain.get_input_embeddings().weight)
    torch.testing.assert_close(scaled(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"mlp_only_layers": [0], "intermediate_size": 16}], ids=str)
def test_projections_are_zero_and_layers_leave_the_embeddings_alone(started, fields):
    _, model = started(**fields)
    tokens = torch.arange(8)[None]
    hidden = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[-2], model.get_input_embeddings()(tokens))


def test_rows_of_one_seed_share_all_weights_but_the_routers(started):
    _, plain = started(router_type="linear", router_block_size=1)
    for other in ({"router_block_size": 2}, {"router_type": "random"}, {"router_bias_update_rate": 0.1}):
        _, model = started(**other)
        own = dict(model.named_parameters())
        for name, parameter in plain.named_parameters():
            assert "routers." in name or torch.equal(parameter, own[name]), name


def test_embeddings_and_head_do_not_decay(started):
    parsed, model = started()
    optimizer, _ = build_optimizer(parsed, model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decays[id(p)] > 0 for name, p in model.named_parameters()}
    assert not found["model.embed_tokens.weight"] and not found["lm_head.weight"]
    assert found["model.layers.0.self_attn.q_proj.weight"]
    parsed.unigram_start = False
    optimizer, _ = build_optimizer(parsed, model)
    assert any(p is model.lm_head.weight for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unigram_start": True, "model_overrides": {"tie_word_embeddings": True}}, "unigram_start=true needs a head"),
        ({"unigram_start": True, "model": "CHECKPOINT"}, "unigram_start=true initialises a new model, but model="),
        ({"zero_init_projections": True, "model": "CHECKPOINT"}, "zero_init_projections=true initialises a new model"),
    ],
)
def test_start_that_the_model_cannot_have_is_refused_before_anything_is_written(
    recipe, tmp_path, started, fields, message
):
    if "model" in fields:
        started()[1].save_pretrained(tmp_path / "checkpoint")
        fields = fields | {"model": str(tmp_path / "checkpoint")}
    with pytest.raises(RecipeError, match=message):
        main(recipe(tmp_path / "refused", **fields))
    assert not (tmp_path / "refused").exists()


def test_resumed_run_ends_with_the_same_bits(recipe, tmp_path):
    fields = START | {"model_overrides": UNTIED, "checkpoint_every": 3}
    main(recipe(tmp_path / "whole", **fields))
    main(recipe(tmp_path / "cut", **fields))
    for folder in ("final", "checkpoints/step-00000006"):
        shutil.rmtree(tmp_path / "cut" / folder)
    main([*recipe(tmp_path / "cut", **fields), "--resume", "auto"])
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", rtol=0, atol=0)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_start_and_train_like_one(recipe, tmp_path, free_port, engine):
    fields = START | {"model_overrides": UNTIED, "micro_batch_size": 4}
    assert main(recipe(tmp_path / "single", **fields)) == 0
    accelerate_launch(recipe(tmp_path / "two", **fields, engine=engine), engine, free_port)
    assert metrics(tmp_path / "two") == pytest.approx(metrics(tmp_path / "single"), abs=1e-5)
    for name, tensor in weights(tmp_path / "single").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0.05, atol=5e-3)


def test_trained_model_exports_to_qwen3_moe_exactly(recipe, tmp_path):
    main(recipe(tmp_path / "run", **START, model_overrides=UNTIED))
    export_checkpoint(tmp_path / "run" / "final", tmp_path / "qwen", "qwen3_moe")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", experts_implementation="eager")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen", experts_implementation="eager")
    assert theirs.config.model_type == "qwen3_moe"
    routed = {name: tensor for name, tensor in theirs.state_dict().items() if "gate.weight" not in name}
    for name, tensor in ours.state_dict().items():
        assert "routers." in name or torch.equal(tensor, routed[name]), name
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens).logits, rtol=1e-5, atol=1e-5)
