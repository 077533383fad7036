# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Measures the perplexity of a causal language model on text.

    python eval/perplexity.py --model runs/demo --data validation.parquet --output runs/demo/perplexity.json
    python eval/perplexity.py --model runs/demo --data notes.txt --max_length 1024 --stride 256 --output out.json
    python eval/perplexity.py --model runs/demo --data Salesforce/wikitext --name wikitext-2-raw-v1 --output out.json

The data is a .jsonl, .json, .parquet, .csv or .arrow file with one document a row, a .txt file that is one document, a
folder that `datasets` saved, or the name of a dataset. Each document is scored on its own. Beside `out.json` with the
sums, in total and for each value of `--source_column`, `out.jsonl` has a line for each document.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from metrics.perplexity.perplexity import score, summarize
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_pathmoe  # noqa: F401  registers PathMoE with the Auto classes


BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


def load_documents(
    data: str,
    columns: list[str],
    split: str = "validation",
    name: str | None = None,
    limit: int | None = None,
) -> Dataset:
    """Reads documents.

    Args:
        data (`str`): A file, a folder written by `save_to_disk`, or the name of a dataset.
        columns (`list[str]`): The columns to read; a .txt file has `text` alone.
        split (`str`): The split, where the data has several.
        name (`str`, *optional*): The configuration of a named dataset.
        limit (`int`, *optional*): How many documents to take from the start; all when unset.

    Returns:
        `Dataset`: The documents, with these columns.

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
        dataset = Dataset.from_dict({"text": [path.read_text(encoding="utf-8")]})
    elif path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"{data} must end in one of .txt, {', '.join(BUILDERS)}.")
        dataset = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    else:
        dataset = load_from_disk(data) if path.is_dir() else load_dataset(data, name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{data} has no split {split!r}: choose one of {', '.join(dataset)}.")
            dataset = dataset[split]
    for column in columns:
        if column not in dataset.column_names:
            raise ValueError(f"{data} has no column {column!r}: choose one of {', '.join(dataset.column_names)}.")
    return dataset.select_columns(columns).select(range(len(dataset))[:limit])


def main(argv: list[str] | None = None) -> dict:
    """Loads, scores, prints and writes the result.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; the process's own when unset.

    Returns:
        `dict`: The sums over all documents, those of each source, and the settings.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a saved model and its tokenizer")
    parser.add_argument("--data", required=True, help="file, folder or name of a dataset")
    parser.add_argument("--name", help="configuration of a named dataset")
    parser.add_argument("--split", default="validation", help="split, where the data has several")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--source_column", help="also give the results of each value of this column")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result, with a .jsonl beside it")
    parser.add_argument("--max_length", type=int, help="most tokens in a window; the model's longest when unset")
    parser.add_argument("--stride", type=int, help="how far windows move; half of max_length when unset")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--limit", type=int, help="only the first documents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16; that of the checkpoint when unset")
    args = parser.parse_args(argv)

    if not Path(args.model).is_dir():
        raise FileNotFoundError(f"--model {args.model}: there is no such folder. Download a model from the Hub first.")
    if args.output.suffix != ".json":
        parser.error(f"--output {args.output} must end in .json.")
    columns = [column for column in (args.text_column, args.source_column) if column]
    data = load_documents(args.data, columns, args.split, args.name, args.limit)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)
    texts = list(data[args.text_column])
    documents, settings = score(model, tokenizer, texts, args.max_length, args.stride, args.batch_size)
    by_source = defaultdict(list)
    if args.source_column:
        for document, source in zip(documents, data[args.source_column]):
            document["source"] = source
            by_source[source].append(document)
    settings |= {key: getattr(args, key) for key in ("name", "split", "text_column", "limit", "device")}
    result = summarize(documents) | {
        "sources": {source: summarize(of_source) for source, of_source in by_source.items()},
        "model": args.model,
        "data": args.data,
        "settings": settings | {"dtype": str(model.dtype)},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    args.output.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
