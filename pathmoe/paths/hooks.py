# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Finds the routers of a model and edits their decisions."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel


@dataclass(frozen=True)
class RoutedModel:
    """The properties that two models must share for the paths of one to be valid in the other.

    Attributes:
        model_type (`str`): The configuration's `model_type`.
        num_layers (`int`): Number of routed layers; dense ones are not counted.
        num_experts (`int`): Experts per layer.
        top_k (`int`): Experts per token and layer.
        layer_to_block (`tuple[int, ...]`): The router of each layer; 0, 1, 2, … where each layer has its own.
        router_hash (`str` or `None`): Hash of the routers' parameters, rounded to bfloat16 so that it does not depend
            on the precision in which a model is loaded. `None` if some parameters are missing, as when they are
            sharded, and in traces of versions without it. Random routers drawn with the same seed have the same hash.
    """

    model_type: str
    num_layers: int
    num_experts: int
    top_k: int
    layer_to_block: tuple[int, ...]
    router_hash: str | None = None

    def check_same(self, other: "RoutedModel"):
        """Refuses a trace (`self`) of a model that has a different shape than `other`.

        Raises:
            ValueError: If it has; lists all fields that differ.
        """
        differences = [
            f"{name} is {value!r} in the trace and {getattr(other, name)!r} in the model"
            for name, value in vars(self).items()
            if name != "router_hash" and value != getattr(other, name)
        ]
        if differences:
            raise ValueError(
                f"This trace belongs to a different model: {'; '.join(differences)}. Record a trace of this model."
            )

    def check_routers(self, other: "RoutedModel", advice: str = "Record a trace of this model."):
        """Refuses a trace (`self`) of a model whose routers have different parameters than those of `other`.

        Raises:
            ValueError: If they differ, or cannot be compared; the message ends with `advice`.
        """
        if self.router_hash is None or other.router_hash is None:
            raise ValueError(
                "This trace cannot be compared with the model: router_hash is None in the "
                f"{'trace' if self.router_hash is None else 'model'}, whose router parameters are sharded or not "
                f"known. {advice}"
            )
        if self.router_hash != other.router_hash:
            raise ValueError(
                "This trace belongs to a different model: the parameters of the routers differ, "
                f"router_hash is {self.router_hash} in the trace and {other.router_hash} in the model. {advice}"
            )


class Routing:
    """The routers of a model, and the module whose forward routes each token once.

    Args:
        model (`torch.nn.Module`): A mixture-of-experts model of transformers, or a wrapper around one.

    Attributes:
        decoder (`PreTrainedModel`): The smallest model that holds all routers.
        routers (`list[torch.nn.Module]`): In the order of their layers.
        layer_to_block (`tuple[int, ...]`): The index in `routers` of each routed layer's router.

    Raises:
        TypeError: If the model declares no routers that return `(logits, weights, indices)`.
    """

    def __init__(self, model: nn.Module):
        check_type("model", model, nn.Module)
        routers = {}
        for part in model.modules():
            recorders = getattr(part, "_can_record_outputs", None) or {} if isinstance(part, PreTrainedModel) else {}
            recorder = recorders.get("router_logits")
            # Index 0: transformers records the logits as the first output of such routers.
            if recorder is None or getattr(recorder, "index", None) != 0:
                continue
            for name, module in part.named_modules():
                in_place = f".{recorder.layer_name.strip('.')}." in f".{name}." if recorder.layer_name else True
                if in_place and recorder.target_class and isinstance(module, recorder.target_class):
                    routers[module] = None
        if not routers:
            raise TypeError(
                f"{type(model).__name__} has no routers that are recognised: use a mixture-of-experts model whose "
                "_can_record_outputs['router_logits'] names, with index 0, a router module that returns "
                "(logits, weights, indices), such as PathMoE, OLMoE, Qwen2-MoE, Qwen3-MoE or Mixtral."
            )
        self.name = type(model).__name__
        self.routers = list(routers)
        self.decoder = [
            part
            for part in model.modules()
            if isinstance(part, PreTrainedModel) and routers.keys() <= set(part.modules())
        ][-1]
        # A PathMoE router lists the layers that share it; other routers serve one layer each.
        self._layers = {router: getattr(router, "layers", [i]) for i, router in enumerate(self.routers)}
        blocks = {layer: block for block, layers in enumerate(self._layers.values()) for layer in layers}
        self._places = {layer: place for place, layer in enumerate(sorted(blocks))}
        self.layer_to_block = tuple(blocks[layer] for layer in self._places)
        self._arguments = list(inspect.signature(self.decoder.forward).parameters)

    def layer_of(self, router: nn.Module, args: tuple, kwargs: dict) -> int:
        """Returns the routed layer that calls the router with these arguments. Dense layers are not counted."""
        layers = self._layers[router]
        return self._places[layers[0] if len(layers) == 1 else self.index_of(args, kwargs)]

    @staticmethod
    def index_of(args: tuple, kwargs: dict) -> int:
        """Returns the index of the layer that calls a PathMoE's router with these arguments, among all layers."""
        return kwargs["layer_idx"] if "layer_idx" in kwargs else args[1]

    def arguments(self, args: tuple, kwargs: dict) -> dict:
        """Returns the arguments of a forward of the decoder, by name."""
        return dict(zip(self._arguments, args)) | kwargs

    def check_output(self, router: nn.Module, output):
        """Refuses a router that does not return `(logits, weights, indices)`.

        Raises:
            TypeError: If it does not; names the model and the router.
        """
        if not (
            isinstance(output, tuple)
            and len(output) >= 3
            and all(isinstance(tensor, torch.Tensor) for tensor in output[:3])
            and output[1].shape == output[2].shape
            and not output[2].is_floating_point()
        ):
            raise TypeError(
                f"The router {type(router).__name__} of {self.name} does not return (logits, weights, indices): its "
                "paths cannot be recorded or edited."
            )

    @contextmanager
    def hooked(self, model: nn.Module, on_call, on_start, on_route, on_forward) -> Iterator[None]:
        """Hooks the calls of `model` and its decoder, and the starts, routers and ends of the decoder's forwards."""
        with ExitStack() as hooks:
            for handle in (
                *(module.register_forward_pre_hook(on_call, with_kwargs=True) for module in {model, self.decoder}),
                *(router.register_forward_hook(on_route, with_kwargs=True) for router in self.routers),
                self.decoder.register_forward_pre_hook(on_start, with_kwargs=True),
                self.decoder.register_forward_hook(on_forward),
            ):
                hooks.callback(handle.remove)
            yield

    def check_layers(self, count: int):
        """Refuses a forward that has passed through `count` routed layers, if the model has a different number.

        Raises:
            ValueError: If it has.
        """
        layers = len(self.layer_to_block)
        if count != layers:
            raise ValueError(
                f"{self.name} has {layers} routed layers, but this forward passed through {count}: its paths cannot "
                "be recorded."
            )

    def describe(self, num_experts: int, top_k: int) -> RoutedModel:
        """Describes the model. E and k come from a router's output, since configurations use different names."""
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1.")
        layers, model_type = len(self.layer_to_block), self.decoder.config.model_type
        return RoutedModel(model_type, layers, num_experts, top_k, self.layer_to_block, self.router_hash)

    @cached_property
    def router_hash(self) -> str | None:
        """The hash of [`RoutedModel`], computed on first access."""
        digest = hashlib.blake2b(digest_size=8)
        for router in self.routers:
            with _loaded(router):
                for name, tensor in router.state_dict().items():
                    if isinstance(tensor, DTensor) or tensor.is_meta or not tensor.numel():
                        return None
                    if tensor.is_floating_point():
                        tensor = tensor.bfloat16()
                    digest.update(f"{name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


def _loaded(module: nn.Module) -> AbstractContextManager:
    """Returns a context in which parameters that accelerate has offloaded are loaded."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def check_indices(what: str, indices: torch.Tensor, shape: tuple[int, ...], num_experts: int, different: bool = False):
    """Refuses expert indices that are not integers, do not have the shape `shape`, or are out of range.

    Args:
        what (`str`): The name of the indices in messages.
        indices (`torch.Tensor`): The indices.
        shape (`tuple[int, ...]`): The shape that they must have.
        num_experts (`int`): Number of experts in a layer.
        different (`bool`, defaults to `False`): Whether the k experts of a token in a layer must differ.

    Raises:
        TypeError: If they are not a tensor.
        ValueError: If they are refused; the message begins with `what`.
    """
    check_type(what, indices, torch.Tensor)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{what} has dtype {indices.dtype}, but must have an integer dtype.")
    if indices.shape != shape:
        raise ValueError(f"{what} has shape {tuple(indices.shape)}, but must have shape {tuple(shape)}.")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_experts:
        raise ValueError(
            f"{what} has indices from {int(indices.min())} to {int(indices.max())}, but experts are 0 to "
            f"{num_experts - 1}."
        )
    if different and (indices.long().sort(dim=-1).values.diff(dim=-1) == 0).any():
        raise ValueError(f"{what} has an expert twice for one token in one layer: give each k different ones.")


def check_token_ids(what: str, ids: torch.Tensor, vocab_size: int | None):
    """Refuses token ids that are not a list of integers of the vocabulary; -1 stands for an embedding.

    Raises:
        ValueError: If they are refused; the message begins with `what`.
    """
    if ids.ndim != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"{what} has shape {tuple(ids.shape)} and dtype {ids.dtype}, but must be a list of integers.")
    if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < (vocab_size or 2**31):
        raise ValueError(
            f"{what} has token ids from {int(ids.min())} to {int(ids.max())}, but the model's vocabulary has "
            f"{vocab_size}: pass the tokens of this model."
        )


def check_type(what: str, value: object, kind: type):
    """Refuses a value of a different type.

    Raises:
        TypeError: If `value` is not a `kind`; the message begins with `what`.
    """
    if not isinstance(value, kind):
        shown = " ".join(repr(value).split())[:80]
        raise TypeError(f"{what}={shown} must be a {kind.__name__}, not a {type(value).__name__}.")


def check_limit(limit: int) -> int:
    """Refuses a `memory_limit` that is not a number or negative, and returns any other."""
    if not isinstance(limit, int | float) or limit < 0:
        raise ValueError(f"memory_limit={limit!r} must be at least 0 bytes, as a number.")
    return limit


class _Calls(TorchFunctionMode):
    """Records the results of torch calls, replaces some of them, and tracks the tensors that are computed from them.

    Args:
        answer (`Callable`): Returns the result of a call from its number, its original result and its positional
            arguments.
        followed (`Iterable[int]`): Numbers of the calls from which tensors are tracked.
    """

    def __init__(self, answer: Callable = lambda number, result, args: result, followed: Iterable[int] = ()):
        super().__init__()
        self.answer, self.followed = answer, followed
        self.results = []  # keeps every result alive, so that no id is used twice
        self.derived = set()  # the ids of tensors that are computed from followed calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        number = len(self.results)
        result = self.answer(number, func(*args, **(kwargs or {})), args)
        self.results.append(result)
        if number in self.followed or any(id(tensor) in self.derived for tensor in _tensors((args, kwargs))):
            self.derived.update(id(tensor) for tensor in _tensors(result))
        return result

    def that_return(self, tensor: torch.Tensor) -> list[int]:
        """Returns the numbers of the calls that returned this tensor object, alone or with others."""
        return [n for n, result in enumerate(self.results) if any(part is tensor for part in _tensors(result))]


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _decide(
    router: nn.Module, decision: Callable[[], tuple], logits: torch.Tensor | None, indices: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Repeats a router's decision with different logits or indices.

    Architectures differ in how they compute weights from logits (softmax before or after the choice, sigmoid, a bias,
    renormalisation, scaling). So the decision is made twice: once to see which torch calls returned its logits and its
    indices, and once with the results of those calls replaced.

    Args:
        router (`torch.nn.Module`): The router.
        decision (`Callable`): Takes no arguments and returns `(logits, weights, indices, …)`.
        logits (`torch.Tensor`, *optional*): Replaces the router's logits.
        indices (`torch.Tensor`, *optional*): Replaces the router's indices.

    Raises:
        TypeError: If no torch call returned the tensor to replace, or the weights are not computed from it.
    """
    with _Calls() as calls:
        old_logits, _, old_indices, *_ = decision()
    # Several calls may return the same tensor, such as `.float()` of a float32 tensor.
    of_logits = calls.that_return(old_logits) if logits is not None else []
    of_indices = calls.that_return(old_indices) if indices is not None else []

    def answer(number, result, args):
        if number in of_logits:
            return logits.to(result.dtype, copy=True)
        if number in of_indices:
            chosen = indices.to(old_indices, copy=True)
            # A top-k also returns the scores of its choice.
            return (args[0].gather(-1, chosen), chosen) if isinstance(result, tuple) else chosen
        return result

    with _Calls(answer, followed=of_logits if indices is None else of_indices) as calls:
        decided = decision()[:3]
    if (logits is not None or indices is not None) and id(decided[1]) not in calls.derived:
        raise TypeError(
            f"The router {type(router).__name__} does not compute its weights from its logits and top-k indices in a "
            "way that can be repeated with different ones: its paths can be recorded, but not edited or replayed."
        )
    return decided


@contextmanager
def edit_paths(
    model: nn.Module,
    edit_indices: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    *,
    edit_logits: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    edit_hidden_states: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    keep_weights: bool = False,
) -> Iterator[None]:
    """Lets functions edit the input, the logits or the choice of each layer's router, in any forward or `generate`.

    The first argument of each function is the index of the routed layer. T includes padding tokens. Where a block
    shares one decision, an edit changes one layer only, and later layers repeat the unedited decision. Gradient
    checkpointing computes layers twice, and the functions must then return the same both times.

    Args:
        model (`torch.nn.Module`): A model that [`record_paths`] accepts.
        edit_indices (`Callable`, *optional*): `(layer_idx, logits (T, E), indices (T, k)) -> indices (T, k)`. The
            router computes the weights of the new experts from its logits, as for its own choice.
        edit_logits (`Callable`, *optional*): `(layer_idx, logits (T, E)) -> logits (T, E)`, from which the router
            then chooses.
        edit_hidden_states (`Callable`, *optional*): `(layer_idx, hidden_states) -> hidden_states`, which only the
            router sees.
        keep_weights (`bool`, defaults to `False`): Whether the i-th new expert gets the weight of the router's i-th.

    Raises:
        TypeError: If the model has no routers that are recognised, or computes weights in a way that edits cannot
            follow.
        ValueError: If `edit_indices` returns indices of a different shape or outside of 0 … E - 1.

    Example:

    ```python
    >>> with edit_paths(model, lambda layer_idx, logits, indices: (indices + 1) % logits.shape[-1]):
    ...     model(**tokenizer("The quick brown fox", return_tensors="pt"))
    ```
    """
    routing = Routing(model)

    def on_hidden_states(router, args, kwargs):
        layer_idx = routing.layer_of(router, args, kwargs)
        return (edit_hidden_states(layer_idx, args[0]), *args[1:]), kwargs

    def on_route(router, args, kwargs, output):
        routing.check_output(router, output)
        layer_idx = routing.layer_of(router, args, kwargs)
        logits, weights, indices, *rest = output

        def decide(new_logits, new_indices):
            if not hasattr(router, "choose"):
                return _decide(router, lambda: router.forward(*args, **kwargs), new_logits, new_indices)
            # PathMoE's `choose` is separate from scoring. Where a block shares its decision, later layers skip it.
            scores = logits if new_logits is None else new_logits
            index = routing.index_of(args, kwargs)
            return _decide(router, lambda: (scores, *router.choose(scores, index)), None, new_indices)

        new_logits = None
        if edit_logits is not None:
            new_logits = edit_logits(layer_idx, logits)
            logits, weights, indices = decide(new_logits, None)
        if edit_indices is not None:
            edited = edit_indices(layer_idx, logits, indices)
            check_indices(f"The result of edit_indices for layer {layer_idx}", edited, indices.shape, logits.shape[-1])
            indices = edited
            if not keep_weights:
                logits, weights, indices = decide(new_logits, edited)
        return logits, weights.to(output[1].dtype), indices.to(output[2].dtype), *rest

    handles = []
    for router in routing.routers:
        if edit_hidden_states is not None:
            handles.append(router.register_forward_pre_hook(on_hidden_states, with_kwargs=True))
        if edit_indices is not None or edit_logits is not None:
            # Before all other hooks, so that they record the edited decision.
            handles.append(router.register_forward_hook(on_route, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def balance_routing(model: nn.Module) -> AbstractContextManager[None]:
    """Sends the same number of tokens to each expert of a layer, up to one, to measure speed and memory.

    Without it, an untrained router may overload a few experts, so that a profile depends on chance. The experts of a
    token follow from its place in the batch, and their weights from the router's logits, as for its own choice. The
    context manager changes neither parameters nor configuration, so no checkpoint is routed this way.

    Args:
        model (`torch.nn.Module`): A model that [`edit_paths`] accepts.

    Raises:
        TypeError: As in [`edit_paths`].

    Example:

    ```python
    >>> with balance_routing(model):
    ...     benchmark(model)
    ```
    """

    def take_turns(layer_idx, logits, indices):
        turns = torch.arange(indices.numel(), device=indices.device) + layer_idx
        return (turns % logits.shape[-1]).view_as(indices).to(indices.dtype)

    return edit_paths(model, take_turns)
