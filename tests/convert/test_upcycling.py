# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pathmoe.convert import export_checkpoint, upcycle


SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
DENSE = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
}


@pytest.fixture
def dense(tmp_path):
    """Returns a function that saves a tiny dense model and gives its folder."""

    def save(kind="llama"):
        torch.manual_seed(0)
        model_class, config_class, fields = DENSE[kind]
        model_class(config_class(**SIZES, **fields)).save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    return save


@pytest.mark.parametrize(
    "kind, experts, top_k, granularity",
    [
        ("llama", 8, 2, 1),
        ("llama tied", 8, 1, 1),
        ("mistral", 8, 4, 2),
        ("qwen3", 6, 3, 3),
        ("llama", 2, 2, 2),
    ],
)
def test_the_function_is_preserved_without_noise(dense, tmp_path, logits, kind, experts, top_k, granularity):
    source = dense(kind)

    manifest = upcycle(source, tmp_path / "moe", experts, top_k, block_size=2, granularity=granularity)

    assert (logits(tmp_path / "moe") - logits(source)).abs().max() <= 1e-4
    assert manifest["verified"]["must_be_equal"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.config.moe_intermediate_size == 24 // granularity
    assert len(model.model.routers) == 3 and all(router.weight.std() > 0.1 for router in model.model.routers.values())


def test_an_upcycled_llama_trains_as_one_and_leaves_as_mixtral(dense, tmp_path, logits):
    upcycle(dense(), tmp_path / "moe", 4, 2, block_size=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(99, (4, 32), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    experts = model.model.layers[0].mlp.experts.down_proj
    assert not torch.allclose(experts[0], experts[1], atol=1e-3), "training must part the copies"
    model.save_pretrained(tmp_path / "trained")

    export_checkpoint(tmp_path / "trained", tmp_path / "mixtral")
    assert (logits(tmp_path / "mixtral") - logits(tmp_path / "trained")).abs().max() <= 1e-4


def test_noise_parts_the_experts_by_its_size(dense, tmp_path):
    source = dense()
    manifest = upcycle(source, tmp_path / "moe", 4, 2, noise=0.1)

    assert not manifest["verified"]["must_be_equal"]
    before = load_file(source / "model.safetensors")["model.layers.3.mlp.up_proj.weight"]
    after = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.3.mlp.experts.gate_up_proj"][:, 24:]
    for expert in after:
        assert ((expert - before).std() / before.std()).item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(after[0], after[1])


def test_drop_redraws_a_share_of_whole_neurons(dense, tmp_path):
    source = dense()
    upcycle(source, tmp_path / "moe", 4, 2, drop=0.5)

    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "moe"))
    gate, down = (before[f"model.layers.2.mlp.{name}_proj.weight"] for name in ("gate", "down"))
    fused, new_down = (after[f"model.layers.2.mlp.experts.{name}_proj"] for name in ("gate_up", "down"))
    dropped = []
    for expert in range(4):
        neurons = (fused[expert, :24] != gate).all(dim=1)
        assert neurons.sum() == 12, "half of the 24"
        assert torch.equal((new_down[expert] != down).all(dim=0), neurons), "the same neurons in every matrix"
        assert torch.equal(fused[expert, :24][~neurons], gate[~neurons]), "the others are untouched"
        assert fused[expert, :24][neurons].std().item() == pytest.approx(gate[neurons].std().item(), rel=0.2)
        dropped.append(tuple(neurons.tolist()))
    assert len(set(dropped)) == 4, "other neurons in each expert"


def test_the_seed_decides(dense, tmp_path):
    source = dense()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(source, tmp_path / name, 4, 2, noise=0.1, drop=0.5, seed=seed, verify=False)
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same != other


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"num_experts": 6, "num_experts_per_tok": 2, "granularity": 4}, "granularity=4.*num_experts=6"),
        ({"num_experts": 8, "num_experts_per_tok": 3, "granularity": 2}, "granularity=2.*num_experts_per_tok=3"),
        ({"num_experts": 10, "num_experts_per_tok": 5, "granularity": 5}, "granularity=5.*intermediate_size=24"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "noise": -1.0}, "noise=-1.0"),
        ({"num_experts": 4, "num_experts_per_tok": 2, "drop": 1.0}, "drop=1.0"),
    ],
    ids=str,
)
def test_numbers_that_do_not_fit_are_refused(dense, tmp_path, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        upcycle(dense(), tmp_path / "moe", **arguments)


@pytest.mark.parametrize(
    "model_class, config, reason",
    [
        (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True), "attention_bias=True"),
        (LlamaForCausalLM, LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias=True"),
        (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=64), "sliding_window=64"),
        (Qwen2ForCausalLM, Qwen2Config(**SIZES), "model_type='qwen2'.*biases"),
    ],
    ids=["attention bias", "mlp bias", "sliding window", "qwen2"],
)
def test_dense_models_that_do_not_fit_are_refused(tmp_path, model_class, config, reason):
    model_class(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=reason):
        upcycle(tmp_path / "dense", tmp_path / "moe", 4, 2)
