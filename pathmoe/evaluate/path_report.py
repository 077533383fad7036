# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the expert paths of one model, or of two models side by side, and shows them on an offline page.

    pathmoe paths --model runs/quickstart/final --data runs/quickstart/data/validation.jsonl --output out
    pathmoe paths --model A --model B --data validation.jsonl runs/brown/brown.jsonl --output out

The command supports every causal language model that `record_paths` supports: PathMoE, OLMoE, Qwen2-MoE, Qwen3-MoE,
Mixtral and more. It reads the same number of tokens from each data file, from documents in random order. Rows have a
`text`, and optionally a `source` and gold tags of words in the format of `pathmoe.text.brown`. The command writes all
figures to OUTPUT/paths.json and the page to OUTPUT/report.html.

In paths.json, a path is a list with the first choice of every routed layer. Shares are of tokens, `load` is of
choices, and entropies are in nats. An interval is `{estimate, low, high}`: 95 % over documents, by bootstrap. For
measures of distinct paths and of information it is by jackknife, because a bootstrap repeats documents, which would
change these measures.
"""

import argparse
import json
import os
import random
import shlex
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pathmoe import paths
from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.evaluate.inputs import (
    add_device_arguments,
    check_device_arguments,
    check_model_folder,
    explained,
    load_config,
    load_tokenizer,
)
from pathmoe.evaluate.path_figures import curves, first_choices, frequent_paths, measure, perturb
from pathmoe.evaluate.path_reading import DOCUMENT_TOKENS, Reading, encode, read_documents, read_text, tags_of
from pathmoe.evaluate.prefetch import AHEAD, prefetch_estimate
from pathmoe.files import check_writable, write_texts
from pathmoe.loading import load_model
from pathmoe.paths.hooks import Routing
from pathmoe.paths.measure import jaccard_chance


TEMPLATE = Path(__file__).with_suffix(".html")
MAX_LENGTH = 1024
TOKENS_SHOWN = 600


def analyse(model: PreTrainedModel, name: str, reading: Reading, max_length: int, options: argparse.Namespace) -> dict:
    """Computes all figures of one model."""
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
        "jaccard_chance": jaccard_chance(shape.num_experts, shape.top_k),
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
    """Returns the page: the template with the figures inserted."""
    # Text in the data must not close the script element that contains the data.
    data = json.dumps(figures, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data)


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    """Parses the options, and checks them as far as possible before anything is loaded."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder of a model; give it once or twice")
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="files with a column `text`")
    parser.add_argument("--output", type=Path, required=True, help="folder for paths.json and report.html")
    parser.add_argument("--max_tokens", type=int, default=20_000, help="tokens per model, from all files together")
    parser.add_argument("--max_length", type=int, help="most tokens in a piece (at most 1024 if unset)")
    parser.add_argument("--perturbed_tokens", type=int, default=8_000, help="tokens under perturbation; 0 for none")
    parser.add_argument("--resamples", type=int, default=100, help="resamples of each bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="seed of the document order and random numbers")
    add_device_arguments(parser)
    options = parser.parse_args(args)
    if len(options.model) > 2:
        parser.error(f"--model is given {len(options.model)} times: give one model, or two to show side by side.")
    if len({os.path.realpath(folder) for folder in options.model}) < len(options.model):
        parser.error(f"--model {options.model[0]} is given twice: give one model, or two different ones.")
    if len({os.path.realpath(file) for file in options.data}) < len(options.data):
        parser.error(
            f"--data {' '.join(map(str, options.data))} names a file twice, which would count double: omit it."
        )
    for option, least in (
        ("max_tokens", 1),
        ("perturbed_tokens", 0),
        ("resamples", 2),
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
    """Checks that a model has expert paths, and returns the most tokens that it can read at once.

    Raises:
        UserError: If the model cannot be used, or has fewer than two routed layers or two experts.
    """
    check_model_folder(folder)
    config = load_config(folder)
    try:
        with torch.device("meta"):
            routing = Routing(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # the configuration of another model can make transformers raise any error
        raise UserError(f"--model {folder}: {error}") from error
    if len(routing.layer_to_block) < 2:
        raise UserError(f"--model {folder} has one routed layer: a path needs at least two.")
    text = config.get_text_config()
    if (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)) == 1:
        raise UserError(f"--model {folder} has one expert (num_experts: 1): all tokens take one path.")
    return getattr(text, "max_position_embeddings", None) or MAX_LENGTH


def read_tokens(tokenizers: list, files: list[list[dict]], max_tokens: int) -> tuple[list[list[tuple]], int]:
    """Reads the same number of tokens from each file for each model.

    Returns:
        `tuple`: the encoded documents of each tokenizer, and the number of tokens.

    Raises:
        UserError: If fewer than 4 documents are reached.
    """
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
    """Checks that the model has an embedding for every token.

    Raises:
        UserError: If it does not, because the tokenizer belongs to a different model.
    """
    largest, rows = max(max(ids, default=0) for _, ids, _ in entries), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise UserError(
            f"--model {folder}: the tokenizer returns token {largest}, but the model has {rows} tokens: use the "
            "tokenizer of this model."
        )


def main(args: list[str] | None = None):
    options = parse_arguments(args)
    # Models are compared on the same number of tokens of each file, in pieces of the same length.
    longest = min(check_model(folder) for folder in options.model)
    max_length = options.max_length or min(longest, MAX_LENGTH)
    if not 1 < max_length <= longest:
        raise UserError(f"--max_length {max_length} must be from 2 to {longest}, the most that the models can read.")
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
    text = json.dumps(figures, ensure_ascii=False, allow_nan=False) + "\n"
    write_texts({options.output / "paths.json": text, options.output / "report.html": render(figures)})
    print(f"Wrote {options.output / 'paths.json'} and {options.output / 'report.html'}.")


if __name__ == "__main__":
    run_command(main)
