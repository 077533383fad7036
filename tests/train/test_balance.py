# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from pathmoe import PathMoEForCausalLM, load_balancing_loss
from pathmoe.train.main import main
from pathmoe.train.recipe import RecipeError
from tests.run_helpers import accelerate_launch, metrics, weights


FIELDS = {
    "max_steps": 6, "batch_size": 8, "learning_rate": 3e-3,
    "model_overrides": {"router_aux_loss_coef": 0.5},
}  # fmt: skip
GLOBAL = FIELDS | {"balance_over": "global_batch"}


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """One process that computes the loss of the whole batch in one forward."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(recipe(folder, **FIELDS, micro_batch_size=8)) == 0
    return folder


def assert_same(run, other):
    for key in ("loss", "grad_norm"):
        assert list(metrics(run, key=key).values()) == pytest.approx(list(metrics(other, key=key).values()), rel=1e-4)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("size", [8, 2])
def test_micro_batches_train_the_model_of_the_whole_batch(whole, recipe, tmp_path, size):
    assert main(recipe(tmp_path / "run", **GLOBAL, micro_batch_size=size)) == 0
    assert_same(tmp_path / "run", whole)


def test_without_it_every_micro_batch_has_its_own(whole, recipe, tmp_path):
    assert main(recipe(tmp_path / "run", **FIELDS, micro_batch_size=2)) == 0
    assert metrics(tmp_path / "run", key="grad_norm")[1] != pytest.approx(metrics(whole, key="grad_norm")[1], rel=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_the_model_of_the_whole_batch(whole, recipe, tmp_path, free_port, engine):
    accelerate_launch(recipe(tmp_path / "run", **GLOBAL, micro_batch_size=2, engine=engine), engine, free_port)
    assert_same(tmp_path / "run", whole)


def test_parts_of_a_batch_have_the_loss_and_gradients_of_the_batch(tiny_config):
    torch.manual_seed(0)
    model = PathMoEForCausalLM(tiny_config()).train()
    ids = torch.randint(1, 99, (6, 10))

    def logits_of(rows):
        return model(ids[rows], output_router_logits=True).router_logits

    loss = load_balancing_loss(logits_of(slice(0, 6)), 8, 2)
    expected = torch.autograd.grad(loss, list(model.model.routers.parameters()))
    load = torch.stack([x.topk(2).indices.flatten().bincount(minlength=8) / len(x) for x in logits_of(slice(0, 6))])
    parts = [
        (load_balancing_loss(logits_of(rows), 8, 2, load=load), n) for rows, n in ((slice(0, 2), 2), (slice(2, 6), 4))
    ]
    total = sum(part * n for part, n in parts) / 6
    torch.testing.assert_close(total, loss, rtol=0, atol=1e-6)
    for actual, gradient in zip(torch.autograd.grad(total, list(model.model.routers.parameters())), expected):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-6)


def test_it_is_refused_without_a_loss_to_balance(recipe, tmp_path):
    with pytest.raises(RecipeError, match="has no effect while router_aux_loss_coef is 0: set it in model_overrides"):
        main(recipe(tmp_path / "run", balance_over="global_batch"))
    with pytest.raises(RecipeError, match="balance_over='step' must be one of micro_batch, global_batch"):
        main(recipe(tmp_path / "run", balance_over="step"))
