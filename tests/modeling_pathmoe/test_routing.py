# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn
from transformers import initialization as init

from modeling_pathmoe.routing_pathmoe import ROUTERS, LinearRouter
from pathmoe import PathMoEForCausalLM, PathMoERouter, register_router


class CarryingRouter(PathMoERouter):
    """Scores a mix of the hidden state and what the layers before it left behind."""

    def __init__(self, config, layers):
        super().__init__(config, layers)
        self.read = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))
        self.carry = nn.Parameter(torch.empty(self.hidden_size, self.hidden_size))

    def compute_logits(self, hidden_states, layer_idx, state):
        assert (state is None) == (layer_idx == 0)
        if state is not None:
            hidden_states = hidden_states + torch.tanh(state @ self.carry.float())
        return hidden_states @ self.read.float().T, hidden_states

    def init_weights(self, std):
        init.normal_(self.read, std=std)
        init.normal_(self.carry, std=std)


@pytest.fixture
def carrying():
    register_router("carrying", CarryingRouter)
    yield "carrying"
    del ROUTERS["carrying"]


def recorded(model, *args, **kwargs):
    return model(*args, output_router_logits=True, **kwargs).router_logits


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_router_returns_the_softmax_of_its_best_experts(tiny_model, norm_topk_prob):
    router = tiny_model(norm_topk_prob=norm_topk_prob).model.routers["0"]
    x = torch.randn(6, 32)
    logits, weights, indices, state = router(x, 0, None)
    assert state is None
    torch.testing.assert_close(logits, x @ router.weight.T)
    for row in range(6):
        best = logits[row].sort(descending=True).indices[:2]
        probs = logits[row].softmax(dim=0)[best]
        assert indices[row].tolist() == best.tolist()
        torch.testing.assert_close(weights[row], probs / probs.sum() if norm_topk_prob else probs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_computes_in_float32_and_weighs_in_the_dtype_of_its_input(tiny_model, dtype, autocast):
    """To the bit what float32 gives on the same numbers, whatever surrounds it."""
    router = tiny_model().model.routers["0"].to(dtype)
    x = torch.randn(64, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, weights, indices, _ = router(x, 0)
    assert (logits.dtype, weights.dtype, indices.dtype) == (torch.float32, dtype, torch.int64)
    assert torch.equal(logits, x.float() @ router.weight.float().T)


@pytest.mark.parametrize("how", ["bfloat16 model", "autocast"])
def test_recorded_logits_are_float32(tiny_model, tokens, how):
    model = tiny_model()
    if how == "bfloat16 model":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        router_logits = recorded(model, tokens())
    for logits in router_logits:
        assert logits.dtype == torch.float32
        # Numbers that were rounded to bfloat16 on the way would survive the round trip.
        assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("router_block_size", [1, 2, 99, [4, 1]], ids=str)
def test_one_logit_tensor_for_each_layer_in_order(tiny_model, tokens, router_block_size):
    """The l-th tensor is what the router of layer l's block says of what enters layer l's experts."""
    model, ids = tiny_model(router_block_size=router_block_size), tokens(3, 7)
    entered = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: entered.append(output))
    router_logits = recorded(model, ids)
    assert len(router_logits) == 5
    for x, logits, block in zip(entered, router_logits, model.config.layer_to_block, strict=True):
        assert logits.shape == (3 * 7, 8)
        torch.testing.assert_close(logits, x.flatten(0, 1) @ model.model.routers[str(block)].weight.T)


def test_logits_with_a_cache_are_those_of_the_new_tokens(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens(2, 7)
    whole = recorded(model, ids)
    first = model(ids[:, :4], use_cache=True, output_router_logits=True)
    second = recorded(model, ids[:, 4:], past_key_values=first.past_key_values)
    assert len(first.router_logits) == len(second) == 5
    for a, b, both in zip(first.router_logits, second, whole):
        assert_same(torch.cat([a.view(2, 4, 8), b.view(2, 3, 8)], dim=1), both.view(2, 7, 8))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_records_each_layer_once(tiny_model, tokens, assert_same, use_reentrant):
    model, ids = tiny_model(), tokens()
    expected = recorded(model, ids)
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    outputs = model(ids, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    assert len(outputs.router_logits) == 5
    assert_same(outputs.router_logits, expected)


def test_compiled_model_records_each_layer_once(tiny_model, tokens, assert_same):
    """From its first call on: no eager forward has prepared the recording."""
    model, ids = tiny_model(num_hidden_layers=3, output_router_logits=True), tokens()
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).router_logits
    assert len(actual) == 3
    assert_same(actual, model(ids).router_logits)


@pytest.mark.parametrize("asked", ["argument", "config"])
def test_router_logits_are_returned_on_request_only(tiny_model, tokens, asked):
    model, ids = tiny_model(), tokens()
    assert model(ids).router_logits is None
    if asked == "config":
        model.config.output_router_logits = True
        assert len(model(ids).router_logits) == len(model.model(ids).router_logits) == 5
        assert model(ids, output_router_logits=False).router_logits is None
    else:
        assert len(recorded(model, ids)) == len(recorded(model.model, ids)) == 5


@pytest.mark.parametrize(
    "cls", [nn.Linear, "LinearRouter", lambda config, layers: None], ids=["module", "str", "lambda"]
)
def test_registering_something_that_is_no_router_is_refused(cls):
    with pytest.raises(TypeError, match="'mine'.*must be a subclass of PathMoERouter"):
        register_router("mine", cls)
    assert "mine" not in ROUTERS


def test_registering_a_second_router_under_a_name_is_refused():
    with pytest.raises(ValueError, match="'linear' is already registered.*choose a different name"):
        register_router("linear", CarryingRouter)
    assert ROUTERS["linear"] is LinearRouter


def test_registering_the_same_router_again_is_allowed():
    """Modules are imported twice in notebooks and by remote code."""
    register_router("linear", LinearRouter)
    assert ROUTERS["linear"] is LinearRouter


def test_unknown_router_type_becomes_known_by_registering(tiny_config, carrying):
    assert tiny_config(router_type=carrying).router_type == "carrying"


def test_own_router_initialises_its_weights(tiny_config, carrying):
    model = PathMoEForCausalLM(tiny_config(router_type=carrying, initializer_range=0.1))
    for router in model.model.routers.values():
        assert router.carry.std().item() == pytest.approx(0.1, rel=0.2)


def test_routers_may_start_from_a_scale_of_their_own(tiny_config):
    model = PathMoEForCausalLM(tiny_config(router_initializer_range=0.3)).model
    assert model.routers["0"].weight.std().item() == pytest.approx(0.3, rel=0.2)
    assert model.layers[0].mlp.experts.down_proj.std().item() == pytest.approx(0.02, rel=0.2)


def test_embeddings_may_start_from_a_scale_of_their_own(tiny_config):
    model = PathMoEForCausalLM(tiny_config(embedding_initializer_range=0.7, pad_token_id=3))
    assert not model.model.embed_tokens.weight[3].any()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.7, rel=0.2)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_state_is_carried_from_layer_to_layer_across_blocks(tiny_model, tokens, assert_same, carrying):
    """Every router's logits, from the hidden states that entered the experts and a recurrence by hand."""
    model, ids = tiny_model(router_type=carrying), tokens()
    entered = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, output: entered.append(output))
    router_logits, state = recorded(model, ids), None
    for x, logits, block in zip(entered, router_logits, model.config.layer_to_block, strict=True):
        router = model.model.routers[str(block)]
        x = x.flatten(0, 1)
        state = x if state is None else x + torch.tanh(state @ router.carry)
        assert_same(logits, state @ router.read.T)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_stateful_router_has_the_same_gradients_under_checkpointing(
    tiny_model, tokens, gradients, assert_same, carrying, use_reentrant
):
    model, ids = tiny_model(router_type=carrying).train(), tokens()
    expected = gradients(model, model(ids, labels=ids).loss)
    assert all(expected[f"model.routers.{block}.carry"].abs().max() > 1e-4 for block in range(3))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(gradients(model, model(ids, labels=ids).loss), expected)


def test_stateful_router_decodes_with_a_cache_as_without(tiny_model, tokens, assert_same, carrying):
    """The state runs over layers, not over time: nothing of it needs to be cached."""
    model, ids = tiny_model(router_type=carrying), tokens(2, 7)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    assert_same(model(ids[:, 4:], past_key_values=cache).logits, model(ids).logits[:, 4:])


def test_stateful_router_learns(tiny_model, tokens, carrying):
    model, ids = tiny_model(router_type=carrying).train(), tokens()
    optimizer = torch.optim.SGD(model.model.routers.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
