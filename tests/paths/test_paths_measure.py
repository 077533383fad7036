# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import math
from collections import Counter
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from pathmoe.paths import (
    adjacent_jaccard,
    bootstrap,
    cluster_purity,
    distinct_paths,
    expert_load,
    jaccard_matrix,
    jackknife,
    load_entropy,
    load_variation,
    mutual_information,
    normalized_mutual_information,
    path_counts,
    path_coverage,
    path_entropy,
    path_ids,
    path_perplexity,
    permutation_baseline,
    routing_entropy,
    subsample_documents,
    sustained_engagement,
)


@st.composite
def traces(draw):
    """Experts (T, L, k) that often repeat from layer to layer and from token to token."""
    tokens, layers, num_experts = draw(st.integers(1, 40)), draw(st.integers(1, 6)), draw(st.sampled_from([3, 9, 70]))
    k = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scores = torch.rand(tokens, 1, num_experts, generator=generator).round(decimals=draw(st.integers(0, 2)))
    scores = scores + draw(st.sampled_from([0, 0.5])) * torch.rand(tokens, layers, num_experts, generator=generator)
    return scores.topk(k).indices.to(torch.uint8), num_experts


def entropy(counts):
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def jaccard(a, b):
    return len(set(a) & set(b)) / len(set(a) | set(b))


@given(traces())
def test_path_measures_equal_counting_by_hand(trace):
    experts, _ = trace
    paths = [tuple(path) for path in experts[:, :, 0].tolist()]
    frequent = [count for _, count in Counter(paths).most_common()]
    ids = path_ids(experts).tolist()
    assert [ids[i] == ids[j] for i in range(len(ids)) for j in range(i)] == [
        paths[i] == paths[j] for i in range(len(ids)) for j in range(i)
    ]
    assert [path for _, path in sorted(zip(ids, paths))] == sorted(paths)
    assert path_counts(experts).tolist() == frequent
    assert distinct_paths(experts) == len(frequent)
    assert path_coverage(experts, 3) == pytest.approx(sum(frequent[:3]) / len(paths))
    assert path_entropy(experts) == pytest.approx(entropy(frequent), abs=1e-9)
    assert path_perplexity(experts) == pytest.approx(math.exp(entropy(frequent)))


def test_paths_of_more_layers_than_a_number_holds_stay_apart():
    experts = torch.randint(0, 256, (50, 40, 1), generator=torch.manual_seed(0)).to(torch.uint8)
    experts = torch.cat([experts, experts])
    experts[99, 0] ^= 1
    experts[98, 39] ^= 1
    assert distinct_paths(experts) == 52


@given(traces(), st.booleans())
def test_load_measures_equal_counting_by_hand(trace, pooled):
    experts, num_experts = trace
    layers = experts.shape[1]
    layer_to_block = [layer // 2 for layer in range(layers)] if pooled else list(range(layers))
    load = expert_load(experts, num_experts, layer_to_block if pooled else None)
    for block in set(layer_to_block):
        layers_of_block = [layer for layer in range(layers) if layer_to_block[layer] == block]
        chosen = Counter(expert for token in experts.tolist() for layer in layers_of_block for expert in token[layer])
        counts = np.array([chosen[e] for e in range(num_experts)])
        assert load[block].tolist() == pytest.approx((counts / counts.sum()).tolist())
        assert load_variation(load)[block].item() == pytest.approx(counts.std() / counts.mean())
        assert load_entropy(load)[block].item() == pytest.approx(entropy(counts), abs=1e-9)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 99))
def test_routing_entropy_equals_counting_by_hand(tokens, layers, seed):
    probabilities = (3 * torch.randn(tokens, layers, 5, generator=torch.manual_seed(seed))).softmax(dim=-1)
    expected = [sum(entropy(p.tolist()) for p in layer) / tokens for layer in probabilities.unbind(dim=1)]
    assert routing_entropy(probabilities).tolist() == pytest.approx(expected, rel=1e-4)
    assert routing_entropy(probabilities.half()).tolist() == pytest.approx(expected, rel=1e-2, abs=1e-2)


@given(traces(), st.integers(1, 6))
def test_agreement_of_layers_equals_counting_by_hand(trace, length):
    experts, _ = trace
    tokens = experts.tolist()
    layers = experts.shape[1]
    expected = [[np.mean([jaccard(t[i], t[j]) for t in tokens]) for j in range(layers)] for i in range(layers)]
    torch.testing.assert_close(jaccard_matrix(experts), torch.tensor(expected, dtype=torch.float64))
    if layers > 1:
        assert adjacent_jaccard(experts) == pytest.approx(np.mean([expected[i][i + 1] for i in range(layers - 1)]))
    if length > layers:
        with pytest.raises(ValueError, match=f"length={length} must be between 1 and the number of layers, {layers}"):
            sustained_engagement(experts, length)
        return

    def longest(token, expert):
        return max((len(list(run)) for there, run in groupby(expert in layer for layer in token) if there), default=0)

    keeps = [any(longest(token, e) >= length for e in set(sum(token, []))) for token in tokens]
    assert sustained_engagement(experts, length) == pytest.approx(np.mean(keeps))


labels = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-7, 0, 2**40])), min_size=1, max_size=40)


@given(labels)
def test_information_and_purity_equal_scikit_learn_and_counting_by_hand(pairs):
    first, second = (torch.tensor(column) for column in zip(*pairs))
    assert mutual_information(first, second) == pytest.approx(mutual_info_score(first, second), abs=1e-9)
    expected = normalized_mutual_info_score(first, second)
    assert normalized_mutual_information(first, second) == pytest.approx(expected, abs=1e-9)
    groups = {c: Counter(label for cluster, label in pairs if cluster == c) for c, _ in pairs}
    best = sum(group.most_common(1)[0][1] for group in groups.values())
    assert cluster_purity(first, second) == pytest.approx(best / len(pairs))


def test_permutation_baseline_is_what_unrelated_labels_give():
    generator = torch.manual_seed(0)
    clusters = torch.randint(0, 50, (400,), generator=generator)
    unrelated = torch.randint(0, 8, (400,), generator=generator)
    chance = permutation_baseline(mutual_information, clusters, unrelated, permutations=50)
    assert chance.low < mutual_information(clusters, unrelated) < chance.high
    assert chance.low < chance.estimate < chance.high
    assert mutual_information(clusters, clusters % 8) > 2 * chance.high
    # The bias of an estimate from so few tokens, by Miller's formula, in nats: nothing to be read as information.
    assert chance.estimate == pytest.approx(49 * 7 / (2 * 400), rel=0.25)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    generator = torch.manual_seed(0)
    hits = 0
    for seed in range(100):
        offsets = torch.randn(30, generator=generator)  # tokens of one document are alike
        values = offsets.repeat_interleave(5) + 0.1 * torch.randn(150, generator=generator)
        documents = torch.arange(30).repeat_interleave(5)
        interval = bootstrap(lambda x: x.mean().item(), documents, values, seed=seed)
        assert interval.estimate == pytest.approx(values.mean().item())
        hits += interval.low <= 0 <= interval.high
    assert 85 <= hits <= 99


def test_bootstrap_draws_whole_documents_in_any_order_of_tokens():
    documents, values = torch.tensor([5, 1, 5, 1, 9]), torch.tensor([1, 2, 1, 2, 3])

    def sizes(x):
        assert (x == 1).sum() % 2 == 0 and (x == 2).sum() % 2 == 0
        return float(len(x))

    interval = bootstrap(sizes, documents, values, resamples=50)
    assert (interval.low, interval.estimate, interval.high) == (
        3.0,
        5.0,
        6.0,
    ) or 3 <= interval.low <= interval.high <= 6


def test_jackknife_of_a_mean_has_its_standard_error():
    values = torch.randn(40, generator=torch.manual_seed(0), dtype=torch.float64)
    interval = jackknife(lambda x: x.mean().item(), torch.arange(40), values)
    half = 1.959964 * values.std().item() / 40**0.5
    expected = values.mean().item() - half, values.mean().item(), values.mean().item() + half
    assert (interval.low, interval.estimate, interval.high) == pytest.approx(expected)


def test_jackknife_covers_what_grows_with_the_sample_as_often_as_it_says():
    def draw(seed):
        """Documents of tokens on a few of many paths, with labels that the paths tell something of."""
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.rand(30, 4, generator=generator).mul(math.log(400)).exp().long()
        paths = kinds.gather(1, torch.randint(4, (30, 6), generator=generator)).flatten()
        labels = (paths + torch.randint(2, (180,), generator=generator)) % 5
        return torch.arange(30).repeat_interleave(6), paths, labels

    for measure in (lambda paths, labels: distinct_paths(paths[:, None, None]), mutual_information, cluster_purity):
        found = np.array([measure(*draw(seed)[1:]) for seed in range(1000, 1200)])
        intervals = [jackknife(measure, *draw(seed), groups=15) for seed in range(60)]
        assert sum(interval.low <= found.mean() <= interval.high for interval in intervals) >= 53
        width = np.mean([interval.high - interval.low for interval in intervals])
        assert width < 1.3 * 2 * 1.96 * found.std()


def test_subsample_has_that_many_tokens_of_whole_documents():
    documents = torch.randint(0, 20, (500,), generator=torch.manual_seed(0))
    indices = subsample_documents(documents, 200)
    assert len(indices) == 200 == len(set(indices.tolist())) and indices.tolist() == sorted(indices.tolist())
    taken, whole = Counter(documents[indices].tolist()), Counter(documents.tolist())
    assert sum(taken[d] != whole[d] for d in taken) <= 1
    assert subsample_documents(documents, 200, seed=1).tolist() != indices.tolist()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(TypeError, match="must be a Tensor, not a list"):
        path_ids([[[0, 1]]])
    empty = torch.zeros(0, 3, 2, dtype=torch.uint8)
    for measure in (path_ids, path_entropy, jaccard_matrix, lambda e: sustained_engagement(e, 2)):
        with pytest.raises(ValueError, match=r"experts has shape \(5, 2\), but must have 3 dimensions"):
            measure(torch.zeros(5, 2, dtype=torch.uint8))
        with pytest.raises(ValueError, match="experts is empty: there is nothing to measure"):
            measure(empty)
    with pytest.raises(ValueError, match="experts holds index 7, but num_experts=4"):
        expert_load(torch.full((1, 1, 1), 7), num_experts=4)
    with pytest.raises(ValueError, match="Each token needs two labels"):
        mutual_information(torch.zeros(3), torch.zeros(4))
    experts = torch.tensor([[[0, 1], [2, 3]]])
    for measure in (path_ids, jaccard_matrix, lambda e: expert_load(e, 4)):
        for wrong in (experts.float(), experts - 1):
            with pytest.raises(ValueError, match="must be indices: integers from 0"):
                measure(wrong)
    with pytest.raises(ValueError, match="layer_to_block has 1 entries for 2 layers"):
        expert_load(experts, 4, [0])
    with pytest.raises(ValueError, match="probabilities has values from -2 to 3: pass a softmax"):
        routing_entropy(torch.tensor([[[-2.0, 3.0]]]))
    for measure in (load_variation, load_entropy):
        for load in ([-1.0, 2.0], [math.nan, 1.0], [0.0, 0.0]):
            with pytest.raises(ValueError, match="load has a negative value, NaN, infinity or a row of zeros"):
                measure(torch.tensor(load))
    with pytest.raises(ValueError, match="labels of dtype torch.float32 and torch.float32 must be integers"):
        mutual_information(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="permutations=0 must be at least 1"):
        permutation_baseline(mutual_information, torch.arange(3), torch.arange(3), permutations=0)
    with pytest.raises(ValueError, match="resamples=1 must be at least 2"):
        bootstrap(lambda x: 0.0, torch.arange(3), torch.zeros(3), resamples=1)
    for interval in (bootstrap, jackknife):
        with pytest.raises(ValueError, match="confidence=95 must be between 0 and 1"):
            interval(lambda x: 0.0, torch.arange(3), torch.zeros(3), confidence=95)
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        bootstrap(lambda x: 0.0, torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="groups=1 must be at least 2"):
        jackknife(lambda x: 0.0, torch.arange(3), torch.zeros(3), groups=1)
    with pytest.raises(ValueError, match="document_ids has 3 tokens, but a value has 2"):
        bootstrap(lambda x: 0.0, torch.arange(3), torch.zeros(2))
    with pytest.raises(ValueError, match="tokens=9 must be between 1 and the number of tokens, 3"):
        subsample_documents(torch.arange(3), 9)
