# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersModel,
)

from pathmoe import PathMoEForCausalLM, PathTrace, record_paths


def test_recorded_paths_are_those_of_the_router_logits(any_model, tokens, kind):
    model = any_model(kind)
    with record_paths(model, weights=True, probabilities=True) as trace:
        logits = torch.stack(model(tokens(), output_router_logits=True).router_logits, dim=1)
    torch.testing.assert_close(trace.probabilities, logits.softmax(dim=-1).half(), rtol=1e-3, atol=1e-3)
    if kind == "deepseek_v3":  # chooses within the better half of the experts only
        halves = logits.sigmoid().unflatten(-1, (2, 4)).topk(2).values.sum(dim=-1, keepdim=True)
        logits = logits.masked_fill((halves < halves.amax(dim=-2, keepdim=True)).expand(-1, -1, 2, 4).flatten(-2), -99)
    best = logits.topk(trace.model.top_k).indices
    assert trace.experts.sort(dim=-1).values.tolist() == best.sort(dim=-1).values.tolist()
    assert trace.weights.argmax(dim=-1).tolist() == (trace.experts == best[..., :1]).int().argmax(dim=-1).tolist()


def test_routed_layers_are_described(any_model, tokens, kind):
    model = any_model(kind)
    with record_paths(model) as trace:
        model(tokens())
    config, (_, layers, k) = model.config, trace.experts.shape
    own = 3 if kind in ("qwen2_moe", "deepseek_v3") else len(getattr(config, "moe_layers", range(layers)))
    described = trace.model
    assert (described.model_type, described.num_layers, described.num_experts, described.top_k) == (
        *(config.model_type, own, 8),
        config.num_experts_per_tok,
    )
    assert (layers, k) == (own, config.num_experts_per_tok)
    of_layer = getattr(config, "layer_to_block", list(range(own)))
    assert list(described.layer_to_block) == [block for block in of_layer if block is not None]
    assert trace.experts.dtype == torch.uint8


def test_padding_is_left_out_and_tokens_keep_their_place(any_model, kind):
    model = any_model(kind)
    ids = torch.randint(1, 99, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with record_paths(model) as trace:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        model(ids[:1])
    assert trace.token_ids.tolist() == [*ids[mask.bool()].tolist(), *ids[0].tolist()]
    assert trace.sequence_ids.tolist() == [0] * 4 + [1] * 6 + [2] * 6
    assert trace.positions.tolist() == [*range(4), *range(6), *range(6)]
    with record_paths(model) as alone:
        model(ids[:1, 2:])
    assert trace.experts[:4].tolist() == alone.experts.tolist()


def test_generation_with_a_cache_records_each_token_once(any_model, kind):
    model = any_model(kind)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (ids > 0).long()
    with record_paths(model) as trace:
        generated = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
    for row, first in ((0, 2), (1, 0)):
        with record_paths(model) as whole:
            model(generated[row : row + 1, first:-1])
        own = trace.sequence_ids == row
        assert trace.token_ids[own].tolist() == generated[row, first:-1].tolist()
        assert trace.positions[own].tolist() == whole.positions.tolist()
        assert trace.experts[own].tolist() == whole.experts.tolist()


@pytest.mark.parametrize("kind", [{"router_type": "linear"}, "qwen3_moe"], ids=str)
def test_generation_with_a_static_cache_records_the_same(any_model, kind):
    model = any_model(kind)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    traces = []
    for cache in ("dynamic", "static"):
        with record_paths(model) as trace:
            mask = (ids > 0).long()
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation=cache)
        traces.append([trace.token_ids.tolist(), trace.positions.tolist(), trace.experts.tolist()])
    assert traces[0] == traces[1]


def test_documents_of_a_packed_row_are_sequences_of_their_own(tiny_model, tokens):
    with record_paths(model := tiny_model()) as trace:
        model(tokens(batch=2, length=5), position_ids=torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]))
    assert trace.sequence_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert trace.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4]


def test_offsets_of_the_tokenizer_lead_back_to_the_text(tiny_model):
    words = {"[PAD]": 0, "the": 1, "old": 2, "path": 3}
    backend = Tokenizer(WordLevel(words))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    texts = ["the old path", "path"]
    inputs = tokenizer(texts, return_offsets_mapping=True, return_tensors="pt", padding=True)
    with record_paths(model := tiny_model()) as trace:
        model(inputs.input_ids, attention_mask=inputs.attention_mask, offset_mapping=inputs.offset_mapping)
        model(inputs.input_ids)
    spans = [texts[s][a:b] for s, (a, b) in zip(trace.sequence_ids[:4].tolist(), trace.offsets[:4].tolist())]
    assert spans == ["the", "old", "path", "path"]
    assert trace.offsets[4:].unique().tolist() == [-1]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 2}], ids=str)
def test_offsets_go_through_generate_to_the_tokens_of_the_prompt(tiny_model, options):
    model, ids = tiny_model(), torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    offsets, mask = torch.arange(16).view(2, 4, 2), (ids > 0).long()
    options = options | {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with record_paths(model) as trace:
        model.generate(ids, attention_mask=mask, offset_mapping=offsets, **options)
    tokens = [*zip(trace.sequence_ids.tolist(), trace.positions.tolist(), trace.token_ids.tolist())]
    rows = {sequence: {5: 0, 7: 1}[token] for sequence, position, token in tokens if position == 0}
    for (sequence, position, _), span in zip(tokens, trace.offsets.tolist()):
        prompt = offsets[rows[sequence]][mask[rows[sequence]].bool()].tolist()
        assert span == (prompt[position] if position < len(prompt) else [-1, -1])
    assert (trace.offsets >= 0).any() and (trace.offsets < 0).any()
    assert "generate" not in vars(model)


def test_offsets_of_another_prompt_are_refused(tiny_model, tokens):
    model = tiny_model()
    with record_paths(model):
        with pytest.raises(ValueError, match="offset_mapping has 8 tokens, but the prompt has 14"):
            model.generate(tokens(), offset_mapping=torch.zeros(2, 4, 2), max_new_tokens=2)
        with pytest.raises(ValueError, match="offset_mapping has 8 tokens, but input_ids has 14"):
            model(tokens(), offset_mapping=torch.zeros(2, 4, 2))
        cache = model(tokens()[:, :3]).past_key_values
        with pytest.raises(ValueError, match="and a cache with 3 tokens, so"):
            model.generate(tokens(), past_key_values=cache, offset_mapping=torch.zeros(2, 7, 2), max_new_tokens=2)


def test_steps_that_reuse_their_input_are_recorded_as_they_were(tiny_model, tokens):
    model, ids, step, lengths = tiny_model(), tokens(), torch.empty(2, 1, dtype=torch.long), []
    with record_paths(model) as trace:
        cache = model(ids[:, :3]).past_key_values
        for place in (3, 4, 5):
            model(step.copy_(ids[:, place : place + 1]), past_key_values=cache)
            if place != 4:  # read amid the steps, and before them
                lengths.append(len(trace))
    assert lengths == [8, 12]
    assert trace.token_ids.tolist() == [*ids[:, :3].flatten().tolist(), *ids[:, 3:6].T.flatten().tolist()]
    assert trace.sequence_ids.tolist() == [0] * 3 + [1] * 3 + [0, 1] * 3
    assert trace.positions.tolist() == [0, 1, 2] * 2 + [3, 3, 4, 4, 5, 5]
    with record_paths(model) as whole:
        model(ids[:, :6])
    order = (6 * trace.sequence_ids + trace.positions).argsort()
    assert torch.equal(trace.experts[order], whole.experts)


@pytest.mark.parametrize("kind", [{"router_type": "recurrent"}, {"router_sharing": "decision"}, "olmoe"], ids=str)
def test_backward_of_checkpointed_layers_is_not_recorded(any_model, tokens, kind):
    model, ids = any_model(kind).train(), tokens(1, 4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with record_paths(model) as trace:
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    assert trace.token_ids.tolist() == ids[0].tolist() * 2


def test_nothing_is_recorded_after_the_block(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).eval()
    with record_paths(model) as trace:
        model(torch.zeros(1, 3, dtype=torch.long))
    model(torch.zeros(1, 5, dtype=torch.long))
    assert len(trace) == 3


def test_embeddings_and_the_bare_decoder_are_recorded(tiny_model, tokens):
    model = tiny_model()
    with record_paths(model) as trace:
        model.model(inputs_embeds=model.get_input_embeddings()(tokens()))
    with record_paths(model) as expected:
        model(tokens())
    assert trace.experts.tolist() == expected.experts.tolist()
    assert trace.token_ids.unique().tolist() == [-1]


def test_wrapped_models_are_recorded(tiny_model, tokens):
    model = tiny_model()
    with record_paths(model) as expected:
        model(tokens())
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with record_paths(wrapped) as trace:
        wrapped(input_ids=tokens())
    assert trace.experts.tolist() == expected.experts.tolist()


def test_a_trace_beyond_its_limit_goes_to_disk_and_is_the_same(tiny_model, tokens):
    model, traces = tiny_model(), []
    for limit in (2**28, 500):
        with record_paths(model, weights=True, probabilities=True, memory_limit=limit) as trace:
            for seed in range(5):
                model(tokens(seed=seed))
        traces.append(trace)
    assert traces[1]._pending_bytes <= 500 and len(list(traces[1].batches())) > 2
    for name in ("experts", "weights", "probabilities", "token_ids", "sequence_ids", "positions", "offsets"):
        assert torch.equal(getattr(traces[0], name), getattr(traces[1], name)), name
    folder = traces[1]._file.parent
    assert folder.exists()
    del trace, traces
    gc.collect()
    assert not folder.exists()


def test_rows_that_are_all_padding_in_the_first_chunk_begin_later(tiny_model):
    model, ids = tiny_model(), torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    with record_paths(model) as trace:
        cache = model(ids[:, :2], attention_mask=(ids > 0)[:, :2]).past_key_values
        model(ids[:, 2:], attention_mask=ids > 0, past_key_values=cache)
    assert trace.token_ids.tolist() == [7, 8, 5, 6, 9, 10]
    assert trace.sequence_ids.tolist() == [0, 0, 1, 1, 0, 0]
    assert trace.positions.tolist() == [0, 1, 0, 1, 2, 3]


def test_a_saved_trace_is_the_same_in_another_process(any_model, tokens, tmp_path):
    model = any_model("qwen2_moe")
    with record_paths(model, weights=True, memory_limit=500) as trace:
        for seed in range(3):
            model(tokens(seed=seed))
    trace.save(tmp_path / "trace.arrow")
    code = (
        "import sys; from dataclasses import asdict; import json; from pathmoe import PathTrace\n"
        "t = PathTrace.load(sys.argv[1])\n"
        "print(json.dumps([asdict(t.model), len(t), t.experts.tolist(), t.weights.tolist(), t.positions.tolist()]))"
    )
    root = Path(__file__).parents[2]
    printed = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "trace.arrow"], cwd=root, check=True, capture_output=True, text=True
    )
    described, length, experts, weights, positions = json.loads(printed.stdout)
    assert described == {**vars(trace.model), "layer_to_block": [0, 1, 2]}
    assert length == len(trace) == 42
    assert experts == trace.experts.tolist()
    assert weights == trace.weights.tolist()
    assert positions == trace.positions.tolist()


def test_a_saved_trace_opens_as_a_dataset(tiny_model, tokens, tmp_path):
    with record_paths(model := tiny_model()) as trace:
        model(tokens())
    trace.save(tmp_path / "trace.arrow")
    dataset = Dataset.from_file(str(tmp_path / "trace.arrow"))
    assert dataset["token_ids"][:] == trace.token_ids.tolist()
    assert dataset[3]["experts"] == trace.experts[3].flatten().tolist()


def test_a_trace_can_be_saved_where_it_was_loaded_from(tiny_model, tokens, tmp_path):
    """In a process of its own: writing into the mapped file would end it with a signal."""
    with record_paths(model := tiny_model()) as trace:
        model(tokens())
    trace.save(file := tmp_path / "trace.arrow")
    before = file.read_bytes()
    code = "import sys; from pathmoe import PathTrace; t = PathTrace.load(sys.argv[1]); t.save(sys.argv[1])"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", f"{code}; t.save(sys.argv[1]); print(len(t))", file], cwd=root, check=True)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_trace_that_lacks_its_end_is_named(tiny_model, tokens, tmp_path):
    with record_paths(model := tiny_model()) as trace:
        model(tokens())
    trace.save(file := tmp_path / "trace.arrow")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="trace.arrow is truncated or damaged"):
        _ = PathTrace.load(file).experts


def test_a_flipped_bit_of_a_trace_is_found_unless_it_has_no_checksum(tiny_model, tokens, tmp_path, monkeypatch):
    with record_paths(model := tiny_model(), weights=True) as trace:
        model(tokens())
    trace.save(file := tmp_path / "trace.arrow")
    whole = file.read_bytes()
    names = ("experts", "weights", "token_ids", "sequence_ids", "positions", "offsets")
    refused = 0
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            loaded = PathTrace.load(file)
            assert all(torch.equal(getattr(loaded, name), getattr(trace, name)) for name in names)
            assert loaded.model == trace.model
        except ValueError as error:
            assert "trace.arrow is" in str(error)
            refused += 1
    assert refused > len(whole) / 7 / 2  # the rest is padding
    monkeypatch.setattr("pathmoe.paths.record._CHECKSUM", b"unknown")
    file.write_bytes(whole)
    assert torch.equal(PathTrace.load(file).experts, trace.experts)


@pytest.mark.parametrize("content", [b"", b"{}", None], ids=["empty", "text", "truncated"])
def test_a_damaged_trace_is_named(tiny_model, tokens, tmp_path, content):
    with record_paths(model := tiny_model()) as trace:
        model(tokens())
    trace.save(file := tmp_path / "trace.arrow")
    file.write_bytes(file.read_bytes()[:200] if content is None else content)
    with pytest.raises(ValueError, match="trace.arrow is not a trace"):
        PathTrace.load(file)


def test_what_was_not_recorded_is_named(tiny_model, tokens, tmp_path):
    with record_paths(model := tiny_model()) as trace:
        pass
    with pytest.raises(ValueError, match="trace is empty: run the model inside"):
        _ = trace.experts
    with pytest.raises(ValueError, match="trace is empty"):
        trace.save(tmp_path / "trace.arrow")
    with record_paths(model) as trace:
        model(tokens())
    with pytest.raises(ValueError, match=r"no weights: ask for them with record_paths\(model, weights=True\)"):
        _ = trace.weights
    (tmp_path / "not.arrow").write_bytes(b"text, text, text, text")
    with pytest.raises(ValueError, match="not.arrow is not a trace"):
        PathTrace.load(tmp_path / "not.arrow")
    with pytest.raises(ValueError, match="not.arrow exists and is not an earlier result"):
        trace.save(tmp_path / "not.arrow")
    assert (tmp_path / "not.arrow").read_bytes() == b"text, text, text, text"
    with pytest.raises(ValueError, match="is a folder: name a file"):
        trace.save(tmp_path)
    with pytest.raises(ValueError, match="is not a trace that PathTrace.save has written, but a folder"):
        PathTrace.load(tmp_path)


def test_models_without_recognisable_routers_are_refused():
    dense = LlamaModel(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                   num_attention_heads=2))  # fmt: skip
    # Its routers return (indices, probabilities, logits).
    switch = SwitchTransformersModel(SwitchTransformersConfig(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2,
                                                              num_heads=2, num_experts=2))  # fmt: skip
    for model in (dense, switch):
        with pytest.raises(TypeError, match=f"{type(model).__name__} has no routers that are recognised"):
            with record_paths(model):
                pass
