# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The experts' own kernels, against a loop over tokens in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from pathmoe.experts import UNKNOWN, grouped, loop, select_kernel
from tests.conftest import TINY


KERNELS = {"loop": loop.run, "grouped": grouped.run}


def by_hand(x, top_k_index, weights, gate_up_proj, down_proj):
    """Token by token, expert by expert, with automatic differentiation."""
    outputs = []
    for token, experts, shares in zip(x, top_k_index.tolist(), weights):
        output = torch.zeros_like(token)
        for expert, share in zip(experts, shares):
            if expert < len(down_proj):
                gate, up = (gate_up_proj[expert] @ token).chunk(2)
                output = output + share * (down_proj[expert] @ (F.silu(gate) * up))
        outputs.append(output)
    return torch.stack(outputs)


def example(tokens=13, experts=6, top_k=3, hidden=16, width=8, dtype=torch.float32, seed=0, elsewhere=0):
    """Inputs of a kernel; routing is skewed, so that some experts get nothing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    liked = normal(experts + elsewhere).double() * 2
    scores = (normal(tokens, experts + elsewhere).double() + liked).softmax(dim=-1)
    weights, index = scores.topk(top_k)
    floats = (normal(tokens, hidden), weights.to(dtype), normal(experts, 2 * width, hidden, scale=0.3),
              normal(experts, hidden, width, scale=0.3))  # fmt: skip
    x, weights, gate_up_proj, down_proj = (tensor.requires_grad_() for tensor in floats)
    return x, index, weights, gate_up_proj, down_proj


def outcome(run, inputs):
    """Output and gradients of a kernel, in float64."""
    floats = [tensor for tensor in inputs if tensor.requires_grad]
    output = run(*inputs)
    weighting = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    return [output.double(), *torch.autograd.grad(output, floats, weighting.to(output.dtype))]


def assert_right(run, inputs, tolerance):
    exact = [t.double().detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    for got, expected in zip(outcome(run, inputs), outcome(by_hand, exact), strict=True):
        assert (got - expected).norm() <= tolerance * (expected.norm() + 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape",
    [{}, {"top_k": 1}, {"experts": 1, "top_k": 1}, {"tokens": 1}, {"experts": 40, "top_k": 8}, {"elsewhere": 4}],
    ids=str,
)
def test_outputs_and_all_gradients_are_those_by_hand(kernel, shape):
    assert_right(KERNELS[kernel], example(**shape), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_is_right_to_its_precision(kernel):
    assert_right(KERNELS[kernel], example(tokens=40, hidden=32, width=16, dtype=torch.bfloat16), 2e-2)


@given(st.integers(1, 9), st.integers(1, 7), st.data(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_loop_is_right_for_any_shape(tokens, experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    assert_right(loop.run, example(tokens, experts, top_k, hidden=5, width=3, seed=seed), 1e-4)


@pytest.mark.parametrize("numbers", [0, 100])
def test_experts_are_right_in_groups_of_any_size(numbers, monkeypatch):
    monkeypatch.setattr(loop, "PARALLEL_NUMBERS", numbers)
    assert_right(loop.run, example(tokens=40), 1e-5)


def test_gradients_of_the_loop_are_the_slopes():
    inputs = example(tokens=4, experts=3, top_k=2, hidden=3, width=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(loop.run, inputs)


def test_operators_keep_what_torch_asks_of_them():
    """Schema, fake tensors and gradients agree with what the operator does, also when it is traced."""
    x, index, *others = example(tokens=4)
    torch.library.opcheck(loop.experts, (x, index, *others))
    transposed = x.detach().t().contiguous().t().requires_grad_()
    torch.library.opcheck(loop.experts, (transposed, index.int(), *others))
    with torch.no_grad():
        torch.library.opcheck(loop.token_op, [tensor.detach() for tensor in example(tokens=1)])


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_inputs_give_the_same_bits(kernel):
    first, second = (outcome(KERNELS[kernel], example(tokens=50)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("elsewhere", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_token_is_right(dtype, elsewhere):
    with torch.no_grad():
        inputs = example(tokens=1, dtype=dtype, elsewhere=elsewhere)
        expected = by_hand(*(t.double() if t.is_floating_point() else t for t in inputs))
        assert (loop.run_token(*inputs) - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * (
            expected.norm() + 1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_tokens_give_no_tokens(kernel, dtype):
    x, index, weights, *projections = example(dtype=dtype)
    assert KERNELS[kernel](x[:0], index[:0], weights[:0], *projections).shape == (0, 16)


@pytest.mark.parametrize("frozen", [0, 3, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_frozen_inputs_get_no_gradient_and_change_no_other(kernel, frozen):
    inputs = list(example())
    expected = outcome(KERNELS[kernel], inputs)
    inputs[frozen] = inputs[frozen].detach()
    del expected[1 + [0, 2, 3, 4].index(frozen)]
    assert all(torch.equal(a, b) for a, b in zip(outcome(KERNELS[kernel], inputs), expected, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_keeps_no_more_than_the_first_projection(kernel):
    """Beside inputs and indices: S x 2F numbers, where S = 40 x 3 rows."""
    inputs = example(tokens=40)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = KERNELS[kernel](*inputs)
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert sum(t.numel() for place, t in kept.items() if place not in given and t.is_floating_point()) == 40 * 3 * 16
    output.sum().backward()


def experts_of(activation="silu", hidden=16, width=8, **attributes):
    config = AutoConfig.for_model(
        "mixtral", hidden_size=hidden, intermediate_size=width, num_local_experts=6, hidden_act=activation
    )
    config._experts_implementation = "pathmoe"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def gated_otherwise():
    class Experts(MixtralExperts):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return gate.sigmoid() * up

    module = experts_of()
    module.__class__ = Experts
    return module


def experts_of_gpt_oss():
    config = GptOssConfig(hidden_size=16, intermediate_size=8, num_local_experts=6, experts_implementation="pathmoe")
    module = GptOssExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize(
    "tokens, gradients, width, expected",
    [
        (1, False, 8, "token"),
        (5, False, 8, "grouped_mm"),
        (5, False, 6, "loop"),
        (2000, False, 8, "loop"),
        (1, True, 8, "loop"),
        (2000, True, 8, "loop"),
    ],
)
def test_kernel_suits_the_number_of_tokens_and_gradients(tokens, gradients, width, expected):
    x, index, weights, *_ = (tensor.detach() for tensor in example(tokens))
    with torch.set_grad_enabled(gradients):
        module = experts_of(width=width)
        assert select_kernel(module, x, index, weights) == expected
        result = module(x, index, weights)
        assert result.requires_grad == gradients
    reference = by_hand(x, index, weights, module.gate_up_proj, module.down_proj)
    torch.testing.assert_close(result, reference, atol=1e-5, rtol=1e-4)


def test_kernel_learns_through_the_weights_of_frozen_experts():
    """Only the router is trained: neither the experts nor what they see asks for a gradient."""
    x, index, weights, *_ = example(5)
    module = experts_of().requires_grad_(False)
    module(x.detach(), index, weights).sum().backward()
    assert weights.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "module, reason",
    [(experts_of("gelu"), "activation"), (gated_otherwise(), "gate"), (experts_of_gpt_oss(), "has_bias=True")],
    ids=["gelu", "gate", "gpt_oss"],
)
def test_other_experts_are_left_to_transformers_aloud(module, reason, caplog):
    x, index, weights, *_ = (tensor.detach() for tensor in example(5))
    assert select_kernel(module, x, index, weights) == "grouped_mm"
    with torch.no_grad():
        module(x, index, weights)
    assert "run on transformers' grouped_mm" in caplog.text and reason in caplog.text


def test_experts_with_an_attribute_of_a_later_transformers_are_not_run_by_our_kernels(monkeypatch, caplog):
    monkeypatch.setitem(UNKNOWN, "has_residual", False)
    module, (x, index, weights, *_) = experts_of(), example(5)
    assert select_kernel(module, x, index, weights) == "loop"
    module.has_residual = True
    assert select_kernel(module, x, index, weights) == "grouped_mm"
    module(x, index, weights)
    assert "they have has_residual=True" in caplog.text


@pytest.mark.parametrize("architecture", ["olmoe", "qwen3_moe", "mixtral"])
def test_other_models_take_our_experts_by_name(architecture, tokens):
    sizes = {"num_local_experts": 8, "intermediate_size": 16} if architecture != "qwen3_moe" else {"num_experts": 8}
    config = AutoConfig.for_model(architecture, **{**TINY, **sizes, "num_experts": 8})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="pathmoe")
    ids = tokens(2, 9)
    ours = model(ids, labels=ids)
    ours.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_experts_implementation("eager")
    theirs = model(ids, labels=ids)
    theirs.loss.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_autocast_reaches_the_experts_of_other_models():
    """transformers' implementations compute in the weights' float32."""
    x, index, weights, *_ = (tensor.detach() for tensor in example(40))
    module = experts_of()
    rounded = copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = module(x, index, weights)
    assert torch.equal(result, rounded(x.bfloat16(), index, weights.bfloat16()).float())
    result.sum().backward()
    assert module.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_model_is_the_eager_one(tiny_model, tokens, dtype):
    model, ids = tiny_model().to(dtype), tokens(2, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses, gradients = [], []
    for run in (model, compiled):
        loss = run(ids, labels=ids, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss)
        with torch.no_grad():
            losses.append(run(ids[:1, :1], use_cache=False).logits.sum())
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2  # a compiled norm rounds its gradients to bfloat16 midway
    torch.testing.assert_close(losses[:2], losses[2:], atol=tolerance, rtol=tolerance)
    for eager, traced in zip(*gradients):
        assert (eager - traced).norm() <= tolerance * (eager.norm() + 1e-3)


def test_experts_under_lora_learn_as_with_transformers_own(tiny_model, tokens):
    ids = tokens(2, 9)
    model = get_peft_model(
        tiny_model(),
        LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False),
    )
    gradients = []
    for implementation in ("pathmoe", "eager"):
        model.base_model.model.set_experts_implementation(implementation)
        loss = model(input_ids=ids, labels=ids).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(loss, trained))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
