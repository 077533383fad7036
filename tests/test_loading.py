# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from pathmoe import PathMoEForCausalLM
from pathmoe.command import UserError
from pathmoe.loading import check_finite, load_model


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
OTHERS = [
    *(
        kind(vocab_size=99, intermediate_size=16, num_experts_per_tok=2, **SIZES)
        for kind in (OlmoeConfig, MixtralConfig)
    ),
    Qwen3MoeConfig(vocab_size=99, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, **SIZES),
    LlamaConfig(vocab_size=99, intermediate_size=16, **SIZES),
    GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4),
]


@pytest.fixture
def folder(tiny_config, tmp_path):
    PathMoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config.model_type)
def test_whole_checkpoints_of_other_architectures_load(config, tied, tmp_path):
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("tied", [False, True])
def test_whole_checkpoints_of_ours_load(tiny_config, tied, tmp_path):
    PathMoEForCausalLM(tiny_config(tie_word_embeddings=tied)).save_pretrained(tmp_path)
    load_model(tmp_path)


def drop_router(tensors):
    tensors.pop("model.routers.1.weight")


DAMAGES = {
    "1 missing (model.routers.1.weight)": lambda folder: edit_tensors(folder, drop_router),
    "1 unknown (extra)": lambda folder: edit_tensors(folder, lambda t: t.update(extra=torch.ones(1))),
    "norm.weight has": lambda folder: edit_tensors(folder, lambda t: t["model.norm.weight"].fill_(torch.nan)),
    "head.weight has": lambda folder: edit_tensors(folder, lambda t: t["lm_head.weight"][0].fill_(torch.inf)),
    "2 missing": lambda folder: edit_config(folder, router_block_size=1),
    "2 unknown": lambda folder: edit_config(folder, router_block_size=5),
    "of a different shape": lambda folder: edit_config(folder, num_experts=4),
}
UNREADABLE = [
    lambda folder: (folder / "model.safetensors").write_bytes(b""),
    lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + 99 * b"\x00"),
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: (folder / "config.json").write_text("[1]"),
]


@pytest.mark.parametrize(
    ("message", "damage"), [*DAMAGES.items(), *(("could not be loaded", damage) for damage in UNREADABLE)]
)
def test_checkpoints_that_are_not_whole_are_refused(folder, message, damage):
    damage(folder)
    with pytest.raises(UserError) as refused:
        load_model(folder)
    assert f"--model {folder}" in str(refused.value) and message in str(refused.value)


def test_missing_tensors_are_initialised_when_asked(folder):
    edit_tensors(folder, drop_router)
    model = load_model(folder, allow_missing=True)
    assert torch.isfinite(model.get_parameter("model.routers.1.weight")).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_every_floating_point_type_is_checked(dtype):
    layer = torch.nn.Linear(2, 2).to(dtype)
    check_finite(layer, "it")
    layer.weight.data = torch.full((2, 2), torch.nan).to(dtype)
    with pytest.raises(UserError, match="it: weight has values that are not finite"):
        check_finite(layer, "it")


def test_checkpoint_of_the_first_release_gives_its_logits():
    """Written by the code of 21816fd: blocks of 1 and 3 layers, a selection bias with its old field only."""
    folder = Path(__file__).parent / "first_checkpoint"
    model, expected = load_model(folder).eval(), load_file(folder / "expected.safetensors")
    assert model.config.router_selection_bias
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-6)
