# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""SwiGLU experts on a CPU: tokens sorted by expert, then one expert after another, so that what belongs to one expert
stays in the cache; experts of few rows in groups, which all threads work on.

The router's weight enters before the down projection: its gradient then needs the inner state alone, which is computed
anew, and no expert's output is kept (SonicMoE, arXiv 2512.14080). For the backward, only the outcome of the first
projection is kept. Weight gradients are written in place, expert by expert.

Rows are pairs of a token and one of its experts, S = T · k of them, sorted by expert.

For bfloat16, oneDNN compiles a matrix product anew for every number of rows that it has not met, and in training every
expert has another number of rows in every step. So an expert takes a few of the rows behind its own with it, up to a
round number. What it computes for them the next expert overwrites, and they add nothing to sums.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


aten = torch.ops.aten

# From twice as many numbers on, torch computes with two threads, and so on.
PARALLEL_NUMBERS = 2**15
# In bfloat16, a product of a vector and a matrix of at most so many elements is faster in float32.
SMALL_MATRIX = 2**17


def sort_rows(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Sorts rows by expert; the tokens of one expert stay in order.

    Returns:
        `tuple`: The rows' places in `top_k_index.flatten()`, of shape `(S,)`; and how many rows each expert has. Rows
        of experts that live elsewhere are last, and not counted.
    """
    experts = top_k_index.flatten().numpy()
    # numpy sorts 16-bit numbers by radix, ten times faster than torch.
    order = np.argsort(experts.astype(np.int16) if num_experts < 2**15 else experts, kind="stable")
    return torch.from_numpy(order), count_rows(top_k_index, num_experts)


def count_rows(top_k_index: Tensor, num_experts: int) -> list[int]:
    """How many rows each expert has."""
    return np.bincount(top_k_index.flatten().numpy(), minlength=num_experts)[:num_experts].tolist()


def sum_rows(rows: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Adds up the rows of each token, (S, D) → (T, D)."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return torch.embedding_bag(rows, places, torch.arange(0, len(order), top_k), mode=0)[0]


def padding(rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """What an expert's number of rows is rounded up to a multiple of."""
    if dtype == torch.float32 or dtype == torch.float64:
        return 1
    return 64 if rows >= 256 * num_experts else 16


def groups(counts: list[int], multiple: int, width: int) -> Iterator[tuple[slice, int, slice, list[int]]]:
    """The experts that have rows, in groups that are worked on together: what a group takes of the sorted rows, how
    many of these are its own, what it takes of the experts that have rows, and how many rows each of these takes.

    What is computed number by number runs on all threads from a size on: experts of few rows are put together. Where
    rows are rounded up, each expert is a group of its own.
    """
    least = PARALLEL_NUMBERS * torch.get_num_threads() // width if multiple == 1 else 1
    counts = [count for count in counts if count]
    row, first = 0, 0
    for last, _ in enumerate(counts, start=1):
        count = sum(counts[first:last])
        if count >= least or last == len(counts):
            sizes = [-(-count // multiple) * multiple] if multiple > 1 else counts[first:last]
            yield slice(row, row + sum(sizes)), count, slice(first, last), sizes
            row, first = row + count, last


def matrices_of(projection: Tensor, experts: list[int]) -> list[Tensor]:
    """The matrices of some experts."""
    matrices = projection.unbind()
    return [matrices[expert] for expert in experts]


def multiply(rows: Sequence[Tensor], matrices: Sequence[Tensor], out: Sequence[Tensor]):
    """One product for each expert."""
    for a, b, c in zip(rows, matrices, out):
        torch.mm(a, b, out=c)


def pad_rows(order: Tensor, top_k: int, weights: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Tokens and weights of the sorted rows, and of as many more as an expert may take with it."""
    tokens = torch.from_numpy(order.numpy() // top_k)  # numpy divides integers faster than torch
    pad = (0, multiple - 1)
    return F.pad(tokens, pad), F.pad(weights.flatten()[order], pad).unsqueeze(1)


def packed(view: Tensor, buffer: Tensor) -> Tensor:
    """A half of the first projection's outcome; copied in bfloat16, where silu of a view is not vectorised."""
    return view if view.dtype == torch.float32 else buffer.copy_(view)


@torch.library.custom_op("pathmoe::experts", mutates_args=())
def experts(
    x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the experts; gives the output (T, D), the outcome of the first projection (S, 2F) and the order of rows."""
    order, counts = sort_rows(top_k_index, len(gate_up_proj))
    top_k, width = top_k_index.shape[1], down_proj.shape[2]
    multiple = padding(len(order), len(counts), x.dtype)
    tokens, row_weights = pad_rows(order, top_k, weights, multiple)
    gate_up, rows = x.new_empty(len(tokens), 2 * width), x.new_empty(len(tokens), x.shape[1])
    busy = [expert for expert, count in enumerate(counts) if count]
    firsts, seconds = (matrices_of(projection.transpose(1, 2), busy) for projection in (gate_up_proj, down_proj))
    work = list(groups(counts, multiple, width))
    most = max((here.stop - here.start for here, *_ in work), default=0)
    inputs, inners = x.new_empty(most, x.shape[1]), x.new_empty(most, width)
    for here, _, which, sizes in work:
        mine = slice(here.stop - here.start)
        x_here = torch.index_select(x, 0, tokens[here], out=inputs[mine])
        multiply(x_here.split(sizes), firsts[which], gate_up[here].split(sizes))
        gate, up = gate_up[here].split(width, dim=1)
        h = aten.silu.out(packed(gate, inners[mine]), out=inners[mine]).mul_(up).mul_(row_weights[here])
        multiply(h.split(sizes), seconds[which], rows[here].split(sizes))
    rows[sum(counts) :] = 0
    return sum_rows(rows, order, top_k), gate_up, order


@experts.register_fake
def _(x, top_k_index, weights, gate_up_proj, down_proj):
    rows = top_k_index.numel()
    padded = rows + padding(rows, len(gate_up_proj), x.dtype) - 1
    gate_up, order = x.new_empty(padded, gate_up_proj.shape[1]), top_k_index.new_empty(rows, dtype=torch.int64)
    return x.new_empty(x.shape), gate_up, order


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
    """Gives the gradients of x, weights, gate_up_proj and down_proj; of the two latter, empty ones unless trained."""
    width, top_k = down_proj.shape[2], top_k_index.shape[1]
    counts = count_rows(top_k_index, len(down_proj))
    multiple = padding(len(order), len(counts), x.dtype)
    tokens, row_weights = pad_rows(order, top_k, weights, multiple)
    busy = [expert for expert, count in enumerate(counts) if count]
    idle = torch.tensor([expert for expert, count in enumerate(counts) if not count], dtype=torch.int64)
    grad_gate_up_proj, grad_down_proj = (
        torch.empty_like(parameter).index_fill_(0, idle, 0) if wanted else parameter.new_empty(0)
        for parameter, wanted in zip((gate_up_proj, down_proj), trained)
    )
    firsts, seconds = matrices_of(gate_up_proj, busy), matrices_of(down_proj, busy)
    grad_firsts, grad_seconds = (
        matrices_of(gradient, busy) if wanted else []
        for gradient, wanted in zip((grad_gate_up_proj, grad_down_proj), trained)
    )
    grad_rows, grad_weights = x.new_empty(len(tokens), x.shape[1]), weights.new_empty(len(tokens))
    work = list(groups(counts, multiple, width))
    most, ones = max((here.stop - here.start for here, *_ in work), default=0), x.new_ones(width)
    inputs, grads = x.new_empty(2, most, x.shape[1])
    gates, ups, silus, inners, grad_inners = x.new_empty(5, most, width)
    grad_gate_ups = x.new_empty(most, 2 * width)
    for here, count, which, sizes in work:
        mine = slice(here.stop - here.start)
        gate, up = gate_up[here].split(width, dim=1)
        gate, up = packed(gate, gates[mine]), packed(up, ups[mine])
        silu = aten.silu.out(gate, out=silus[mine])
        h = torch.mul(silu, up, out=inners[mine])

        dy, dh = torch.index_select(grad, 0, tokens[here], out=grads[mine]), grad_inners[mine]
        multiply(dy.split(sizes), seconds[which], dh.split(sizes))
        # The fastest sum along rows is a product with ones.
        grad_weights[here] = torch.mv(dh * h, ones)
        dh.mul_(row_weights[here])[count:] = 0
        if trained[1]:
            h.mul_(row_weights[here])[count:] = 0
            multiply(dy.t().split(sizes, dim=1), h.split(sizes), grad_seconds[which])

        d_gate_up = grad_gate_ups[mine]
        d_gate, d_up = d_gate_up.split(width, dim=1)
        torch.mul(dh, silu, out=d_up)
        d_gate.copy_(aten.silu_backward.grad_input(dh.mul_(up), gate, grad_input=h))
        if trained[0]:
            x_here = torch.index_select(x, 0, tokens[here], out=inputs[mine])
            multiply(d_gate_up.t().split(sizes, dim=1), x_here.split(sizes), grad_firsts[which])
        multiply(d_gate_up.split(sizes), firsts[which], grad_rows[here].split(sizes))
    grad_rows[sum(counts) :] = 0
    grad_weights[sum(counts) :] = 0
    grad_weights = weights.new_empty(len(order)).index_copy_(0, order, grad_weights[: len(order)])
    return sum_rows(grad_rows, order, top_k), grad_weights.view_as(weights), grad_gate_up_proj, grad_down_proj


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
    if torch.is_grad_enabled():  # create_graph=True: the backward must be differentiable itself
        # Views: the weights come from x, through the router, and x would be reached twice.
        inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors[:5]]
        wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad) if needed]
        found = iter(torch.autograd.grad(run_plain(*inputs), wanted, grad, create_graph=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
    grad_x, grad_weights, *gradients = experts_backward(grad, *ctx.saved_tensors, list(trained))
    return grad_x, None, grad_weights, *(g if wanted else None for g, wanted in zip(gradients, trained))


experts.register_autograd(_backward, setup_context=_save)


def run(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs the experts one after another.

    Args:
        x (`torch.Tensor` of shape `(T, D)`): Hidden states.
        top_k_index (`torch.Tensor` of shape `(T, k)`): Experts; ids from E on add nothing.
        weights (`torch.Tensor` of shape `(T, k)`): Weights.
        gate_up_proj (`torch.Tensor` of shape `(E, 2F, D)`): First projections.
        down_proj (`torch.Tensor` of shape `(E, D, F)`): Second projections.

    Returns:
        `torch.Tensor` of shape `(T, D)`: The output.
    """
    return experts(x, top_k_index, weights, gate_up_proj, down_proj)[0]


def run_plain(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """As `run`, of operators that can be differentiated any number of times."""
    output = torch.zeros_like(x)
    for expert in range(len(gate_up_proj)):
        tokens, places = torch.where(top_k_index == expert)
        gate, up = F.linear(x[tokens], gate_up_proj[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down_proj[expert]) * weights[tokens, places, None]
        output = output.index_add(0, tokens, rows)
    return output


def token_forward(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Runs one token without gradients, as `run`: nothing is sorted or gathered, and no weight copied."""
    chosen, width, dtype = top_k_index[0].tolist(), down_proj.shape[2], x.dtype
    if max(chosen) >= len(down_proj):
        here = [row for row, expert in enumerate(chosen) if expert < len(down_proj)]
        if not here:
            return torch.zeros_like(x)
        chosen, weights = [chosen[row] for row in here], weights[:, here]
    token, firsts, seconds = x[0], [gate_up_proj[e] for e in chosen], [down_proj[e] for e in chosen]
    # oneDNN's bfloat16 products take their time to start: those with small matrices are faster in float32.
    if dtype == torch.bfloat16 and width * len(token) <= SMALL_MATRIX:
        token, weights = token.float(), weights.float()
        firsts, seconds = [matrix.float() for matrix in firsts], [matrix.float() for matrix in seconds]
    gate, up = torch.stack([torch.mv(matrix, token) for matrix in firsts]).split(width, dim=1)
    inner, *inners = F.silu(gate).mul_(up).mul_(weights.t()).unbind()
    output = torch.mv(seconds[0], inner)
    for matrix, inner in zip(seconds[1:], inners):
        output.addmv_(matrix, inner)
    return output.to(dtype).unsqueeze(0)


token_op = torch.library.custom_op("pathmoe::experts_token", token_forward, mutates_args=())
token_op.register_fake(lambda x, *_: x.new_empty(x.shape))


def run_token(x: Tensor, top_k_index: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """As `run`, for one token and without gradients; a compiler sees it as one operator."""
    operator = token_op if torch.compiler.is_compiling() else token_forward
    return operator(x, top_k_index, weights, gate_up_proj, down_proj)
