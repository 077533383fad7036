# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from pathmoe import PathMoEForCausalLM, PathMoERouter


BLOCK_SIZES = [1, 2, 99, [1, 3, 1]]


def assert_router_of_block_one_is_shared(model, ids):
    """With blocks of two in five layers: changing router 1 changes the choice of layers 2 and 3, and of no earlier."""

    def choices():
        router_logits = model(ids, output_router_logits=True).router_logits
        return [logits.detach().clone() for logits in router_logits]

    def layer_inputs():
        seen = []
        base = next(m for m in model.modules() if isinstance(m, PathMoEForCausalLM))
        hooks = [
            layer.post_attention_layernorm.register_forward_hook(
                lambda m, args, output: seen.append(output.flatten(0, 1))
            )
            for layer in base.model.layers
        ]
        logits = choices()
        for hook in hooks:
            hook.remove()
        return seen, logits

    routers = {m.layers[0]: m for m in model.modules() if isinstance(m, PathMoERouter)}
    before = choices()
    with torch.no_grad():
        routers[2].weight.copy_(torch.randn_like(routers[2].weight))
    inputs, after = layer_inputs()
    for layer in (0, 1):
        assert torch.equal(before[layer], after[layer])
    for layer in (2, 3):
        assert not torch.allclose(before[layer], after[layer])
        torch.testing.assert_close(after[layer], inputs[layer] @ routers[2].weight.T)


@pytest.mark.parametrize("router_block_size", BLOCK_SIZES, ids=str)
def test_router_parameters_number_blocks_times_experts_times_width(tiny_config, router_block_size):
    config = tiny_config(router_block_size=router_block_size)
    model = PathMoEForCausalLM(config)
    inside = sum(p.numel() for name, p in model.named_parameters() if "router" in name)
    assert inside == len(config.router_blocks) * 8 * 32
    independent = PathMoEForCausalLM(tiny_config(router_block_size=1))
    assert independent.num_parameters() - model.num_parameters() == (5 - len(config.router_blocks)) * 8 * 32


@pytest.mark.parametrize("router_block_size", BLOCK_SIZES, ids=str)
def test_state_has_one_key_and_one_storage_for_each_router(tiny_config, router_block_size):
    config = tiny_config(router_block_size=router_block_size)
    state = PathMoEForCausalLM(config).state_dict()
    keys = [f"model.routers.{block}.weight" for block in range(len(config.router_blocks))]
    assert [key for key in state if "router" in key or "gate." in key] == keys
    assert len({state[key].data_ptr() for key in keys}) == len(keys)
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_router_is_registered_in_one_place(tiny_config):
    model = PathMoEForCausalLM(tiny_config())
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PathMoERouter)]
    assert names == ["model.routers.0", "model.routers.1", "model.routers.2"]


def test_changing_a_router_changes_all_layers_of_its_block(tiny_model, tokens):
    assert_router_of_block_one_is_shared(tiny_model(), tokens())


@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"], ids=["one file", "shards"])
def test_saved_files_hold_each_router_once(tiny_model, tmp_path, max_shard_size):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    saved = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                assert key not in saved
                saved[key] = file.get_tensor(key)
    assert sorted(saved) == sorted(model.state_dict())
    for block in range(3):
        name = f"model.routers.{block}.weight"
        assert torch.equal(saved[name], model.state_dict()[name])


def test_loaded_model_shares_its_routers(tiny_model, tokens, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert_router_of_block_one_is_shared(PathMoEForCausalLM.from_pretrained(tmp_path), tokens())


@pytest.mark.parametrize("fields", [{}, {"router_block_size": [4, 1]}, {"tie_word_embeddings": True}], ids=str)
def test_loaded_model_computes_the_same(tiny_model, tokens, assert_same, tmp_path, fields):
    model, ids = tiny_model(**fields), tokens()
    model.save_pretrained(tmp_path)
    loaded, info = PathMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded(ids).logits, model(ids).logits)


def test_deep_copy_shares_within_itself_and_nothing_with_the_original(tiny_model, tokens):
    model, ids = tiny_model(), tokens()
    expected = model(ids).logits
    assert_router_of_block_one_is_shared(copy.deepcopy(model), ids)
    assert torch.equal(model(ids).logits, expected)


def test_shared_router_takes_one_step_for_the_summed_gradient_of_its_layers(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens()
    layerwise = tiny_model(router_block_size=1)
    layerwise.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if ".routers." not in name}
        | {
            f"model.routers.{layer}.weight": model.model.routers[str(block)].weight
            for layer, block in enumerate(model.config.layer_to_block)
        }
    )
    layerwise(ids, labels=ids).loss.backward()
    before = model.model.routers["1"].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    step = sum(layerwise.model.routers[layer].weight.grad for layer in ("2", "3"))
    assert_same(model.model.routers["1"].weight, before - 0.5 * step)


def test_resumed_training_is_the_uninterrupted_one_to_the_bit(tiny_model, tokens, tmp_path):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            ids = tokens(seed=seed)
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    def start(seed):
        model = tiny_model(seed, router_aux_loss_coef=0.1).train()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = start(seed=0)
    steps(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(model, optimizer, range(3, 6))

    resumed, resumed_optimizer = start(seed=1)
    state = torch.load(tmp_path / "state.pt")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    steps(resumed, resumed_optimizer, range(3, 6))
    for (name, expected), actual in zip(model.named_parameters(), resumed.parameters()):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear"], ids=str)
def test_lora_leaves_routers_single_and_unwrapped(tiny_model, tokens, target_modules):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=target_modules))
    names = [name for name, module in model.named_modules() if isinstance(module, PathMoERouter)]
    assert names == [f"base_model.model.model.routers.{block}" for block in range(3)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("self_attn" in name or "lm_head" in name for name in trained)
    assert_router_of_block_one_is_shared(model, tokens())


def test_lora_that_also_trains_the_routers_keeps_one_for_each_block(tiny_model, tokens, assert_same, tmp_path):
    """`modules_to_save` copies what it names once for each block, trains the copy, and saves it."""
    ids = tokens()
    model = get_peft_model(
        tiny_model(),
        LoraConfig(
            target_modules=["q_proj"],
            modules_to_save=[f"routers.{block}" for block in range(3)],
            init_lora_weights=False,
        ),
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    assert trained == [f"base_model.model.model.routers.{block}.modules_to_save.default.weight" for block in range(3)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_same(loaded(ids).logits, model(ids).logits)
