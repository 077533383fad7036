# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Average and prune."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pathmoe.convert import average_checkpoints, prune_experts


def test_average_is_the_weighted_mean_of_every_tensor(saved, tmp_path):
    sources = [saved(f"step-{seed}", seed, router_bias_update_rate=0.01) for seed in range(3)]
    average_checkpoints(sources, tmp_path / "average", [0.5, 0.3, 0.2])

    first, second, third, mean = (load_file(f / "model.safetensors") for f in [*sources, tmp_path / "average"])
    assert mean.keys() == first.keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, 0.5 * first[name] + 0.3 * second[name] + 0.2 * third[name])


def test_average_of_one_model_with_its_copy_is_that_model(saved, tmp_path, logits):
    source, copy = saved(), tmp_path / "copy"
    shutil.copytree(source, copy)
    manifest = average_checkpoints([source, copy], tmp_path / "average")
    torch.testing.assert_close(logits(tmp_path / "average"), logits(source), rtol=1e-5, atol=1e-5)
    assert [entry["weight"] for entry in manifest["averaged"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    "fields, weights, reason",
    [
        ({"rms_norm_eps": 1e-5}, None, "rms_norm_eps=1e-05, but .* 1e-06"),
        ({"router_block_size": 5}, None, "router_block_size=5"),
        ({}, [0.5, 0.6], "sum to 1"),
        ({}, [1.0], "must be 2 finite numbers"),
    ],
    ids=str,
)
def test_average_refuses_what_does_not_fit(saved, tmp_path, fields, weights, reason):
    sources = [saved("one"), saved("two", **fields)]
    with pytest.raises(ValueError, match=reason):
        average_checkpoints(sources, tmp_path / "average", weights)


def test_average_of_one_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="at least two"):
        average_checkpoints([saved("one")], tmp_path / "average")


def test_average_refuses_different_tokenizers(saved, tmp_path, tiny_tokenizer):
    sources = [saved(name, vocab_size=400) for name in ("one", "two")]
    tiny_tokenizer.save_pretrained(sources[0])
    tiny_tokenizer.add_tokens(["another"])
    tiny_tokenizer.save_pretrained(sources[1])
    with pytest.raises(ValueError, match="a different tokenizer"):
        average_checkpoints(sources, tmp_path / "average")


ROUTERS = {
    "linear": {},
    "cosine": {"router_type": "cosine"},
    "low rank": {"router_type": "low_rank"},
    "recurrent": {"router_type": "recurrent"},
    "random": {"router_type": "random"},
    "decision": {"router_sharing": "decision"},
    "bias": {"router_bias_update_rate": 0.01},
    "dense layers": {"mlp_only_layers": [0, 2], "intermediate_size": 24},
}


def route_among(model, kept):
    """Makes the routers of a model choose only among the kept experts of their block."""
    for router, experts in zip(model.model.routers.values(), kept):

        def masked(hidden_states, layer_idx, state, compute=router.compute_logits, experts=experts):
            logits, state = compute(hidden_states, layer_idx, state)
            allowed = torch.full_like(logits, -torch.inf)
            allowed[:, experts] = logits[:, experts]
            return allowed, state

        router.compute_logits = masked


@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
def test_a_pruned_model_is_the_model_that_may_choose_only_the_kept_experts(
    saved, tmp_path, logits, tiny_tokenizer, text, fields
):
    source = saved(vocab_size=320, **fields)
    tiny_tokenizer.save_pretrained(source)

    manifest = prune_experts(source, tmp_path / "pruned", 5, text)

    restricted = AutoModelForCausalLM.from_pretrained(source).eval()
    route_among(restricted, manifest["kept"])
    with torch.no_grad():
        expected = restricted(torch.arange(64).view(2, 32)).logits
    torch.testing.assert_close(logits(tmp_path / "pruned"), expected, rtol=1e-4, atol=1e-4)
    assert manifest["perplexity"]["before"] != manifest["perplexity"]["after"]


def test_pruning_keeps_the_experts_that_the_paths_of_the_text_use_most(saved, tmp_path, tiny_tokenizer, text):
    source = saved(vocab_size=320)
    tiny_tokenizer.save_pretrained(source)

    manifest = prune_experts(source, tmp_path / "pruned", 3, text, 1280)

    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = [i for line in text.read_text().splitlines() for i in tiny_tokenizer(eval(line)["text"] + "\n\n").input_ids]
    uses = torch.zeros(3, 8)
    with torch.no_grad():
        for start in range(0, 1024, 128):
            logits = model(torch.tensor(ids[start : start + 128])[None], output_router_logits=True).router_logits
            for layer, of_layer in enumerate(logits):
                uses[layer // 2] += of_layer.topk(2).indices.flatten().bincount(minlength=8)
    for block in range(3):
        assert uses[block, manifest["kept"][block]].sum() == uses[block].topk(3).values.sum()
        share = (uses[block].topk(3).values.sum() / uses[block].sum()).item()
        assert manifest["choices_kept"][block] == pytest.approx(share)
    assert 0 < manifest["paths_kept"] < min(manifest["choices_kept"]) + 0.2


def test_keeping_all_experts_changes_nothing(saved, tmp_path, logits, rounding, tiny_tokenizer, text):
    source = saved(vocab_size=320)
    tiny_tokenizer.save_pretrained(source)
    manifest = prune_experts(source, tmp_path / "pruned", 8, text)
    expected = logits(source)
    torch.testing.assert_close(logits(tmp_path / "pruned"), expected, rtol=0, atol=rounding(expected))
    assert manifest["paths_kept"] == 1


def test_fewer_experts_than_a_token_visits_are_refused(saved, tmp_path, tiny_tokenizer, text):
    with pytest.raises(ValueError, match="num_experts=1 must be from num_experts_per_tok=2"):
        prune_experts(saved(vocab_size=320), tmp_path / "pruned", 1, text)
