# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Estimates how much memory a recipe takes on each GPU, without a GPU.

    pathmoe plan --config RECIPE.yaml [--gpus 8 16 64] [--memory 80 141] [--field value …]

Parameters, gradients and optimizer state follow from the number of ranks. Temporary tensors (activations, logits,
gradients of activations) are counted in a run of two and of three layers with fake tensors, which have sizes but no
contents, and are extrapolated linearly to the number of layers. A model with dense layers is run with all of its
layers. Norms are counted as on a CPU. On a GPU, each norm keeps one more tensor of the size of its input: 4 GB for the
paper's 16B model without checkpointing.
"""

import dataclasses
import functools
import json
import math
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations import moe

from pathmoe.accounting import count_parameters
from pathmoe.command import ArgumentParser
from pathmoe.markdown import markdown_table
from pathmoe.train.model import build_config
from pathmoe.train.recipe import MAX_COUNT, Recipe, RecipeError, parse_recipe


GB = 1e9


@dataclasses.dataclass
class Memory:
    """The peak memory of each rank during a step, in bytes.

    Args:
        states (`float`): float32 parameters, gradients and AdamW moments.
        gathered (`float`): Gathered copies of sharded weights, and the gradients of these before they are scattered.
        working (`float`): Activations, logits and temporary tensors.
    """

    states: float
    gathered: float
    working: float

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.working


def plan_memory(recipe: Recipe, config: PreTrainedConfig, engine: str, ranks: int) -> Memory:
    """Estimates the memory of one rank.

    Args:
        recipe (`Recipe`): The recipe.
        config (`PreTrainedConfig`): The model's configuration.
        engine (`str`): `"cpu"`, `"gpu"`, `"ddp"`, `"fsdp"` or `"fsdp_ep"`.
        ranks (`int`): Number of processes.
    """
    sharded = engine.startswith("fsdp")
    total, half = count_parameters(config)["total"], 2 if recipe.precision == "bf16" else 4
    share = total / (ranks if sharded else 1)
    dense = getattr(config, "mlp_only_layers", None) or []
    routed = config.num_hidden_layers - len(dense)
    if dense:  # the peak depends on the order of the layers
        working = trace_working_memory(recipe, config, config.num_hidden_layers, cast=sharded, dense=dense)
    else:
        two, three = (trace_working_memory(recipe, config, layers, cast=sharded) for layers in (2, 3))
        working = two + (three - two) * (routed - 2)
    states = 16 * share
    if engine != "ddp" and recipe.batch_size <= recipe.micro_batch_size * ranks:
        # With one micro-batch per step, there are no gradients yet when the activations are at their peak. When all
        # gradients exist, only the activations of the first layer are left. (DDP always holds the gradients.)
        late = 4 * share + trace_working_memory(recipe, config, 0, cast=sharded)
        states, working = 12 * share, max(working, late)
    rows = recipe.micro_batch_size * recipe.sequence_length * getattr(config, "num_experts_per_tok", 0)
    implementation = recipe.experts_implementation or ("pathmoe" if config.model_type == "pathmoe" else "grouped_mm")
    if implementation == "pathmoe":
        # The outputs of all experts before they are summed: they exist inside an operator, which tracing does not see.
        working += rows * config.hidden_size * half
    gathered = 0.0
    if sharded and ranks > 1:
        embeddings = config.vocab_size * config.hidden_size
        experts = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size
        mlp = 3 * config.hidden_size * config.intermediate_size if dense else 0
        others = total - (1 if config.tie_word_embeddings else 2) * embeddings - routed * experts - len(dense) * mlp
        if engine == "fsdp_ep":
            experts /= recipe.ep_size
        layer = others / config.num_hidden_layers + max(experts, mlp)
        # The current layer and the next one, and the float32 buffer in which the layer's gradients are reduced.
        gathered = half * max(2 * layer, layer + embeddings) + 4 * layer
        if engine == "fsdp_ep":
            kept = 1 if recipe.gradient_checkpointing else routed
            # Tokens sent to and received from other ranks. Where the experts keep the sorted tokens, the received ones
            # replace them.
            working += (2 if implementation == "pathmoe" else 1) * kept * rows * config.hidden_size * half
    return Memory(states, gathered, working)


def trace_working_memory(
    recipe: Recipe, config: PreTrainedConfig, layers: int, cast: bool, dense: Sequence[int] = ()
) -> float:
    """Measures the peak memory of a forward and backward in bytes, without the parameters.

    Args:
        recipe (`Recipe`): The recipe.
        config (`PreTrainedConfig`): The model's configuration.
        layers (`int`): Number of layers to run; 0 stands for one layer without the head and the loss.
        cast (`bool`): Whether the weights are cast to bfloat16 (sharded) or autocast is used, if the precision is
            `"bf16"`.
        dense (`list[int]`, *optional*): The layers that are dense.
    """
    fields = config.to_dict() | {"num_hidden_layers": layers or 1, "router_block_size": 1}
    fields["mlp_only_layers"] = list(dense)
    names = ("micro_batch_size", "sequence_length", "precision", "gradient_checkpointing")
    names += ("attn_implementation", "experts_implementation")
    return _trace(json.dumps(fields), *(getattr(recipe, name) for name in names), cast, layers > 0)


@functools.cache
def _trace(fields, rows, length, precision, checkpointing, attention, experts, cast, head) -> float:
    fields, bf16 = json.loads(fields), precision == "bf16"
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    # grouped_mm does not support fake float32 tensors; the fallback of transformers does.
    with FakeTensorMode(), mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: bf16):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if bf16 and cast else torch.float32,
            **({} if attention is None else {"attn_implementation": attention}),
            **({} if experts is None else {"experts_implementation": experts}),
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():  # `Memory.states` counts the gradients of parameters
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        positions = torch.arange(length).expand_as(tokens)
        with PeakMemory(known=list(model.parameters())) as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not cast):
                inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
                if head:
                    # As in training, which does not hold all logits unless the head is sharded (like all weights).
                    loss_only = {"skip_logits": True} if config.model_type == "pathmoe" and not cast else {}
                    loss = model(**inputs, labels=tokens, num_items_in_batch=1, **loss_only).loss
                else:
                    loss = model.base_model(**inputs).last_hidden_state.sum()
            loss.backward()
        return memory.peak


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of all tensors that are created and freed, and their peak.

    torch's own memory tracker cannot follow modules whose parameters are replaced for a call, as those of the experts
    are under autocast.

    Args:
        known (`list[torch.Tensor]`): Tensors that are not counted.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.storages = WeakIdKeyDictionary()
        for tensor in known:
            self.storages[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[storage] = True
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int):
        self.now -= size


def plan(args: list[str]) -> str:
    """Formats a table of the memory per GPU, with and without the options that save memory."""
    parser = ArgumentParser(prog=f"{Path(sys.argv[0]).name} plan", description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+")
    parser.add_argument("--memory", type=float, nargs="+", default=[80, 141], metavar="GB")
    options, fields = parser.parse_known_args(args)
    for gpus in options.gpus or []:
        if not 1 <= gpus <= MAX_COUNT:
            parser.error(f"--gpus {gpus} must be from 1 to {MAX_COUNT:,}.")
    for size in options.memory:
        if not 0 < size < math.inf:
            parser.error(f"--memory {size:g} must be a positive number of GB.")
    recipe = parse_recipe(fields)
    config = build_config(recipe)
    if config.model_type != "pathmoe":
        raise RecipeError(f"model={recipe.model!r}: plan supports PathMoE models, not {config.model_type}.")
    micro_batches, rest = divmod(recipe.batch_size, recipe.micro_batch_size)
    options.gpus = options.gpus or [gpus for gpus in (8, 16, 64) if micro_batches % gpus == 0] or [1]
    if config.num_experts % recipe.ep_size or all(gpus % recipe.ep_size for gpus in options.gpus):
        raise RecipeError(
            f"ep_size={recipe.ep_size} must divide num_experts={config.num_experts} and the number of GPUs "
            f"(--gpus {' '.join(map(str, options.gpus))})."
        )
    for gpus in options.gpus:
        if rest or micro_batches % gpus:
            raise RecipeError(
                f"batch_size={recipe.batch_size} must be a multiple of micro_batch_size={recipe.micro_batch_size} "
                f"times the number of GPUs (--gpus {gpus})."
            )
    count = count_parameters(config)
    head = ["GPUs", "engine", "checkpointing", "states", "gathered", "working", "total"]
    head += [f"fits {size:g} GB" for size in options.memory]
    rows = []
    expert_sizes = sorted({1, 8, recipe.ep_size})
    for gpus in options.gpus:
        for ep_size in expert_sizes:
            if gpus % ep_size or config.num_experts % ep_size:
                continue
            for checkpointing in (False, True):
                variant = dataclasses.replace(recipe, ep_size=ep_size, gradient_checkpointing=checkpointing)
                memory = plan_memory(variant, config, "fsdp" if ep_size == 1 else "fsdp_ep", gpus)
                cells = [gpus, "FSDP2" if ep_size == 1 else f"FSDP2 x EP {ep_size}", "yes" if checkpointing else "no"]
                cells += [f"{part / GB:.1f}" for part in (memory.states, memory.gathered, memory.working)]
                cells += [f"{memory.total / GB:.1f}"]
                cells += ["yes" if memory.total < 0.95 * size * GB else "no" for size in options.memory]
                rows.append(cells)
    return (
        f"{count['total']:,} parameters, {recipe.micro_batch_size} x {recipe.sequence_length:,} tokens in a "
        f"micro-batch, {recipe.precision}. GB per GPU; 5 % are reserved for the allocator and the libraries.\n\n"
        + markdown_table(head, rows, left=(1, 2, *range(7, len(head))))
    )
