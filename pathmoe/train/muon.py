# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Muon for hidden matrices and stacks of them, and AdamW for all other parameters, in one optimizer."""

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


# Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), as in `torch.optim.Muon`.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.AdamW):
    """AdamW, with the update of Muon for the parameters of groups that have `muon=True`.

    Muon replaces the momentum of a matrix by the nearest matrix with orthonormal rows or columns. A three-dimensional
    parameter, such as the weights of all experts, is a batch of matrices. The update is scaled by `0.2 * sqrt(max(A,
    B))` for matrices of shape (A, B), so that its entries are about as large as those of an AdamW update. Both can
    therefore use the same learning rate and the same weight decay (Moonlight, arXiv 2502.16982, equation 4).

    Args:
        groups (`list[dict]`): Parameter groups of AdamW; the parameters of groups with `muon=True` have two or three
            dimensions.
        momentum (`float`, defaults to 0.95): Momentum of Muon; it is Nesterov's.
        **kwargs: Arguments of [`torch.optim.AdamW`].
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, **kwargs):
        super().__init__(groups, **kwargs)
        for group in self.param_groups:
            group.setdefault("muon", False)
            group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict):
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
        state["step"] += 1
        momentum = state["exp_avg"].lerp_(parameter.grad, 1 - group["momentum"])
        update = orthogonalize(parameter.grad.lerp(momentum, group["momentum"]))
        scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def moment_names(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """Returns the names of the tensors in the optimizer state of a parameter that have the parameter's shape."""
    muon = any(
        group.get("muon") and any(parameter is member for member in group["params"])
        for group in optimizer.param_groups
    )
    return ("exp_avg",) if muon else ("exp_avg", "exp_avg_sq")


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Replaces the singular values of matrices by values between about 0.7 and 1.2, by Newton–Schulz iterations.

    A `DTensor` of shape (E, A, B) that is sharded over E is computed where it is. Any other `DTensor` is gathered, and
    every rank computes all of it.

    Args:
        matrices (`torch.Tensor` of shape `(A, B)` or `(E, A, B)`): One matrix or a batch.
        dtype (`torch.dtype`, *optional*): Computes in this type; by default bfloat16, and float32 on a CPU, where
            bfloat16 is slow unless the processor has instructions for it.

    Returns:
        `torch.Tensor` of the same shape, type and sharding.
    """
    if isinstance(matrices, DTensor):
        mesh, placements = matrices.device_mesh, matrices.placements
        if matrices.ndim == 3 and all(p.is_replicate() or p == Shard(0) for p in placements):
            local, shape, stride = orthogonalize(matrices.to_local(), dtype), matrices.shape, matrices.stride()
            return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        full = orthogonalize(matrices.full_tensor(), dtype)
        replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return replicated.redistribute(placements=placements)
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype or (torch.float32 if matrices.device.type == "cpu" else torch.bfloat16))
    x = x.reshape(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)
