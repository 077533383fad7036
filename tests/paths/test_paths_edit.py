# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from accelerate import cpu_offload

from pathmoe import PathTrace, record_paths, replay_paths
from pathmoe.paths import balance_routing, edit_paths


def other_experts(trace, seed=0):
    """Distinct random experts for every token and layer."""
    scores = torch.rand(*trace.experts.shape[:2], trace.model.num_experts, generator=torch.manual_seed(seed))
    return trace.replace(scores.topk(trace.model.top_k).indices)


def test_replaying_the_recorded_trace_gives_the_same_logits(any_model, kind):
    model = any_model(kind)
    ids = torch.randint(1, 99, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with record_paths(model) as trace:
        expected = [model(ids, attention_mask=mask).logits, model(ids).logits]
    with replay_paths(model, trace):
        replayed = [model(ids, attention_mask=mask).logits, model(ids).logits]
    torch.testing.assert_close(replayed[0][mask.bool()], expected[0][mask.bool()], rtol=0, atol=1e-6)
    torch.testing.assert_close(replayed[1], expected[1], rtol=0, atol=1e-6)


def weights_by_hand(kind, model, logits, experts):
    """The weights of `experts` (T, L, k) from `logits` (T, L, E), as each architecture's paper or code has them."""
    chosen = logits.gather(-1, experts)
    if kind == "gpt_oss":  # softmax of the chosen
        return chosen.softmax(dim=-1)
    if kind == "deepseek_v3":  # sigmoid, renormalised, scaled
        weights = chosen.sigmoid()
        return model.config.routed_scaling_factor * weights / weights.sum(dim=-1, keepdim=True)
    if kind == {"router_type": "hash"}:
        return torch.full_like(chosen, 1 / chosen.shape[-1])
    weights = logits.softmax(dim=-1).gather(-1, experts)
    if getattr(model.config, "norm_topk_prob", True):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights


def test_edited_trace_is_taken_with_the_weights_of_the_architecture(any_model, tokens, kind):
    model = any_model(kind)
    with record_paths(model) as trace:
        before = model(tokens()).logits
    edited = other_experts(trace)
    with replay_paths(model, edited), record_paths(model, weights=True) as taken:
        outputs = model(tokens(), output_router_logits=True)
    assert taken.experts.tolist() == edited.experts.tolist()
    logits = torch.stack(outputs.router_logits, dim=1)
    expected = weights_by_hand(kind, model, logits, edited.experts.long())
    torch.testing.assert_close(taken.weights.float(), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(outputs.logits, before, atol=1e-2)


@pytest.mark.parametrize("kind", [{"router_type": "linear"}, {"router_sharing": "decision"}, "mixtral"], ids=str)
def test_generation_replays_its_own_trace(any_model, kind):
    model, ids = any_model(kind), torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_scores": True, "return_dict_in_generate": True, "attention_mask": (ids > 0).long()}
    with record_paths(model) as trace:
        expected = model.generate(ids, **options)
    with replay_paths(model, trace):
        replayed = model.generate(ids, **options)
    for a, b in zip(replayed.scores, expected.scores):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [{"router_type": "linear"}, {"router_type": "recurrent"}, "qwen3_moe"], ids=str)
def test_training_on_replayed_paths_gives_the_same_gradients_when_checkpointed(any_model, tokens, gradients, kind):
    model = any_model(kind)
    with record_paths(model) as trace:
        model(tokens())
    edited, found = other_experts(trace), []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with replay_paths(model, edited):
            found.append(gradients(model, model(tokens(), labels=tokens()).loss))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_editing_logits_equals_what_the_router_makes_of_them(any_model, tokens, kind):
    model = any_model(kind)

    def favour(layer_idx, logits):  # experts 2 and 3 for all, far ahead
        return logits + torch.tensor([0.0, 0.0, 100.0, 100.0, 0.0, 0.0, 0.0, 0.0])

    with edit_paths(model, edit_logits=favour), record_paths(model, weights=True) as trace:
        logits = torch.stack(model(tokens(), output_router_logits=True).router_logits, dim=1)
    assert (logits[..., 2:4] > 50).all()
    assert ((trace.experts == 2) | (trace.experts == 3)).sum(dim=-1).eq(2).all()
    expected = weights_by_hand(kind, model, logits, trace.experts.long())
    torch.testing.assert_close(trace.weights.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [{"router_type": "linear"}, "qwen3_moe"], ids=str)
def test_edited_hidden_states_are_seen_by_the_router_alone(any_model, tokens, kind):
    model = any_model(kind)
    with edit_paths(model, edit_hidden_states=lambda layer_idx, hidden_states: torch.zeros_like(hidden_states)):
        edited = model(tokens(), output_router_logits=True)
    assert all((logits == 0).all() for logits in edited.router_logits)
    with edit_paths(model, edit_logits=lambda layer_idx, logits: torch.zeros_like(logits)):
        expected = model(tokens())
    torch.testing.assert_close(edited.logits, expected.logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [{"router_type": "linear"}, {"norm_topk_prob": False}, "olmoe", "mixtral"], ids=str)
def test_permuting_indices_with_their_weights_equals_permuting_the_experts(any_model, tokens, kind):
    model = any_model(kind)
    permutation = torch.randperm(8, generator=torch.manual_seed(0))
    with edit_paths(model, lambda layer_idx, logits, indices: permutation[indices], keep_weights=True):
        edited = model(tokens()).logits
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.mlp.experts.parameters():
                parameter.copy_(parameter[permutation])
    torch.testing.assert_close(edited, model(tokens()).logits, rtol=0, atol=1e-5)


def test_the_model_is_itself_again_after_the_block(tiny_model, tokens):
    model = tiny_model()
    expected = model(tokens()).logits
    with pytest.raises(RuntimeError, match="inside"):
        with edit_paths(model, lambda layer_idx, logits, indices: indices.flip(0)):
            raise RuntimeError("inside")
    assert torch.equal(model(tokens()).logits, expected)


def test_traces_that_do_not_fit_are_refused(any_model, tokens, tmp_path):
    model = any_model({})
    with record_paths(model) as trace:
        model(tokens())
    trace.save(tmp_path / "trace.arrow")
    trace = PathTrace.load(tmp_path / "trace.arrow")
    refusals = {
        "qwen3_moe": "model_type is 'pathmoe' in the trace and 'qwen3_moe' in the model; num_layers is 5",
        "twin": r"layer_to_block is \(0, 0, 1, 1, 2\) in the trace and \(0, 1, 2, 3, 4\) in the model",
    }
    for other, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            with replay_paths(any_model({"router_block_size": 1} if other == "twin" else other), trace):
                pass
    with pytest.raises(ValueError, match="num_experts is 8 in the trace and 9 in the model"):
        with replay_paths(wider := any_model({"num_experts": 9}), trace, check_routers=False):
            wider(tokens())
    with replay_paths(model, trace):
        with pytest.raises(ValueError, match=r"Token 0 of the trace is \d+, but the model is given \d+"):
            model((tokens() + 1) % 99)
    with replay_paths(model, trace):
        with pytest.raises(ValueError, match="The trace has 14 tokens, but the model is given 16"):
            model(tokens(length=8))
    with pytest.warns(UserWarning, match="The trace has 14 tokens, but the model was given only 7"):
        with replay_paths(model, trace):
            model(tokens()[:1])
    with pytest.raises(ValueError, match=r"experts has shape \(13, 5, 2\), but must have shape \(14, 5, 2\)"):
        trace.replace(trace.experts[1:])
    with pytest.raises(ValueError, match="experts has indices from 8 to 8, but experts are 0 to 7"):
        trace.replace(torch.full((14, 5, 2), 8))
    with pytest.raises(ValueError, match="experts has an expert twice"):
        trace.replace(torch.zeros(14, 5, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"experts=\[1\] must be a Tensor, not a list"):
        trace.replace([1])
    with pytest.raises(TypeError, match="trace='a.arrow' must be a PathTrace"), replay_paths(model, "a.arrow"):
        pass
    with pytest.raises(TypeError, match="model='model' must be a Module"), record_paths("model"):
        pass
    with pytest.raises(ValueError, match="memory_limit=-1 must be at least 0"), record_paths(model, memory_limit=-1):
        pass
    with pytest.raises(ValueError, match="memory_limit='1GB' must be"), record_paths(model, memory_limit="1GB"):
        pass
    with pytest.raises(ValueError, match="experts has dtype torch.float32, but must have an integer dtype"):
        trace.replace(trace.experts + 0.5)


def test_trace_of_a_twin_is_refused_unless_it_is_asked_for(any_model, tokens, kind, tmp_path):
    model = any_model(kind)
    with record_paths(model) as trace:
        model(tokens())
    trace.save(tmp_path / "trace.arrow")
    trace = PathTrace.load(tmp_path / "trace.arrow")
    twin = any_model(kind, seed=1)
    for refused in (lambda: replay_paths(twin, trace), lambda: replay_paths(twin, trace.replace(trace.experts))):
        with pytest.raises(
            ValueError, match="belongs to a different model: the parameters of the routers differ.*pass check"
        ):
            with refused():
                pass
    with replay_paths(twin, trace, check_routers=False), record_paths(twin) as taken:
        twin(tokens())
    assert torch.equal(taken.experts, trace.experts)
    with replay_paths(model.bfloat16(), trace):  # the same in another precision
        model(tokens())


def test_trace_of_an_offloaded_model_is_its_own(any_model, tokens):
    whole, model = any_model("qwen3_moe"), cpu_offload(any_model("qwen3_moe"), execution_device=torch.device("cpu"))
    with record_paths(model) as trace:
        expected = model(tokens()).logits
    assert model.model.layers[0].mlp.gate.weight.is_meta
    for same in (whole, model):
        with replay_paths(same, trace):
            torch.testing.assert_close(same(tokens()).logits, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="parameters of the routers differ"):
        with replay_paths(any_model("qwen3_moe", seed=1), trace):
            pass


def test_routers_that_cannot_be_compared_are_refused(any_model, tokens):
    model = any_model({})
    with record_paths(model) as trace:
        model(tokens())
    with pytest.raises(ValueError, match="cannot be compared .*: router_hash is None in the model, .* sharded or not"):
        with replay_paths(any_model({}).to("meta"), trace):
            pass


def test_routers_whose_weights_do_not_follow_the_indices_are_recorded_but_not_replayed(tokens):
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(vocab_size=99, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                          num_attention_heads=4, num_key_value_heads=4, num_local_experts=8)  # fmt: skip
    model = PhimoeForCausalLM(config).eval()
    with record_paths(model) as trace:
        model(tokens())
    assert trace.experts.shape == (14, 2, 2)
    with pytest.raises(TypeError, match="PhimoeTopKRouter does not compute its weights from its logits and top-k"):
        with replay_paths(model, trace):
            model(tokens())


def test_experts_that_another_program_recorded_are_replayed(any_model, kind, tmp_path):
    """Sequence by sequence, as a server reports them: plain integer arrays and lists of token ids."""
    model = any_model(kind)
    sequences = [torch.randint(1, 99, (length,)) for length in (6, 3)]
    with record_paths(model) as recorded:
        expected = [model(ids[None]).logits for ids in sequences]
    arrays = [array.long().numpy() for array in recorded.experts.split([6, 3])]
    made = PathTrace.from_experts(arrays, [ids.tolist() for ids in sequences], model)
    made.save(tmp_path / "trace.arrow")
    for trace in (made, PathTrace.load(tmp_path / "trace.arrow")):
        for name in ("experts", "token_ids", "sequence_ids", "positions"):
            assert getattr(trace, name).tolist() == getattr(recorded, name).tolist(), name
        assert trace.model == recorded.model
        with replay_paths(model, trace):
            for ids, logits in zip(sequences, expected):
                torch.testing.assert_close(model(ids[None]).logits, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e[:, 1:], r"experts\[0\] has shape \(6, 3, 2\), but must have shape \(6, 4, 2\)"),
        (lambda e: e[1:], r"experts\[0\] has shape \(5, 4, 2\), but must have shape \(6, 4, 2\)"),
        (lambda e: e[0, 0], r"experts\[0\] has shape \(2,\)"),
        (lambda e: e + 7, "has indices from .* to .*, but experts are 0 to 7"),
        (lambda e: e - 9, "has indices from"),
        (lambda e: e.float(), "has dtype torch.float32"),
        (lambda e: torch.zeros_like(e), "has an expert twice for one token in one layer"),
    ],
)
def test_experts_that_cannot_be_those_of_the_model_are_refused(tiny_model, change, message):
    model, ids = tiny_model(num_hidden_layers=4, num_experts=8, num_experts_per_tok=2), torch.arange(1, 7)
    with record_paths(model) as recorded:
        model(ids[None])
    with pytest.raises(ValueError, match=message):
        PathTrace.from_experts([change(recorded.experts.long())], [ids], model)
    with pytest.raises(ValueError, match="experts has 1 sequences and token_ids 2"):
        PathTrace.from_experts([recorded.experts], [ids, ids], model)
    with pytest.raises(ValueError, match="num_experts=-1 must be at least 1"):
        PathTrace.from_experts([recorded.experts], [ids], model, num_experts=-1)
    for wrong in (ids / 2, ids[:, None]):
        with pytest.raises(ValueError, match=r"token_ids\[0\] has shape .* must be a list of integers"):
            PathTrace.from_experts([recorded.experts], [wrong], model)
    for wrong in (ids - 9, ids + 10**6):
        with pytest.raises(ValueError, match=r"token_ids\[0\] has token ids from .*, but the model's vocabulary has"):
            PathTrace.from_experts([recorded.experts], [wrong], model)


def test_balanced_routing_loads_all_experts_alike_and_ends_with_the_block(any_model, tokens, kind, tmp_path):
    model = any_model(kind)
    before = model(tokens()).logits
    with balance_routing(model), record_paths(model) as trace:
        assert not torch.allclose(model(tokens()).logits, before, atol=1e-2)
        model.save_pretrained(tmp_path)
    load = torch.stack(
        [layer.flatten().bincount(minlength=trace.model.num_experts) for layer in trace.experts.unbind(1)]
    )
    assert (load.max(dim=1).values - load.min(dim=1).values).max() <= 1
    assert (trace.experts.sort(dim=-1).values.diff(dim=-1) > 0).all()  # a token has k different experts
    for unbalanced in (model, type(model).from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(unbalanced(tokens()).logits, before, rtol=1e-4, atol=1e-5)
