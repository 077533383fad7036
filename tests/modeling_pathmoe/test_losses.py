# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from pathmoe import load_balancing_loss, router_z_loss


def random_logits(seed, layers, tokens, experts):
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(tokens, experts, generator=generator) for _ in range(layers))


def brute_force_load_balancing(router_logits, top_k):
    per_layer = []
    for logits in router_logits:
        num_tokens, num_experts = logits.shape
        picks, importance = [0] * num_experts, [0.0] * num_experts
        for row in logits.double():
            probs = row.exp() / row.exp().sum()
            for e in sorted(range(num_experts), key=lambda e: row[e].item(), reverse=True)[:top_k]:
                picks[e] += 1
            for e in range(num_experts):
                importance[e] += probs[e].item()
        terms = [picks[e] / num_tokens * importance[e] / num_tokens for e in range(num_experts)]
        per_layer.append(num_experts * sum(terms))
    return sum(per_layer) / len(per_layer)


def brute_force_z(router_logits):
    squares = [row.double().exp().sum().log().item() ** 2 for logits in router_logits for row in logits]
    return sum(squares) / len(squares)


shapes = {
    "seed": st.integers(0, 999),
    "layers": st.integers(1, 4),
    "tokens": st.integers(1, 6),
    "experts_and_k": st.integers(1, 8).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e))),
}


@given(**shapes)
def test_load_balancing_loss_equals_loops(seed, layers, tokens, experts_and_k):
    experts, top_k = experts_and_k
    logits = random_logits(seed, layers, tokens, experts)
    assert load_balancing_loss(logits, experts, top_k).item() == pytest.approx(
        brute_force_load_balancing(logits, top_k), rel=1e-5
    )


@given(**shapes)
@example(seed=5, layers=1, tokens=1, experts_and_k=(3, 1))
def test_z_loss_equals_loops(seed, layers, tokens, experts_and_k):
    logits = random_logits(seed, layers, tokens, experts_and_k[0])
    # A logsumexp near zero is a difference of numbers up to 6, which float32 knows to 5e-7: its square, where the
    # logsumexp is below 0.1 and 1e-5 of it asks for more, to 1e-7.
    assert router_z_loss(logits).item() == pytest.approx(brute_force_z(logits), rel=1e-5, abs=1e-7)


def test_z_loss_of_equal_logits_is_the_squared_log_of_their_number():
    """E logits of zero: logsumexp is log E."""
    assert router_z_loss((torch.zeros(3, 8),)).item() == pytest.approx(torch.tensor(8.0).log().item() ** 2)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balanced_layer_costs_k(top_k):
    """Eight tokens, each preferring the next k experts in a circle."""
    logits = torch.stack([torch.roll(torch.tensor([9.0] * top_k + [0.0] * (8 - top_k)), t) for t in range(8)])
    assert load_balancing_loss((logits, logits), 8, top_k).item() == pytest.approx(top_k)


def collapsed_layers():
    """Four layers, each sending all tokens to two experts of its own."""
    layers = []
    for layer in range(4):
        logits = torch.full((16, 8), -50.0)
        logits[:, 2 * layer : 2 * layer + 2] = 50.0
        layers.append(logits)
    return tuple(layers)


def test_layers_collapsed_onto_different_experts_cost_the_number_of_experts():
    assert load_balancing_loss(collapsed_layers(), 8, 2).item() == pytest.approx(8.0)


def test_transformers_function_calls_such_layers_balanced():
    """Why the package has its own; when this fails, transformers has changed and ours may be superfluous."""
    assert load_balancing_loss_func(collapsed_layers(), 8, 2).item() == pytest.approx(2.0)


@given(seed=st.integers(0, 999), mask=st.lists(st.booleans(), min_size=12, max_size=12).filter(any))
def test_padded_rows_leave_both_losses_as_if_they_were_absent(seed, mask):
    kept = torch.tensor(mask)
    logits = random_logits(seed, 3, 12, 4)
    poisoned = tuple(x.masked_fill(~kept[:, None], float("nan")) for x in logits)
    for loss in (lambda x, m=None: load_balancing_loss(x, 4, 2, m), router_z_loss):
        expected = loss(tuple(x[kept] for x in logits))
        torch.testing.assert_close(loss(poisoned, kept.view(3, 4).long()), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_of_the_model(tiny_model, tokens, assert_same, side):
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.5).train()
    ids = tokens(2, 6)
    pad = (4, 0) if side == "left" else (0, 4)
    mask = torch.nn.functional.pad(torch.ones_like(ids), pad)
    padded = {
        "input_ids": torch.nn.functional.pad(ids, pad, value=3),
        "labels": torch.nn.functional.pad(ids, pad, value=-100),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    # A left-padded row has one more target, the first token, predicted from padding.
    padded["labels"][:, pad[0]] = -100
    actual, expected = model(**padded), model(ids, labels=ids)
    for name in ("loss", "aux_loss", "z_loss"):
        assert_same(actual[name], expected[name])


def test_cached_tokens_are_not_counted_again(tiny_model, tokens, assert_same):
    """With a cache the mask is longer than what is routed; the losses are those of the new tokens."""
    model, ids = tiny_model(), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask, output_router_logits=True)
    cache = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
    new = model(ids[:, 6:], attention_mask=mask, past_key_values=cache, output_router_logits=True)
    last = tuple(x.view(2, 8, 8)[:, 6:].flatten(0, 1) for x in whole.router_logits)
    assert_same(new.aux_loss, load_balancing_loss(last, 8, 2))
    assert_same(new.z_loss, router_z_loss(last))


@pytest.mark.parametrize("output_router_logits", [False, True])
@pytest.mark.parametrize("coefficients", [(0.5, 0.0), (0.0, 0.5), (0.3, 0.7)], ids=str)
def test_training_loss_is_cross_entropy_plus_coefficients_times_losses(
    tiny_model, tokens, assert_same, coefficients, output_router_logits
):
    """A coefficient alone is enough: router logits need not be asked for."""
    model = tiny_model(
        router_aux_loss_coef=coefficients[0],
        router_z_loss_coef=coefficients[1],
        output_router_logits=output_router_logits,
    ).train()
    ids = tokens()
    outputs = model(ids, labels=ids)
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_same(outputs.loss, cross_entropy + coefficients[0] * outputs.aux_loss + coefficients[1] * outputs.z_loss)
    assert (outputs.router_logits is not None) == output_router_logits
    recorded = model(ids, output_router_logits=True).router_logits
    assert_same(outputs.aux_loss, load_balancing_loss(recorded, 8, 2))
    assert_same(outputs.z_loss, router_z_loss(recorded))


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_evaluation_loss_is_cross_entropy_alone(tiny_model, tokens, assert_same, output_router_logits):
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.5, output_router_logits=output_router_logits)
    ids = tokens()
    outputs = model(ids, labels=ids)
    assert_same(
        outputs.loss, torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    assert (outputs.aux_loss is not None) == output_router_logits


def test_default_training_loss_is_cross_entropy_alone(tiny_model, tokens, assert_same):
    model, ids = tiny_model().train(), tokens()
    assert_same(model(ids, labels=ids).loss, model.eval()(ids, labels=ids).loss)


def test_auxiliary_loss_reaches_the_shared_router_from_every_layer(tiny_model, tokens, assert_same):
    """Its gradient is that of the loss of an unshared model, summed over the block."""
    model, ids = tiny_model(), tokens()
    embeds = model.get_input_embeddings()(ids).detach()
    shared = model(inputs_embeds=embeds, output_router_logits=True).aux_loss
    expected = torch.autograd.grad(shared, model.model.routers["0"].weight)[0]

    unshared = tiny_model(router_block_size=1)
    unshared.load_state_dict(
        {n: t for n, t in model.state_dict().items() if ".routers." not in n}
        | {
            f"model.routers.{layer}.weight": model.model.routers[str(block)].weight
            for layer, block in enumerate(model.config.layer_to_block)
        }
    )
    loss = unshared(inputs_embeds=embeds, output_router_logits=True).aux_loss
    per_layer = torch.autograd.grad(loss, [unshared.model.routers[str(layer)].weight for layer in (0, 1)])
    assert_same(expected, sum(per_layer))
    assert all(gradient.abs().max() > 1e-4 for gradient in per_layer)


def test_micro_batches_weigh_router_losses_like_the_cross_entropy(tiny_model, tokens, assert_same):
    """Each micro-batch counts by its share of the targets of the optimizer step, so the sum is a mean."""
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.25).train()
    ids = tokens(4, 9)
    labels = ids.clone()
    labels[0, 3:] = labels[1, 7:] = -100
    num_items = (labels[:, 1:] != -100).sum()
    losses, expected = [], 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        outputs = model(ids[rows], labels=labels[rows], num_items_in_batch=num_items)
        losses.append(outputs.loss)
        share = (labels[rows, 1:] != -100).sum() / num_items
        expected = expected + share * (0.5 * outputs.aux_loss + 0.25 * outputs.z_loss)
    whole = model(ids, labels=labels)
    cross_entropy = whole.loss - 0.5 * whole.aux_loss - 0.25 * whole.z_loss
    assert_same(sum(losses), cross_entropy + expected)


@pytest.mark.parametrize("num_items", [int, torch.tensor], ids=["int", "tensor"])
def test_one_micro_batch_is_the_batch(tiny_model, tokens, assert_same, num_items):
    model = tiny_model(router_aux_loss_coef=0.5).train()
    ids = tokens(2, 6)
    assert_same(model(ids, labels=ids, num_items_in_batch=num_items(10)).loss, model(ids, labels=ids).loss)


def test_labels_that_were_shifted_beforehand_weigh_router_losses_the_same(tiny_model, tokens, assert_same):
    """Sequence-parallel trainers pass `shift_labels`."""
    model = tiny_model(router_aux_loss_coef=0.5).train()
    ids = tokens(2, 6)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    kwargs = {"labels": ids, "num_items_in_batch": 20}
    assert_same(model(ids, shift_labels=shifted, **kwargs).loss, model(ids, **kwargs).loss)


def test_mask_that_is_not_two_dimensional_is_refused(tiny_model, tokens):
    model, ids = tiny_model(router_aux_loss_coef=0.5).train(), tokens(2, 6)
    mask = torch.zeros(2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(batch, sequence\).*\[2, 1, 6, 6\].*pass that"):
        model(ids, labels=ids, attention_mask=mask)
    assert model.eval()(ids, labels=ids, attention_mask=mask).loss.isfinite()


@pytest.mark.parametrize(
    "fields", [{"router_aux_loss_coef": 0.1}, {"router_z_loss_coef": 0.1}, {"router_sharing": "decision"}], ids=str
)
def test_reentrant_checkpointing_is_refused_where_it_loses_router_gradients(tiny_model, tokens, fields):
    """In silence, because it sees neither a recorded loss nor a tuple of tensors that a layer hands on."""
    model, ids = tiny_model(**fields).train(), tokens()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match='use_reentrant": False'):
        model(ids, labels=ids)


def test_checkpointing_keeps_the_gradients_of_router_losses(tiny_model, tokens, gradients, assert_same):
    model, ids = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.5).train(), tokens()
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(model, model(ids, labels=ids).loss), expected)


def test_trainer_evaluates_cross_entropy_and_predicts_logits_alone(tiny_model, tokens, tmp_path):
    """With router logits on and router losses trained, which is when transformers' outputs grow."""
    model = tiny_model(router_aux_loss_coef=0.5, router_z_loss_coef=0.5, output_router_logits=True)
    ids = tokens(4, 6)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, use_cpu=True, report_to=[], per_device_eval_batch_size=4, disable_tqdm=True),
        eval_dataset=rows,
    )
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)
    predictions = trainer.predict(rows).predictions
    torch.testing.assert_close(torch.tensor(predictions), logits.detach(), rtol=1e-5, atol=1e-5)


def test_trainer_takes_the_step_of_one_batch_when_it_accumulates_micro_batches(tiny_model, tokens, tmp_path):
    """Two equal rows as two micro-batches: every loss, the router's too, counts as in one batch."""
    row = tokens(1, 8)[0]
    rows = [{"input_ids": row, "labels": row}] * 2

    def weights_after_a_step(batch_size, steps):
        model = tiny_model(router_aux_loss_coef=1.0, router_z_loss_coef=1.0)
        arguments = TrainingArguments(
            tmp_path,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        return dict(model.named_parameters())

    torch.testing.assert_close(weights_after_a_step(1, 2), weights_after_a_step(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        ({"router_aux_loss_coef": 0.5}, "router_aux_loss_coef=0.5"),
        (
            {"router_z_loss_coef": 0.25, "router_aux_loss_coef": 0.5, "output_router_logits": True},
            "router_z_loss_coef=0.25",
        ),
        ({"router_bias_update_rate": 0.001}, None),
        ({}, None),
        ({"router_aux_loss_coef": 0.5, "output_router_logits": True}, None),
    ],
    ids=str,
)
def test_a_trainer_that_computes_the_loss_itself_is_told_what_has_no_effect(
    tiny_model, tokens, tmp_path, monkeypatch, fields, unused
):
    said = []
    monkeypatch.setattr("modeling_pathmoe.loss_pathmoe.logger.warning_once", said.append)
    model, row = tiny_model(**fields), tokens(1, 8)[0]
    rows = [{"input_ids": row, "labels": row}] * 2
    common = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    Trainer(model, TrainingArguments(tmp_path, **common), train_dataset=rows).train()
    model.eval()(row[None])
    with torch.no_grad():
        model.train()(row[None])
    assert said == []
    Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, **common), train_dataset=rows).train()
    assert [unused in message and "pass labels" in message for message in said] == ([True] if unused else [])
