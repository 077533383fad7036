# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pathmoe import PathMoEForCausalLM
from pathmoe.train.freezing import train_only


IDS = torch.arange(1, 33).view(2, 16)


def mixtral():
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 5}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, head_dim=8)
    )


def train(model, steps=3, **options):
    """Trains with an optimizer of all parameters; returns the parameters before."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **{"weight_decay": 0.0} | options)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before


@pytest.mark.parametrize("kind", ["pathmoe", "mixtral"])
def test_only_the_chosen_experts_routers_and_parameters_change(tiny_config, kind):
    model = (PathMoEForCausalLM(tiny_config()) if kind == "pathmoe" else mixtral()).train()
    with train_only(model, experts={1: [0, 3], 2: None}, routers=[1], parameters=[r"layers\.0\.self_attn"]) as chosen:
        before = train(model)
        router = "model.routers.1.weight" if kind == "pathmoe" else "model.layers.1.mlp.gate.weight"
        assert router in chosen.parameters and len(chosen.parameters) == (4 + 1 + (6 if kind == "pathmoe" else 4))
    for name, parameter in model.named_parameters():
        changed = parameter != before[name]
        if "layers.1.mlp.experts" in name:
            assert [bool(expert.any()) for expert in changed] == [n in (0, 3) for n in range(8)], name
        else:
            assert bool(changed.any()) == (name in chosen.parameters), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradients_of_the_chosen_are_those_of_full_training_and_all_others_zero(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).train()
    full = copy.deepcopy(model)
    full(input_ids=IDS, labels=IDS).loss.backward()
    chosen = train_only(model, experts={0: [5], 4: [1, 2]})
    model(input_ids=IDS, labels=IDS).loss.backward()
    for (name, parameter), reference in zip(model.named_parameters(), full.parameters()):
        if name not in chosen.parameters:
            assert parameter.grad is None
            continue
        trained = [5] if "layers.0" in name else [1, 2]
        for expert in range(8):
            expected = reference.grad[expert] if expert in trained else torch.zeros_like(reference.grad[expert])
            torch.testing.assert_close(parameter.grad[expert], expected, rtol=1e-5, atol=1e-7)
    chosen.remove()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for parameter, reference in zip(model.parameters(), full.parameters()):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-5, atol=1e-7)


def test_adapters_of_the_chosen_experts_are_trained(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).train()
    lora = LoraConfig(
        r=2,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj"],
        modules_to_save=[f"routers.{block}" for block in model.model.routers],
    )
    adapted = get_peft_model(model, lora)
    base = {name: parameter.detach().clone() for name, parameter in model.state_dict().items() if "lora" not in name}
    with train_only(adapted, experts={2: [4]}, routers=[0]) as chosen:
        assert len(chosen.parameters) == 4 + 1 and all(
            "layers.2" in name or "routers.0" in name for name in chosen.parameters
        )
        train(adapted, steps=4)
    merged = adapted.merge_and_unload().state_dict()
    for name, value in PathMoEForCausalLM(tiny_config()).state_dict().items():
        stem, _, leaf = name.rpartition(".")
        before = next(
            v
            for key, v in base.items()
            if key
            in (
                name,
                f"{stem}.original_module.{leaf}",
                name.replace("experts.", "experts.base_layer.base_layer."),
                name.replace("q_proj", "q_proj.base_layer"),
            )
        )
        changed = merged[name] != before
        if "layers.2.mlp.experts" in name:
            assert [bool(expert.any()) for expert in changed] == [n == 4 for n in range(8)], name
        else:
            assert bool(changed.any()) == (name == "model.routers.0.weight"), name
        assert value.shape == merged[name].shape


def test_an_optimizer_that_would_move_frozen_experts_is_refused(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).train()
    with train_only(model, experts={0: [1]}):
        with pytest.raises(ValueError, match=r"weight_decay=0.1 would change the frozen experts in model.layers.0"):
            train(model, weight_decay=0.1)
        model.zero_grad()
        train(model, steps=1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with train_only(model, experts={0: [1]}), pytest.raises(ValueError, match="whose moments are not zero"):
        optimizer.step()
    train(model, weight_decay=0.1)  # the check ends with the choice


@pytest.mark.parametrize(
    "choice, said",
    [
        ({"experts": {5: [0]}}, "experts: layer 5 does not exist: choose from 0 to 4"),
        ({"experts": {0: [8]}}, r"experts\[0\]: expert 8 does not exist: choose from 0 to 7"),
        ({"routers": [3]}, "routers 3 does not exist: choose from 0 to 2"),
        ({"parameters": ["embed_token$"]}, "'embed_token\\$' matches no parameter"),
        ({"experts": {0: []}}, "Nothing would be trained"),
        ({}, "Nothing would be trained"),
    ],
    ids=str,
)
def test_a_wrong_choice_is_refused_and_changes_nothing(tiny_config, choice, said):
    model = PathMoEForCausalLM(tiny_config())
    with pytest.raises(ValueError, match=said):
        train_only(model, **choice)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dense_models_are_refused():
    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM has no routers that are recognised"):
        train_only(dense, experts="all")
