# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the perplexity of a causal language model on text.

    python eval/perplexity.py --model runs/demo --data validation.parquet --output runs/demo/perplexity.json
    python eval/perplexity.py --model runs/demo --data notes.txt --max_length 1024 --stride 256 --output out.json
    python eval/perplexity.py --model runs/demo --data Salesforce/wikitext --name wikitext-2-raw-v1 --output out.json

The data is a .jsonl, .json, .parquet, .csv or .arrow file with one document a row, a .txt file that is one document, a
folder that `datasets` saved, or the name of a dataset. Each document is scored on its own.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import DatasetDict, load_dataset, load_from_disk
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import modeling_pathmoe  # noqa: F401  registers PathMoE with the Auto classes


BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def load_texts(
    data: str, text_column: str = "text", split: str = "validation", name: str | None = None, limit: int | None = None
) -> list[str]:
    """Reads documents.

    Args:
        data (`str`): A file, a folder written by `save_to_disk`, or the name of a dataset.
        text_column (`str`): The column that holds the text.
        split (`str`): The split, where the data has several.
        name (`str`, *optional*): The configuration of a named dataset.
        limit (`int`, *optional*): How many documents to take from the start; all when unset.

    Returns:
        `list[str]`: The documents.

    Raises:
        FileNotFoundError: If `data` looks like a file and is not there.
        ValueError: If there is no such split or column, or `limit` is not positive.
    """
    path = Path(data)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1.")
    if path.suffix in {".txt", *BUILDERS} and not path.is_file():
        raise FileNotFoundError(f"There is no file {data}.")
    if path.suffix == ".txt":
        return [path.read_text(encoding="utf-8")]
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"{data} must end in one of .txt, {', '.join(BUILDERS)}.")
        dataset = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    else:
        dataset = load_from_disk(data) if path.is_dir() else load_dataset(data, name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{data} has no split {split!r}: choose one of {', '.join(dataset)}.")
            dataset = dataset[split]
    if text_column not in dataset.column_names:
        raise ValueError(f"{data} has no column {text_column!r}: choose one of {', '.join(dataset.column_names)}.")
    return list(dataset[:limit][text_column])


def sliding_windows(length: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Splits a sequence of inputs into overlapping windows that score each position once.

    Args:
        length (`int`): Number of inputs; input i predicts token i + 1.
        max_length (`int`): Most inputs in a window.
        stride (`int`): Most positions that a window after the first scores, at most `max_length`.

    Yields:
        `(start, first, end)`: the window's inputs are `[start, end)`, and it scores the positions `[first, end)`, each
        with `max_length - stride` inputs before it, or all that there are.
    """
    end = 0
    while end < length:
        first, end = end, min(length, end + stride if end else max_length)
        yield max(0, end - max_length), first, end


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict:
    """Scores every token of every text once, in sliding windows that never span two texts.

    A text is preceded by the BOS token, or by EOS where there is no BOS. With neither, its first token is not scored.
    With `stride=max_length` the windows, and so the results, are those of lm-eval's `loglikelihood_rolling`.

    Args:
        model (`PreTrainedModel`): A causal language model; it is used in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        texts (`list[str]`): The documents.
        max_length (`int`, *optional*): Most tokens in a window; the model's `max_position_embeddings` when unset.
        stride (`int`, *optional*): How far windows move: tokens see at least `max_length - stride` others, where there
            are that many; `max_length // 2` when unset.
        batch_size (`int`): Windows per forward pass. It does not change the result beyond rounding.

    Returns:
        `dict`: `nll`, the summed negative log-likelihood in nats; the numbers of `tokens` that were scored, of `words`
        as lm-eval counts them (`re.split(r"\\s+", text)`), of UTF-8 `bytes` and of `documents`;
        `token_perplexity = exp(nll / tokens)`, `word_perplexity = exp(nll / words)`,
        `byte_perplexity = exp(nll / bytes)` and `bits_per_byte = nll / bytes / ln 2`; and `settings`, in which
        `prefix_token` is `None` where first tokens were not scored.

    Raises:
        ValueError: If a length does not fit the model or the others, a text is empty, or no token can be scored.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    max_length = longest if max_length is None else max_length
    if max_length is None:
        raise ValueError("The model's config states no max_position_embeddings: give max_length.")
    stride = max(1, max_length // 2) if stride is None else stride
    if max_length < 1 or (longest is not None and max_length > longest):
        raise ValueError(f"max_length={max_length} must be from 1 to the model's max_position_embeddings={longest}.")
    if not 1 <= stride <= max_length:
        raise ValueError(f"stride={stride} must be from 1 to max_length={max_length}, or tokens would be left out.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if not texts:
        raise ValueError("There is no document.")
    given, texts = len(texts), [text for text in texts if text]
    if not texts:
        raise ValueError(f"All {given} documents are empty.")

    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    documents = [ids if prefix is None else [prefix, *ids] for ids in encoded]
    rows = [(ids, *window) for ids in documents for window in sliding_windows(len(ids) - 1, max_length, stride)]
    if not rows:
        raise ValueError("No token can be scored: the documents have one token each and the tokenizer no BOS or EOS.")
    # The longest first: windows of one length need no padding, and a lack of memory shows at once.
    rows.sort(key=lambda row: row[1] - row[3])

    was_training, nll = model.training, 0.0
    model.eval()
    for i in tqdm(range(0, len(rows), batch_size), desc="perplexity", unit="batch"):
        batch = rows[i : i + batch_size]
        inputs = [torch.tensor(ids[start:end]) for ids, start, _, end in batch]
        input_ids = pad_sequence(inputs, batch_first=True).to(model.device)
        mask = pad_sequence([torch.ones_like(ids) for ids in inputs], batch_first=True).to(model.device)
        logits_BTV = model(input_ids, attention_mask=mask, use_cache=False).logits
        for logits_TV, (ids, start, first, end) in zip(logits_BTV, batch):
            scored = logits_TV[first - start : end - start]
            targets = torch.tensor(ids[first + 1 : end + 1], device=scored.device)
            losses = cross_entropy(
                scored.to(torch.promote_types(scored.dtype, torch.float32)), targets, reduction="none"
            )
            nll += losses.cpu().double().sum().item()
    model.train(was_training)

    counts = {
        "tokens": sum(end - first for _, _, first, end in rows),
        "words": sum(len(re.split(r"\s+", text)) for text in texts),
        "bytes": sum(len(text.encode("utf-8")) for text in texts),
    }
    per = {unit: torch.tensor(nll / count, dtype=torch.float64) for unit, count in counts.items()}
    return {
        **{f"{unit.removesuffix('s')}_perplexity": value.exp().item() for unit, value in per.items()},
        "bits_per_byte": nll / counts["bytes"] / math.log(2),
        "nll": nll,
        **counts,
        "documents": len(texts),
        "empty_documents": given - len(texts),
        "settings": {
            "max_length": max_length,
            "stride": stride,
            "batch_size": batch_size,
            "prefix_token": None if prefix is None else tokenizer.convert_ids_to_tokens(prefix),
        },
    }


def main(argv: list[str] | None = None) -> dict:
    """Loads, scores, prints and writes the result.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; the process's own when unset.

    Returns:
        `dict`: What `perplexity` returns, with the arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved model and its tokenizer")
    parser.add_argument("--data", required=True, help="file, folder or name of a dataset")
    parser.add_argument("--name", help="configuration of a named dataset")
    parser.add_argument("--split", default="validation", help="split, where the data has several")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--max_length", type=int, help="most tokens in a window; the model's longest when unset")
    parser.add_argument("--stride", type=int, help="how far windows move; half of max_length when unset")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="only the first documents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16; that of the checkpoint when unset")
    args = parser.parse_args(argv)

    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"--model {args.model}: there is no such folder. Download a model from the Hub first.")
    texts = load_texts(args.data, args.text_column, args.split, args.name, args.limit)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    result = perplexity(model, tokenizer, texts, args.max_length, args.stride, args.batch_size)
    result |= {"model": args.model, "data": args.data}
    result["settings"] |= {key: getattr(args, key) for key in ("name", "split", "text_column", "limit", "device")}
    result["settings"]["dtype"] = str(model.dtype)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
