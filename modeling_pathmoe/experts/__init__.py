# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Fast experts for any mixture-of-experts model of transformers: `experts_implementation="pathmoe"`.

loop.py     one expert after another, with one backward for all that they do: training on a CPU; and single tokens
grouped.py  the same on torch's grouped matrix multiplication: other devices
"""

from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _can_use_grouped_mm, _default_apply_gate
from transformers.utils import logging

from . import grouped, loop


logger = logging.get_logger(__name__)

# Up to so many rows (tokens times k) without gradients, transformers' kernels are faster than expert by expert. In
# bfloat16, where oneDNN compiles a product for every new number of rows, only while an expert has few.
FEW_ROWS, FEW_ROWS_OF_EXPERT = 4096, 16
# In bfloat16, weights of at most so many elements are cheaper to gather than oneDNN's products are to start.
CHEAP_TO_GATHER = 2**19


def select_kernel(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> str:
    """Tells which kernel `experts_implementation="pathmoe"` runs.

    Args:
        experts (`torch.nn.Module`): The experts of one layer, of any model with transformers' experts interface.
        hidden_states (`torch.Tensor` of shape `(T, D)`): What they are given.
        top_k_index (`torch.Tensor` of shape `(T, k)`): The experts that each token visits.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): Their weights.

    Returns:
        `str`: On a CPU, `"loop"`; on other devices `"grouped"`. Without gradients on a CPU, `"token"` for a single
        token, and transformers' own `"grouped_mm"`, or `"batched_mm"` for very small experts in bfloat16, for up to
        4,096 rows of experts (in bfloat16, for up to 16 times E). `"grouped_mm"` also where ours cannot: for experts
        that are not plain SwiGLU (it warns), and outside a CPU where torch's grouped product does not take the dtype
        or the device.

    Raises:
        ValueError: If a row of the hidden or inner states is no multiple of 16 bytes, outside a CPU.
    """
    if why_not(experts):
        return "grouped_mm"
    down_proj, dtype = experts.down_proj, compute_dtype(hidden_states, experts)
    unaligned = [size for size in down_proj.shape[1:] if size * dtype.itemsize % 16]
    if hidden_states.device.type != "cpu":
        if unaligned:
            raise ValueError(
                f"Rows of {unaligned[0] * dtype.itemsize} bytes are no multiple of 16, which grouped products need: "
                f'choose widths that are multiples of {16 // dtype.itemsize}, or experts_implementation="eager".'
            )
        return "grouped" if _can_use_grouped_mm(hidden_states, down_proj, None) else "grouped_mm"
    if torch.is_grad_enabled():
        tensors = (hidden_states, top_k_weights, down_proj, experts.gate_up_proj)
        if any(tensor.requires_grad for tensor in tensors):
            return "loop"
    if len(hidden_states) > 1 and torch.compiler.is_compiling():
        return "loop"
    rows, autocast = top_k_index.numel(), torch.is_autocast_enabled("cpu")
    if dtype == torch.bfloat16 and rows * down_proj[0].numel() <= CHEAP_TO_GATHER and not autocast:
        return "batched_mm"
    if len(hidden_states) == 1:
        return "token"
    few = {torch.float32: FEW_ROWS, torch.bfloat16: FEW_ROWS_OF_EXPERT * len(down_proj)}.get(dtype, 0)
    return "loop" if unaligned or rows > few or autocast else "grouped_mm"


def compute_dtype(hidden_states: torch.Tensor, experts: torch.nn.Module) -> torch.dtype:
    """The experts' dtype; under autocast its own, which transformers' implementations ignore."""
    device_type = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if autocast else experts.gate_up_proj.dtype


def why_not(experts: torch.nn.Module) -> str | None:
    """What keeps our kernels from computing these experts; nothing, if they are plain SwiGLU."""
    if experts.has_bias or experts.has_post_expert_norm or experts.is_transposed:
        return "they have biases, a norm or transposed weights"
    if not (experts.has_gate and experts.is_concatenated and type(experts)._apply_gate is _default_apply_gate):
        return "they have no gate, or one of their own"
    activation, weights = experts.act_fn, experts.gate_up_proj
    if activation is not F.silu and not isinstance(activation, (torch.nn.SiLU, SiLUActivation)):
        return f"their activation is {type(activation).__name__}, not SwiGLU"
    if is_traceable_wrapper_subclass(weights):
        return f"their weights are {type(weights).__name__}"
    return None


def pathmoe_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Runs SwiGLU experts, whatever the device; a member of transformers' experts interface.

    Under autocast it computes in autocast's dtype, which transformers' own implementations ignore.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, D)`): Hidden states.
        top_k_index (`torch.Tensor` of shape `(T, k)`): Experts of each token. Where transformers has made the module
            expert parallel, ids from `num_experts` on stand for experts of other ranks: they add nothing.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): Their weights.

    Returns:
        `torch.Tensor` of shape `(T, D)`: Weighted sums of the experts' outputs, in the dtype of `hidden_states`.

    Raises:
        ValueError: As [`select_kernel`].
    """
    kernel = select_kernel(self, hidden_states, top_k_index, top_k_weights)
    if kernel == "grouped_mm" and (reason := why_not(self)):
        logger.warning_once(f"{type(self).__name__} are run by transformers' grouped_mm: {reason}.")
    if kernel in ("grouped_mm", "batched_mm"):
        return ALL_EXPERTS_FUNCTIONS[kernel](self, hidden_states, top_k_index, top_k_weights)

    run = {"loop": loop.run, "token": loop.run_token, "grouped": grouped.run}[kernel]
    dtype, device_type = compute_dtype(hidden_states, self), hidden_states.device.type
    inputs = (hidden_states, top_k_weights, self.gate_up_proj, self.down_proj)
    x, weights, *projections = (tensor.to(dtype) for tensor in inputs)
    # To enter and leave a context costs a small model a noticeable part of a decoding step.
    autocast = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        return run(x, top_k_index, weights, *projections).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("pathmoe", pathmoe_experts_forward)
