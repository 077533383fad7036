# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Every router type, by itself and in a model. The references are written token by token in float64."""

import gc
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_pathmoe.routing_pathmoe import ROUTERS, load_balancing_loss
from pathmoe import PathMoEConfig, PathMoEForCausalLM, update_selection_bias


TYPES = sorted(kind for kind, router in ROUTERS.items() if not router.needs_token_ids)
COMBINATIONS = [
    (kind, sharing)
    for kind, sharing in itertools.product(ROUTERS, ("parameters", "decision"))
    if sharing == "parameters" or ROUTERS[kind].can_share_decision
]


def build(tiny_config, seed=0, **fields):
    torch.manual_seed(seed)
    return PathMoEForCausalLM(tiny_config(**fields))


def randomised_router(config, layers):
    """A router with weights that are far from their initial values."""
    router = ROUTERS[config.router_type](config, layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in itertools.chain(router.parameters(), router.buffers()):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return router


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def reference_linear(weights, x, layer, state):
    return torch.stack([dot(row, x) for row in weights["weight"]]), state


def reference_cosine(weights, x, layer, state):
    low = torch.stack([dot(row, x) for row in weights["projection"]])
    scale = torch.exp(torch.clamp(weights["log_scale"][0], max=math.log(100)))
    return torch.stack([scale * dot(low, e) / (low.norm() * e.norm()) for e in weights["expert_embeddings"]]), state


def reference_low_rank(weights, x, layer, state):
    full = weights["weight"] + weights["up"][layer] @ weights["down"][layer]
    return torch.stack([dot(row, x) for row in full]), state


def reference_recurrent(weights, x, layer, state):
    inputs = weights["projection"][layer] @ x
    size = len(inputs)
    state = torch.zeros(size, dtype=torch.float64) if state is None else state
    a = weights["weight_ih"] @ inputs + weights["bias_ih"]
    b = weights["weight_hh"] @ state + weights["bias_hh"]
    reset, update = (torch.sigmoid(a[i * size : (i + 1) * size] + b[i * size : (i + 1) * size]) for i in (0, 1))
    new = torch.tanh(a[2 * size :] + reset * b[2 * size :])
    state = (1 - update) * new + update * state
    return weights["gate"][layer] @ state, state


REFERENCES = {
    "linear": reference_linear,
    "random": reference_linear,
    "cosine": reference_cosine,
    "low_rank": reference_low_rank,
    "recurrent": reference_recurrent,
}


@pytest.mark.parametrize("kind", TYPES)
def test_logits_and_gradients_equal_a_token_by_token_reference_in_float64(tiny_config, kind):
    router = randomised_router(tiny_config(router_type=kind), [3, 4, 5])
    weights = {name: tensor.detach().double() for name, tensor in router.state_dict().items()}
    trained = {name: weights[name].requires_grad_() for name, _ in router.named_parameters()}
    tokens = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    inputs = tokens.clone().requires_grad_()
    exact = tokens.double().requires_grad_()

    state, total, logits = None, 0.0, []
    for layer_idx in (3, 4, 5):
        layer_logits, _, _, state = router(inputs, layer_idx, state)
        logits.append(layer_logits)
        total = total + (layer_logits * torch.linspace(-1, 1, 8)).square().sum()
    expected, expected_total = [], 0.0
    states = [None] * len(tokens)
    for layer in range(3):
        rows = []
        for i, x in enumerate(exact):
            row, states[i] = REFERENCES[kind](weights, x, layer, states[i])
            rows.append(row)
        expected.append(torch.stack(rows))
        expected_total = expected_total + (expected[-1] * torch.linspace(-1, 1, 8).double()).square().sum()

    for layer_logits, layer_expected in zip(logits, expected):
        torch.testing.assert_close(layer_logits.double(), layer_expected, rtol=1e-4, atol=1e-4)
    total.backward()
    expected_total.backward()
    torch.testing.assert_close(inputs.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)
    for name, parameter in router.named_parameters():
        scale = max(1.0, trained[name].grad.abs().max().item())
        torch.testing.assert_close(parameter.grad.double() / scale, trained[name].grad / scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "sharing"), COMBINATIONS)
@pytest.mark.parametrize("block_size", [1, 2, 5, 9, [1, 4], [3, 2]])
def test_every_combination_trains_all_its_parameters_and_reports_each_layer(tiny_config, kind, sharing, block_size):
    model = build(tiny_config, router_type=kind, router_sharing=sharing, router_block_size=block_size).train()
    ids = torch.randint(0, 99, (2, 6))
    output = model(ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    assert [logits.shape for logits in output.router_logits] == [(12, 8)] * 5
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []
    blocks = {1: 5, 2: 3, 5: 1, 9: 1}.get(block_size if isinstance(block_size, int) else None, 2)
    assert len(model.model.routers) == blocks


@pytest.mark.parametrize("kind", [kind for kind in TYPES if not ROUTERS[kind].can_share_decision])
def test_decision_cannot_be_shared_where_layers_route_differently_by_design(tiny_config, kind):
    with pytest.raises(Exception, match=f"router_sharing='decision' has no meaning with router_type='{kind}'"):
        tiny_config(router_type=kind, router_sharing="decision")


@pytest.mark.parametrize("kind", [kind for kind in TYPES if ROUTERS[kind].can_share_decision])
def test_shared_decision_is_that_of_the_first_layer_of_the_block(tiny_config, kind):
    """Written by hand: the later layers of a block are given the first layer's weights and indices."""
    shared = build(tiny_config, router_type=kind, router_sharing="decision").eval()
    apart = build(tiny_config, router_type=kind, router_block_size=2).eval()
    apart.load_state_dict(shared.state_dict())
    decisions = {}

    def repeat(router, args, output):
        layer_idx = args[1]
        first = router.layers[0]
        if layer_idx == first:
            decisions[first] = output
        return (*decisions[first][:3], output[3])

    for router in apart.model.routers.values():
        router.register_forward_hook(repeat)
    ids = torch.randint(0, 99, (2, 6))
    a, b = (model(ids, output_router_logits=True) for model in (shared, apart))
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=0)
    for block in shared.config.router_blocks:
        for layer_idx in block:
            assert torch.equal(a.router_logits[layer_idx], a.router_logits[block[0]])


def test_low_rank_with_rank_zero_is_linear_and_starts_as_linear(tiny_config):
    ids = torch.randint(0, 99, (2, 6))
    linear = build(tiny_config)
    for rank in (0, 3):
        low_rank = build(tiny_config, router_type="low_rank", router_rank=rank)
        low_rank.load_state_dict(linear.state_dict(), strict=False)
        torch.testing.assert_close(low_rank(ids).logits, linear(ids).logits)
    assert sorted(build(tiny_config, router_type="low_rank", router_rank=0).state_dict()) == sorted(
        linear.state_dict()
    )


def test_recurrent_state_crosses_blocks_and_stays_with_its_token(tiny_config):
    model = build(tiny_config, router_type="recurrent", router_block_size=2).eval()
    inputs = []
    for router in model.model.routers.values():
        router.register_forward_pre_hook(lambda router, args: inputs.append((args[1], args[2])))
    ids = torch.randint(0, 99, (1, 6))
    whole = model(ids, output_router_logits=True)
    assert [state is None for _, state in inputs] == [True, False, False, False, False]
    # The same tokens one by one with a cache: a token's routing depends on its own layers alone.
    cache, steps = None, []
    for position in range(6):
        step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True, output_router_logits=True)
        cache = step.past_key_values
        steps.append(torch.stack(step.router_logits))
    torch.testing.assert_close(torch.cat(steps, dim=1), torch.stack(whole.router_logits), rtol=1e-4, atol=1e-5)


def test_recurrent_routing_of_packed_documents_is_that_of_the_documents_alone(tiny_config):
    model = build(tiny_config, router_type="recurrent").eval()
    a, b = torch.randint(0, 99, (1, 4)), torch.randint(0, 99, (1, 6))
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = model(torch.cat([a, b], dim=1), position_ids=positions, output_router_logits=True, use_cache=False)
    alone = [model(ids, output_router_logits=True) for ids in (a, b)]
    for layer_idx in range(5):
        expected = torch.cat([output.router_logits[layer_idx] for output in alone])
        torch.testing.assert_close(packed.router_logits[layer_idx], expected, rtol=1e-4, atol=1e-5)


def test_random_router_is_never_trained_and_survives_saving(tiny_config, tmp_path):
    model = build(tiny_config, router_type="random")
    assert not [name for name, _ in model.named_parameters() if "routers" in name]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "routers" in name}
    assert len(before) == 3 and all(tensor.abs().sum() > 0 for tensor in before.values())
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(reloaded.parameters(), lr=0.1)
    ids = torch.randint(0, 99, (2, 6))
    for _ in range(3):
        reloaded(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, tensor in before.items():
        assert torch.equal(reloaded.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", TYPES)
def test_router_survives_saving_and_trainer(tiny_config, tmp_path, kind):
    """Sharing too: as many routers, tensors and names as before, and the trained weights back to the bit."""
    model = build(tiny_config, router_type=kind, router_bias_update_rate=0.01)
    ids = torch.randint(0, 99, (6,)).tolist()
    data = [{"input_ids": ids, "labels": ids}] * 4
    args = TrainingArguments(tmp_path / "run", max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=data)
    names = sorted(model.state_dict())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert sorted(reloaded.state_dict()) == names
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(("kind", "sharing"), COMBINATIONS)
def test_fullgraph_compile_and_checkpointing_equal_eager(tiny_config, kind, sharing):
    fields = {"router_type": kind, "router_sharing": sharing, "router_bias_update_rate": 0.01}
    ids = torch.randint(0, 99, (2, 6))
    gradients = []
    for way in ("eager", "compiled", "checkpointed"):
        model = build(tiny_config, **fields).train()
        if way == "checkpointed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if way == "compiled" else model
        run(ids, labels=ids).loss.backward()
        load = torch.cat([router.load for router in model.model.routers.values()])
        gradients.append({**{name: p.grad for name, p in model.named_parameters()}, "load": load})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_sum_to_one_and_belong_to_their_experts(tiny_config, kind, dtype):
    router = randomised_router(tiny_config(router_type=kind), [0, 1]).to(dtype)
    logits, weights, indices, _ = router(torch.randn(50, 32, dtype=dtype), 0)
    assert logits.dtype == torch.float32 and weights.dtype == dtype
    chosen = logits.gather(-1, indices).softmax(dim=-1)
    torch.testing.assert_close(weights.float(), chosen, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(50), rtol=0, atol=8e-3)
    assert torch.equal(indices, logits.topk(2).indices)


def test_equal_scores_go_to_the_lower_expert(tiny_config):
    router = ROUTERS["linear"](tiny_config(num_experts_per_tok=3), [0])
    torch.nn.init.zeros_(router.weight)
    _, _, indices, _ = router(torch.randn(300, 32), 0)
    assert indices.unique(dim=0).tolist() == [[0, 1, 2]]


def test_selection_bias_decides_who_is_chosen_and_not_how_much(tiny_config):
    router = randomised_router(tiny_config(router_bias_update_rate=0.001), [0, 1])
    router.selection_bias.zero_()
    router.selection_bias[1, 5] = 10.0
    tokens = torch.randn(20, 32)
    logits, weights, indices, _ = router(tokens, 1)
    assert (indices[:, 0] == 5).all()
    torch.testing.assert_close(weights, logits.gather(-1, indices).softmax(dim=-1))
    assert not (router(tokens, 0)[2][:, 0] == 5).all()


def test_counting_the_load_leaves_the_logits_of_the_vocabulary(tiny_config):
    model, ids = build(tiny_config, router_bias_update_rate=0.01), torch.randint(0, 64, (2, 9))
    expected = model.eval()(ids).logits
    torch.testing.assert_close(model.train()(ids, labels=ids).logits, expected)


def test_bias_update_follows_the_load_of_the_whole_step_without_padding(tiny_config):
    model = build(tiny_config, router_bias_update_rate=0.01).train()
    ids = torch.randint(0, 99, (4, 6))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    expected = torch.zeros(5, 8)
    for rows in (slice(0, 2), slice(2, 4)):
        output = model(ids[rows], labels=ids[rows], attention_mask=mask[rows], output_router_logits=True)
        real = mask[rows].reshape(-1).bool()
        for layer_idx, logits in enumerate(output.router_logits):
            for chosen in logits[real].topk(2).indices.tolist():
                for expert in chosen:
                    expected[layer_idx, expert] += 1
    load = torch.cat([router.load for router in model.model.routers.values()])
    assert torch.equal(load, expected)
    update_selection_bias(model)
    bias = torch.cat([router.selection_bias for router in model.model.routers.values()])
    torch.testing.assert_close(bias, 0.01 * torch.sign(expected.mean(dim=1, keepdim=True) - expected))
    assert all(router.load.sum() == 0 for router in model.model.routers.values())


def test_bias_and_counts_stay_float32_in_a_bfloat16_model(tiny_config, tmp_path):
    model = build(tiny_config, router_bias_update_rate=0.001)
    model.model.routers["0"].selection_bias.fill_(0.6001)
    model.save_pretrained(tmp_path)
    for low in (model.to(torch.bfloat16), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        router = low.model.routers["0"]
        assert router.weight.dtype == torch.bfloat16
        assert router.selection_bias.dtype == router.load.dtype == torch.float32
        assert torch.equal(router.selection_bias, torch.full((2, 8), 0.6001))


def test_pipeline_plan_is_offered_only_where_no_state_would_be_lost(tiny_config):
    assert tiny_config().base_model_pp_plan is not None
    for fields in ({"router_type": "recurrent"}, {"router_sharing": "decision"}):
        assert tiny_config(**fields).base_model_pp_plan is None


def test_bias_balances_a_collapsed_router(tiny_config):
    """From a start where all tokens go to the same experts, some hundred updates spread them."""
    model = build(tiny_config, router_bias_update_rate=0.01, num_hidden_layers=1).train()
    router = model.model.routers["0"]
    ids = torch.randint(0, 99, (8, 16))
    with torch.no_grad():
        router.weight[:] *= 5
        imbalance = []
        for _ in range(150):
            logits = model(ids, labels=ids, output_router_logits=True).router_logits
            _, chosen = router.choose(logits[0], 0)
            load = chosen.flatten().bincount(minlength=8).float()
            imbalance.append((load.max() / load.mean()).item())
            update_selection_bias(model)
    assert imbalance[-1] < 1.3 < imbalance[0]


def test_evaluation_and_models_without_a_bias_are_left_alone(tiny_config):
    model = build(tiny_config, router_bias_update_rate=0.01).eval()
    ids = torch.randint(0, 99, (2, 6))
    model(ids, labels=ids)
    assert all(router.load.sum() == 0 for router in model.model.routers.values())
    plain = build(tiny_config)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    update_selection_bias(plain)
    torch.testing.assert_close(plain.state_dict(), before, rtol=0, atol=0)


def test_balancing_loss_reaches_the_router_that_its_layers_share(tiny_config):
    """The gradient of a shared router is the sum of what each of its layers would give."""
    model = build(tiny_config, router_block_size=5).train()
    ids = torch.randint(0, 99, (2, 6))
    logits = model(ids, output_router_logits=True).router_logits
    (whole,) = torch.autograd.grad(
        load_balancing_loss(logits, 8, 2), model.model.routers["0"].weight, retain_graph=True
    )
    parts = [
        torch.autograd.grad(load_balancing_loss((layer,), 8, 2), model.model.routers["0"].weight, retain_graph=True)[0]
        for layer in logits
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean(dim=0), rtol=1e-4, atol=1e-7)


def run_rank(rank, port, folder):
    """One of two ranks that train with every router type on halves of a batch."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    torch.manual_seed(3)
    ids = torch.randint(0, 99, (4, 6))
    for kind in TYPES:
        torch.manual_seed(0)
        model = PathMoEForCausalLM(PathMoEConfig.from_pretrained(folder, router_type=kind)).train()
        ddp = DistributedDataParallel(model)
        half = ids[rank * 2 : rank * 2 + 2]
        ddp(input_ids=half, labels=half).loss.backward()
        update_selection_bias(model)
        if rank == 0:
            state = {f"bias.{b}": router.selection_bias for b, router in model.model.routers.items()}
            torch.save({**state, **{name: p.grad for name, p in model.named_parameters()}}, f"{folder}/{kind}.pt")
    distributed.barrier()
    del ddp  # if it held the last reference to the group, freeing it could wait forever for gloo's threads
    gc.collect()
    distributed.destroy_process_group()


def test_two_ranks_give_the_gradients_and_the_bias_of_one(tiny_config, tmp_path, free_port):
    tiny_config(router_bias_update_rate=0.01).save_pretrained(tmp_path)
    code = (
        "import sys; from tests.modeling_pathmoe.test_routers import run_rank; "
        "run_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", code]
    ranks = [subprocess.Popen([*command, str(rank), free_port, str(tmp_path)], env=env) for rank in range(2)]
    assert [rank.wait(600) for rank in ranks] == [0, 0]
    torch.manual_seed(3)
    ids = torch.randint(0, 99, (4, 6))
    for kind in TYPES:
        model = build(tiny_config, router_type=kind, router_bias_update_rate=0.01).train()
        model(ids, labels=ids).loss.backward()
        update_selection_bias(model)
        two = torch.load(tmp_path / f"{kind}.pt")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(two[name], parameter.grad, rtol=1e-3, atol=1e-6)
        for block, router in model.model.routers.items():
            assert torch.equal(two[f"bias.{block}"], router.selection_bias)
