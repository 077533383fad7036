# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""RMSNorm with the arithmetic of Qwen3's, in fewer passes over memory and with less of it kept."""

import torch
import torch.nn.functional as F


class RMSNormOnCPU(torch.autograd.Function):
    """Keeps its input and a number per row; torch would keep three tensors of the input's size and go through them in
    fourteen operators, for which other devices have one."""

    @staticmethod
    def forward(ctx, hidden_states, weight, eps):
        x = _at_least_float32(hidden_states)
        scale = x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden_states, weight, scale)
        return weight * (x * scale).to(hidden_states.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # y = w x s with s = (mean(x²) + ε)^(-1/2), so dx = s (dy w) - x s³ mean(dy w x) and dw = Σ dy x s.
        hidden_states, weight, scale = ctx.saved_tensors
        x, w, dy = (_at_least_float32(tensor) for tensor in (hidden_states, weight, grad))
        size = x.shape[-1]
        dy_x = (dy * x).reshape(-1, size)
        grad_weight = torch.mv(dy_x.t(), scale.flatten())
        means = torch.mv(dy_x, w).div_(size).view_as(scale)
        grad_x = torch.mul(dy, w).mul_(scale).addcmul_(x, means.mul_(scale.pow(3)), value=-1)
        return grad_x.to(hidden_states.dtype), grad_weight.to(weight.dtype), None


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """w · x / sqrt(mean(x²) + ε), in float32, and rounded to the dtype of x before the product with w (as in Qwen3).

    Args:
        hidden_states (`torch.Tensor` of shape `(..., D)`): x.
        weight (`torch.Tensor` of shape `(D,)`): w.
        eps (`float`): ε.

    Returns:
        `torch.Tensor` of shape `(..., D)`: What Qwen3's norm gives, on a CPU to the bit.
    """
    if torch.is_grad_enabled() and hidden_states.device.type == "cpu" and not torch.compiler.is_compiling():
        return RMSNormOnCPU.apply(hidden_states, weight, eps)
    return weight * F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=eps).to(hidden_states.dtype)
