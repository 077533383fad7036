# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""How much memory a recipe takes on each GPU, before one is rented.

    pathmoe plan --config RECIPE.yaml [--gpus 8 16 64] [--memory 80 141] [--field value …]

Parameters, gradients and optimizer state follow from the number of ranks. What a step holds for a while (activations,
logits, gradients on their way) is counted while two and three layers of the model run with fake tensors, which have
sizes and no contents, and is linear in the number of layers. Norms count as on a CPU; on a GPU each keeps one more
tensor of its input's size: 4 GB of the paper's 16B model without checkpointing.
"""

import dataclasses
import functools
import json
import math
import sys
import weakref
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
    """Bytes on each rank at the worst moment of a step.

    Args:
        states (`float`): float32 parameters, gradients and AdamW moments.
        gathered (`float`): Copies of sharded weights in use, and their gradients before they are scattered.
        working (`float`): Activations, logits and temporary tensors.
    """

    states: float
    gathered: float
    working: float

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.working


def plan_memory(recipe: Recipe, config: PreTrainedConfig, engine: str, ranks: int) -> Memory:
    """Plans the memory of one rank.

    Args:
        recipe (`Recipe`): The recipe; its micro-batch, length, precision, checkpointing and `ep_size` count.
        config (`PreTrainedConfig`): The model's configuration.
        engine (`str`): `"cpu"`, `"gpu"`, `"ddp"`, `"fsdp"` or `"fsdp_ep"`.
        ranks (`int`): Number of processes.
    """
    sharded = engine.startswith("fsdp")
    total, half = count_parameters(config)["total"], 2 if recipe.precision == "bf16" else 4
    share = total / (ranks if sharded else 1)
    two, three = (trace_working_memory(recipe, config, layers, cast=sharded) for layers in (2, 3))
    working = two + (three - two) * (config.num_hidden_layers - 2)
    states = 16 * share
    if engine != "ddp" and recipe.batch_size <= recipe.micro_batch_size * ranks:
        # One micro-batch a step: when its activations are most, there are no gradients yet; when all gradients are
        # there, only the first layer is left. (DDP holds the gradients all the time.)
        late = 4 * share + trace_working_memory(recipe, config, 0, cast=sharded)
        states, working = 12 * share, max(working, late)
    rows = recipe.micro_batch_size * recipe.sequence_length * getattr(config, "num_experts_per_tok", 0)
    implementation = recipe.experts_implementation or ("pathmoe" if config.model_type == "pathmoe" else "grouped_mm")
    if implementation == "pathmoe":
        # What all experts give, before it is summed up: inside an operator, where tracing does not look.
        working += rows * config.hidden_size * half
    gathered = 0.0
    if sharded and ranks > 1:
        embeddings = config.vocab_size * config.hidden_size
        layer = (total - (1 if config.tie_word_embeddings else 2) * embeddings) / config.num_hidden_layers
        experts = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size
        if engine == "fsdp_ep":
            layer -= experts * (1 - 1 / recipe.ep_size)
        # The layer at work and the next one; then the float32 buffer in which the layer's gradients are summed up.
        gathered = half * max(2 * layer, layer + embeddings) + 4 * layer
        if engine == "fsdp_ep":
            kept = 1 if recipe.gradient_checkpointing else config.num_hidden_layers
            # Tokens that were sent to the experts of other ranks, and those that came; the latter take the place of
            # the sorted ones where the experts keep these.
            working += (2 if implementation == "pathmoe" else 1) * kept * rows * config.hidden_size * half
    return Memory(states, gathered, working)


def trace_working_memory(recipe: Recipe, config: PreTrainedConfig, layers: int, cast: bool) -> float:
    """The most bytes that a forward and backward of a model with so many layers holds, its parameters left aside.

    Args:
        recipe (`Recipe`): The recipe.
        config (`PreTrainedConfig`): The model's configuration.
        layers (`int`): Number of layers to run; 0 stands for a single one without the head and the loss.
        cast (`bool`): Whether bfloat16 is what the weights are held in (sharded), or what autocast makes of them.
    """
    fields = config.to_dict() | {"num_hidden_layers": layers or 1, "router_block_size": 1}
    names = ("micro_batch_size", "sequence_length", "precision", "gradient_checkpointing")
    names += ("attn_implementation", "experts_implementation")
    return _trace(json.dumps(fields), *(getattr(recipe, name) for name in names), cast, layers > 0)


@functools.cache
def _trace(fields, rows, length, precision, checkpointing, attention, experts, cast, head) -> float:
    fields, bf16 = json.loads(fields), precision == "bf16"
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    # grouped_mm does not know float32 tensors that are fake; transformers' stand-in for it does.
    with FakeTensorMode(), mock.patch.object(moe, "_can_use_grouped_mm", lambda *_: bf16):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if bf16 and cast else torch.float32,
            **({} if attention is None else {"attn_implementation": attention}),
            **({} if experts is None else {"experts_implementation": experts}),
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():  # gradients that stay are counted among the states
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        positions = torch.arange(length).expand_as(tokens)
        with PeakMemory(known=list(model.parameters())) as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not cast):
                inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
                if head:
                    # As in training: without all logits, unless the head is sharded, as all weights are then.
                    alone = {"skip_logits": True} if config.model_type == "pathmoe" and not cast else {}
                    loss = model(**inputs, labels=tokens, num_items_in_batch=1, **alone).loss
                else:
                    loss = model.base_model(**inputs).last_hidden_state.sum()
            loss.backward()
        return memory.peak


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being and pass away, but for the known ones. (torch's own memory
    tracker cannot follow modules whose parameters are replaced for a call, as those of the experts are in autocast.)

    Args:
        known (`list[torch.Tensor]`): Tensors that do not count.
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
    """A table of the memory per GPU, for the recipe as it is and with the options that save memory."""
    parser = ArgumentParser(prog=f"{Path(sys.argv[0]).name} plan", description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--memory", type=float, nargs="+", default=[80, 141], metavar="GB")
    options, rest = parser.parse_known_args(args)
    for gpus in options.gpus:
        if not 1 <= gpus <= MAX_COUNT:
            parser.error(f"--gpus {gpus} must be from 1 to {MAX_COUNT:,}.")
    for size in options.memory:
        if not 0 < size < math.inf:
            parser.error(f"--memory {size:g} must be a positive number of GB.")
    recipe = parse_recipe(rest)
    config = build_config(recipe)
    if config.model_type != "pathmoe":
        raise RecipeError(f"model={recipe.model!r}: plan knows the memory of PathMoE, not of {config.model_type}.")
    if config.num_experts % recipe.ep_size or all(gpus % recipe.ep_size for gpus in options.gpus):
        raise RecipeError(
            f"ep_size={recipe.ep_size} must divide num_experts={config.num_experts} and the number of GPUs "
            f"(--gpus {' '.join(map(str, options.gpus))})."
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
        f"micro-batch, {recipe.precision}. GB per GPU; a twentieth is left to the allocator and the libraries.\n\n"
        + markdown_table(head, rows, left=(1, 2, *range(7, len(head))))
    )
