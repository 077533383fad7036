# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from modeling_pathmoe.norm_pathmoe import rms_norm


def outcome(norm, dtype, shape=(2, 5, 3, 24)):
    """The output, and the gradients of hidden states and weight."""
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    x[0, 0] = 0
    x.requires_grad_()
    weight.requires_grad_()
    y = norm(x, weight)
    y = y.transpose(1, 2)  # so that its gradient is not contiguous, as in attention
    y.backward(torch.randn(y.shape).to(dtype))
    return y.detach(), x.grad, weight.grad


def of_qwen3(x, weight):
    norm = Qwen3MoeRMSNorm(x.shape[-1], 1e-6).to(x.dtype)
    return torch.func.functional_call(norm, {"weight": weight}, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [True, False])
def test_outputs_are_those_of_qwen3_to_the_bit(dtype, gradients):
    x, weight = torch.randn(7, 40).to(dtype), torch.randn(40).to(dtype)
    with torch.set_grad_enabled(gradients):
        assert torch.equal(rms_norm(x, weight, 1e-6), of_qwen3(x, weight))


def test_gradients_agree_with_finite_differences():
    x, weight = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_agree_with_qwen3(dtype, tolerance, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(0)
        ours = outcome(lambda x, weight: rms_norm(x, weight, 1e-6), dtype)
        torch.manual_seed(0)
        expected = outcome(of_qwen3, dtype)
    for mine, theirs in zip(ours, expected):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())


def test_second_derivatives_agree_with_finite_differences():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    x.requires_grad_()
    for inputs in ((x, weight.requires_grad_()), (x, weight.detach())):
        assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, 1e-2), inputs)


def test_functional_transforms_take_the_norm():
    x, weight = torch.randn(4, 8), torch.randn(8)
    expected = torch.autograd.grad(rms_norm(x.requires_grad_(), weight, 1e-6).square().sum(), x)[0]
    per_row = torch.func.vmap(torch.func.grad(lambda row: rms_norm(row, weight, 1e-6).square().sum()))(x.detach())
    torch.testing.assert_close(per_row, expected)
