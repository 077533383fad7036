# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""RMSNorm with the arithmetic of Qwen3's, but fewer passes over memory and fewer saved tensors."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm that saves its input and one number per row. On a CPU, torch would save three tensors of the input's
    size and run fourteen operators, where other devices have one."""

    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        x = _at_least_float32(hidden_states)
        scale = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_states, weight, scale)
        ctx.eps = eps
        return weight * (x * scale).to(hidden_states.dtype)

    @staticmethod
    def backward(ctx, grad):
        hidden_states, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the in-place operations below could not be differentiated
            hidden_states, weight = hidden_states.view_as(hidden_states), weight.view_as(weight)
            wanted, y = ctx.needs_input_grad[:2], _plain(hidden_states, weight, ctx.eps)
            inputs = [tensor for tensor, needed in zip((hidden_states, weight), wanted) if needed]
            gradients = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(gradients) if needed else None for needed in wanted), None
        # y = w x s with s = (mean(x²) + ε)^(-1/2), so dx = s (dy w) - x s³ mean(dy w x) and dw = Σ dy x s.
        x, w, dy = (_at_least_float32(tensor) for tensor in (hidden_states, weight, grad))
        dy_x = (dy * x).reshape(-1, x.shape[-1])
        grad_weight = torch.mv(dy_x.t(), scale.flatten()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        means = torch.mv(dy_x, w.to(x.dtype)).div_(x.shape[-1]).view_as(scale)
        grad_x = torch.mul(dy, w).mul_(scale).addcmul_(x, means.mul_(scale.pow(3)), value=-1)
        return grad_x.to(hidden_states.dtype), grad_weight, None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _plain(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=eps).to(hidden_states.dtype)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Computes w · x / sqrt(mean(x²) + ε) in float32 or float64, rounded to the dtype of x before the product with w.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., D)`): x.
        weight (`torch.Tensor` of shape `(D,)`): w.
        eps (`float`): ε.

    Returns:
        `torch.Tensor` of shape `(..., D)`: The result of Qwen3's norm; on a CPU and up to float32, equal to the bit.
    """
    plain = hidden_states.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    if plain or torch._C._are_functorch_transforms_active():
        return _plain(hidden_states, weight, eps)
    return RMSNormOnCPU.apply(hidden_states, weight, eps)


class PathMoERMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"
