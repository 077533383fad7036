# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains chosen experts, routers and other parameters of a mixture-of-experts model, and freezes the rest."""

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pathmoe.paths.hooks import Routing


class TrainOnly:
    """The choice that [`train_only`] has made. As a context manager, it ends with the `with` block.

    Attributes:
        parameters (`dict[str, torch.nn.Parameter]`): The parameters that are trained, by name.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[nn.Parameter, torch.Tensor | None]):
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._before = {parameter: parameter.requires_grad for parameter in self._names}
        self._frozen = {parameter: ~trained for parameter, trained in chosen.items() if trained is not None}
        self._checked: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self.parameters = {name: parameter for parameter, name in self._names.items() if parameter in chosen}
        for parameter in self._names:
            parameter.requires_grad_(parameter in chosen)
        self._handles = [
            parameter.register_hook(lambda grad, frozen=frozen: grad.masked_fill(frozen.to(grad.device), 0))
            for parameter, frozen in self._frozen.items()
        ]
        self._handles.append(register_optimizer_step_pre_hook(self._check))

    def _check(self, optimizer: torch.optim.Optimizer, args, kwargs):
        """Refuses an optimizer that would move frozen experts although their gradients are zero."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                frozen = self._frozen.get(parameter)
                if frozen is None:
                    continue
                name = self._names[parameter]
                if group.get("weight_decay"):
                    raise ValueError(
                        f"weight_decay={group['weight_decay']} would change the frozen experts in {name}: put the "
                        "parameter into a group with weight_decay=0."
                    )
                values = [] if optimizer in self._checked else list(optimizer.state.get(parameter, {}).values())
                for value in [parameter.grad, *values]:
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        if isinstance(value, DTensor) or value.masked_select(frozen.to(value.device)).any():
                            raise ValueError(
                                f"The optimizer would change the frozen experts in {name}, whose gradient is sharded "
                                "or whose moments are not zero: call train_only on a model that is not sharded, and "
                                "create the optimizer afterwards."
                            )
        self._checked.add(optimizer)

    def remove(self):
        """Lets every parameter be trained that could be trained before."""
        for handle in self._handles:
            handle.remove()
        for parameter, trained in self._before.items():
            parameter.requires_grad_(trained)

    def __enter__(self) -> "TrainOnly":
        return self

    def __exit__(self, *_):
        self.remove()


def train_only(
    model: nn.Module,
    *,
    experts: Mapping[int, Sequence[int] | None] | Literal["all"] | None = None,
    routers: Sequence[int] | Literal["all"] | None = None,
    parameters: Sequence[str] = (),
) -> TrainOnly:
    """Trains chosen experts, routers and other parameters, and freezes the rest.

    The gradients of frozen experts are exactly zero, although they share a three-dimensional parameter with the
    experts that are trained. If adapters of PEFT wrap the experts, the adapters of the chosen experts are trained.
    Call it before the optimizer is created. It cannot choose single experts of a sharded model.

    Args:
        model (`torch.nn.Module`): A mixture-of-experts model that [`record_paths`] accepts and whose experts are
            three-dimensional parameters, as in transformers; or a wrapper around one.
        experts (`dict[int, list[int] or None]` or `"all"`, *optional*): The experts of each routed layer to train;
            `None` in the place of a list means all experts of the layer.
        routers (`list[int]` or `"all"`, *optional*): The routers to train: block numbers of a PathMoE, layers of other
            models.
        parameters (`list[str]`, defaults to `()`): Regular expressions; a parameter is trained whole if one of them
            matches a part of its name.

    Returns:
        `TrainOnly`: Its `remove()` ends the choice; so does the end of a `with` block.

    Raises:
        TypeError: If the model has no routers that are recognised, or no experts of that form.
        ValueError: If a layer, expert, router or pattern does not exist, nothing is chosen, or single experts of a
            sharded parameter are chosen. A step of an optimizer raises it too if weight decay or old moments would
            change frozen experts.

    Example:

    ```python
    >>> with train_only(model, experts={3: [0, 5], 4: None}, routers=[1]):
    ...     trainer.train()
    ```
    """
    chosen: dict[nn.Parameter, torch.Tensor | None] = {}
    for pattern in parameters:
        matching = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not matching:
            raise ValueError(f"parameters: {pattern!r} matches no parameter of the model.")
        chosen |= dict.fromkeys(matching)
    if routers is not None:
        modules = _find_routers(model)
        for number in range(len(modules)) if routers == "all" else routers:
            _check_number("routers", number, len(modules))
            chosen |= dict.fromkeys(modules[number].parameters())
    if experts is not None:
        layers = _find_experts(model)
        for layer, numbers in (dict.fromkeys(range(len(layers))) if experts == "all" else experts).items():
            _check_number("experts: layer", layer, len(layers))
            size, tensors = layers[layer]
            trained = torch.zeros(size, dtype=torch.bool)
            for number in range(size) if numbers is None else numbers:
                _check_number(f"experts[{layer}]: expert", number, size)
                trained[number] = True
            for parameter, mask_of in tensors:
                if isinstance(parameter, DTensor) and not trained.all():
                    raise ValueError(f"experts[{layer}]: the experts are sharded: call train_only before sharding.")
                if trained.any():
                    chosen[parameter] = None if trained.all() else mask_of(trained)
    if not chosen:
        raise ValueError("Nothing would be trained: choose experts, routers or parameters.")
    return TrainOnly(model, chosen)


def _check_number(what: str, number: int, count: int):
    if not isinstance(number, int) or not 0 <= number < count:
        raise ValueError(f"{what} {number!r} does not exist: choose from 0 to {count - 1}.")


def _find_routers(model: nn.Module) -> list[nn.Module]:
    """Returns the routers in the order of their layers, without those that PEFT keeps beside its trained copies."""
    routers = set(Routing(model).routers)
    return [module for name, module in model.named_modules() if module in routers and "original_module" not in name]


def _find_experts(model: nn.Module) -> list[tuple[int, list[tuple[nn.Parameter, Callable]]]]:
    """Returns the experts of each routed layer: their number E, and their parameters or, if PEFT adapts these, those
    of the adapters; each with a function from a mask `(E,)` of experts to a mask that broadcasts to the parameter.

    Raises:
        TypeError: If there is not one module with three-dimensional parameters for each router's layer.
    """
    count = len(Routing(model).layer_to_block)
    layers: dict[nn.Module, tuple[int, list]] = {}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim == 3 for parameter in own) and hasattr(module, "down_proj"):
            layers[module] = (
                len(own[0]),
                [(p, lambda mask, ndim=p.ndim: mask.view(-1, *[1] * (ndim - 1))) for p in own],
            )
    if len(layers) != count:
        raise TypeError(
            f"{type(model).__name__} has {count} routed layers, but {len(layers)} modules with experts as "
            "three-dimensional parameters: train_only cannot choose among its experts."
        )
    adapted = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "parameter_name")]
    for module in adapted:
        layers[module.get_base_layer()][1].clear()
    for module in adapted:  # of PEFT, one for each adapted parameter; A is (E r, in), B is (out, r E)
        tensors = layers[module.get_base_layer()][1]
        for name, rank in module.r.items():
            tensors.append((module.lora_A[name].weight, lambda mask, r=rank: mask.repeat_interleave(r)[:, None]))
            tensors.append((module.lora_B[name].weight, lambda mask, r=rank: mask.repeat(r)[None]))
    return list(layers.values())
