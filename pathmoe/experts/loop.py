# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""SwiGLU experts on a CPU.

A row is a pair of a token and one of its experts. Rows are sorted by expert, and one expert is computed after the
other, so that its data stays in the cache. Experts with few rows form groups, which all threads work on.

The router's weight is applied before the down projection. Its gradient then needs only the inner state, which is
recomputed, and no expert's output is saved (SonicMoE, arXiv 2512.14080). For the backward, only the output of the
first projection is saved. Weight gradients are written in place, expert by expert.

For bfloat16, oneDNN compiles a matrix product for every new number of rows, and in training each expert has a
different number in every step. So an expert's number of rows is rounded up by including rows of the next experts. The
next expert overwrites their outputs, and they are excluded from sums.

Shapes, as suffixes of names:
    T  tokens
    k  experts of a token
    S  rows, T · k
    P  rows and the padding behind the last one
    R  rows of one group, padding included
    M  the largest R of all groups
    E  experts
    D  hidden size
    F  inner size of an expert
The arguments are x (T, D), top_k_index and weights (T, k), gate_up_proj (E, 2F, D) and down_proj (E, D, F).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


aten = torch.ops.aten

# Number of elements per thread in torch's elementwise operations.
PARALLEL_NUMBERS = 2**15
# In bfloat16, a product of a vector and a matrix of at most this many elements is faster in float32.
SMALL_MATRIX = 2**17


def sort_rows(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Sorts rows by expert; the tokens of one expert stay in order.

    Returns:
        `tuple`: The index of each sorted row in `top_k_index.flatten()`, of shape `(S,)`, and the number of rows of
        each expert. Rows of experts on other ranks come last and are not counted.
    """
    experts_S = top_k_index.flatten().numpy()
    # numpy sorts 16-bit numbers by radix, ten times faster than torch.
    order_S = np.argsort(experts_S.astype(np.int16) if num_experts < 2**15 else experts_S, kind="stable")
    return torch.from_numpy(order_S), count_rows(top_k_index, num_experts)


def count_rows(top_k_index: Tensor, num_experts: int) -> list[int]:
    """Returns the number of rows of each expert."""
    return np.bincount(top_k_index.flatten().numpy(), minlength=num_experts)[:num_experts].tolist()


def sum_rows(rows_PD: Tensor, order_S: Tensor, top_k: int) -> Tensor:
    """Sums the rows of each token, (P, D) → (T, D)."""
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S))
    return torch.embedding_bag(rows_PD, places_S, torch.arange(0, len(order_S), top_k), mode=0)[0]


def row_multiple(rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Returns the multiple to which each expert's number of rows is rounded up."""
    if dtype == torch.float32 or dtype == torch.float64:
        return 1
    return 64 if rows >= 256 * num_experts else 16


def group_experts(counts: list[int], multiple: int, width: int) -> Iterator[tuple[slice, int, slice, list[int]]]:
    """Divides the experts that have rows into groups that are computed together.

    torch uses several threads only for large elementwise operations, so experts with few rows are put together. Where
    numbers of rows are rounded up, each expert is a group of its own.

    Args:
        counts (`list[int]`): Number of rows of each expert.
        multiple (`int`): See `row_multiple`.
        width (`int`): F.

    Yields:
        `tuple`: The group's slice of the sorted rows, padding included; its number of rows without padding; its slice
        of the experts that have rows; and the number of rows of each of these experts, padding included.
    """
    min_rows = PARALLEL_NUMBERS * torch.get_num_threads() // width if multiple == 1 else 1
    counts = [count for count in counts if count]
    row, first = 0, 0
    for last, _ in enumerate(counts, start=1):
        count = sum(counts[first:last])
        if count >= min_rows or last == len(counts):
            sizes = [-(-count // multiple) * multiple] if multiple > 1 else counts[first:last]
            yield slice(row, row + sum(sizes)), count, slice(first, last), sizes
            row, first = row + count, last


def select_matrices(projection: Tensor, experts: list[int]) -> list[Tensor]:
    """Returns the matrices of the given experts."""
    matrices = projection.unbind()
    return [matrices[expert] for expert in experts]


def multiply(rows: Sequence[Tensor], matrices: Sequence[Tensor], out: Sequence[Tensor]):
    """Computes one matrix product for each expert."""
    for a, b, c in zip(rows, matrices, out):
        torch.mm(a, b, out=c)


def pad_rows(order_S: Tensor, top_k: int, weights: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Returns the token (P,) and the weight (P, 1) of each sorted row, with padding for the last expert."""
    tokens_S = torch.from_numpy(order_S.numpy() // top_k)  # numpy divides integers faster than torch
    pad = (0, multiple - 1)
    return F.pad(tokens_S, pad), F.pad(weights.flatten()[order_S], pad).unsqueeze(1)


def contiguous_half(half_RF: Tensor, buffer_RF: Tensor) -> Tensor:
    """Copies a half of the first projection's output to the buffer: silu of a bfloat16 view is not vectorised."""
    return half_RF if half_RF.dtype == torch.float32 else buffer_RF.copy_(half_RF)


@torch.library.custom_op("pathmoe::experts", mutates_args=())
def experts(
    x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the experts. Returns the output (T, D), the output of the first projection (P, 2F) and the order (S,)."""
    order_S, counts = sort_rows(top_k_index, len(gate_up_proj))
    top_k, width = top_k_index.shape[1], down_proj.shape[2]
    multiple = row_multiple(len(order_S), len(counts), x.dtype)
    tokens_P, weights_P1 = pad_rows(order_S, top_k, weights, multiple)
    gate_up_P2F, out_PD = x.new_empty(len(tokens_P), 2 * width), x.new_empty(len(tokens_P), x.shape[1])
    busy = [expert for expert, count in enumerate(counts) if count]
    gate_up_weights, down_weights = (  # (D, 2F) and (F, D) for each busy expert
        select_matrices(projection.transpose(1, 2), busy) for projection in (gate_up_proj, down_proj)
    )
    groups = list(group_experts(counts, multiple, width))
    max_rows = max((rows.stop - rows.start for rows, *_ in groups), default=0)
    x_MD, inner_MF = x.new_empty(max_rows, x.shape[1]), x.new_empty(max_rows, width)
    for rows, _, expert_slice, sizes in groups:
        local_rows = slice(rows.stop - rows.start)
        x_RD = torch.index_select(x, 0, tokens_P[rows], out=x_MD[local_rows])
        multiply(x_RD.split(sizes), gate_up_weights[expert_slice], gate_up_P2F[rows].split(sizes))
        gate_RF, up_RF = gate_up_P2F[rows].split(width, dim=1)
        h_RF = aten.silu.out(contiguous_half(gate_RF, inner_MF[local_rows]), out=inner_MF[local_rows])
        h_RF.mul_(up_RF).mul_(weights_P1[rows])
        multiply(h_RF.split(sizes), down_weights[expert_slice], out_PD[rows].split(sizes))
    out_PD[sum(counts) :] = 0
    return sum_rows(out_PD, order_S, top_k), gate_up_P2F, order_S


@experts.register_fake
def _(x, top_k_index, weights, gate_up_proj, down_proj):
    rows = top_k_index.numel()
    padded_rows = rows + row_multiple(rows, len(gate_up_proj), x.dtype) - 1
    gate_up_P2F = x.new_empty(padded_rows, gate_up_proj.shape[1])
    return x.new_empty(x.shape), gate_up_P2F, top_k_index.new_empty(rows, dtype=torch.int64)


@torch.library.custom_op("pathmoe::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor,
    x: Tensor,
    top_k_index: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up: Tensor,
    order: Tensor,
    trained: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weights, gate_up_proj and down_proj from the gradient of the output (T, D).

    `gate_up` (P, 2F) and `order` (S,) come from `experts`. `trained` selects the gradients of gate_up_proj and
    down_proj; a gradient that is not selected is an empty tensor.
    """
    width, top_k = down_proj.shape[2], top_k_index.shape[1]
    counts = count_rows(top_k_index, len(down_proj))
    multiple = row_multiple(len(order), len(counts), x.dtype)
    tokens_P, weights_P1 = pad_rows(order, top_k, weights, multiple)
    busy = [expert for expert, count in enumerate(counts) if count]
    idle = torch.tensor([expert for expert, count in enumerate(counts) if not count], dtype=torch.int64)
    grad_gate_up_proj, grad_down_proj = (
        torch.empty_like(parameter).index_fill_(0, idle, 0) if wanted else parameter.new_empty(0)
        for parameter, wanted in zip((gate_up_proj, down_proj), trained)
    )
    # (2F, D) and (D, F) for each busy expert
    gate_up_weights, down_weights = select_matrices(gate_up_proj, busy), select_matrices(down_proj, busy)
    grad_gate_up_weights, grad_down_weights = (
        select_matrices(gradient, busy) if wanted else []
        for gradient, wanted in zip((grad_gate_up_proj, grad_down_proj), trained)
    )
    grad_x_PD, grad_weights_P = x.new_empty(len(tokens_P), x.shape[1]), weights.new_empty(len(tokens_P))
    groups = list(group_experts(counts, multiple, width))
    max_rows, ones_F = max((rows.stop - rows.start for rows, *_ in groups), default=0), x.new_ones(width)
    x_MD, dy_MD = x.new_empty(2, max_rows, x.shape[1])
    gate_MF, up_MF, silu_MF, inner_MF, dh_MF = x.new_empty(5, max_rows, width)
    d_gate_up_M2F = x.new_empty(max_rows, 2 * width)
    for rows, count, expert_slice, sizes in groups:
        local_rows = slice(rows.stop - rows.start)
        gate_RF, up_RF = gate_up[rows].split(width, dim=1)
        gate_RF, up_RF = contiguous_half(gate_RF, gate_MF[local_rows]), contiguous_half(up_RF, up_MF[local_rows])
        silu_RF = aten.silu.out(gate_RF, out=silu_MF[local_rows])
        h_RF = torch.mul(silu_RF, up_RF, out=inner_MF[local_rows])

        dy_RD, dh_RF = torch.index_select(grad, 0, tokens_P[rows], out=dy_MD[local_rows]), dh_MF[local_rows]
        multiply(dy_RD.split(sizes), down_weights[expert_slice], dh_RF.split(sizes))
        # The fastest sum along rows is a product with ones.
        grad_weights_P[rows] = torch.mv(dh_RF * h_RF, ones_F)
        dh_RF.mul_(weights_P1[rows])[count:] = 0
        if trained[1]:
            h_RF.mul_(weights_P1[rows])[count:] = 0
            multiply(dy_RD.t().split(sizes, dim=1), h_RF.split(sizes), grad_down_weights[expert_slice])

        d_gate_up_R2F = d_gate_up_M2F[local_rows]
        d_gate_RF, d_up_RF = d_gate_up_R2F.split(width, dim=1)
        torch.mul(dh_RF, silu_RF, out=d_up_RF)
        d_gate_RF.copy_(aten.silu_backward.grad_input(dh_RF.mul_(up_RF), gate_RF, grad_input=h_RF))
        if trained[0]:
            x_RD = torch.index_select(x, 0, tokens_P[rows], out=x_MD[local_rows])
            multiply(d_gate_up_R2F.t().split(sizes, dim=1), x_RD.split(sizes), grad_gate_up_weights[expert_slice])
        multiply(d_gate_up_R2F.split(sizes), gate_up_weights[expert_slice], grad_x_PD[rows].split(sizes))
    grad_x_PD[sum(counts) :] = 0
    grad_weights_P[sum(counts) :] = 0
    grad_weights = weights.new_empty(len(order)).index_copy_(0, order, grad_weights_P[: len(order)])
    return sum_rows(grad_x_PD, order, top_k), grad_weights.view_as(weights), grad_gate_up_proj, grad_down_proj


@experts_backward.register_fake
def _(grad, x, top_k_index, weights, gate_up_proj, down_proj, gate_up, order, trained):
    parameters = (gate_up_proj, down_proj)
    gradients = (torch.empty_like(p) if wanted else p.new_empty(0) for p, wanted in zip(parameters, trained))
    return x.new_empty(x.shape), weights.new_empty(weights.shape), *gradients


def _save(ctx, inputs, output):
    _, gate_up, order = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gate_up, order)
    ctx.save_for_backward(*inputs, gate_up, order)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 5
    trained = ctx.needs_input_grad[3:5]
    if torch.is_grad_enabled():  # create_graph=True: the backward must itself be differentiable
        # Views, because the weights depend on x through the router, and x would be reached twice.
        inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors[:5]]
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad) if needed]
        gradients = iter(torch.autograd.grad(run_plain(*inputs), wanted, grad, create_graph=True))
        return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)
    grad_x, grad_weights, *gradients = experts_backward(grad, *ctx.saved_tensors, list(trained))
    return grad_x, None, grad_weights, *(g if wanted else None for g, wanted in zip(gradients, trained))


experts.register_autograd(_backward, setup_context=_save)


def run(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs the experts one after another.

    Args:
        x (`torch.Tensor` of shape `(T, D)`): Hidden states.
        top_k_index (`torch.Tensor` of shape `(T, k)`): Expert ids; ids from E on add nothing.
        weights (`torch.Tensor` of shape `(T, k)`): Weights of these experts.
        gate_up_proj (`torch.Tensor` of shape `(E, 2F, D)`): First projections.
        down_proj (`torch.Tensor` of shape `(E, D, F)`): Second projections.

    Returns:
        `torch.Tensor` of shape `(T, D)`: The output.
    """
    return experts(x, top_k_index, weights, gate_up_proj, down_proj)[0]


def run_plain(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs the experts as `run` does, with operators that can be differentiated any number of times."""
    output_TD = torch.zeros_like(x)
    for expert in range(len(gate_up_proj)):
        tokens, slots = torch.where(top_k_index == expert)  # of the expert's n rows
        gate_nF, up_nF = F.linear(x[tokens], gate_up_proj[expert]).chunk(2, dim=-1)
        rows_nD = F.linear(F.silu(gate_nF) * up_nF, down_proj[expert]) * weights[tokens, slots, None]
        output_TD = output_TD.index_add(0, tokens, rows_nD)
    return output_TD


def token_forward(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs the experts of one token without gradients, and without sorting or gathering anything."""
    chosen, width, dtype = top_k_index[0].tolist(), down_proj.shape[2], x.dtype
    if max(chosen) >= len(down_proj):
        local = [slot for slot, expert in enumerate(chosen) if expert < len(down_proj)]
        if not local:
            return torch.zeros_like(x)
        chosen, weights = [chosen[slot] for slot in local], weights[:, local]
    x_D, gate_up_weights, down_weights = x[0], [gate_up_proj[e] for e in chosen], [down_proj[e] for e in chosen]
    # oneDNN's bfloat16 products are slow to start, so small ones are faster in float32.
    if dtype == torch.bfloat16 and width * len(x_D) <= SMALL_MATRIX:
        x_D, weights = x_D.float(), weights.float()
        gate_up_weights, down_weights = [w.float() for w in gate_up_weights], [w.float() for w in down_weights]
    gate_kF, up_kF = torch.stack([torch.mv(weight, x_D) for weight in gate_up_weights]).split(width, dim=1)
    first_h_F, *other_h_F = F.silu(gate_kF).mul_(up_kF).mul_(weights.t()).unbind()
    output_D = torch.mv(down_weights[0], first_h_F)
    for weight, h_F in zip(down_weights[1:], other_h_F):
        output_D.addmv_(weight, h_F)
    return output_D.to(dtype).unsqueeze(0)


token_op = torch.library.custom_op("pathmoe::experts_token", token_forward, mutates_args=())
token_op.register_fake(lambda x, *_: x.new_empty(x.shape))


def run_token(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs the experts as `run` does, for one token and without gradients; a compiler sees one operator."""
    operator = token_op if torch.compiler.is_compiling() else token_forward
    return operator(x, top_k_index, weights, gate_up_proj, down_proj)
