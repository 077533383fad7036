# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Computes the figures of a path report: measures with intervals, curves, frequent paths and perturbations."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from pathmoe import paths
from pathmoe.evaluate.path_reading import CONTEXT, Reading, record


COVERED = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
PATHS_SHOWN = 20
PERTURBED_TOKENS = 256
FLOW_KEPT = 0.0005  # smallest share of the tokens that `flow` lists


def labels(values: list) -> torch.Tensor:
    """Numbers the distinct values 0, 1, …: `(T,)`."""
    numbers = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def permuted(experts: torch.Tensor, seed: int) -> torch.Tensor:
    """Shuffles the choices of each layer over the tokens. Every layer keeps its load, but the paths are destroyed."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [layer[torch.randperm(len(layer), generator=generator)] for layer in experts.unbind(dim=1)]
    return torch.stack(shuffled, dim=1)


def path_ranks(experts: torch.Tensor) -> torch.Tensor:
    """Returns the rank of each token's path among the paths in order of frequency, from 0: `(T,)`."""
    ids = paths.path_ids(experts)
    return ids.bincount().argsort(descending=True, stable=True).argsort()[ids]


def coverage(ranks: torch.Tensor, top: int) -> float:
    """Returns the share of tokens on the `top` most frequent paths.

    For all tokens, the result equals `path_coverage`. In a bootstrap, the most frequent paths are those of all tokens,
    because a resample repeats documents, so that its own most frequent paths would cover more of it.
    """
    return (ranks < top).double().mean().item()


def row(key: str, name: str, note: str, unit: str, interval: paths.Interval, baseline: float | None = None) -> dict:
    names = ("key", "name", "note", "unit", "value", "baseline", "low", "high")
    return dict(zip(names, (key, name, note, unit, interval.estimate, baseline, interval.low, interval.high)))


def measure(reading: Reading, tags: list[str | None], resamples: int, seed: int) -> list[dict]:
    """Computes the table of measures.

    The baseline is the same measure after a permutation of each layer's choices, which keeps the load, or of the
    labels. A bootstrap resample repeats documents, which changes the number of paths and the information in them.
    The intervals of such measures are therefore computed by jackknife, and all others by bootstrap. Measures of tags
    from a single document have no interval.

    Returns:
        `list[dict]`: `key`, `name`, `note`, `unit`, `value`, the interval from `low` to `high`, and `baseline`.
    """
    experts, shape = reading.experts, reading.trace.model
    shuffled, undecided = permuted(experts, seed), math.log(shape.num_experts)

    def load(measure_load, experts):
        return measure_load(paths.expert_load(experts, shape.num_experts)).mean().item()

    bootstrap = partial(paths.bootstrap, resamples=resamples, seed=seed)
    jackknife = partial(paths.jackknife, seed=seed)

    rows = []
    possible = f"of {shape.num_experts}^{shape.num_layers} possible ones, taken by {len(experts):,} tokens"
    both = (experts, shuffled)
    for key, name, note, unit, function, interval, (real, chance) in (
        ("distinct_paths", "distinct paths", possible, "count", paths.distinct_paths, jackknife, both),
        ("perplexity", "perplexity of the paths", "number of equally frequent paths with the same entropy", "count",
         paths.path_perplexity, jackknife, both),
        ("coverage_10", "tokens on the 10 most frequent paths", "", "share", partial(coverage, top=10), bootstrap,
         (path_ranks(experts), path_ranks(shuffled))),
        ("agreement", "agreement of neighbouring layers", "Jaccard similarity of a token's expert sets", "number",
         paths.adjacent_jaccard, bootstrap, both),
        ("load_variation", "variation of the load", "standard deviation over mean of the experts' loads, per layer",
         "number", partial(load, paths.load_variation), bootstrap, (experts, None)),
        ("load_entropy", "entropy of the load", "over that of an even load, per layer", "share",
         lambda e: load(paths.load_entropy, e) / undecided, bootstrap, (experts, None)),
    ):  # fmt: skip
        baseline = None if chance is None else function(chance)
        rows.append(row(key, name, note, unit, interval(function, reading.document_ids, real), baseline))
    # The measure is a mean over tokens, so a token can be replaced by the mean of its document in a resample.
    probabilities = reading.trace.probabilities
    of_documents = torch.stack(
        [
            paths.routing_entropy(probabilities[reading.document_ids == document]).mean() / undecided
            for document in range(len(reading.documents))
        ]
    )
    entropy = bootstrap(lambda x: x.mean().item(), reading.document_ids, of_documents[reading.document_ids])
    note = "of a token's router probabilities, over that of an undecided router, per layer"
    rows.append(row("routing_entropy", "routing entropy", note, "share", entropy))
    return rows + measure_labels(reading, tags, jackknife, seed)


def measure_labels(reading: Reading, tags: list[str | None], jackknife: Callable, seed: int) -> list[dict]:
    """Computes the rows of [`measure`] that relate paths to labels of tokens."""
    experts, rows = reading.experts, []
    everything = torch.arange(len(experts))
    sources = [document["source"] for document in reading.documents]
    known = [
        ("token", everything, reading.trace.token_ids.long()),
        ("position", everything, reading.trace.positions.long()),
        ("source", everything, labels(sources)[reading.document_ids]),
    ]
    tagged = [i for i, tag in enumerate(tags) if tag is not None]
    if tagged:
        known.append(("part of speech", torch.tensor(tagged), labels([tags[i] for i in tagged])))
    against: list[tuple[str, str, str, str, Callable, torch.Tensor, torch.Tensor]] = [
        (f"information_{label}", f"information of the path about the {label}", "mutual information in nats", "number",
         paths.mutual_information, kept, values)
        for label, kept, values in known
        if len(values.unique()) > 1
    ]  # fmt: skip
    if tagged:
        against += [
            ("nmi", "paths and parts of speech, NMI", "normalized mutual information", "number",
             paths.normalized_mutual_information, *known[-1][1:]),
            ("purity", "purity of the paths", "tokens that have the main part of speech of their path", "share",
             paths.cluster_purity, *known[-1][1:]),
        ]  # fmt: skip
    ids = paths.path_ids(experts)
    for key, name, note, unit, function, kept, values in against:
        baseline = paths.permutation_baseline(function, ids[kept], values, permutations=5, seed=seed).estimate
        if len((of := reading.document_ids[kept]).unique()) > 1:
            interval = jackknife(function, of, ids[kept], values)
        else:  # the tags are of a single document
            interval = paths.Interval(function(ids[kept], values), None, None)
        rows.append(row(key, name, note, unit, interval, baseline))
    return rows


def log_likelihood_ratio(together: int, first: int, second: int, total: int) -> float:
    """Computes Dunning's G² (1993) of two events that occur `first` and `second` times, `together` times jointly."""
    observed = [together, first - together, second - together, total - first - second + together]
    expected = [a * b / total for a in (first, total - first) for b in (second, total - second)]
    return 2 * sum(o * math.log(o / e) for o, e in zip(observed, expected) if o)


def frequent_paths(reading: Reading, tags: list[str | None]) -> list[dict]:
    """Describes the most frequent paths and the tokens that take them.

    Returns:
        `list[dict]`: `path`, `tokens` (their number), `share`, `tags` (`[tag, share]` among the tagged tokens, largest
        first), `typical` (`[token, count]` of tokens that are more frequent on the path than elsewhere, highest
        log-likelihood ratio first) and `examples` (`[before, token, after]`).
    """
    ids, words = paths.path_ids(reading.experts), [text.strip() or text for text in reading.texts]
    totals, documents = Counter(words), reading.document_ids.tolist()
    result = []
    for number in ids.bincount().argsort(descending=True, stable=True)[:PATHS_SHOWN].tolist():
        members = (ids == number).nonzero()[:, 0].tolist()
        here = Counter(words[i] for i in members)
        scores = {
            word: log_likelihood_ratio(count, len(members), totals[word], len(words))
            for word, count in here.items()
            if count * len(words) > len(members) * totals[word]
        }
        typical = sorted(scores, key=scores.get, reverse=True)[:8]
        examples = []
        for word in typical[:3]:
            seen = [i for i in members if words[i] == word]
            i = seen[len(seen) // 2]
            text, (start, end) = reading.documents[documents[i]]["text"], reading.offsets[i]
            before, after = text[:start][-CONTEXT:].partition(" ")[2], text[end:][:CONTEXT].rpartition(" ")[0]
            examples.append([" ".join(part.split("\n")) for part in (before, text[start:end], after)])
        classes = Counter(tags[i] for i in members if tags[i] is not None)
        result.append(
            {
                "path": reading.experts[members[0], :, 0].tolist(),
                "tokens": len(members),
                "share": len(members) / len(words),
                "tags": [[tag, count / classes.total()] for tag, count in classes.most_common()],
                "typical": [[word, here[word]] for word in typical],
                "examples": examples,
            }
        )
    return result


def curves(reading: Reading, resamples: int, seed: int) -> dict:
    """Computes two curves with intervals: tokens on the most frequent paths, and tokens that keep an expert."""
    experts, shuffled = reading.experts, permuted(reading.experts, seed)

    def points(key, places, function, real, chance):
        for place in places:
            interval = paths.bootstrap(
                lambda values, place=place: function(values, place),
                reading.document_ids,
                real,
                resamples=resamples,
                seed=seed,
            )
            yield {
                key: place,
                "share": interval.estimate,
                "low": interval.low,
                "high": interval.high,
                "baseline": function(chance, place),
            }

    ranks, shuffled_ranks = path_ranks(experts), path_ranks(shuffled)
    tops = [top for top in COVERED if top <= paths.distinct_paths(experts)]
    runs = range(1, experts.shape[1] + 1)
    return {
        "coverage": list(points("paths", tops, coverage, ranks, shuffled_ranks)),
        "engagement": list(points("layers", runs, paths.sustained_engagement, experts, shuffled)),
    }


def first_choices(experts: torch.Tensor, num_experts: int) -> dict:
    """Counts tokens by first choice: shares `first_choice` (L, E), and `flow`, L - 1 lists of `[from, to, share]`."""
    top1, tokens = experts[:, :, 0], len(experts)
    flow = []
    for here, there in zip(top1.unbind(dim=1), top1[:, 1:].unbind(dim=1)):
        cells, counts = (here * num_experts + there).unique(return_counts=True)
        shares = zip(cells.tolist(), (counts / tokens).tolist())
        flow.append([[*divmod(cell, num_experts), share] for cell, share in shares if share >= FLOW_KEPT])
    return {
        "first_choice": [(layer.bincount(minlength=num_experts) / tokens).tolist() for layer in top1.unbind(dim=1)],
        "flow": flow,
    }


def perturb(model: PreTrainedModel, reading: Reading, max_tokens: int, max_length: int, seed: int) -> dict:
    """Measures the perplexity under every perturbation, on the first pieces of at most half of the documents.

    Returns:
        `dict`: The numbers of perturbed `tokens` and `documents`, and `curves`, each with `title`, `note` and the
        fields of a `PerturbationCurve`. The most frequent paths are those of the other documents.
    """
    order = torch.randperm(len(reading.documents), generator=torch.Generator().manual_seed(seed)).tolist()
    order = [i for i in order if (reading.document_ids == i).sum() > 1]  # a single token predicts nothing
    chosen = order[: max(2, min(len(order) // 2, max_tokens // PERTURBED_TOKENS))]
    firsts = [reading.pieces[reading.piece_documents.index(document)] for document in chosen]
    pieces = [piece[: max(2, max_tokens // len(chosen))] for piece in firsts]
    others = [piece for piece, document in zip(reading.pieces, reading.piece_documents) if document not in chosen]
    common: dict[str, Any] = {"model": model, "documents": pieces, "max_length": max_length, "seed": seed}
    layers = reading.trace.model.num_layers
    spans = [*(n for n in (2, 4, 8, 16, 32) if n < layers), layers]
    curves = []
    for title, note, function, settings in (
        ("Experts shuffled, each layer differently", "", paths.shuffle_experts, {"scope": "each_layer"}),
        ("Experts shuffled, all layers the same way", "", paths.shuffle_experts, {"scope": "same"}),
        ("Experts shuffled in one layer only", "", paths.shuffle_experts, {"scope": "one_layer"}),
        ("Noise on the router's logits", "", paths.noise_router, {"on": "logits"}),
        ("Noise on the router's input", "", paths.noise_router, {"on": "hidden_states"}),
        ("Routing frozen", "only the first of n layers decides", paths.freeze_routing, {"spans": spans}),
        ("Most frequent paths only", "of other documents", paths.restrict_paths, {"trace": record(model, others)}),
    ):
        curves.append({"title": title, "note": note, **asdict(function(**common, **settings))})
    return {"tokens": sum(len(piece) for piece in pieces), "documents": len(pieces), "curves": curves}
