# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Muon: its update beside torch's, which parameters it trains, and runs that resume or use several processes."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import pathmoe.train.muon
from pathmoe.train.main import main
from pathmoe.train.model import build_config
from pathmoe.train.muon import Muon, orthogonalize
from pathmoe.train.optimizer import build_optimizer
from pathmoe.train.recipe import RecipeError, parse_recipe
from tests.run_helpers import accelerate_launch, assert_same_weights, metrics, weights


MUON = {"optimizer": "muon", "learning_rate": 3e-3}


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (3, 8, 12), (3, 12, 8), (1, 4, 4)], ids=str)
def test_steps_are_those_of_torch_on_every_matrix(shape, monkeypatch):
    # torch computes in bfloat16 on all devices.
    monkeypatch.setattr(
        pathmoe.train.muon, "orthogonalize", lambda matrices: orthogonalize(matrices, dtype=torch.bfloat16)
    )
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in ours.detach().reshape(-1, *shape[-2:])]
    optimizer = Muon([{"params": [ours], "muon": True}], momentum=0.9, lr=0.02, weight_decay=0.3)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw", ns_steps=5
    )
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        for parameter, gradient in zip(theirs, ours.grad.reshape(-1, *shape[-2:])):
            parameter.grad = gradient.clone()
        optimizer.step()
        reference.step()
    # A bfloat16 has a relative step of 2**-8, and batched products may be summed in another order.
    step = 0.02 * 0.2 * max(shape[-2:]) ** 0.5
    torch.testing.assert_close(ours.reshape(-1, *shape[-2:]), torch.stack(list(theirs)), rtol=0, atol=4 * step * 2**-6)


def test_parameters_of_other_groups_take_the_steps_of_adamw():
    first, second = (torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)) for _ in range(2))
    matrix = torch.nn.Parameter(torch.eye(3, 4))
    kwargs = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-9, "weight_decay": 0.1}
    ours = Muon([{"params": [first]}, {"params": [matrix], "muon": True}], **kwargs)
    reference = torch.optim.AdamW([second], **kwargs)
    for number in range(3):
        first.grad = second.grad = torch.cos(torch.arange(12.0) + number).reshape(3, 4)
        ours.step()
        reference.step()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(matrix, torch.eye(3, 4), rtol=0, atol=0)  # it has no gradient


@pytest.mark.parametrize("shape", [(16, 16), (4, 32), (5, 24, 8)], ids=str)
def test_singular_values_become_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def test_only_matrices_of_attention_and_experts_are_trained_by_muon(recipe, tmp_path):
    overrides = {"tie_word_embeddings": False, "mlp_only_layers": [0], "intermediate_size": 16}
    parsed = parse_recipe(recipe(tmp_path / "run", **MUON, model_overrides=overrides))
    model = AutoModelForCausalLM.from_config(build_config(parsed))
    optimizer, _ = build_optimizer(parsed, model)
    chosen = {id(p): group["muon"] for group in optimizer.param_groups for p in group["params"]}
    found = {name for name, parameter in model.named_parameters() if chosen[id(parameter)]}
    expected = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj")
    names = dict(model.named_parameters())
    assert found == {name for name in names if name.removesuffix(".weight").endswith(expected)}
    assert "model.layers.0.mlp.down_proj.weight" in found
    assert len(chosen) == len(list(model.parameters()))


def test_a_resumed_run_is_the_same(recipe, tmp_path):
    fields = {**MUON, "max_steps": 8, "checkpoint_every": 4, "keep_last": 9}
    assert main(recipe(tmp_path / "whole", **fields)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "final")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000008")
    assert main([*recipe(tmp_path / "resumed", **fields), "--resume", "auto"]) == 0
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_the_model_of_one(recipe, tmp_path, free_port, engine):
    fields = {**MUON, "max_steps": 5, "batch_size": 8, "micro_batch_size": 4}
    assert main(recipe(tmp_path / "one", **fields)) == 0
    accelerate_launch(recipe(tmp_path / "two", **fields), engine, free_port)
    # Orthogonalization amplifies small singular values, and with them the rounding of sums in another order.
    for step, loss in metrics(tmp_path / "one").items():
        assert metrics(tmp_path / "two")[step] == pytest.approx(loss, rel=1e-4), step
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0, atol=2e-3, msg=name)


def test_expert_parallelism_is_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match="optimizer='muon' does not support ep_size=2: set ep_size=1"):
        parse_recipe(recipe(tmp_path / "run", **MUON, ep_size=2))
