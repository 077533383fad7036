# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from pathmoe import record_paths
from pathmoe.paths import (
    document_losses,
    freeze_routing,
    noise_router,
    restrict_paths,
    shuffle_experts,
)


def draw_documents(lengths=(9, 6, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 99, (length,), generator=generator).tolist() for length in lengths]


def paths_of(trace):
    return {tuple(path) for path in trace.experts[:, :, 0].tolist()}


ARCHITECTURES = [{}, {"router_sharing": "decision"}, "olmoe", "qwen2_moe", "qwen3_moe", "mixtral"]
architectures = pytest.mark.parametrize("kind", ARCHITECTURES, ids=str)


def test_document_loss_is_that_of_its_windows(any_model):
    model, documents = any_model("qwen3_moe"), draw_documents()
    losses, counts = document_losses(model, documents, max_length=5)
    for document, loss, count in zip(documents, losses.tolist(), counts.tolist()):
        windows = [torch.tensor([document[start : start + 5]]) for start in range(0, len(document), 5)]
        windows = [window for window in windows if window.shape[1] > 1]
        assert count == sum(window.shape[1] - 1 for window in windows)
        expected = sum(model(window, labels=window).loss.item() * (window.shape[1] - 1) for window in windows)
        assert loss == pytest.approx(expected, rel=1e-5)


@architectures
def test_perturbations_of_no_strength_change_nothing(any_model, kind):
    model, documents = any_model(kind), draw_documents()
    with record_paths(model) as trace:
        document_losses(model, documents)
    for curve in (
        noise_router(model, documents, "logits", strengths=(0.0,)),
        noise_router(model, documents, "hidden_states", strengths=(0.0,)),
        freeze_routing(model, documents, spans=(1,)),
        restrict_paths(model, documents, trace, tops=(None,), others="any"),
    ):
        assert curve.rise[0].estimate == pytest.approx(0, abs=1e-5), curve.name
        assert curve.perplexity[0].estimate == pytest.approx(curve.baseline.estimate, rel=1e-5)


@architectures
def test_curves_have_a_paired_interval_at_each_point(any_model, kind):
    model, documents = any_model(kind), draw_documents()
    with record_paths(model) as trace:
        document_losses(model, documents)
    layers = trace.model.num_layers
    losses, counts = document_losses(model, documents)
    for curve, points in (
        (shuffle_experts(model, documents, "each_layer", shares=(0.5, 1.0)), 2),
        (shuffle_experts(model, documents, "same", shares=(1.0,)), 1),
        (shuffle_experts(model, documents, "one_layer"), layers),
        (noise_router(model, documents, "logits", strengths=(1.0, 9.0)), 2),
        (noise_router(model, documents, "hidden_states", strengths=(1.0,)), 1),
        (freeze_routing(model, documents, spans=(2, layers)), 2),
        (restrict_paths(model, documents, trace, tops=(1, None)), 2),
    ):
        assert len(curve.values) == len(curve.perplexity) == len(curve.rise) == points
        baseline = curve.baseline
        assert baseline.estimate == pytest.approx((losses.sum() / counts.sum()).exp().item())
        assert baseline.low < baseline.estimate < baseline.high
        for perplexity, rise in zip(curve.perplexity, curve.rise):
            assert rise.estimate == pytest.approx(perplexity.estimate / baseline.estimate - 1, abs=1e-6)
            assert perplexity.low < perplexity.estimate < perplexity.high
            assert rise.low <= rise.estimate <= rise.high
    shared = kind == {"router_sharing": "decision"}
    frozen = freeze_routing(model, documents, spans=(2, layers)).rise
    # Blocks of two layers that share their decision are frozen already.
    assert (abs(frozen[0].estimate) < 1e-6) == shared and abs(frozen[1].estimate) > 1e-6


@architectures
def test_only_the_most_frequent_paths_are_taken(any_model, kind):
    model, reference = any_model(kind), draw_documents(lengths=(40, 40), seed=1)
    with record_paths(model) as trace:
        document_losses(model, reference)
    paths, counts = trace.experts[:, :, 0].unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    for others in ("allowed", "any"):
        for top in (1, 3, 20):
            allowed = {tuple(path) for path in paths[order[:top]].tolist()}
            documents = draw_documents()
            with record_paths(model) as taken:
                restrict_paths(model, documents, trace, tops=(top,), others=others)
            perturbed = taken.experts[len(taken) // 2 :]
            assert {tuple(path) for path in perturbed[:, :, 0].tolist()} <= allowed
            assert all(len(set(experts)) == len(experts) for token in perturbed.tolist() for experts in token)
            if others == "allowed" and top == 20:
                for layer in range(perturbed.shape[1]):
                    used = {path[layer] for path in allowed}
                    inside = [len(used & set(experts)) for experts in perturbed[:, layer].tolist()]
                    assert min(inside) == min(len(used), perturbed.shape[2])


def test_frozen_layers_repeat_the_layer_before(tiny_model):
    model, documents = tiny_model(), draw_documents()
    with record_paths(model) as trace:
        freeze_routing(model, documents, spans=(3,))
    experts = trace.experts[len(trace) // 2 :]
    assert (experts[:, 1] == experts[:, 0]).all() and (experts[:, 2] == experts[:, 0]).all()
    assert not (experts[:, 3] == experts[:, 0]).all() and (experts[:, 4] == experts[:, 3]).all()


def test_shuffled_experts_follow_one_permutation_in_the_layers_and_tokens_that_are_shuffled(tiny_model):
    model, documents = tiny_model(), draw_documents(lengths=(60, 60))
    for scope, shares in (("same", (1.0,)), ("each_layer", (1.0,)), ("each_layer", (0.5,)), ("one_layer", (1.0,))):
        seen = []  # what the router would have chosen, and what was taken

        def keep(router, args, output, seen=seen):
            seen.append(output[2])

        # Registered first, and moved after the edit by it.
        handles = [router.register_forward_hook(keep) for router in model.model.routers.values()]
        shuffle_experts(model, documents, scope, shares=shares)
        for handle in handles:
            handle.remove()
        # Layer 0 sees the same tokens with and without the perturbation.
        for document in range(2):
            clean, taken = seen[document * 5], seen[2 * 5 + document * 5]
            pairs = {(a, b) for a, b in zip(clean.reshape(-1).tolist(), taken.reshape(-1).tolist())}
            moved = (clean != taken).any(dim=-1).float().mean()
            if shares == (0.5,):
                assert 0.2 < moved < 0.8
            else:
                assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
                assert moved > 0


def test_random_perturbations_repeat_with_their_seed(tiny_model):
    model, documents = tiny_model(), draw_documents()
    for perturb in (shuffle_experts, noise_router):
        first, again, other = (perturb(model, documents, seed=seed).perplexity[-1] for seed in (0, 0, 1))
        assert first == again and first.estimate != other.estimate


def test_what_cannot_be_perturbed_is_refused(any_model):
    model, documents = any_model({}), draw_documents()
    with pytest.raises(ValueError, match="documents is empty"):
        document_losses(model, [])
    with pytest.raises(ValueError, match=r"documents\[1\] has 1 tokens; at least 2"):
        document_losses(model, [[1, 2], [1]])
    with pytest.raises(
        ValueError, match=r"documents\[0\] has token ids from 1 to 99, but the model's vocabulary has 99"
    ):
        document_losses(model, [[1, 99]])
    with pytest.raises(ValueError, match="needs at least 2 of them, got 1"):
        freeze_routing(model, documents[:1])
    with pytest.raises(ValueError, match="scope='all' must be"):
        shuffle_experts(model, documents, "all")
    with pytest.raises(ValueError, match="on='weights' must be"):
        noise_router(model, documents, "weights")
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"strengths=.* must be finite and not negative"):
            noise_router(model, documents, strengths=(strength,))
    with pytest.raises(TypeError, match=r"documents\[0\]='a b' is text: pass its token ids"):
        document_losses(model, ["a b"])
    with record_paths(model) as trace:
        pass
    with pytest.raises(ValueError, match="trace is empty"):
        restrict_paths(model, documents, trace)
    with record_paths(other := any_model("mixtral")) as trace:
        document_losses(other, documents)
    with pytest.raises(ValueError, match="model_type is 'mixtral' in the trace and 'pathmoe' in the model"):
        restrict_paths(model, documents, trace)
