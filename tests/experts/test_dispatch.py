# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import copy
import re

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.integrations import ALL_PARALLEL_STYLES

from pathmoe import (
    PathMoEConfig,
    PathMoEForCausalLM,
    PathMoEForQuestionAnswering,
    PathMoEForSequenceClassification,
    PathMoEForTokenClassification,
    PathMoEModel,
)


MODELS = [
    PathMoEModel,
    PathMoEForCausalLM,
    PathMoEForSequenceClassification,
    PathMoEForTokenClassification,
    PathMoEForQuestionAnswering,
]


def operators(model, ids):
    """Names of the operators that a forward runs."""
    with torch.profiler.profile() as profile:
        model(ids)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("cls", MODELS)
def test_experts_are_ours_by_default(tiny_config, cls):
    """Without the package, `grouped_mm`: tests/hub."""
    assert cls(tiny_config(pad_token_id=0)).config._experts_implementation == "pathmoe"


def test_experts_are_ours_after_loading(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "pathmoe"


@pytest.mark.parametrize("implementation", ["pathmoe", "grouped_mm", "eager", "batched_mm"])
def test_experts_run_the_implementation_that_the_config_names(tiny_model, tokens, implementation):
    """The operator itself is looked for, because a wrong dispatch would be silent."""
    model = tiny_model()
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    assert ("pathmoe::experts" in operators(model, tokens())) == (implementation == "pathmoe")
    assert ("aten::_grouped_mm" in operators(model, tokens())) == (implementation == "grouped_mm")
    assert ("aten::bmm" in operators(model, tokens())) == (implementation == "batched_mm")


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_expert_implementations_agree_in_logits_and_gradients(
    tiny_model, tokens, gradients, assert_same, implementation
):
    model, ids = tiny_model(), tokens(3, 9)
    expected = model(ids, labels=ids)
    expected_gradients = gradients(model, expected.loss)
    model.set_experts_implementation(implementation)
    actual = model(ids, labels=ids)
    assert_same(actual.logits, expected.logits)
    assert_same(gradients(model, actual.loss), expected_gradients)


# Flex attention is compiled by inductor, for which a machine needs a C++ compiler; on a CPU it has no backward.
@torch.no_grad
@pytest.mark.parametrize("qk_norm", [True, "full"])
@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree_in_logits(tiny_model, tokens, assert_same, implementation, qk_norm):
    """With left and right padding; logits of padding are nobody's business."""
    model, ids = tiny_model(head_dim=16, qk_norm=qk_norm), tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, 6:] = 0
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask).logits[mask == 1]
    model.set_attn_implementation(implementation)
    assert_same(model(ids, attention_mask=mask).logits[mask == 1], expected)


def test_attention_implementations_agree_in_gradients(tiny_model, tokens, gradients, assert_same):
    model, ids = tiny_model(), tokens()
    model.set_attn_implementation("eager")
    expected = gradients(model, model(ids, labels=ids).loss)
    model.set_attn_implementation("sdpa")
    assert_same(gradients(model, model(ids, labels=ids).loss), expected)


def test_attentions_are_returned_for_each_layer(tiny_model, tokens):
    model = tiny_model()
    model.set_attn_implementation("eager")
    attentions = model(tokens(2, 7), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 4, 7, 7)] * 5


def test_hidden_states_run_from_the_embeddings_to_the_final_norm(tiny_model, tokens):
    model, ids = tiny_model(), tokens()
    hidden_states = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden_states) == 6
    assert torch.equal(hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(hidden_states[-1], model.model(ids).last_hidden_state)


def test_compiled_model_equals_eager_without_a_graph_break(tiny_model, tokens, gradients, assert_same):
    model, ids = tiny_model(num_hidden_layers=3).train(), tokens()
    expected = model(ids, labels=ids)
    expected_gradients = gradients(model, expected.loss)
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids)
    assert_same(actual.logits, expected.logits)
    assert_same(gradients(model, actual.loss), expected_gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(tiny_model, tokens, gradients, assert_same, use_reentrant):
    model, ids = tiny_model().train(), tokens()
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    runs = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda module, args: runs.append(module))
    assert_same(gradients(model, model(ids, labels=ids).loss), expected)
    assert len(runs) == 2 * 5


@pytest.mark.parametrize("field", ["hidden_size", "moe_intermediate_size"])
def test_grouped_mm_with_unaligned_rows_is_refused_when_built(tiny_config, field):
    """18 float32 numbers are 72 bytes."""
    with pytest.raises(ValueError, match=rf'{field}=18 .*72 bytes.* multiple of 4, or pass .*="eager"'):
        AutoModelForCausalLM.from_config(tiny_config(**{field: 18}), experts_implementation="grouped_mm")


def test_grouped_mm_with_unaligned_rows_is_refused_when_set(tiny_config, tokens):
    model = AutoModelForCausalLM.from_config(tiny_config(moe_intermediate_size=18), experts_implementation="eager")
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="moe_intermediate_size=18 in torch.float32"):
        model.set_experts_implementation("grouped_mm")
    assert model.config._experts_implementation == "eager"


def test_alignment_is_judged_in_the_dtype_that_is_loaded(tiny_config, tokens, tmp_path):
    """20 numbers are 80 bytes in float32 and 40 in bfloat16."""
    PathMoEForCausalLM(tiny_config(moe_intermediate_size=20)).save_pretrained(tmp_path)
    grouped = {"experts_implementation": "grouped_mm"}
    assert AutoModelForCausalLM.from_pretrained(tmp_path, **grouped)(tokens()).logits.isfinite().all()
    with pytest.raises(ValueError, match="moe_intermediate_size=20 in torch.bfloat16 .* choose a multiple of 8"):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **grouped)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert ours(tokens()).logits.isfinite().all()


def test_alignment_is_judged_in_the_dtype_that_is_built(tiny_config):
    config = tiny_config(moe_intermediate_size=20)
    with pytest.raises(ValueError, match="moe_intermediate_size=20 in torch.bfloat16"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("fields", [{}, {"qk_norm": False, "attention_bias": True}, {"qk_norm": "full"}], ids=str)
def test_initialisation_covers_every_parameter_and_buffer(tiny_config, cls, fields):
    """What loading on the meta device relies on."""
    with torch.device("meta"):
        model = cls(tiny_config(pad_token_id=0, **fields))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    model.init_weights()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if not t.isfinite().all()]
    assert left == []


def test_initial_matrices_have_the_standard_deviation_of_the_config(tiny_config):
    model = PathMoEForCausalLM(tiny_config(initializer_range=0.05, router_block_size=5))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.15), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=0.01), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name


def test_other_rows_of_a_batch_change_nothing(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens(6, 9)
    together = model(ids).logits
    for row in range(6):
        assert_same(together[row], model(ids[row : row + 1]).logits[0])


def test_no_token_is_dropped_however_crowded_its_experts_are(tiny_model, assert_same):
    """512 equal tokens at equal positions all want the same two experts."""
    model = tiny_model()
    alone = model(torch.tensor([[7]])).logits[0]
    assert_same(model(torch.full((512, 1), 7)).logits, alone.expand(512, 1, -1))


def test_later_tokens_change_nothing(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens(2, 9)
    assert_same(model(ids).logits[:, :5], model(ids[:, :5]).logits)


@pytest.mark.parametrize(
    "places",
    [
        pytest.param({"model.layers": "disk", "model.routers": "cpu"}, id="layers-on-disk"),
        pytest.param({"model.layers": "cpu", "model.routers": "disk"}, id="routers-on-disk"),
        pytest.param({"model.layers": "disk", "model.routers": "disk"}, id="both-on-disk"),
    ],
)
def test_offloading_changes_no_logit(tiny_model, tokens, assert_same, tmp_path, places):
    model, ids = tiny_model(), tokens()
    model.save_pretrained(tmp_path / "model")
    others = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=others | places, offload_folder=tmp_path / "offload"
    )
    on_disk = {name for name, parameter in offloaded.named_parameters() if parameter.device.type == "meta"}
    wanted = tuple(part for part, place in places.items() if place == "disk")
    assert on_disk == {name for name, _ in model.named_parameters() if name.startswith(wanted)}
    assert_same(offloaded(ids).logits, model(ids).logits)


def test_offloaded_model_runs_under_autocast(tiny_model, tokens, tmp_path):
    model, ids = tiny_model(), tokens()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "model.routers", "lm_head"), "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places | {"model.layers": "disk"}, offload_folder=tmp_path / "offload"
    )
    with torch.autocast("cpu", torch.bfloat16):
        logits = offloaded(ids).logits
    # The experts stay in float32 here, so the comparison is as wide as bfloat16 attention makes it.
    correlation = torch.corrcoef(torch.stack([logits.float().flatten(), model(ids).logits.flatten()]))[0, 1]
    assert correlation > 0.99


def test_experts_follow_autocast(tiny_model, assert_same):
    """Output and gradients are those of experts that were cast by hand; the gradients arrive in float32."""
    model = tiny_model()
    block, by_hand = model.model.layers[0].mlp, copy.deepcopy(model.model.layers[0].mlp).to(torch.bfloat16)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    route = model.model._route_of_layer(0)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = block(x, route)
    expected, _ = by_hand(x, route)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    for parameter, cast in zip(block.parameters(), by_hand.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert_same(parameter.grad, cast.grad.float())


DENSE = {"mlp_only_layers": [0], "intermediate_size": 24}


def matches(pattern, names):
    regex = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if regex.fullmatch(name)]


@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"qk_norm": "full"}, DENSE], ids=str)
@pytest.mark.parametrize("plan", ["_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan"])
def test_every_key_of_a_plan_names_something_that_exists(tiny_model, plan, fields):
    model = tiny_model(**fields)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    keys = list(getattr(model, plan))
    assert any(key.startswith("model.") for key in keys)
    assert [key for key in keys if not matches(key, names)] == []


@pytest.mark.parametrize("qk_norm", [True, "full"])
@pytest.mark.parametrize("plan", ["base_model_tp_plan", "base_model_ep_plan"])
def test_every_style_of_a_plan_is_known_to_transformers(tiny_config, plan, qk_norm):
    unknown = set(getattr(tiny_config(qk_norm=qk_norm), plan).values()) - set(ALL_PARALLEL_STYLES)
    if plan == "base_model_ep_plan" and Version(transformers.__version__) < Version("5.20"):
        with pytest.raises(ValueError, match=re.escape(f"does not know the parallel styles {sorted(unknown)}")):
            PathMoEConfig.check_parallel_styles({"ep_size": 2})
    else:
        assert not unknown


@pytest.mark.parametrize("fields", [{}, DENSE], ids=str)
def test_tensor_parallel_plan_covers_all_weights_of_a_layer_but_its_norms(tiny_model, fields):
    model = tiny_model(**fields)
    plan = [key for key in model._tp_plan if "layers" in key]
    uncovered = [
        name
        for name, _ in model.named_parameters()
        if ".layers.0." in name and not any(matches(key, [name, name.removesuffix(".weight")]) for key in plan)
    ]
    assert uncovered == ["model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"]


def test_pipeline_plan_names_the_stages_in_the_order_they_run(tiny_model):
    model = tiny_model()
    stages = [name for name, _ in model.model.named_children() if f"model.{name}" in model._pp_plan]
    assert stages == list(model.config.base_model_pp_plan) == ["embed_tokens", "layers", "norm"]
