# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Loads the text of a run, packs it into batches, and loads or trains the tokenizer."""

import glob
import hashlib
import os
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pathmoe.command import one_line
from pathmoe.files import read_json, write_aside
from pathmoe.text.batches import Batches, PackedBlocks, PackedStream, Prefetch, document_positions
from pathmoe.text.reader import DataError, load_text, pack, read_blocks, train_tokenizer
from pathmoe.train.output import set_aside
from pathmoe.train.recipe import Recipe, RecipeError, Source


def build_tokenizer(
    recipe: Recipe,
    texts: list[tuple[Source, Dataset]],
    vocab_size: int,
    accelerator: Accelerator,
    fresh: bool = True,
) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the recipe, or of the checkpoint `model`. If there is neither, trains one on the text.

    A resumed run loads the tokenizer that it has trained.

    Args:
        recipe (`Recipe`): The recipe.
        texts (`list`): The sources and their text, from which a tokenizer is trained.
        vocab_size (`int`): The vocabulary size of the model.
        accelerator (`Accelerator`): The engine.
        fresh (`bool`, defaults to `True`): Whether nothing has been trained yet. If so, an existing folder `tokenizer`
            is renamed and not used.

    Raises:
        RecipeError: If the tokenizer cannot be loaded, has no end-of-text token or has too many tokens.
    """
    name = recipe.tokenizer
    if name is None and not recipe.model.endswith(".json"):
        name = recipe.model
    if name is None:
        folder = Path(recipe.output_dir) / "tokenizer"
        if accelerator.is_main_process and fresh and os.path.lexists(folder):
            accelerator.print(f"{folder} existed before this run and is kept as {set_aside(folder)}.")
        if accelerator.is_main_process and not folder.exists():
            # A sample of the documents is enough to learn the merges, and quick on large data.
            sample = (row[source.text_column] for source, text in texts for row in text.take(50_000 // len(texts)))
            tokenizer = train_tokenizer(tqdm(sample, desc="train tokenizer", disable=None, unit="doc"), vocab_size)
            with write_aside(folder) as partial:
                tokenizer.save_pretrained(partial)
        accelerator.wait_for_everyone()
        name = str(folder)
    if Path(name).is_file():
        raise RecipeError(f"tokenizer={name!r} is a file: name the folder of a saved tokenizer.")
    for file in filter(Path.is_file, (Path(name) / "tokenizer.json", Path(name) / "tokenizer_config.json")):
        read_json(file, f"tokenizer={name!r}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged file can raise any type of error
        reason = one_line(error)
        if not Path(name).exists():
            reason = "it is not a folder here, nor could the Hub be asked for it"
        elif not (Path(name) / "tokenizer.json").exists():
            reason = "it holds no tokenizer.json. Name the folder of a saved tokenizer"
        raise RecipeError(f"tokenizer={name!r} could not be loaded: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"tokenizer={name!r} has no end-of-text token, which separates packed documents: set eos_token in "
            "its tokenizer_config.json, or name another tokenizer."
        )
    if len(tokenizer) > vocab_size:
        raise RecipeError(
            f"tokenizer={name!r} has {len(tokenizer)} tokens but the model's vocab_size is {vocab_size}: "
            f"set model_overrides={{vocab_size: {len(tokenizer)}}} or more."
        )
    return tokenizer


def build_data(recipe: Recipe, accelerator: Accelerator, vocab_size: int, fresh: bool = True):
    """Loads and packs the text. All errors in the data are raised here, before a new model is built.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        vocab_size (`int`): The vocabulary size of the model.
        fresh (`bool`, defaults to `True`): Whether nothing has been trained yet. If so, a tokenizer and validation
            text that an earlier run left in the output folder are renamed and not used.

    Returns:
        `tuple`: the tokenizer, the training batches and the validation blocks, an int array of shape
        `(blocks, sequence_length)`.
    """
    with accelerator.main_process_first():
        texts = [load_source(recipe, source) for source in recipe.sources]
    readable = [(source, train) for source, train, _ in texts]
    tokenizer = build_tokenizer(recipe, readable, vocab_size, accelerator, fresh)
    weights = [source.weight for source in recipe.sources]
    rank, world_size, length = accelerator.process_index, accelerator.num_processes, recipe.sequence_length
    cache = Path(recipe.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "pathmoe")
    held_out: list[np.ndarray] = []
    sources: list[PackedBlocks | PackedStream] = []
    for number, (source, train, validation) in enumerate(texts):
        share = max(1, round(recipe.eval_sequences * source.weight / sum(weights)))
        if recipe.streaming:
            file = Path(recipe.output_dir) / f"validation-{number}.npy"
            if accelerator.is_main_process and fresh and os.path.lexists(file):
                accelerator.print(f"{file} existed before this run and is kept as {set_aside(file)}.")
            if accelerator.is_main_process and not file.exists():
                hold_out_stream(recipe, file, validation, tokenizer, source, share)
            accelerator.wait_for_everyone()
            held_out.append(read_blocks(file, length))
            train = split_dataset_by_node(train, rank, world_size)
            sources.append(
                PackedStream(train, tokenizer, source.text_column, length, recipe.seed, recipe.shuffle_window)
            )
            continue
        with accelerator.main_process_first():
            trained_on = pack(train, tokenizer, source.text_column, length, cache)
            blocks = pack(validation, tokenizer, source.text_column, length, cache)
        sources.append(PackedBlocks(trained_on, recipe.seed))
        if source.validation_split is not None and np.array_equal(blocks[:1], trained_on[:1]):
            warn_of_same_text(source)
        # Take blocks from the whole text, because its beginning may be of one kind only.
        held_out.append(blocks[np.linspace(0, len(blocks) - 1, min(len(blocks), share)).round().astype(int)])
    batches = Batches(sources, weights, rank, world_size, split=recipe.streaming)
    return tokenizer, Prefetch(batches) if recipe.streaming else batches, np.concatenate(held_out)


def warn_of_same_text(source: Source):
    tqdm.write(
        f"WARNING: validation_split={source.validation_split!r} of dataset={source.dataset!r} is also the training "
        "text: the validation loss will be too low."
    )


def hold_out_stream(recipe: Recipe, file: Path, validation, tokenizer, source: Source, share: int):
    """Writes the first `share` validation blocks of a stream to a file.

    The main process reads the blocks once and saves them, because finding one held-out document may require reading
    many others.
    """
    stream = PackedStream(validation, tokenizer, source.text_column, recipe.sequence_length)
    try:
        blocks = [stream.next_block() for _ in tqdm(range(share), desc="read validation text", disable=None)]
    except DataError as error:
        raise DataError(f"validation text of dataset={source.dataset!r}: {error}") from error
    with write_aside(file) as partial:
        np.save(partial, np.array(blocks, dtype=np.int32))


def is_held_out(text: str, every: int) -> bool:
    """Returns whether a document belongs to the validation text, which contains one in `every` documents.

    The choice depends only on the text of the document: it is the same on all ranks and for all copies.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % every == 0


def find_paths(source: Source, split: str) -> set[str]:
    """Returns the real paths of the files of a split, or the split itself if `data_files` is not set."""
    files = source.data_files
    files = files.get(split) if isinstance(files, dict) else split if files is None else files
    entries = files if isinstance(files, list) else [files]
    found = [
        name for entry in entries if isinstance(entry, str) for name in (glob.glob(entry, recursive=True) or [entry])
    ]
    return {os.path.realpath(name) for name in found}


def load_source(recipe: Recipe, source: Source):
    """Loads the training text and the validation text of a source.

    Returns:
        `tuple`: the source, its training text and its validation text.

    Raises:
        DataError: If the text cannot be read, or has too few documents to hold some of them out.
    """
    load = partial(
        load_text,
        source.dataset,
        text_column=source.text_column,
        config=source.dataset_config,
        data_files=source.data_files,
        streaming=recipe.streaming,
        max_bad_rows=recipe.max_bad_rows,
    )
    train = load(source.train_split)
    if source.validation_split is not None:
        if find_paths(source, source.train_split) & find_paths(source, source.validation_split):
            warn_of_same_text(source)
        return source, train, load(source.validation_split)
    column, every = source.text_column, recipe.holdout_every
    validation = train.filter(lambda row: is_held_out(row[column], every))
    train = train.filter(lambda row: not is_held_out(row[column], every))
    if not recipe.streaming and not (len(train) and len(validation)):
        raise DataError(
            f"dataset={source.dataset!r} has too few documents to hold out one in {every} of them for validation: "
            "set validation_split or lower holdout_every."
        )
    return source, train, validation


def make_inputs(tokens: torch.Tensor, recipe: Recipe, end_of_text: int) -> dict[str, torch.Tensor]:
    """Returns the model inputs for packed sequences of shape `(rows, sequence_length)`."""
    if not recipe.document_mask:
        return {"input_ids": tokens, "labels": tokens}
    positions = document_positions(tokens, end_of_text)
    # The label is masked, because the first token of a document cannot be predicted from the previous document.
    return {"input_ids": tokens, "position_ids": positions, "labels": tokens.masked_fill(positions == 0, -100)}


def count_targets(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["labels"][:, 1:] != -100).sum()
