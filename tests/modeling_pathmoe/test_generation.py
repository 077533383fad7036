# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig


NEW = 12
GREEDY = {"do_sample": False, "max_new_tokens": NEW}


@torch.no_grad
def next_logits(model, ids):
    """Of the last position, from a full forward without a cache."""
    return model(ids, use_cache=False).logits[:, -1].float()


def greedy_by_hand(model, ids):
    for _ in range(NEW):
        ids = torch.cat([ids, next_logits(model, ids).argmax(dim=-1, keepdim=True)], dim=1)
    return ids


def beams_by_hand(model, ids, num_beams):
    """All of the best `num_beams` continuations by total log-probability, best first."""
    beams = [(0.0, ids[0].tolist())]
    for _ in range(NEW):
        candidates = []
        for score, sequence in beams:
            log_probs = next_logits(model, torch.tensor([sequence])).log_softmax(dim=-1)[0]
            candidates += [(score + log_prob.item(), [*sequence, token]) for token, log_prob in enumerate(log_probs)]
        beams = sorted(candidates, reverse=True)[:num_beams]
    return beams


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router_block_size": 1},
        {"router_block_size": [1, 4], "qk_norm": False},
        {"qk_norm": "full"},
        {"output_router_logits": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_decoding_equals_full_forwards(tiny_model, tokens, fields, cache):
    model, ids = tiny_model(**fields), tokens(3, 6)
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    assert torch.equal(model.generate(ids, **how, **GREEDY), greedy_by_hand(model, ids))


def test_greedy_reference_is_not_a_repetition(tiny_model, tokens):
    """Or the tests above could not see a wrong position or a stale cache."""
    assert all(row.unique().numel() > NEW / 2 for row in greedy_by_hand(tiny_model(), tokens(3, 6))[:, 6:])


def test_greedy_scores_equal_the_logits_of_full_forwards(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens(2, 6)
    outputs = model.generate(ids, output_logits=True, return_dict_in_generate=True, **GREEDY)
    for step, logits in enumerate(outputs.logits):
        assert_same(logits, next_logits(model, outputs.sequences[:, : 6 + step]))


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_equals_beams_by_hand(tiny_model, tokens, use_cache):
    model, ids = tiny_model(), tokens(1, 6)
    outputs = model.generate(
        ids,
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,
        use_cache=use_cache,
        output_scores=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    expected = beams_by_hand(model, ids, num_beams=3)
    assert outputs.sequences.tolist() == [sequence for _, sequence in expected]
    assert outputs.sequences_scores.tolist() == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert outputs.sequences[0].tolist() != greedy_by_hand(model, ids)[0].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_of_a_batch_is_that_of_its_rows(tiny_model, tokens, use_cache):
    model, ids = tiny_model(), tokens(3, 6)
    together = model.generate(ids, num_beams=3, use_cache=use_cache, **GREEDY)
    for row in range(3):
        alone = model.generate(ids[row : row + 1], num_beams=3, use_cache=use_cache, **GREEDY)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("seed", [0, 1])
def test_sampling_equals_draws_from_full_forwards(tiny_model, tokens, seed, cache):
    model, ids = tiny_model(), tokens(3, 6)
    how = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    torch.manual_seed(seed)
    actual = model.generate(ids, do_sample=True, top_k=0, temperature=0.7, max_new_tokens=NEW, **how)
    torch.manual_seed(seed)
    expected = ids
    for _ in range(NEW):
        probs = (next_logits(model, expected) / 0.7).softmax(dim=-1)
        expected = torch.cat([expected, torch.multinomial(probs, 1)], dim=1)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("assistant", ["another model", "itself"])
def test_assisted_decoding_equals_greedy(tiny_model, tokens, assistant):
    """Rejected drafts crop the cache; an assistant that is the model itself is never rejected."""
    model, ids = tiny_model(), tokens(1, 6)
    helper = tiny_model(seed=5, num_hidden_layers=2) if assistant == "another model" else tiny_model()
    assert torch.equal(model.generate(ids, assistant_model=helper, **GREEDY), greedy_by_hand(model, ids))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_batch_decodes_like_its_rows_alone(tiny_model, tokens, cache):
    model = tiny_model(pad_token_id=0)
    rows = [tokens(1, length, seed=length).clamp(min=1) for length in (3, 6, 8)]
    ids = torch.cat([torch.nn.functional.pad(row, (8 - row.shape[1], 0), value=0) for row in rows])
    together = model.generate(ids, attention_mask=(ids != 0).long(), cache_implementation=cache, **GREEDY)
    for row, output in zip(rows, together):
        assert torch.equal(output[8:], greedy_by_hand(model, row)[0, row.shape[1] :])


def test_decoding_continues_from_a_cache_as_from_the_whole_text(tiny_model, tokens):
    model, ids = tiny_model(), tokens(2, 9)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), greedy_by_hand(model, ids))


def test_decoding_from_embeddings_equals_decoding_from_tokens(tiny_model, tokens):
    model, ids = tiny_model(), tokens(2, 6)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), greedy_by_hand(model, ids)[:, 6:])


def test_logits_to_keep_are_the_last_ones(tiny_model, tokens, assert_same):
    model, ids = tiny_model(), tokens()
    assert_same(model(ids, logits_to_keep=2).logits, model(ids).logits[:, -2:])


@pytest.mark.parametrize(
    "fields", [{}, {"router_type": "recurrent"}, {"router_sharing": "decision", "output_router_logits": True}], ids=str
)
def test_other_ways_to_generate_equal_greedy_decoding(tiny_model, tokens, fields):
    """Each of them hands the cache over in a way of its own."""
    model, ids = tiny_model(**fields), tokens(1, 6)
    expected = greedy_by_hand(model, ids)
    for how in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(ids, **how, **GREEDY), expected), how


@pytest.mark.parametrize(
    "fields", [{}, {"router_type": "recurrent"}, {"router_sharing": "decision", "output_router_logits": True}], ids=str
)
def test_continuous_batching_equals_greedy_decoding(tiny_model, tokens, fields):
    """Requests of several lengths share a forward; the mask is four-dimensional, and the cache a paged one."""
    model = tiny_model(pad_token_id=0, eos_token_id=98, **fields)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 4, 6)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=98, pad_token_id=0)
    # Without limits it takes what memory the machine has free.
    limits = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=limits)
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt in prompts:
        expected = greedy_by_hand(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()
        expected = expected[: expected.index(98) + 1] if 98 in expected else expected
        assert list(found[tuple(prompt)]) == expected


def test_paged_attention_outside_of_continuous_batching_is_refused(tiny_model, tokens):
    """Without a paged cache, its attention has no mask: each token would see the ones that follow."""
    model = tiny_model()
    model.set_attn_implementation("paged|eager")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"'paged\|eager' is for continuous batching.*load the model with"):
            call(tokens(1, 4))
