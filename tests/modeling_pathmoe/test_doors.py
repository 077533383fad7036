# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The ways in which transformers' users call, change, trace and export a model, each of them beside the plain one."""

import copy
import gc

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_pathmoe.cache_pathmoe import CACHE_NAMES
from modeling_pathmoe.loss_pathmoe import linear_cross_entropy
from pathmoe import PathMoEForCausalLM, update_selection_bias


GREEDY = {"do_sample": False, "max_new_tokens": 6}
VARIANTS = [
    {},
    {"router_type": "recurrent"},
    {"router_type": "cosine"},
    {"router_sharing": "decision"},
    {"router_bias_update_rate": 0.1},
]


def chosen(model, ids):
    """The experts that each layer chooses, a tensor of shape (layers, tokens, k)."""
    seen = []
    handles = [
        router.register_forward_hook(lambda router, args, output: seen.append(output[2]))
        for router in model.model.routers.values()
    ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_the_cache_goes_in_and_out_under_both_names(tiny_model, tokens, assert_same, name):
    model, ids = tiny_model(), tokens(2, 8)
    for forward in (model, model.model):
        outputs = forward(ids[:, :5], use_cache=True)
        assert outputs[name] is getattr(outputs, name) is not None
        kept = copy.deepcopy(outputs[name])
        whole, part = forward(ids, use_cache=False)[0], forward(ids[:, 5:], **{name: outputs[name]})[0]
        assert_same(part, whole[:, 5:])
        in_place = forward(ids[:, 5:], None, None, copy.deepcopy(kept))[0]
        as_tuple = forward(ids[:, 5:], **{name: kept}, return_dict=False)
        assert torch.equal(in_place, part) and torch.equal(as_tuple[0], part)
        assert kept in as_tuple


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("name", CACHE_NAMES)
@torch.no_grad()
def test_heads_take_the_cache_under_both_names(tiny_config, tokens, assert_same, head, name):
    import pathmoe

    model = getattr(pathmoe, f"PathMoEFor{head}")(tiny_config(pad_token_id=0)).eval()
    ids = tokens(2, 8)
    cache = getattr(model, model.base_model_prefix)(ids[:, :5], use_cache=True).cache
    whole, part = model(ids)[0], model(ids[:, 5:], **{name: cache})[0]
    assert_same(part, whole if head == "SequenceClassification" else whole[:, 5:])


def test_two_caches_and_unknown_names_of_the_cache_are_refused(tiny_model, tokens):
    model, ids = tiny_model(), tokens(1, 4)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, past_key_values=caches[0], cache=caches[1])
    for forward in (model, model.model):
        with pytest.raises(TypeError, match="^key_value_store=DynamicCache is a key-value cache"):
            forward(ids, key_value_store=caches[0])


@pytest.mark.parametrize("fields", [{}, {"router_sharing": "decision"}, {"router_block_size": [1, 4]}], ids=str)
def test_early_exit_and_fewer_layers_keep_the_routers(tiny_model, tokens, fields):
    model, ids = tiny_model(**fields), tokens(1, 6)
    plain = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **GREEDY), plain)
    full = chosen(model, ids)
    model.config.num_hidden_layers = 3
    few = chosen(model, ids)
    assert torch.equal(few, full[: len(few)]) and len(few) == 3


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_layers_keep_their_router_when_others_are_removed(tiny_model, tokens, fields):
    """A layer is removed by taking its effect away first: what the others do must not change by the removal."""
    model, ids = tiny_model(**fields), tokens(2, 6)
    removed = 1
    with torch.no_grad():
        model.model.layers[removed].self_attn.o_proj.weight.zero_()
        model.model.layers[removed].mlp.experts.down_proj.zero_()
    expected = model(ids, use_cache=False).logits
    del model.model.layers[removed]
    model.config.num_hidden_layers -= 1
    if fields.get("router_type") == "recurrent":  # the removed layer also took part in the state
        assert model(ids, use_cache=False).logits.shape == expected.shape
    else:
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_a_saved_model_without_a_layer_routes_as_before(tiny_model, tokens, tmp_path, assert_same):
    model, ids = tiny_model(), tokens(2, 6)
    del model.model.layers[2]
    model.config.num_hidden_layers = 4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.router_block_size == [2, 1, 1]
    assert_same(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("fields", [{"router_type": "low_rank"}, {"router_bias_update_rate": 0.1}, None], ids=str)
def test_layers_that_no_configuration_describes_are_not_saved(tiny_model, tmp_path, fields):
    model = tiny_model(**(fields or {}))
    removed = [2, 3] if fields is None else [3]  # a whole block, or a layer with parameters of its own in the router
    for layer in reversed(removed):
        del model.model.layers[layer]
    model.config.num_hidden_layers = len(model.model.layers)
    with pytest.raises(ValueError, match="router_block_size cannot describe"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [{}, {"router_sharing": "decision"}, {"router_type": "recurrent"}], ids=str)
def test_replicated_layers_keep_their_router(tiny_model, tokens, fields):
    model, ids = tiny_model(**fields), tokens(1, 6)
    config = LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 3], [1, 4]], task_type="CAUSAL_LM")
    replicated = get_peft_model(model, config)
    assert [layer.router_block for layer in model.model.layers] == [0, 0, 1, 0, 1, 1]
    whole = replicated(ids, use_cache=False).logits
    cache = replicated(ids[:, :3], use_cache=True).cache
    part = replicated(ids[:, 3:], cache=cache).logits
    torch.testing.assert_close(part, whole[:, 3:], rtol=1e-4, atol=1e-5 * whole.abs().max().item())


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.12"),
    reason="torch 2.11 cannot tell that the smaller of two strides is, and refuses Qwen3-MoE too",
)
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_exported_programs_take_other_lengths(tiny_model, tokens, fields):
    model = tiny_model(**fields)
    shapes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("sequence", min=2, max=100)}
    program = torch.export.export(
        model,
        (),
        {"input_ids": tokens(2, 12), "use_cache": False},
        dynamic_shapes={"input_ids": shapes, "use_cache": None},
    )
    for ids in (tokens(3, 20), tokens(1, 5)):
        actual, expected = program.module()(input_ids=ids, use_cache=False).logits, model(ids).logits
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
def test_onnx_runtime_agrees_at_other_lengths(tiny_config, tokens, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = PathMoEForCausalLM(tiny_config(initializer_range=0.2, num_hidden_layers=3)).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=100)}}
    program = torch.onnx.export(Logits(), (tokens(2, 12),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokens(3, 20)
    actual = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
    torch.testing.assert_close(actual, model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_trace_of_a_single_token_chooses_experts_anew(tiny_model):
    model = tiny_model().requires_grad_(False)
    model.config.return_dict = False
    trace = torch.jit.trace(lambda ids: model(ids, use_cache=False)[0], torch.tensor([[1]]), check_trace=False)
    for token in range(2, 20):
        ids = torch.tensor([[token]])
        torch.testing.assert_close(trace(ids), model(ids, use_cache=False)[0], rtol=1e-4, atol=1e-4)


def test_functional_gradients_equal_plain_ones(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens(2, 8)
    parameters = dict(model.named_parameters())

    def loss(parameters, ids):
        inputs = {"input_ids": ids[None], "labels": ids[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, kwargs=inputs).loss

    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for row, sequence in enumerate(ids):
        model.zero_grad()
        model(sequence[None], labels=sequence[None], use_cache=False).loss.backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(of_each[name][row], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"qk_norm": "full"}], ids=str)
def test_second_derivatives_equal_those_of_plain_torch(tiny_model, tokens, fields):
    found, ids = [], tokens(2, 6)
    for experts in ("pathmoe", "eager"):
        model = tiny_model(**fields).double()
        model.set_experts_implementation(experts)
        model.set_attn_implementation("eager")
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False).loss
        (first,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        first.square().sum().backward()
        found.append([first.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    for actual, expected in zip(*found):
        torch.testing.assert_close(actual, expected)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    # If DDP held the last reference to the group, freeing it could wait forever for gloo's threads; see train/main.py.
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block_size, refused", [(2, True), (1, False)])
def test_reentrant_checkpointing_of_shared_routers_under_ddp_is_refused(
    tiny_model, tokens, one_rank, block_size, refused
):
    model, ids = tiny_model(router_block_size=block_size).train(), tokens(2, 6)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    if refused:
        with pytest.raises(ValueError, match="use_reentrant.*DistributedDataParallel"):
            wrapped(ids, labels=ids)
    else:
        wrapped(ids, labels=ids).loss.backward()
        assert all(router.weight.grad.abs().sum() > 0 for router in model.model.routers.values())


def replicate(model):
    """What DataParallel makes of a module for one forward on another device: its tensors are plain attributes."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas.get(child))
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, tensor.clone())
    return replicas[model]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_data_parallel_replicas_compute_the_same(tiny_model, tokens, precision):
    model, ids = tiny_model(router_aux_loss_coef=0.01, router_bias_update_rate=0.01).train(), tokens(2, 6)
    if precision == "bfloat16":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        torch.testing.assert_close(replicate(model)(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_a_trained_selection_bias_outlives_a_rate_of_zero(tiny_model, tokens, tmp_path, assert_same):
    model, ids = tiny_model(router_bias_update_rate=0.1), tokens(2, 6)
    for router in model.model.routers.values():
        router.selection_bias.normal_()
    model.save_pretrained(tmp_path)
    expected = model(ids, labels=ids).loss
    still = AutoModelForCausalLM.from_pretrained(tmp_path, router_bias_update_rate=0)
    assert_same(still(ids, labels=ids).loss, expected)
    still.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").train()
    assert again.config.router_selection_bias and not again.config.router_bias_update_rate
    before = [router.selection_bias.clone() for router in again.model.routers.values()]
    again(ids, labels=ids)
    update_selection_bias(again)
    for router, bias in zip(again.model.routers.values(), before):
        assert torch.equal(router.selection_bias, bias) and bias.any()


def test_the_rate_may_be_set_after_loading(tiny_model, tokens, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    ids = tokens(2, 6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, router_bias_update_rate=0.1).train()
    model(ids, labels=ids)
    update_selection_bias(model)
    assert all(router.selection_bias.any() for router in model.model.routers.values())
    model.config.router_bias_update_rate = 0.0
    frozen = [router.selection_bias.clone() for router in model.model.routers.values()]
    model(ids, labels=ids)
    update_selection_bias(model)
    assert all(torch.equal(a, r.selection_bias) for a, r in zip(frozen, model.model.routers.values()))


def test_a_rate_without_a_bias_is_refused(tiny_model, tokens):
    model, ids = tiny_model().train(), tokens(2, 6)
    model.config.router_bias_update_rate = 0.1
    with pytest.raises(ValueError, match="router_bias_update_rate=0.1 moves a selection bias, but this model"):
        model(ids, labels=ids)


@torch.no_grad()
def test_router_logits_do_not_ask_for_a_mask_of_two_dimensions(tiny_model, tokens, assert_same):
    model, ids = tiny_model(output_router_logits=True), tokens(2, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6)
    outputs = model(ids, attention_mask=mask)
    assert_same(outputs.logits, model(ids).logits)
    assert len(outputs.router_logits) == 5 and outputs.aux_loss is None


def test_meta_models_run_in_bfloat16(tiny_config, tokens):
    with torch.device("meta"):
        model, ids = PathMoEForCausalLM(tiny_config()).to(torch.bfloat16), torch.ones(2, 7, dtype=torch.int64)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.device.type == "meta"
    assert model.lm_head.weight.grad.shape == model.lm_head.weight.shape


def test_shift_labels_may_be_given_as_none(tiny_model, tokens):
    model, ids = tiny_model(router_aux_loss_coef=0.01).train(), tokens(2, 6)
    losses = [model(ids, labels=ids, num_items_in_batch=10, **extra).loss for extra in ({}, {"shift_labels": None})]
    assert torch.equal(*losses)


def test_positions_that_are_not_counted_may_hold_nan(tokens):
    labels = tokens(2, 8)
    labels[0, 3] = labels[1, 7] = -100
    hidden = torch.randn(2, 8, 16)
    clean, weight = hidden.clone().requires_grad_(), torch.randn(99, 16, requires_grad=True)
    expected = linear_cross_entropy(clean, weight, labels)
    expected.backward()
    expected_weight, weight.grad = weight.grad, None
    hidden[0, 2] = torch.nan  # predicts a label that is ignored
    hidden[1, 6] = torch.inf
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(weight.grad, expected_weight) and torch.equal(hidden.grad, clean.grad)


@pytest.mark.parametrize("size, plan", [("tp_size", "base_model_tp_plan"), ("ep_size", "base_model_ep_plan")])
def test_unknown_parallel_styles_are_refused(tiny_config, monkeypatch, size, plan):
    config = tiny_config()
    monkeypatch.setattr(type(config), plan, {"layers.*.mlp.experts": "folded_sideways"})
    config.check_parallel_styles(None)
    config.check_parallel_styles({"fsdp_size": 2})
    with pytest.raises(ValueError, match=r"does not know the parallel styles \['folded_sideways'\]"):
        config.check_parallel_styles({size: 2})


def test_a_sequence_beyond_the_longest_is_reported(tiny_model, tokens, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_pathmoe.attention_pathmoe.logger.warning_once", said.append)
    model, ids = tiny_model(max_position_embeddings=8), tokens(1, 9)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    model(ids, position_ids=torch.arange(9)[None] % 5)  # packed documents, each of which is short enough
    assert said == []
    for forward in (lambda: model(ids), lambda: model(ids[:, 8:], past_key_values=cache)):
        forward()
        assert "9 tokens, more than max_position_embeddings=8" in said.pop()
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    tiny_model(max_position_embeddings=8, rope_parameters=rope)(ids)
    assert said == []
