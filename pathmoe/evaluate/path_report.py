# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the expert paths of one model, or of two side by side, and shows them on one page that works offline.

    pathmoe paths --model runs/quickstart/final --data runs/quickstart/data/validation.jsonl --output out
    pathmoe paths --model A --model B --data validation.jsonl runs/brown/brown.jsonl --output out

Takes any causal language model that `record_paths` takes: PathMoE, OLMoE, Qwen2-MoE, Qwen3-MoE, Mixtral and more. Of
each data file, equally many tokens are read, of documents in random order. Rows hold `text`, and may hold its
`source`, and gold tags of its words as `pathmoe.text.brown` writes them. Writes OUTPUT/paths.json, every figure, and
OUTPUT/report.html.

In paths.json a path is a list with the first choice of every routed layer, shares are of tokens, `load` is of choices,
entropies are in nats, and an interval is `{estimate, low, high}`: 95 % over documents, by bootstrap, or by jackknife
for measures that a bootstrap would change as it repeats documents: those of distinct paths and of information.
"""

import argparse
import json
import math
import random
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pathmoe import paths
from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.evaluate.inputs import (
    add_device_arguments,
    check_device_arguments,
    check_model_folder,
    check_sources,
    explained,
    keep_texts,
    load_config,
    load_file,
    load_tokenizer,
)
from pathmoe.evaluate.prefetch import AHEAD, prefetch_estimate
from pathmoe.files import check_writable, write_text
from pathmoe.loading import load_model
from pathmoe.paths import PathTrace, record_paths
from pathmoe.paths.hooks import Routing


TEMPLATE = Path(__file__).with_suffix(".html")
COVERED = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
PATHS_SHOWN = 20
# Of a document that has as many, at least so many tokens are read, and perturbed: few of many documents tell more.
DOCUMENT_TOKENS = 512
PERTURBED_TOKENS = 256
MAX_LENGTH = 1024
FLOW_KEPT = 0.0005  # share of the tokens
TOKENS_SHOWN = 600
CONTEXT = 45  # characters on each side of an example


@dataclass
class Reading:
    """What a model made of the text: T tokens of some documents, read piece by piece.

    Attributes:
        documents (`list[dict]`): Rows of the data.
        pieces (`list[list[int]]`): Token ids; no piece crosses a document.
        piece_documents (`list[int]`): Index of the document that each piece is of.
        offsets (`list[tuple[int, int]]` of length T): The characters of each token in its document's text.
        trace (`PathTrace`): The paths of the T tokens, with probabilities.
    """

    documents: list[dict]
    pieces: list[list[int]]
    piece_documents: list[int]
    offsets: list[tuple[int, int]]
    trace: PathTrace

    def __post_init__(self):
        self.experts = self.trace.experts.long()
        lengths = torch.tensor([len(piece) for piece in self.pieces])
        self.document_ids = torch.tensor(self.piece_documents).repeat_interleave(lengths)
        # Where several tokens make up a character, the first one has it.
        self.texts, last, taken = [], None, 0
        for document, (start, end) in zip(self.document_ids.tolist(), self.offsets):
            taken = taken if document == last else 0
            self.texts.append(self.documents[document]["text"][max(start, taken) : end])
            last, taken = document, max(end, taken)


def read_documents(files: list[Path]) -> list[list[dict]]:
    """The rows of each file that hold text.

    Raises:
        UserError: If a file cannot be read, has no column `text`, no text, or tags that do not fit its words.
    """
    result = []
    for file in files:
        rows = load_file(file)
        if "text" not in rows.column_names:
            raise UserError(f"--data {file} has no column 'text', only {', '.join(rows.column_names)}.")
        rows, _ = keep_texts(rows, "text", f"--data {file}")
        if "source" in rows.column_names:
            check_sources(rows["source"], "source", f"--data {file}")
        rows = [row for row in rows if row["text"].strip()]
        if not rows:
            raise UserError(f"--data {file} holds no text: all its rows are empty.")
        for row in rows:
            check_tags(row, file)
        result.append([row | {"source": file.stem if row.get("source") is None else row["source"]} for row in rows])
    return result


def check_tags(row: dict, file: Path):
    """Refuses gold tags without a place for each in the text."""
    if row.get("tags") is None:
        return
    columns = [row.get(column) for column in ("starts", "ends", "tags")]
    where = f"--data {file}: in the row that begins {row['text'][:40]!r},"
    if not all(isinstance(values, list) for values in columns) or len({len(values) for values in columns}) > 1:
        raise UserError(f"{where} starts, ends and tags must be lists of one length, with a value for each word.")
    if not all(isinstance(value, kind) for values, kind in zip(columns, (int, int, str)) for value in values):
        raise UserError(f"{where} starts and ends must be whole numbers, and tags texts.")
    if not all(0 <= start <= end <= len(row["text"]) for start, end, _ in zip(*columns)):
        raise UserError(f"{where} a word starts or ends outside the text's {len(row['text'])} characters.")


def encode(
    tokenizer: PreTrainedTokenizerBase, documents: list[dict], max_tokens: int, each: int
) -> list[tuple[dict, list[int], list[tuple[int, int]]]]:
    """The first tokens of some documents, at most `each` of each: `(document, token ids, offsets)` of those reached.

    Raises:
        UserError: If the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed.")
    result = []
    for document in documents:
        if max_tokens == 0:
            break
        encoded = tokenizer(document["text"], return_offsets_mapping=True, verbose=False)
        ids, offsets = (encoded[key][: min(each, max_tokens)] for key in ("input_ids", "offset_mapping"))
        max_tokens -= len(ids)
        result.append((document, ids, offsets))
    return result


@torch.no_grad()
def record(model: PreTrainedModel, pieces: list[list[int]], probabilities: bool = False) -> PathTrace:
    """The paths of the tokens of some pieces, which are run one by one."""
    with record_paths(model, probabilities=probabilities) as trace:
        for piece in tqdm(pieces, desc="paths", disable=None):
            model(torch.tensor([piece], device=model.device), use_cache=False)
    return trace


def read_text(model: PreTrainedModel, encoded: list[tuple], max_length: int) -> Reading:
    """Runs the model over documents, in pieces of `max_length` tokens at most, and records their paths."""
    documents, pieces, piece_documents, all_offsets = [], [], [], []
    for document, ids, offsets in encoded:
        cut = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        pieces += cut
        piece_documents += [len(documents)] * len(cut)
        all_offsets += offsets
        documents.append(document)
    return Reading(documents, pieces, piece_documents, all_offsets, record(model, pieces, probabilities=True))


def align_tags(offsets: list[tuple[int, int]], document: dict) -> list[str | None]:
    """The gold tag of the word that each token belongs to.

    A token belongs to the word that holds its first character that is not white space; so all sub-words of a word have
    its tag, and a token that spans two words has the first one's.

    Args:
        offsets (`list[tuple[int, int]]`): The characters of each token, end exclusive.
        document (`dict`): `text`, and of each word `starts`, `ends` and `tags`.

    Returns:
        `list[str | None]`: `None` where a token is special, white space, or in no word.
    """
    text, tag_at = document["text"], {}
    for start, end, tag in zip(document["starts"], document["ends"], document["tags"]):
        tag_at.update(dict.fromkeys(range(start, end), tag))
    tags = []
    for start, end in offsets:
        start += len(text[start:end]) - len(text[start:end].lstrip())
        tags.append(tag_at.get(start) if start < end else None)
    return tags


def tags_of(reading: Reading) -> list[str | None]:
    """The gold tag of each token, or `None` where there is none."""
    tags = []
    for number, document in enumerate(reading.documents):
        offsets = [reading.offsets[i] for i in (reading.document_ids == number).nonzero()[:, 0].tolist()]
        tags += align_tags(offsets, document) if document.get("tags") is not None else [None] * len(offsets)
    return tags


def labels(values: list) -> torch.Tensor:
    """Numbers the distinct values 0, 1, …: `(T,)`."""
    numbers = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def permuted(experts: torch.Tensor, seed: int) -> torch.Tensor:
    """The choices of each layer shuffled over the tokens: every layer keeps its load, and paths fall apart."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = [layer[torch.randperm(len(layer), generator=generator)] for layer in experts.unbind(dim=1)]
    return torch.stack(shuffled, dim=1)


def path_ranks(experts: torch.Tensor) -> torch.Tensor:
    """Place of each token's path among the paths in order of frequency, from 0: `(T,)`."""
    ids = paths.path_ids(experts)
    return ids.bincount().argsort(descending=True, stable=True).argsort()[ids]


def coverage(ranks: torch.Tensor, top: int) -> float:
    """The share of tokens on the `top` most frequent paths.

    Of all tokens this is `path_coverage`. In a bootstrap, the most frequent paths stay those of all tokens: a
    resample's own would cover more of it, as it repeats documents.
    """
    return (ranks < top).double().mean().item()


def measure(reading: Reading, tags: list[str | None], resamples: int, seed: int) -> list[dict]:
    """The table of measures: `key`, `name`, `note`, `unit`, `value`, the interval's `low` and `high`, and `baseline`.

    The baseline is the same measure after permutation: of each layer's choices, which leaves the load as it is, or of
    the labels. A resample repeats documents, which changes how many paths there are and how much they tell: the
    intervals of such measures are by jackknife, all others by bootstrap. Tags of a single document give none.
    """
    experts, shape = reading.experts, reading.trace.model
    shuffled, undecided = permuted(experts, seed), math.log(shape.num_experts)

    def load(measure_load, experts):
        return measure_load(paths.expert_load(experts, shape.num_experts)).mean().item()

    def row(key, name, note, unit, interval, baseline=None):
        names = ("key", "name", "note", "unit", "value", "baseline", "low", "high")
        return dict(zip(names, (key, name, note, unit, interval.estimate, baseline, interval.low, interval.high)))

    bootstrap = partial(paths.bootstrap, resamples=resamples, seed=seed)
    jackknife = partial(paths.jackknife, seed=seed)

    rows = []
    possible = f"of {shape.num_experts}^{shape.num_layers} possible ones, taken by {len(experts):,} tokens"
    both = (experts, shuffled)
    for key, name, note, unit, function, interval, (real, chance) in (
        ("distinct_paths", "distinct paths", possible, "count", paths.distinct_paths, jackknife, both),
        ("perplexity", "perplexity of the paths", "how many equally frequent paths would be as spread", "count",
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
    # A mean over tokens: in a resample it is that of the documents' means, by their tokens.
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
        else:  # tags of one document
            interval = paths.Interval(function(ids[kept], values), None, None)
        rows.append(row(key, name, note, unit, interval, baseline))
    return rows


def log_likelihood_ratio(together: int, first: int, second: int, total: int) -> float:
    """Dunning's G² (1993) of two events that are seen `first` and `second` times, both of it `together` times."""
    observed = [together, first - together, second - together, total - first - second + together]
    expected = [a * b / total for a in (first, total - first) for b in (second, total - second)]
    return 2 * sum(o * math.log(o / e) for o, e in zip(observed, expected) if o)


def frequent_paths(reading: Reading, tags: list[str | None]) -> list[dict]:
    """The most frequent paths, and what they carry.

    Returns:
        `list[dict]`: `path`, `tokens` (how many), `share`, `tags` (`[tag, share]`, largest first; of the tokens that
        have one), `typical` (`[token, count]`, the highest log-likelihood ratio first, more frequent on the path than
        elsewhere) and `examples` (`[before, token, after]`).
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
    """How many tokens the most frequent paths cover, and how many keep an expert: points with intervals."""
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
    """Shares of the tokens by first choice: `first_choice` (L, E), and `flow`, L - 1 lists of `[from, to, share]`."""
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
    """Perplexity under every perturbation, on the first piece of each of some documents, at most half of them.

    Returns:
        `dict`: `tokens` and `documents` (how many are perturbed), and `curves`: `title`, `note` and a
        `PerturbationCurve` each. The most frequent paths are those of the other documents.
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
        ("Experts shuffled, each layer its own way", "", paths.shuffle_experts, {"scope": "each_layer"}),
        ("Experts shuffled, all layers the same way", "", paths.shuffle_experts, {"scope": "same"}),
        ("Experts shuffled in one layer only", "", paths.shuffle_experts, {"scope": "one_layer"}),
        ("Noise on the router's logits", "", paths.noise_router, {"on": "logits"}),
        ("Noise on the router's input", "", paths.noise_router, {"on": "hidden_states"}),
        ("Routing frozen", "of so many layers only the first one decides", paths.freeze_routing, {"spans": spans}),
        ("Most frequent paths only", "of other documents", paths.restrict_paths, {"trace": record(model, others)}),
    ):
        curves.append({"title": title, "note": note, **asdict(function(**common, **settings))})
    return {"tokens": sum(len(piece) for piece in pieces), "documents": len(pieces), "curves": curves}


def analyse(model: PreTrainedModel, name: str, reading: Reading, max_length: int, options: argparse.Namespace) -> dict:
    """All figures of one model."""
    shape, experts = reading.trace.model, reading.experts
    tags = tags_of(reading)
    load = paths.expert_load(experts, shape.num_experts)
    longest = reading.document_ids.bincount().argmax()
    shown = (reading.document_ids == longest).nonzero()[:TOKENS_SHOWN, 0].tolist()
    return {
        "name": name,
        "architecture": type(model).__name__,
        "layers": shape.num_layers,
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "layer_to_block": list(shape.layer_to_block),
        "tokens": len(experts),
        "documents": len(reading.documents),
        "tagged_tokens": sum(tag is not None for tag in tags),
        "measures": measure(reading, tags, options.resamples, options.seed),
        **curves(reading, options.resamples, options.seed),
        **first_choices(experts, shape.num_experts),
        "load": load.tolist(),
        "load_variation": paths.load_variation(load).tolist(),
        "jaccard": paths.jaccard_matrix(experts).tolist(),
        "jaccard_chance": shape.top_k / (2 * shape.num_experts - shape.top_k),
        "paths": frequent_paths(reading, tags),
        "text": [
            {"token": reading.texts[i], "path": experts[i, :, 0].tolist(), "experts": experts[i].tolist()}
            for i in shown
        ],
        "perturbations": perturb(model, reading, options.perturbed_tokens, max_length, options.seed)
        if options.perturbed_tokens
        else None,
        "prefetch": prefetch_estimate(
            model,
            reading.pieces,
            reading.piece_documents,
            ahead=[distance for distance in AHEAD if distance < shape.num_layers],
            resamples=options.resamples,
            seed=options.seed,
        ),
    }


def render(figures: dict) -> str:
    """The page: the template with the figures inside."""
    # No text of the data may end the script element that holds it.
    data = json.dumps(figures, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data)


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    """Reads the options and checks what can be checked before anything is loaded."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder of a model; once or twice")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="files with a column `text`")
    parser.add_argument("--output", type=Path, required=True, help="folder for paths.json and report.html")
    parser.add_argument("--max_tokens", type=int, default=20_000, help="tokens of each model, of all files together")
    parser.add_argument("--max_length", type=int, help="most tokens in a piece; the model's longest, or 1024")
    parser.add_argument("--perturbed_tokens", type=int, default=8_000, help="tokens under perturbation; 0 for none")
    parser.add_argument("--resamples", type=int, default=100, help="of each bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents, and of all that is random")
    add_device_arguments(parser)
    options = parser.parse_args(args)
    if len(options.model) > 2:
        parser.error(f"--model is given {len(options.model)} times: one model, or two side by side.")
    for option, least in (
        ("max_tokens", 1),
        ("perturbed_tokens", 0),
        ("resamples", 1),
        ("seed", 0),
        ("max_length", 2),
    ):
        if (value := getattr(options, option)) is not None and value < least:
            parser.error(f"--{option} {value} must be at least {least}.")
    for option, most in (("seed", 2**32 - 1), ("resamples", 100_000)):
        if getattr(options, option) > most:
            parser.error(f"--{option} {getattr(options, option)} must be at most {most}.")
    for name, mark in (("paths.json", '"layer_to_block"'), ("report.html", "<title>Expert paths</title>")):
        check_writable(options.output / name, "--output", mark)
    check_device_arguments(options)
    return options


def check_model(folder: str) -> int:
    """Refuses a model without paths before anything is measured, and returns how many tokens it reads at once."""
    check_model_folder(folder)
    config = load_config(folder)
    try:
        with torch.device("meta"):
            routing = Routing(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # whatever a foreign configuration makes transformers raise
        raise UserError(f"--model {folder}: {error}") from error
    if len(routing.layer_to_block) < 2:
        raise UserError(f"--model {folder} has one routed layer: a path needs at least two.")
    text = config.get_text_config()
    if (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)) == 1:
        raise UserError(f"--model {folder} has one expert (num_experts: 1): all tokens take one path.")
    return getattr(text, "max_position_embeddings", None) or MAX_LENGTH


def read_tokens(tokenizers: list, files: list[list[dict]], max_tokens: int) -> tuple[list[list[tuple]], int]:
    """Reads equally many tokens of each file for each model: the encoded documents of each, and how many tokens."""
    share = max_tokens // len(files)
    limits = [(rows, max(DOCUMENT_TOKENS, -(-share // len(rows)))) for rows in files]
    counts = [
        min(sum(len(ids) for _, ids, _ in encode(tokenizer, rows, share, each)) for tokenizer in tokenizers)
        for rows, each in limits
    ]
    encoded = [
        [entry for (rows, each), count in zip(limits, counts) for entry in encode(tokenizer, rows, count, each)]
        for tokenizer in tokenizers
    ]
    if (reached := min(sum(len(ids) > 1 for _, ids, _ in entries) for entries in encoded)) < 4:
        raise UserError(
            f"--max_tokens {max_tokens} reaches {reached} documents of at least two tokens, but intervals need at "
            "least 4: give more documents, or take more tokens."
        )
    return encoded, sum(counts)


def check_vocabulary(model: PreTrainedModel, folder: str, entries: list[tuple]):
    """Refuses a tokenizer of another model, whose tokens the model does not have."""
    largest, rows = max(max(ids, default=0) for _, ids, _ in entries), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"--model {folder}: its tokenizer gives token {largest} to a model of {rows}: it belongs to another model."
        )


def main(args: list[str] | None = None):
    options = parse_arguments(args)
    # Models are compared on equally many tokens of each file, in pieces of the same length.
    longest = min(check_model(folder) for folder in options.model)
    max_length = options.max_length or min(longest, MAX_LENGTH)
    if not 1 < max_length <= longest:
        raise UserError(f"--max_length {max_length} must be from 2 to the {longest} that a model reads at once.")
    tokenizers = [load_tokenizer(folder) for folder in options.model]
    files = read_documents(options.data)
    for rows in files:
        random.Random(options.seed).shuffle(rows)
    encoded, tokens = read_tokens(tokenizers, files, options.max_tokens)
    models = []
    for folder, entries in zip(options.model, encoded):
        model = load_model(folder, allow_missing=options.allow_missing, dtype=options.dtype).to(options.device)
        check_vocabulary(model, folder, entries)
        reading = read_text(model, entries, max_length)
        models.append(analyse(model, "/".join(Path(folder).parts[-2:]), reading, max_length, options))
        del model
    figures = explained(
        {
            "command": shlex.join(["pathmoe", "paths", *(sys.argv[1:] if args is None else args)]),
            "data": {"files": [file.name for file in options.data], "tokens": tokens},
            "models": models,
        }
    )
    write_text(options.output / "paths.json", json.dumps(figures, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(options.output / "report.html", render(figures))
    print(f"Wrote {options.output / 'paths.json'} and {options.output / 'report.html'}.")


if __name__ == "__main__":
    run_command(main)
