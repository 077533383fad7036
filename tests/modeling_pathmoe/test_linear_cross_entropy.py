# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from accelerate import cpu_offload
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_pathmoe.loss_pathmoe import CHUNK_TOKENS, linear_cross_entropy
from pathmoe.train.plan import PeakMemory


def example(dtype=torch.float32, rows=5, length=300):
    torch.manual_seed(0)
    hidden_states, weight = torch.randn(rows, length, 12).to(dtype), torch.randn(37, 12).to(dtype)
    labels = torch.randint(0, 37, (rows, length))
    labels[0, 7:90] = -100
    assert rows * length > CHUNK_TOKENS
    return hidden_states.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("items", [None, 123, torch.tensor(77)], ids=str)
def test_loss_and_gradients_are_those_of_the_logits(dtype, tolerance, items):
    hidden_states, weight, labels = example(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    loss = linear_cross_entropy(hidden_states, weight, labels, items)
    expected = ForCausalLMLoss(exact[0] @ exact[1].t(), labels, 37, items)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.double(), rtol=tolerance, atol=0)
    got, wanted = torch.autograd.grad(loss, [hidden_states, weight]), torch.autograd.grad(expected, exact)
    for ours, reference in zip(got, wanted):
        assert (ours - reference).norm() <= tolerance * reference.norm()


def test_rounding_leaves_the_length_of_a_bfloat16_gradient():
    hidden_states, weight, labels = example(torch.bfloat16, rows=3, length=1370)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight)]
    got = torch.autograd.grad(linear_cross_entropy(hidden_states, weight, labels), [hidden_states, weight])
    wanted = torch.autograd.grad(ForCausalLMLoss(exact[0] @ exact[1].t(), labels, 37), exact)
    for ours, reference in zip(got, wanted):
        assert (ours * reference).sum() / reference.square().sum() == pytest.approx(1, abs=5e-4)


def test_other_labels_are_ignored_when_asked_and_refused_otherwise():
    hidden_states, weight, labels = example()
    labels[labels == -100] = 3
    loss = linear_cross_entropy(hidden_states, weight, labels, ignore_index=3)
    torch.testing.assert_close(loss, ForCausalLMLoss(hidden_states @ weight.t(), labels, 37, ignore_index=3))
    labels[1, 5] = -1
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden_states, weight, labels)


def test_evaluation_computes_no_gradient():
    hidden_states, weight = torch.randn(1, 4, 64), torch.randn(5000, 64, requires_grad=True)
    labels = torch.randint(0, 5000, (1, 4))
    with torch.no_grad(), PeakMemory([hidden_states, weight, labels]) as memory:
        linear_cross_entropy(hidden_states, weight, labels)
    assert memory.peak < weight.nbytes / 2


def test_a_frozen_head_gets_no_gradient():
    hidden_states, weight, labels = example()
    expected = torch.autograd.grad(linear_cross_entropy(hidden_states, weight, labels), hidden_states)
    got = torch.autograd.grad(linear_cross_entropy(hidden_states, weight.detach(), labels), hidden_states)
    assert torch.equal(*got, *expected)


def test_shifted_labels_are_taken_as_they_are():
    hidden_states, weight, labels = example()
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = linear_cross_entropy(hidden_states, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden_states, weight, None, shift_labels=shifted), expected)


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"router_aux_loss_coef": 0.1}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_model_without_logits_learns_the_same(tiny_model, tokens, fields, autocast):
    model, ids = tiny_model(**fields).train(), tokens(3, 9)
    gradients, losses = [], []
    for skip in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(ids, labels=ids, num_items_in_batch=torch.tensor(50), skip_logits=skip)
        assert (output.logits is None) == skip
        losses.append(output.loss)
        gradients.append(torch.autograd.grad(output.loss, list(model.parameters())))
    tolerance = 3e-2 if autocast else 1e-5
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    for whole, chunked in zip(*gradients):
        assert (whole - chunked).norm() <= tolerance * (whole.norm() + 1e-4)


def test_logits_are_not_skipped_where_that_would_be_wrong(tiny_model, tokens):
    model, ids = tiny_model(), tokens()
    with pytest.raises(ValueError, match="labels is None: pass labels"):
        model(ids, skip_logits=True)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="it is a Sequential that is sharded, offloaded or wrapped"):
        model(ids, labels=ids, skip_logits=True)
    offloaded = cpu_offload(tiny_model(), "cpu")
    with pytest.raises(ValueError, match="leave skip_logits out"):
        offloaded(ids, labels=ids, skip_logits=True)
    assert offloaded(ids, labels=ids).loss.isfinite()


def test_a_second_backward_or_derivative_is_refused():
    hidden_states, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden_states, weight, torch.randint(0, 16, (1, 4)))
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        torch.autograd.grad(loss, hidden_states, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="skip_logits=False"):
        loss.backward()


def test_an_empty_batch_has_zero_gradients():
    hidden_states, weight = torch.randn(0, 4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    linear_cross_entropy(hidden_states, weight, torch.zeros(0, 4, dtype=torch.long), num_items_in_batch=1).backward()
    assert torch.equal(weight.grad, torch.zeros(16, 8))
