# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""SwiGLU experts on torch's grouped matrix multiplication, with the backward of `loop.py`. It saves only the output of
the first projection, where automatic differentiation saves six tensors of about that size."""

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedExperts(torch.autograd.Function):
    """Computes the same as `loop.experts` and its backward, by grouped products."""

    @staticmethod
    def forward(ctx, x, top_k_index, weights, gate_up_proj, down_proj):
        num_experts, top_k, width = len(down_proj), top_k_index.shape[1], down_proj.shape[2]
        experts, order = torch.sort(top_k_index.flatten(), stable=True)
        ids = torch.arange(num_experts, device=x.device)
        ends = torch.searchsorted(experts, ids, right=True).to(torch.int32)
        # Rows of experts on other ranks come last, and no product writes them.
        elsewhere = (experts >= num_experts).unsqueeze(1)
        gate_up = F.grouped_mm(x[order // top_k], gate_up_proj.transpose(-2, -1), offs=ends)
        gate, up = gate_up.split(width, dim=1)
        h = F.silu(gate) * up * weights.flatten()[order].unsqueeze(1)
        rows = F.grouped_mm(h, down_proj.transpose(-2, -1), offs=ends).masked_fill(elsewhere, 0)
        ctx.save_for_backward(x, weights, gate_up_proj, down_proj, gate_up, order, ends, elsewhere)
        return sum_rows(rows, order, top_k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weights, gate_up_proj, down_proj, gate_up, order, ends, elsewhere = ctx.saved_tensors
        width, top_k = down_proj.shape[2], weights.shape[1]
        tokens, row_weights = order // top_k, weights.flatten()[order].unsqueeze(1)
        gate, up = gate_up.split(width, dim=1)
        silu = F.silu(gate)
        h = silu * up

        dy = grad[tokens]
        dh = F.grouped_mm(dy, down_proj, offs=ends)
        grad_weights = torch.empty_like(weights.flatten())
        grad_weights[order] = (dh * h).sum(dim=1).masked_fill(elsewhere.squeeze(1), 0)
        dh = dh * row_weights
        grad_down_proj = grad_gate_up_proj = None
        if ctx.needs_input_grad[4]:
            grad_down_proj = F.grouped_mm(dy.t(), h * row_weights, offs=ends)

        d_gate_up = torch.cat([torch.ops.aten.silu_backward(dh * up, gate), dh * silu], dim=1)
        if ctx.needs_input_grad[3]:
            grad_gate_up_proj = F.grouped_mm(d_gate_up.t(), x[tokens], offs=ends)
        grad_rows = F.grouped_mm(d_gate_up, gate_up_proj, offs=ends).masked_fill(elsewhere, 0)
        grad_x = sum_rows(grad_rows, order, top_k)
        return grad_x, None, grad_weights.view_as(weights), grad_gate_up_proj, grad_down_proj


def sum_rows(rows: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Sums the rows of each token, (S, D) → (T, D), always in the same order."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return rows[places].view(-1, top_k, rows.shape[1]).sum(dim=1)


def run(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs the experts; see `loop.run` for the arguments and the result."""
    return GroupedExperts.apply(x, top_k_index, weights, gate_up_proj, down_proj)
