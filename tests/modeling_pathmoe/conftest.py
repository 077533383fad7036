# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from hypothesis import settings

from modeling_pathmoe import PathMoEForCausalLM


# A busy machine is no failure.
settings.register_profile("pathmoe", deadline=None)
settings.load_profile("pathmoe")


def randomize(model, seed=0, std=0.3):
    """Draws every parameter anew, norms around one, so that routing is spread and no term hides behind a default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = std * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model.eval()


@pytest.fixture
def tiny_model(tiny_config):
    """Returns a function that makes a tiny causal LM with random weights; keyword arguments override config fields."""

    def make(seed=0, **overrides):
        return randomize(PathMoEForCausalLM(tiny_config(**overrides)), seed)

    return make


@pytest.fixture
def tokens():
    """Returns a function that draws token ids of shape (batch, length)."""

    def make(batch=2, length=7, seed=1):
        return torch.randint(99, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def gradients():
    """Returns a function that gives a copy of every gradient after the backward pass of `loss`."""

    def compute(model, loss):
        model.zero_grad()
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    return compute


@pytest.fixture
def assert_same():
    """Returns a function that compares tensors, or dicts of them, at 1e-5."""

    def check(actual, expected, tolerance=1e-5):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    return check
