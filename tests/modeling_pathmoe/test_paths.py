# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaModel

from modeling_pathmoe import PathMoEForCausalLM, record_paths
from modeling_pathmoe.paths import adjacent_jaccard, path_counts, path_coverage


def test_recorded_experts_are_the_best_of_the_router_logits_without_padding(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).eval()
    ids = torch.randint(0, 99, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with record_paths(model) as trace:
        logits = model(ids, attention_mask=mask, output_router_logits=True).router_logits
    expected = torch.stack([layer.topk(2).indices for layer in logits], dim=1)[mask.reshape(-1).bool()]
    assert trace.experts.tolist() == expected.tolist()
    assert trace.token_ids.tolist() == ids[mask.bool()].tolist()


def test_generation_with_a_cache_records_each_token_once(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).eval()
    ids = torch.randint(0, 99, (1, 4))
    with record_paths(model) as trace:
        generated = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    with record_paths(model) as whole:
        model(generated[:, :-1])
    assert trace.token_ids.tolist() == generated[0, :-1].tolist()
    assert trace.experts.tolist() == whole.experts.tolist()


def test_generation_with_a_static_cache_records_the_same(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).eval()
    ids = torch.randint(0, 99, (1, 4))
    traces = []
    for cache in ("dynamic", "static"):
        with record_paths(model) as trace:
            model.generate(ids, max_new_tokens=5, do_sample=False, cache_implementation=cache)
        traces.append(trace.experts.tolist())
    assert traces[0] == traces[1]


def test_backward_of_checkpointed_layers_is_not_recorded(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 99, (1, 4))
    with record_paths(model) as trace:
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    assert trace.experts.shape == (8, 5, 2)


def test_nothing_is_recorded_after_the_block(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).eval()
    with record_paths(model) as trace:
        model(torch.zeros(1, 3, dtype=torch.long))
    model(torch.zeros(1, 5, dtype=torch.long))
    assert len(trace.token_ids) == 3


def test_model_without_routers_of_its_own_is_refused():
    model = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                   num_attention_heads=2))  # fmt: skip
    with pytest.raises(TypeError, match="LlamaModel has no routers"):
        with record_paths(model):
            pass


@given(st.integers(1, 40), st.integers(2, 4), st.integers(1, 3), st.integers(0, 99))
def test_measures_equal_counting_by_hand(tokens, layers, k, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, layers, 4, generator=generator).topk(k).indices.to(torch.int16)
    counts = Counter(tuple(path) for path in experts[:, :, 0].tolist())
    frequent = [count for _, count in counts.most_common()]
    assert path_counts(experts).tolist() == frequent
    assert path_coverage(experts, 3) == pytest.approx(sum(frequent[:3]) / tokens)
    similarity = [
        len(set(a) & set(b)) / len(set(a) | set(b)) for token in experts.tolist() for a, b in zip(token, token[1:])
    ]
    assert adjacent_jaccard(experts) == pytest.approx(sum(similarity) / len(similarity))
