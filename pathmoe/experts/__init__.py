# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Fast experts for any mixture-of-experts model of transformers: `experts_implementation="pathmoe"`.

loop.py     computes one expert after the other, with a backward of its own: for training on a CPU and single tokens
grouped.py  does the same by torch's grouped matrix multiplication: for other devices

On a device other than a CPU, `"pathmoe"` runs transformers' own implementation until a benchmark on such a device
shows that ours is faster; `"pathmoe_grouped"` runs ours there.
"""

import inspect

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.activations import SiLUActivation
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _can_use_grouped_mm,
    _default_apply_gate,
    use_experts_implementation,
)
from transformers.utils import logging

from modeling_pathmoe.routing_pathmoe import autocast_dtype, is_exporting, no_autocast

from . import grouped, loop


logger = logging.get_logger(__name__)

# Without gradients, transformers' kernels are faster than the loop up to this number of rows (tokens times k). In
# bfloat16, where oneDNN compiles a product for every new number of rows, the limit is per expert.
FEW_ROWS, FEW_ROWS_OF_EXPERT = 4096, 16
# In bfloat16, gathering weights of at most this many elements is cheaper than starting oneDNN's products.
CHEAP_TO_GATHER = 2**19
# The attributes by which transformers describes plain SwiGLU experts. Not every version has all of them.
PLAIN = {
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "has_gate": True,
    "is_concatenated": True,
}
# Attributes that a newer transformers may have added, with their defaults. Their meaning is not known here.
UNKNOWN = {
    name: parameter.default
    for name, parameter in inspect.signature(use_experts_implementation).parameters.items()
    if isinstance(parameter.default, bool) and name not in PLAIN
}


def select_kernel(
    experts: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> str:
    """Selects the kernel that `experts_implementation="pathmoe"` runs.

    Args:
        experts (`torch.nn.Module`): The experts of one layer, of any model with transformers' experts interface.
        hidden_states (`torch.Tensor` of shape `(T, D)`): Input of the experts.
        top_k_index (`torch.Tensor` of shape `(T, k)`): The experts that each token visits.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): Their weights.

    Returns:
        `str`: `"loop"` on a CPU. Without gradients, `"token"` for a single token there, and for up to 4,096 rows (in
        bfloat16, up to 16 times E) transformers' own `"grouped_mm"`, or `"batched_mm"` for very small experts in
        bfloat16. `"grouped_mm"` also on other devices, under `torch.func`'s transforms, and for experts that are not
        plain SwiGLU. `"batched_mm"` while the model is exported or traced, since its operators are supported
        everywhere and do not depend on the number of tokens.

    Raises:
        ValueError: If a row of the hidden or inner states is not a multiple of 16 bytes on a device that is not a CPU.
    """
    if unsupported_reason(experts):
        return "grouped_mm"
    if torch.jit.is_tracing() or is_exporting():
        return "batched_mm"
    if torch._C._are_functorch_transforms_active():
        return "grouped_mm"
    down_proj, dtype, device_type = experts.down_proj, compute_dtype(hidden_states, experts), hidden_states.device.type
    unaligned = [size for size in down_proj.shape[1:] if size * dtype.itemsize % 16]
    if device_type not in ("cpu", "meta"):
        if unaligned:
            raise ValueError(
                f"Rows of {unaligned[0] * dtype.itemsize} bytes are not a multiple of 16, which grouped products "
                f'need: choose widths that are multiples of {16 // dtype.itemsize}, or experts_implementation="eager".'
            )
        return "grouped_mm"
    if torch.is_grad_enabled():
        tensors = (hidden_states, top_k_weights, down_proj, experts.gate_up_proj)
        if any(tensor.requires_grad for tensor in tensors):
            return "loop"
    tokens = hidden_states.shape[0]
    if device_type == "meta" or (tokens > 1 and torch.compiler.is_compiling()):
        return "loop"
    rows, autocast = top_k_index.numel(), autocast_dtype("cpu") is not None
    if dtype == torch.bfloat16 and rows * down_proj[0].numel() <= CHEAP_TO_GATHER and not autocast:
        return "batched_mm"
    if tokens == 1:
        return "token"
    few = {torch.float32: FEW_ROWS, torch.bfloat16: FEW_ROWS_OF_EXPERT * len(down_proj)}.get(dtype, 0)
    return "loop" if unaligned or rows > few or autocast else "grouped_mm"


def compute_dtype(hidden_states: torch.Tensor, experts: torch.nn.Module) -> torch.dtype:
    """Returns the dtype of autocast, which transformers' implementations ignore, and without autocast the experts'."""
    return autocast_dtype(hidden_states.device.type) or experts.gate_up_proj.dtype


def unsupported_reason(experts: torch.nn.Module) -> str | None:
    """Returns the reason why our kernels cannot compute these experts, or `None` if they are plain SwiGLU."""
    for name, expected in (PLAIN | UNKNOWN).items():
        if getattr(experts, name, expected) is not expected:
            return f"they have {name}={getattr(experts, name)}"
    if type(experts)._apply_gate is not _default_apply_gate:
        return "they have a custom gate"
    activation, weights = experts.act_fn, experts.gate_up_proj
    if activation is not F.silu and not isinstance(activation, (torch.nn.SiLU, SiLUActivation)):
        return f"their activation is {type(activation).__name__}, not SwiGLU"
    if is_traceable_wrapper_subclass(weights):
        return f"their weights are {type(weights).__name__}"
    return None


def pathmoe_experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Runs SwiGLU experts on any device, as a function of transformers' experts interface.

    Under autocast, it computes in the dtype of autocast, which transformers' own implementations ignore.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, D)`): Hidden states.
        top_k_index (`torch.Tensor` of shape `(T, k)`): Experts of each token. Under transformers' expert parallelism,
            ids from `num_experts` on stand for experts of other ranks and add nothing.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): Weights of these experts.

    Returns:
        `torch.Tensor` of shape `(T, D)`: Weighted sums of the experts' outputs, in the dtype of `hidden_states`.

    Raises:
        ValueError: See [`select_kernel`].
    """
    kernel = select_kernel(self, hidden_states, top_k_index, top_k_weights)
    if kernel == "grouped_mm" and (reason := unsupported_reason(self)):
        logger.warning_once(f"{type(self).__name__} run on transformers' grouped_mm instead of pathmoe: {reason}.")
    return run_kernel(kernel, self, hidden_states, top_k_index, top_k_weights)


def pathmoe_grouped_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Runs SwiGLU experts as [`pathmoe_experts_forward`] does, but on devices other than a CPU with our kernel, where
    torch's grouped product supports the dtype and the device."""
    kernel = select_kernel(self, hidden_states, top_k_index, top_k_weights)
    if kernel == "grouped_mm" and hidden_states.device.type != "cpu" and not unsupported_reason(self):
        kernel = "grouped" if _can_use_grouped_mm(hidden_states, self.down_proj, None) else kernel
    return run_kernel(kernel, self, hidden_states, top_k_index, top_k_weights)


def run_kernel(
    kernel: str,
    experts: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Runs the kernel that [`select_kernel`] returned."""
    if kernel in ("grouped_mm", "batched_mm"):
        return ALL_EXPERTS_FUNCTIONS[kernel](experts, hidden_states, top_k_index, top_k_weights)

    run = {"loop": loop.run, "token": loop.run_token, "grouped": grouped.run}[kernel]
    dtype, device_type = compute_dtype(hidden_states, experts), hidden_states.device.type
    inputs = (hidden_states, top_k_weights, experts.gate_up_proj, experts.down_proj)
    x, weights, *projections = (tensor.to(dtype) for tensor in inputs)
    with no_autocast(device_type):
        return run(x, top_k_index, weights, *projections).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register("pathmoe", pathmoe_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("pathmoe_grouped", pathmoe_grouped_forward)
