# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The contenders of `bench.py`: models of one shape over one set of parameters, and the calls that are timed."""

import copy
import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    StaticCache,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_pathmoe.cache_pathmoe import CACHE_NAME
from modeling_pathmoe.loss_pathmoe import linear_cross_entropy
from pathmoe import PathMoEConfig
from pathmoe.files import read_json


ROOT = Path(__file__).parents[1]


# A preset and its changed fields: one or two layers of a large model, with a small vocabulary.
SHAPES = {
    "quickstart": ("quickstart", {}),
    "0.9b-layer": ("pathmoe-0.9b", {"num_hidden_layers": 2, "vocab_size": 4096}),
    "16b-layer": ("pathmoe-16b", {"num_hidden_layers": 1, "vocab_size": 4096}),
    "0.9b": ("pathmoe-0.9b", {}),
    "16b": ("pathmoe-16b", {}),
}
OURS, DENSE, FREE = "PathMoE", "dense Qwen3", "experts that cost nothing"
FREE_ROUTING = "routing that costs nothing"
DECODE_STEPS = 8
# Rounds alternate between this many batches.
BATCHES = 4


def free_experts(module, hidden_states, top_k_index, top_k_weights):
    """Experts without any cost, also for gradients and optimizer: the bound of the gain from faster experts."""
    return torch.zeros_like(hidden_states)


ALL_EXPERTS_FUNCTIONS.register(FREE, free_experts)


def free_routing(model: torch.nn.Module):
    """Lets every layer repeat its first decision: the bound of the gain from sharing work between routers."""
    for router in model.model.routers.values():

        def repeat(hidden_states, layer_idx, state, token_ids, decide=router.forward, decided={}):  # noqa: B006
            key = layer_idx, len(hidden_states)
            if key not in decided:
                logits, weights, indices, state = decide(hidden_states, layer_idx, state)
                decided[key] = logits.detach(), weights.detach(), indices, state
            return decided[key]

        router.forward = repeat


def transformers_loss(hidden_states, weight, labels):
    return ForCausalLMLoss(F.linear(hidden_states, weight), labels, vocab_size=weight.shape[0])


# Cross-entropy of hidden states (batch, length, D), output weights (V, D) and labels (batch, length).
OUR_LOSS = "PathMoE, without logits"
LOSSES = {"transformers": transformers_loss, OUR_LOSS: linear_cross_entropy}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison. `sweep` and `value` name a point of the scaling suite."""

    suite: str
    shape: str
    dtype: str
    compiled: bool
    mode: str
    batch: int
    length: int
    sweep: str | None = None
    value: int | None = None

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def experts_alone(self) -> bool:
        return self.suite == "experts" or self.sweep in ("experts", "top_k", "tokens")


def load_config(shape: str, **overrides) -> PathMoEConfig:
    """Returns the configuration of a shape: one of `SHAPES`, or a JSON file."""
    preset, changes = SHAPES.get(shape, (None, {}))
    file = ROOT / "configuration" / "model" / f"{preset}.json" if preset else Path(shape)
    return PathMoEConfig.from_dict({**read_json(file), **changes, **overrides})


def peer_config(name: str, config: PathMoEConfig) -> PreTrainedConfig:
    """Returns the configuration of a peer with the shape of a PathMoE."""
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "rope_parameters")  # fmt: skip
    common = {field: getattr(config, field) for field in same}
    common |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    width, top_k = config.moe_intermediate_size, config.num_experts_per_tok
    if name == DENSE:
        return Qwen3Config(**common, intermediate_size=top_k * width, head_dim=config.head_dim)
    common |= {"num_experts_per_tok": top_k, "router_aux_loss_coef": 0.0}
    if name == "Mixtral":
        return MixtralConfig(
            **common, intermediate_size=width, num_local_experts=config.num_experts, head_dim=config.head_dim
        )
    common |= {"num_experts": config.num_experts, "norm_topk_prob": config.norm_topk_prob}
    if name == "OLMoE":
        return OlmoeConfig(**common, intermediate_size=width)
    return Qwen3MoeConfig(**common, moe_intermediate_size=width, head_dim=config.head_dim)


class Zoo:
    """PathMoE and its peers of one shape, over one set of parameters and of optimizer moments.

    Args:
        config (`PathMoEConfig`): The shape.
        dtype (`torch.dtype`): The dtype of all parameters.
        device (`str`): The device of all parameters.
    """

    def __init__(self, config: PathMoEConfig, dtype: torch.dtype, device: str):
        self.config, self.dtype, self.device = config, dtype, device
        torch.manual_seed(0)
        with torch.device(device):
            self.ours = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.parameters = dict(self.ours.named_parameters())
        self.moments = defaultdict(dict)

    def build(self, name: str, backend: str | None = None) -> torch.nn.Module:
        """Builds a model over the shared parameters. Parameters that no other model has are its own.

        Args:
            name (`str`): `"PathMoE"`, one of the peers, the dense model, or PathMoE with free routing.
            backend (`str`, *optional*): Name of the experts implementation.
        """
        # A copy, because a model writes the name of its backend into its configuration and reads it there.
        ours = name in (OURS, FREE_ROUTING)
        config = copy.deepcopy(self.config) if ours else peer_config(name, self.config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, experts_implementation=backend)
        state = {key: self._parameter(key, parameter.shape) for key, parameter in model.named_parameters()}
        model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        # The frequencies of the rotary embedding are not parameters, and still on the meta device.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(self.device)
        if name == FREE_ROUTING:
            free_routing(model)
        return model

    def _parameter(self, name: str, shape: torch.Size) -> torch.nn.Parameter:
        shared = self.parameters.get(name)
        if shared is not None and shared.shape == shape:
            return shared
        if name.endswith("mlp.gate.weight"):
            block = self.config.layer_to_block[int(name.split(".")[2])]
            return torch.nn.Parameter(self.parameters[f"model.routers.{block}.weight"].detach().clone())
        weight = torch.ones(shape, dtype=self.dtype, device=self.device)
        if weight.ndim > 1:
            weight.normal_(std=self.config.initializer_range)
        return torch.nn.Parameter(weight)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        optimizer.state = self.moments
        return optimizer


@functools.lru_cache(maxsize=1)
def make_zoo(shape: str, dtype: str, device: str, **overrides) -> Zoo:
    return Zoo(load_config(shape, **overrides), getattr(torch, dtype), device)


def zipf(size: int, count: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Draws numbers below `size`, the n-th with a probability proportional to 1/n."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    return torch.multinomial(weights, torch.Size(count).numel(), replacement=True, generator=generator).view(count)


def draw_batches(zoo: Zoo, case: Case) -> list[torch.Tensor]:
    size = (case.batch, case.length)
    return [zipf(zoo.config.vocab_size, size, seed).to(zoo.device) for seed in range(BATCHES)]


def draw_routing(zoo: Zoo, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws experts (T, k) by Zipf's law without repetition, and their weights (T, k)."""
    generator = torch.Generator().manual_seed(seed)
    experts, top_k = zoo.config.num_experts, zoo.config.num_experts_per_tok
    # The largest sums of log-probability and Gumbel noise are a draw without replacement. The frequent experts are
    # drawn too; otherwise successive calls would find the same weights in the cache.
    logits = -torch.arange(1.0, experts + 1).log()[torch.randperm(experts, generator=generator)]
    noise = -torch.empty(tokens, experts).exponential_(generator=generator).log()
    index = (logits + noise).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=generator).softmax(-1)
    return index.to(zoo.device), weights.to(zoo.device, zoo.dtype)


class Contender:
    """A call to be timed.

    Args:
        run (`Callable`): Makes one call and returns a tensor. Takes the number of the round, which selects the batch.
        known (`list[torch.Tensor]`): The tensors that exist before the call.
        forward (`Callable`, *optional*): The forward of a call that is forward and backward.
    """

    def __init__(self, run: Callable[[int], torch.Tensor], known: list[torch.Tensor], forward: Callable | None = None):
        self.run, self.known, self.forward = run, known, forward
        self.first = None

    def start(self, name: str):
        """Makes the first call, which may compile, and keeps its result."""
        self.first = self.run()
        if not self.first.isfinite().all():
            raise SystemExit(f"{name} computes values that are not finite.")


def train_step(zoo: Zoo, case: Case, name: str, backend: str | None) -> Contender:
    model = zoo.build(name, backend).train()
    optimizer = zoo.optimizer(model)
    batches = draw_batches(zoo, case)
    call = torch.compile(model) if case.compiled else model
    # The model is called as in train_accelerate.py.
    alone = {"skip_logits": True} if model.config.model_type == "pathmoe" else {}

    def run(turn=0):
        ids = batches[turn % BATCHES]
        loss = call(input_ids=ids, labels=ids, use_cache=False, **alone).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(run, [*model.parameters(), *model.buffers(), *batches])


def prefill(zoo: Zoo, case: Case, name: str, backend: str | None) -> Contender:
    model = zoo.build(name, backend).eval()
    batches = draw_batches(zoo, case)
    call = torch.compile(model) if case.compiled else model

    @torch.no_grad()
    def run(turn=0):
        return call(input_ids=batches[turn % BATCHES], use_cache=True, logits_to_keep=1).logits

    return Contender(run, [*model.parameters(), *model.buffers(), *batches])


def decode(zoo: Zoo, case: Case, name: str, backend: str | None) -> Contender:
    """Decodes one token per step after `case.length` cached tokens; if compiled, with a static cache as `generate`."""
    model = zoo.build(name, backend).eval()
    ids = zipf(zoo.config.vocab_size, (case.batch, case.length + DECODE_STEPS)).to(zoo.device)
    prompt, steps = ids[:, : case.length], ids[:, case.length :].split(1, dim=1)
    call = torch.compile(model) if case.compiled else model
    if case.compiled:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    else:
        cache = DynamicCache(config=model.config)
    # For a whole prompt, batched_mm would gather more weights than fit in memory.
    reader = zoo.build(name, "grouped_mm").eval() if backend == "batched_mm" else model
    with torch.no_grad():
        reader(input_ids=prompt, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})

    @torch.no_grad()
    def run(turn=0):
        for step in steps:
            logits = call(input_ids=step, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits
        if case.compiled:
            for layer in cache.layers:
                layer.cumulative_length.fill_(case.length)
        else:
            cache.crop(-DECODE_STEPS)
        return logits

    return Contender(run, [*model.parameters(), *model.buffers(), ids])


def run_experts(zoo: Zoo, case: Case, name: str, backend: str | None) -> Contender:
    """Runs the experts alone: forward and backward of one layer, or forwards of all layers on all batches."""
    layers = [layer.mlp.experts for layer in zoo.build(name, backend).model.layers]
    calls = [torch.compile(experts) if case.compiled else experts for experts in layers]
    generator = torch.Generator().manual_seed(0)
    hidden_states, gradient = (
        torch.randn(case.tokens, zoo.config.hidden_size, generator=generator).to(zoo.device, zoo.dtype)
        for _ in range(2)
    )
    draws = [draw_routing(zoo, case.tokens, seed) for seed in range(BATCHES)]
    known = [*zoo.parameters.values(), hidden_states, gradient, *itertools.chain(*draws)]
    if case.mode == "forward":

        @torch.no_grad()
        def run(turn=0):
            for draw in draws:
                for experts in calls:
                    output = experts(hidden_states, *draw)
            return output

        return Contender(run, known)

    trained = [hidden_states, *layers[0].parameters(), *(weights for _, weights in draws)]
    for tensor in trained:
        tensor.requires_grad_()

    def forward(turn=0):
        return calls[0](hidden_states, *draws[turn % BATCHES])

    def run(turn=0):
        output = forward(turn)
        output.backward(gradient)
        for tensor in trained:
            tensor.grad = None
        return output.detach()

    return Contender(run, known, forward)


def run_loss(zoo: Zoo, case: Case, name: str, backend: str | None) -> Contender:
    """Runs a cross-entropy over the preset's whole vocabulary, forward and backward."""
    function = torch.compile(LOSSES[name]) if case.compiled else LOSSES[name]
    config = zoo.config
    torch.manual_seed(0)
    hidden_states = torch.randn(case.batch, case.length, config.hidden_size, dtype=zoo.dtype, device=zoo.device)
    weight = torch.randn(config.vocab_size, config.hidden_size, dtype=zoo.dtype, device=zoo.device) * 0.02
    labels = zipf(config.vocab_size, (case.batch, case.length)).to(zoo.device)
    hidden_states.requires_grad_()
    weight.requires_grad_()

    def run(turn=0):
        loss = function(hidden_states, weight, labels)
        loss.backward()
        hidden_states.grad = weight.grad = None
        return loss.detach()

    return Contender(run, [hidden_states, weight, labels])


BUILDERS = {"train_step": train_step, "prefill": prefill, "decode": decode, "loss": run_loss, "scaling": train_step}
