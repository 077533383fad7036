# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Routers, which choose the experts that a token visits in a layer.

A router belongs to a block of consecutive layers and is called once per layer of that block. In a PathMoE, a block
owns *one* router. Shapes: T tokens, D hidden size, E experts, k chosen experts.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init


def is_exporting() -> bool:
    """Returns whether `torch.export` traces the model. Below torch 2.14, torch also says so in compilations by dynamo,
    which are excluded here."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the dtype of autocast on a type of device, or `None` where autocast is off or unknown."""
    # `torch.amp.is_autocast_available` is false for "meta" only, and torch 2.11 cannot compile it.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def no_autocast(device_type: str) -> AbstractContextManager:
    """Returns a context without autocast: a null context where it is off, which saves time in small decoding steps."""
    return nullcontext() if autocast_dtype(device_type) is None else torch.autocast(device_type, enabled=False)


class PathMoERouter(nn.Module):
    """Base of all routers: turns the scores of `compute_logits` into a top-k choice.

    A subclass implements `compute_logits` and, when it owns parameters or buffers, `init_weights`; it becomes a
    `router_type` through [`register_router`].

    Args:
        config (`PathMoEConfig`): Model configuration.
        layers (`list[int]`): Indices of the layers that share this router, ascending.
    """

    # Whether `router_sharing="decision"` is possible; false where layers of a block route differently by design.
    can_share_decision = True
    # Whether `compute_logits` hands a state from layer to layer. Pipeline stages cannot pass one on.
    carries_state = False
    # Whether `compute_logits` gets the token ids, of shape (T,), as a fourth argument.
    needs_token_ids = False

    def __init__(self, config, layers: list[int]):
        super().__init__()
        self.layers = layers
        self.hidden_size = config.hidden_size
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.shares_decision = config.router_sharing == "decision"
        self.config = config
        # A buffer, since it is saved but never trained, and `from_pretrained` would unfreeze a frozen parameter.
        # It is float32 in any model, because the steps of the bias and the counts are too fine for bfloat16.
        bias = (
            torch.zeros(len(layers), self.num_experts, dtype=torch.float32) if config.router_selection_bias else None
        )
        self.register_buffer("selection_bias", bias)
        self.register_buffer("load", None if bias is None else torch.zeros_like(bias), persistent=False)

    @property
    def bias_update_rate(self) -> float:
        """Step by which an update moves the selection bias: the current value of the config."""
        return self.config.router_bias_update_rate

    def _apply(self, fn, recurse=True):
        kept = {name: buffer for name, buffer in self.named_buffers() if name in ("selection_bias", "load")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def compute_logits(
        self, hidden_states: torch.Tensor, layer_idx: int, state: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores every expert for every token.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`, float32): Normalised input of the layer's experts.
            layer_idx (`int`): Index of the calling layer.
            state (`torch.Tensor` with first dimension T, or `None`): The state that this method returned for the
                previous layer; `None` in the first layer of the model.

        Returns:
            `tuple`: float32 logits of shape `(T, E)` and the state for the next layer.
        """
        raise NotImplementedError

    def init_weights(self, std: float):
        """Initialises all parameters and buffers in place; `std` is the config's `router_initializer_range`,
        or its `initializer_range` where that is unset."""

    def init_selection_bias(self):
        """Sets the selection bias and the counted load to zero."""
        if self.selection_bias is not None:
            init.zeros_(self.selection_bias)
            init.zeros_(self.load)

    def choose(self, logits: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses the k experts of each token and computes their weights.

        Ties go to the lower index on every device, which `torch.topk` does not guarantee. A selection bias changes the
        choice but not the weights (arXiv 2408.15664, equation 3).

        Args:
            logits (`torch.Tensor` of shape `(T, E)`, float32): Scores from `compute_logits`.
            layer_idx (`int`): Index of the calling layer.

        Returns:
            `tuple`: weights `(T, k)` in float32 and expert indices `(T, k)` in int64, best first.
        """
        probs = logits.softmax(dim=-1)
        scores = probs
        if self.selection_bias is not None:
            scores = probs + self.selection_bias[self.layers.index(layer_idx)]
        if is_exporting():
            indices = _top_k_by_maxima(scores, self.top_k)  # ONNX has no stable sort
        else:
            indices = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        weights = probs.gather(-1, indices)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, indices

    def forward(
        self,
        hidden_states: torch.Tensor,
        layer_idx: int,
        state: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | tuple[torch.Tensor, ...] | None]:
        """Routes the tokens of one layer. The arithmetic is float32 in any model dtype and under autocast.

        Args:
            hidden_states (`torch.Tensor` of shape `(T, D)`): Normalised input of the layer's experts.
            layer_idx (`int`): Index of the calling layer.
            state (`torch.Tensor` or `tuple`, *optional*): The state that this method returned for the previous layer.
            token_ids (`torch.Tensor` of shape `(T,)`, *optional*): The tokens, where the router `needs_token_ids`.

        Raises:
            ValueError: If the router needs token ids and there are none.

        Returns:
            `tuple`: logits `(T, E)` in float32, weights `(T, k)` in the dtype of `hidden_states`, expert indices
            `(T, k)` in int64, best first, and the state for the next layer. Where a block shares its decision, the
            state is that decision, which the later layers repeat.
        """
        if self.shares_decision and state is not None:
            return (*state, state)
        tokens = ()
        if self.needs_token_ids:
            if token_ids is None:
                raise ValueError(
                    f"router_type={self.config.router_type!r} routes by token ids: pass input_ids, not inputs_embeds."
                )
            tokens = (token_ids.to(hidden_states.device),)
        # Autocast would turn a float32 matrix product back into bfloat16.
        with no_autocast(hidden_states.device.type):
            logits, state = self.compute_logits(hidden_states.float(), layer_idx, state, *tokens)  # type: ignore[arg-type]
            weights, indices = self.choose(logits, layer_idx)
        weights = weights.to(hidden_states.dtype)
        if self.shares_decision:
            state = (logits, weights, indices)
        return logits, weights, indices, state

    def check_selection_bias(self):
        """Refuses to balance a router that has no selection bias.

        Raises:
            ValueError: If the router was built without a selection bias.
        """
        if self.selection_bias is None:
            raise ValueError(
                f"router_bias_update_rate={self.bias_update_rate} moves a selection bias, but this model was built "
                "without one: load it with from_pretrained(..., router_bias_update_rate=...), or set the rate to 0."
            )

    @torch.no_grad()
    def count_load(self, logits: torch.Tensor, layer_idx: int, attention_mask: torch.Tensor | None = None):
        """Adds a layer's choices to the load that the next [`update_selection_bias`] balances.

        Args:
            logits (`torch.Tensor` of shape `(batch · sequence, E)`): The layer's router logits.
            layer_idx (`int`): Index of the layer.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 marks padding, not counted.

        Raises:
            ValueError: If the router has no selection bias.
        """
        self.check_selection_bias()
        _, indices = self.choose(logits, layer_idx)
        picked = torch.zeros_like(logits).scatter_(1, indices, 1.0)
        if attention_mask is not None:
            picked = picked * attention_mask.reshape(-1, 1).to(picked)
        self.load[self.layers.index(layer_idx)] += picked.sum(dim=0).to(self.load)

    def extra_repr(self) -> str:
        return f"layers={self.layers}, num_experts={self.num_experts}, top_k={self.top_k}"


class LinearRouter(PathMoERouter):
    """logits = W x, with one W for all layers of the block (PathMoE, arXiv 2603.18297; one layer: Indep-MoE)."""

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        # A plain parameter, because quantisation and LoRA would replace an `nn.Linear`.
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))

    def compute_logits(self, hidden_states, layer_idx, state):
        return F.linear(hidden_states, self.weight.float()), state

    def init_weights(self, std):
        init.normal_(self.weight, mean=0.0, std=std)


class RandomRouter(PathMoERouter):
    """logits = W x with a W that is drawn once and never trained (Rand-MoE, arXiv 2603.18297)."""

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        # A persistent buffer, because `from_pretrained` would unfreeze a frozen parameter.
        self.weight = nn.Buffer(torch.empty(self.num_experts, self.hidden_size))

    def compute_logits(self, hidden_states, layer_idx, state):
        return F.linear(hidden_states, self.weight.float()), state

    def init_weights(self, std):
        init.normal_(self.weight, mean=0.0, std=std)


class HashRouter(PathMoERouter):
    """Each token id always goes to the same k experts of a block, with equal weights (Hash Layers, arXiv 2106.04426).

    The experts of token t are the k with the largest ((a_e t + b_e) mod p) / p, for random a and b and p = 2³¹ - 1, so
    that the vocabulary may be resized. The logits are these numbers, and only order the experts.
    """

    needs_token_ids = True

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        self.coefficients = nn.Buffer(torch.empty(2, self.num_experts, dtype=torch.int64))

    def compute_logits(self, hidden_states, layer_idx, state, token_ids):  # type: ignore[override]
        factors, offsets = self.coefficients
        return (token_ids[:, None] * factors + offsets).remainder(2**31 - 1).float() / (2**31 - 1), state

    def choose(self, logits, layer_idx):
        weights, indices = super().choose(logits, layer_idx)
        return torch.ones_like(weights) / self.top_k, indices

    def init_weights(self, std):
        init.copy_(self.coefficients, torch.randint(1, 2**31 - 1, self.coefficients.shape))


class CosineRouter(PathMoERouter):
    """logits = s · cos(P x, e_i): scores on a low-dimensional sphere, with a learned scale s = 1 / temperature.

    Source: X-MoE (arXiv 2204.09179, section 3.2), whose projection has E / 2 dimensions. The scale is learned through
    its logarithm, starts at 1 / 0.5 and stays below 1 / 0.01, as in X-MoE's implementation in Tutel.
    """

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        dim = config.router_dim or max(2, self.num_experts // 2)
        self.projection = nn.Parameter(torch.empty(dim, self.hidden_size))
        self.expert_embeddings = nn.Parameter(torch.empty(self.num_experts, dim))
        self.log_scale = nn.Parameter(torch.empty(1))

    def compute_logits(self, hidden_states, layer_idx, state):
        tokens = F.normalize(F.linear(hidden_states, self.projection.float()), dim=-1)
        experts = F.normalize(self.expert_embeddings.float(), dim=-1)
        scale = self.log_scale.float().clamp(max=math.log(1 / 0.01)).exp()
        return scale * F.linear(tokens, experts), state

    def init_weights(self, std):
        init.normal_(self.projection, mean=0.0, std=std)
        init.normal_(self.expert_embeddings, mean=0.0, std=std)
        init.constant_(self.log_scale, math.log(1 / 0.5))


class LowRankRouter(PathMoERouter):
    """logits = (W + B_l A_l) x: a W shared by the block plus a term of rank r for each layer l (LowRank-MoE).

    Source: the comparison in arXiv 2603.18297. B starts at zero, as in LoRA (arXiv 2106.09685), so that training
    starts from `linear`; with r = 0 it stays `linear`.
    """

    can_share_decision = False

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        rank = config.router_rank
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.down = nn.Parameter(torch.empty(len(layers), rank, self.hidden_size)) if rank else None
        self.up = nn.Parameter(torch.empty(len(layers), self.num_experts, rank)) if rank else None

    def compute_logits(self, hidden_states, layer_idx, state):
        logits = F.linear(hidden_states, self.weight.float())
        if self.down is not None:
            layer = self.layers.index(layer_idx)
            low_rank = F.linear(hidden_states, self.down[layer].float())
            logits = logits + F.linear(low_rank, self.up[layer].float())
        return logits, state

    def init_weights(self, std):
        init.normal_(self.weight, mean=0.0, std=std)
        if self.down is not None:
            init.normal_(self.down, mean=0.0, std=std)
            init.zeros_(self.up)


class RecurrentRouter(PathMoERouter):
    """h_l = GRU(P_l x, h_{l-1}), logits = G_l h_l: layers pass on a routing state (Recurrent-MoE).

    Source: RMoE (arXiv 2408.06793, equations 4 to 6): each layer has its own projection P and gate G, the block shares
    the GRU, and h starts at zero. Blocks pass the state on too. The state of a token does not depend on other tokens,
    on a cache or on packing. `router_dim` is the size of h; its default of 128 is our choice.
    """

    can_share_decision = False
    carries_state = True

    def __init__(self, config, layers: list[int]):
        super().__init__(config, layers)
        self.dim = config.router_dim or 128
        self.projection = nn.Parameter(torch.empty(len(layers), self.dim, self.hidden_size))
        self.gate = nn.Parameter(torch.empty(len(layers), self.num_experts, self.dim))
        self.weight_ih = nn.Parameter(torch.empty(3 * self.dim, self.dim))
        self.weight_hh = nn.Parameter(torch.empty(3 * self.dim, self.dim))
        self.bias_ih = nn.Parameter(torch.empty(3 * self.dim))
        self.bias_hh = nn.Parameter(torch.empty(3 * self.dim))

    def compute_logits(self, hidden_states, layer_idx, state):
        layer = self.layers.index(layer_idx)
        inputs = F.linear(hidden_states, self.projection[layer].float())
        if state is None:
            state = inputs.new_zeros(inputs.shape[0], self.dim)
        weights = (w.float() for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
        state = torch.gru_cell(inputs, state, *weights)
        return F.linear(state, self.gate[layer].float()), state

    def init_weights(self, std):
        init.normal_(self.projection, mean=0.0, std=std)
        init.normal_(self.gate, mean=0.0, std=std)
        for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            init.uniform_(weight, -(self.dim**-0.5), self.dim**-0.5)


def _top_k_by_maxima(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Returns the indices (T, k) of the k largest scores (T, E), best first; ties go to the lower index (argmax)."""
    indices = []
    for _ in range(top_k):
        indices.append(scores.argmax(dim=-1, keepdim=True))
        scores = scores.scatter(-1, indices[-1], -torch.inf)
    return torch.cat(indices, dim=-1)


ROUTERS: dict[str, type[PathMoERouter]] = {
    "linear": LinearRouter,
    "hash": HashRouter,
    "cosine": CosineRouter,
    "low_rank": LowRankRouter,
    "recurrent": RecurrentRouter,
    "random": RandomRouter,
}


def match_config_to_layers(config, layers: list[nn.Module], routers: nn.ModuleDict):
    """Updates the configuration of a decoder whose layers were removed or repeated after it was built.

    Layers keep the router that they were built with. If the configuration would route them differently, this function
    sets `router_block_size`, `num_hidden_layers` and `mlp_only_layers`.

    Args:
        config (`PathMoEConfig`): The decoder's configuration.
        layers (`list[nn.Module]`): The decoder's layers. Layers beyond `num_hidden_layers` are allowed, and skipped.
        routers (`nn.ModuleDict`): The decoder's routers.

    Raises:
        ValueError: If no configuration describes such a decoder: layers of one block are not neighbours, a router
            serves no layer, or a router that has parameters for each of its layers would serve different layers.
    """
    whole = all(hasattr(layer, "router_block") for layer in layers)  # false in a pipeline stage
    if not whole or len(layers) > config.num_hidden_layers:
        return
    dense = [index for index, layer in enumerate(layers) if layer.router_block is None]
    routed = [layer for layer in layers if layer.router_block is not None]
    runs = [(block, [layer.router_layer for layer in run]) for block, run in groupby(routed, lambda x: x.router_block)]
    if [served for _, served in runs] == config.router_blocks and dense == sorted(config.mlp_only_layers or []):
        return
    by_layer = any(router.selection_bias is not None or not router.can_share_decision for router in routers.values())
    in_order = [block for block, _ in runs] == list(range(len(routers)))
    if not in_order or (by_layer and any(routers[str(block)].layers != served for block, served in runs)):
        raise ValueError(
            f"These {len(layers)} layers are served by the routers {[layer.router_block for layer in layers]}, as "
            f"layers {[layer.router_layer for layer in layers]}, which router_block_size cannot describe: a saved "
            "checkpoint would route them differently. Keep at least one layer of each block and the order of the "
            "blocks, and all layers where routers have parameters for each layer."
        )
    config.router_block_size, config.num_hidden_layers = [len(served) for _, served in runs], len(layers)
    config.mlp_only_layers = dense


def refuse_reentrant_checkpointing(model: nn.Module):
    """Refuses reentrant checkpointing of a decoder where it fails or silently loses gradients of shared routers.

    Raises:
        ValueError: If it is enabled in training while parameters are sharded, an auxiliary loss is on, blocks share
            decisions, or layers share a router under DistributedDataParallel.
    """
    checkpoint = getattr(model.layers[0], "_gradient_checkpointing_func", None)
    if not (model.training and model.gradient_checkpointing and checkpoint.keywords.get("use_reentrant") is True):
        return
    config = model.config
    sharded = any(isinstance(p, torch.distributed.tensor.DTensor) for p in model.routers.parameters())
    router_loss = config.router_aux_loss_coef or config.router_z_loss_coef
    # Unless its graph is static, DDP takes each layer's gradient of a shared router for the complete one.
    ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    shared = ddp is not None and not ddp.static_graph and len(model.routers) < len(config.moe_layers)
    if sharded or router_loss or shared or config.router_sharing == "decision":
        raise ValueError(
            "Gradient checkpointing with use_reentrant=True fails or gives wrong router gradients when parameters are "
            "sharded, an auxiliary router loss is on, router_sharing is 'decision', or layers share a router under "
            "DistributedDataParallel: use "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}).'
        )


def register_router(name: str, cls: type[PathMoERouter]):
    """Makes `cls` available as `PathMoEConfig(router_type=name)`.

    Args:
        name (`str`): The `router_type` under which checkpoints will refer to the router.
        cls (`type[PathMoERouter]`): The router class.

    Raises:
        TypeError: If `cls` is not a subclass of `PathMoERouter`.
        ValueError: If `name` is already registered for a different class.
    """
    if not (isinstance(cls, type) and issubclass(cls, PathMoERouter)):
        raise TypeError(f"register_router({name!r}, cls): cls must be a subclass of PathMoERouter, got {cls!r}.")
    if ROUTERS.setdefault(name, cls) is not cls:
        raise ValueError(f"router_type {name!r} is already registered as {ROUTERS[name]!r}: choose a different name.")


@torch.no_grad()
def update_selection_bias(model: nn.Module):
    """Moves each layer's selection bias against the load since the last call. Call it after each optimizer step.

    b_e ← b_e + u · sign(mean load − load of e), where u is the config's `router_bias_update_rate` and the load covers
    the global batch: all micro-batches since the last call, on all ranks (arXiv 2408.15664, algorithm 1). Does nothing
    if the rate is 0.

    Args:
        model (`torch.nn.Module`): The unwrapped PathMoE, with or without a head.

    Raises:
        ValueError: If the rate is not 0 and the model has no selection bias.
    """
    for router in model.modules():
        if isinstance(router, PathMoERouter) and router.bias_update_rate:
            router.check_selection_bias()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(router.load)
            error = router.load.mean(dim=-1, keepdim=True) - router.load
            router.selection_bias += router.bias_update_rate * error.sign().to(router.selection_bias)
            router.load.zero_()


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    num_experts: int,
    top_k: int,
    attention_mask: torch.Tensor | None = None,
    load: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the Switch load-balancing loss of each layer and averages it over the layers.

    For one layer it is E · Σ_e f_e · P_e, where f_e is the mean number of times that a token picks expert e among its
    top k and P_e the mean router probability of e (arXiv 2101.03961, equations 4 to 6). It is k when a layer is
    perfectly balanced and grows to E when it collapses onto k experts. The k largest logits count as picked,
    regardless of a selection bias. transformers' counterpart pools all layers first, and then layers that have
    collapsed onto different experts look balanced.

    Args:
        router_logits (`tuple[torch.Tensor]`): One `(batch · sequence, E)` tensor per layer.
        num_experts (`int`): E.
        top_k (`int`): k.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 marks padding, which is left out.
        load (`torch.Tensor` of shape `(L, E)`, *optional*): f of a larger batch that these tokens are a part of (arXiv
            2501.11873). The mean of the losses of its parts, weighted by tokens, is then the loss of that batch.

    Returns:
        `torch.Tensor`: A float32 scalar on the device of the first layer's logits.
    """
    device = router_logits[0].device
    losses = []
    for layer, logits in enumerate(router_logits):
        probs = logits.float().softmax(dim=-1)
        if load is None:
            picked = torch.zeros_like(probs).scatter_(1, probs.topk(top_k, dim=-1).indices, 1.0)
            of_layer = _mean_over_tokens(picked, attention_mask)
        else:
            of_layer = load[layer].to(probs)
        losses.append((num_experts * (of_layer * _mean_over_tokens(probs, attention_mask)).sum()).to(device))
    return torch.stack(losses).mean()


def router_z_loss(router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Computes the router z-loss: the mean over tokens and layers of logsumexp(logits)² (ST-MoE, arXiv 2202.08906,
    equation 5).

    Args:
        router_logits (`tuple[torch.Tensor]`): One `(batch · sequence, E)` tensor per layer.
        attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 0 marks padding, which is left out.

    Returns:
        `torch.Tensor`: A float32 scalar on the device of the first layer's logits.
    """
    device = router_logits[0].device
    return torch.stack(
        [
            _mean_over_tokens(logits.float().logsumexp(dim=-1, keepdim=True).square(), attention_mask).sum().to(device)
            for logits in router_logits
        ]
    ).mean()


def token_mask(attention_mask: torch.Tensor | None, sequence_length: int) -> torch.Tensor | None:
    """Returns the part of an attention mask that covers the tokens of this forward, without those in the cache.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, past + sequence)`, *optional*): 0 marks padding.
        sequence_length (`int`): Number of tokens in each row of the batch in this forward.

    Returns:
        `torch.Tensor` of shape `(batch, sequence)`, or `None` without a mask.

    Raises:
        ValueError: If the mask is not two-dimensional, and so does not mark the padding.
    """
    if attention_mask is None:
        return None
    if getattr(attention_mask, "ndim", None) != 2:
        raise ValueError(
            "The auxiliary router losses leave padding out and so need an attention_mask of shape (batch, "
            f"sequence), got {getattr(attention_mask, 'shape', type(attention_mask).__name__)}: pass that, or "
            "None when nothing is padded."
        )
    return attention_mask[:, -sequence_length:]


def _mean_over_tokens(values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the means of `values` (T, …) over the tokens that are not padding."""
    if attention_mask is None:
        return values.mean(dim=0)
    mask = attention_mask.reshape(-1, 1).to(values.device, values.dtype)
    # `where` instead of a product: a padded row may hold inf or nan.
    return torch.where(mask > 0, values, 0).sum(dim=0) / mask.sum().clamp(min=1)
