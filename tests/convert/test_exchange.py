# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Export to Qwen3-MoE, Mixtral and OLMoE, import from them, and there and back."""

import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pathmoe.convert import export_checkpoint, import_checkpoint
from pathmoe.convert.importing import align
from tests.modeling_pathmoe.test_parity import summed_over_blocks
from tests.tiny_models import randomize


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
QWEN = {**SIZES, "num_experts": 8, "moe_intermediate_size": 16}
DENSE = {"intermediate_size": 24}
MIXTRAL = {**SIZES, "num_local_experts": 8, "intermediate_size": 16}
OLMOE = {name: size for name, size in MIXTRAL.items() if name != "head_dim"} | {"eos_token_id": 2}
SOURCES = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN),
    "qwen3_moe unnormalised": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN, "norm_topk_prob": False}),
    "qwen3_moe dense layer": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN, **DENSE, "mlp_only_layers": [2]}),
    "qwen3_moe sparse step": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN, **DENSE, "decoder_sparse_step": 2}),
    "qwen3_moe biases": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN, "attention_bias": True}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, MIXTRAL),
    "mixtral tied": (MixtralForCausalLM, MixtralConfig, {**MIXTRAL, "tie_word_embeddings": True}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, OLMOE),
    "olmoe normalised, biases": (
        OlmoeForCausalLM,
        OlmoeConfig,
        {**OLMOE, "norm_topk_prob": True, "attention_bias": True},
    ),
}


def save_source(kind, folder, **options):
    torch.manual_seed(0)
    model_class, config_class, fields = SOURCES[kind]
    randomize(model_class(config_class(**fields))).save_pretrained(folder, **options)
    return folder


EXPORTS = {
    "linear": {},
    "one router": {"router_block_size": 99},
    "list of blocks": {"router_block_size": [1, 3, 1]},
    "unnormalised": {"norm_topk_prob": False},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "dense layers": {"mlp_only_layers": [2, 0], "intermediate_size": 24},
    "low rank": {"router_type": "low_rank", "router_rank": 3},
    "low rank 0": {"router_type": "low_rank", "router_rank": 0},
    "long": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mixtral": {"qk_norm": False},
    "mixtral low rank": {"qk_norm": False, "router_type": "low_rank"},
    "olmoe": {"qk_norm": "full"},
    "olmoe low rank": {"qk_norm": "full", "router_type": "low_rank"},
    "olmoe unnormalised, biases, tied": {
        "qk_norm": "full", "norm_topk_prob": False, "attention_bias": True, "tie_word_embeddings": True
    },
}  # fmt: skip


@pytest.mark.parametrize("fields", EXPORTS.values(), ids=EXPORTS)
def test_export_computes_the_same_and_comes_back_the_same(saved, tmp_path, logits, rounding, fields):
    source, blocks = saved(**fields), fields.get("router_block_size", 2)
    kind = {True: "qwen3_moe", False: "mixtral", "full": "olmoe"}[fields.get("qk_norm", True)]

    manifest = export_checkpoint(source, tmp_path / "exported", max_shard_size="30KB")

    assert AutoConfig.from_pretrained(tmp_path / "exported").model_type == kind
    # A low-rank router's product is rounded once more when it becomes one matrix.
    expected = logits(source)
    tolerance = rounding(expected) * (1 if fields.get("router_type", "linear") == "linear" else 4)
    torch.testing.assert_close(logits(tmp_path / "exported"), expected, rtol=0, atol=tolerance)
    assert manifest["verified"]["largest_logit_difference"] <= tolerance
    assert manifest["target"]["shards"] > 5

    if fields.get("router_type") == "low_rank" and fields.get("router_rank") != 0:
        return  # the layers of a block have routers of their own now
    if isinstance(blocks, list):
        return  # import takes one block size
    import_checkpoint(tmp_path / "exported", tmp_path / "back", blocks)
    ours, theirs = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({}, "model.layers.4.mlp.experts.7.gate_proj.weight"),
        ({"qk_norm": False}, "model.layers.4.block_sparse_moe.experts.7.w1.weight"),
        ({"qk_norm": "full"}, "model.layers.4.mlp.experts.7.gate_proj.weight"),
    ],
    ids=["qwen3_moe", "mixtral", "olmoe"],
)
def test_export_is_in_the_published_layout(saved, tmp_path, fields, name):
    """The names, shapes and configuration fields of the checkpoints that servers' loaders were written for."""
    export_checkpoint(saved(**fields), tmp_path / "exported")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("exported", "again"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert ours[name].shape == (16, 32)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["rope_theta"] == 10000 and config["num_experts"] == config["num_local_experts"] == 8
    assert "auto_map" not in config


@pytest.mark.parametrize(
    "fields, ignored",
    [
        ({"qk_norm": "full"}, "ignore norm_topk_prob=True, rms_norm_eps=1e-06 of an OLMoE"),
        ({"qk_norm": "full", "norm_topk_prob": False, "rms_norm_eps": 1e-5}, None),
        ({}, None),
    ],
    ids=str,
)
def test_export_to_olmoe_names_the_fields_that_servers_ignore(saved, tmp_path, fields, ignored):
    note = export_checkpoint(saved(**fields), tmp_path / "exported").get("note")
    assert note is None if ignored is None else ignored in note


def test_export_loads_where_pathmoe_is_not_known(saved, tmp_path, logits, rounding):
    source = saved()
    export_checkpoint(source, tmp_path / "exported")
    expected = logits(source)
    torch.save(expected, tmp_path / "logits.pt")
    code = f"""
import sys
sys.modules["modeling_pathmoe"] = sys.modules["pathmoe"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "exported")!r}, experts_implementation="eager").eval()
logits = model(torch.arange(64).view(2, 32) % 99).logits
print((logits - torch.load({str(tmp_path / "logits.pt")!r})).abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= rounding(expected)


@pytest.mark.parametrize(
    "fields, to, reason",
    [
        ({"router_type": "cosine"}, "auto", "router_type='cosine'.*linear"),
        ({"router_type": "recurrent"}, "auto", "router_type='recurrent'"),
        ({"router_type": "random"}, "auto", "router_type='random'"),
        ({"router_sharing": "decision"}, "auto", "router_sharing='decision'"),
        ({"router_bias_update_rate": 0.001}, "auto", "router_bias_update_rate=0.001"),
        ({"qk_norm": False, "norm_topk_prob": False}, "auto", "norm_topk_prob=False.*Mixtral always"),
        ({"qk_norm": False, "attention_bias": True}, "auto", "attention_bias=True"),
        ({"qk_norm": False, "mlp_only_layers": [1], **DENSE}, "auto", r"mlp_only_layers=\[1\].*Mixtral"),
        ({"qk_norm": False}, "qwen3_moe", "qk_norm=False.*use mixtral"),
        ({}, "mixtral", "qk_norm=True.*use qwen3_moe"),
        ({}, "olmoe", "qk_norm=True cannot become an OLMoE.*full width: use qwen3_moe"),
        ({"qk_norm": "full"}, "qwen3_moe", "qk_norm='full' cannot become a Qwen3-MoE.*per head: use olmoe"),
        ({"qk_norm": "full"}, "mixtral", "qk_norm='full' cannot become a Mixtral.*does not normalise.*: use olmoe"),
        ({"qk_norm": "full", "head_dim": 16}, "auto", "head_dim=16 with num_attention_heads=4.*hidden_size=32"),
        ({}, "gguf", "to='gguf' must be 'auto' or one of qwen3_moe, mixtral, olmoe"),
    ],
    ids=str,
)
def test_what_has_no_equal_is_refused_with_the_reason(saved, tmp_path, fields, to, reason):
    with pytest.raises(ValueError, match=reason):
        export_checkpoint(saved(**fields), tmp_path / "exported", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_bfloat16_is_copied_bit_for_bit_and_low_rank_routers_are_not_rounded(saved, tmp_path, tiny_model):
    tiny_model(router_type="low_rank").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "exported")

    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "exported"))
    assert {t.dtype for name, t in theirs.items() if ".gate.weight" in name} == {torch.float32}
    assert {t.dtype for name, t in theirs.items() if ".gate.weight" not in name} == {torch.bfloat16}
    expert = theirs["model.layers.1.mlp.experts.3.up_proj.weight"]
    assert torch.equal(expert, ours["model.layers.1.mlp.experts.gate_up_proj"][3, 16:])


@pytest.mark.parametrize(
    "kind, fused",
    [*((kind, False) for kind in SOURCES), ("qwen3_moe", True), ("mixtral", True), ("olmoe", True)],
    ids=str,
)
def test_import_with_a_router_for_each_layer_is_exact(tmp_path, logits, kind, fused):
    source = save_source(kind, tmp_path / "source", save_original_format=not fused, max_shard_size="40KB")

    manifest = import_checkpoint(source, tmp_path / "imported", 1)

    assert (logits(tmp_path / "imported") - logits(source)).abs().max() <= 1e-4
    assert manifest["verified"]["must_be_equal"]
    config = AutoConfig.from_pretrained(tmp_path / "imported")
    assert config.router_block_size == 1 and config.router_aux_loss_coef == 0
    assert "AutoModel" in config.auto_map and (tmp_path / "imported" / "modeling_pathmoe.py").is_file()


@pytest.mark.parametrize("kind", SOURCES)
def test_import_and_export_return_the_same_tensors_and_fields(tmp_path, kind):
    source = save_source(kind, tmp_path / "source")
    import_checkpoint(source, tmp_path / "imported", 1)
    export_checkpoint(tmp_path / "imported", tmp_path / "back")

    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    back, config = (AutoConfig.from_pretrained(folder) for folder in (tmp_path / "back", source))
    # The coefficient has no effect in the source, and PathMoE would train with it; see `import_config`.
    free = {"router_aux_loss_coef", "_name_or_path"} | ({"intermediate_size"} if "qwen3_moe" in kind else set())
    free |= {"mlp_only_layers", "decoder_sparse_step"} if kind == "qwen3_moe sparse step" else set()
    assert {**back.to_dict(), **dict.fromkeys(free)} == {**config.to_dict(), **dict.fromkeys(free)}


@pytest.mark.parametrize("way", ["import", "export"])
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("olmoe", {"qk_norm": "full"}),
        ("qwen3_moe dense layer", {"mlp_only_layers": [2, 0], **DENSE}),
        ("qwen3_moe sparse step", {"mlp_only_layers": [1], **DENSE}),
    ],
    ids=["olmoe", "dense layer", "sparse step"],
)
def test_converted_model_has_the_same_loss_and_gradients(
    saved, tmp_path, tokens, gradients, assert_same, kind, fields, way
):
    if way == "import":
        theirs, ours = save_source(kind, tmp_path / "source"), tmp_path / "target"
        import_checkpoint(theirs, ours, 1)
    else:
        ours, theirs = saved(**fields), tmp_path / "target"
        export_checkpoint(ours, theirs)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (ours, theirs))
    assert type(theirs) is SOURCES[kind][0]
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    actual, expected = ours(**batch), theirs(**batch)
    assert_same(actual.logits, expected.logits)
    assert_same(actual.loss, expected.loss)
    assert_same(gradients(ours, actual.loss), summed_over_blocks(gradients(theirs, expected.loss), ours.config))


def shuffle_experts(folder, layers, seed=0):
    """Reorders the experts of the layers of a Qwen3-MoE or OLMoE at random, which does not change its function."""
    tensors = load_file(folder / "model.safetensors")
    shuffled = dict(tensors)
    for layer in layers:
        order = random.Random(seed + layer).sample(range(8), 8)
        gate = f"model.layers.{layer}.mlp.gate.weight"
        shuffled[gate] = tensors[gate][order].contiguous()
        for new, old in enumerate(order):
            for name in ("gate_proj", "up_proj", "down_proj"):
                prefix = f"model.layers.{layer}.mlp.experts"
                shuffled[f"{prefix}.{new}.{name}.weight"] = tensors[f"{prefix}.{old}.{name}.weight"]
    save_file(shuffled, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("fields", [{}, {"qk_norm": "full"}, {"mlp_only_layers": [0, 2], **DENSE}], ids=str)
def test_import_finds_the_sharing_behind_shuffled_experts(saved, tmp_path, logits, tiny_tokenizer, text, fields):
    """A PathMoE whose experts were reordered in each layer must become a PathMoE with the same function again."""
    source, dense = saved(vocab_size=320, **fields), fields.get("mlp_only_layers", [])
    tiny_tokenizer.save_pretrained(source)
    export_checkpoint(source, tmp_path / "exported")
    shuffle_experts(tmp_path / "exported", set(range(5)) - set(dense))
    assert (logits(tmp_path / "exported") - logits(source)).abs().max() <= 1e-4

    manifest = import_checkpoint(tmp_path / "exported", tmp_path / "imported", 2, text)

    assert manifest["agreement"]["of_blocks"] == pytest.approx([1, 1] if dense else [1, 1, 1], abs=1e-3)
    assert manifest["perplexity"]["after"] == pytest.approx(manifest["perplexity"]["before"], rel=1e-3)
    assert (logits(tmp_path / "imported") - logits(source)).abs().max() <= 1e-2
    assert AutoConfig.from_pretrained(tmp_path / "imported").router_block_size == 2


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
def test_import_of_independent_routers_says_what_sharing_costs(tmp_path, tiny_tokenizer, text, kind):
    source = save_source(kind, tmp_path / "source")
    tiny_tokenizer.save_pretrained(source)

    manifest = import_checkpoint(source, tmp_path / "imported", 2, text)

    assert "Train the model further" in manifest["note"]
    assert manifest["reordering"]["largest_logit_difference"] <= 1e-4 * manifest["reordering"]["largest_logit"]
    # Routers that were drawn at random have little in common; the fitted one must beat chance all the same.
    assert all(0.35 < share < 1 for share in manifest["agreement"]["of_blocks"])
    assert manifest["agreement"]["by_chance"] == 0.25
    assert manifest["perplexity"]["after"] != manifest["perplexity"]["before"]


def test_import_without_text_says_that_one_is_needed(tmp_path):
    source = save_source("mixtral", tmp_path / "source")
    with pytest.raises(ValueError, match="block_size=2.*--text"):
        import_checkpoint(source, tmp_path / "imported", 2)


@given(st.integers(2, 9), st.integers(0, 10_000))
def test_align_undoes_any_order(num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(200, num_experts, generator=generator)
    orders = [torch.randperm(num_experts, generator=generator) for _ in range(2)]

    found = align([logits, *(logits[:, order] for order in orders)])

    assert found[0] == list(range(num_experts))
    for order, back in zip(orders, found[1:]):
        assert order[back].tolist() == list(range(num_experts))


@pytest.mark.parametrize(
    "model_class, config, reason",
    [
        (OlmoeForCausalLM, OlmoeConfig(**OLMOE, clip_qkv=8.0), r"clip_qkv=8\.0.*does not clip"),
        (
            Qwen2MoeForCausalLM,
            Qwen2MoeConfig(**{**QWEN, "shared_expert_intermediate_size": 16}),
            "shared expert",
        ),
        (
            Qwen3MoeForCausalLM,
            Qwen3MoeConfig(**QWEN, mlp_only_layers=[0, 1, 2, 3], intermediate_size=8),
            r"mlp_only_layers=\[0, 1, 2, 3\].*at least one MoE layer",
        ),
        (MixtralForCausalLM, MixtralConfig(**MIXTRAL, sliding_window=16), "sliding_window=16"),
    ],
    ids=["clipped values", "qwen2_moe", "dense", "sliding window"],
)
def test_import_refuses_what_pathmoe_does_not_have(tmp_path, model_class, config, reason):
    model_class(config).save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=reason):
        import_checkpoint(tmp_path / "source", tmp_path / "imported", 1)
    assert not (tmp_path / "imported").exists()
