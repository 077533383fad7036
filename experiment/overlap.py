# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Searches for text that training, validation and benchmark items share: runs of 13 words.

    python -m experiment.overlap --data runs/experiment/data --suite pathmoe_paper_0.9b_offline \\
        --output experiment/first/results/overlap.json

A validation document counts as hit if any of its runs occurs in the training text. The report also has the share of
all runs that occur there.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from pathmoe.command import ArgumentParser, run_command
from pathmoe.evaluate.compare import escape
from pathmoe.evaluate.contamination import check_report, check_words, contamination, markdown, task_items
from pathmoe.evaluate.inputs import check_sources, keep_texts
from pathmoe.evaluate.perplexity import load_documents
from pathmoe.evaluate.run_lm_eval import SUITES
from pathmoe.files import write_texts
from pathmoe.markdown import markdown_table
from pathmoe.text.ngrams import Words, are_among, ngram_digests


def shared_runs(train: list[str], validation: list[str], sources: list[str], n: int) -> dict:
    """Counts how much of the validation text occurs in the training text.

    Args:
        train (`list[str]`): Training documents.
        validation (`list[str]`): Validation documents.
        sources (`list[str]`): The source of each validation document.
        n (`int`): Number of words in a run.

    Returns:
        `dict`: For each source `documents`, `hit` (documents that share a run), `runs`, `shared` (runs that occur in
        the training text) and `largest` (the largest share of shared runs in one document).
    """
    words = Words()
    in_train = np.unique(np.concatenate([ngram_digests(text, n, words) for text in train]))
    report = defaultdict(lambda: {"documents": 0, "hit": 0, "runs": 0, "shared": 0, "largest": 0.0})
    for text, source in zip(validation, sources):
        runs, row = ngram_digests(text, n, words), report[source]
        shared = int(are_among(runs, in_train).sum())
        row["documents"] += 1
        row["hit"] += shared > 0
        row["runs"] += len(runs)
        row["shared"] += shared
        row["largest"] = max(row["largest"], shared / max(1, len(runs)))
    return dict(report)


def table(report: dict, n: int) -> str:
    head = ["validation", "documents", f"share a run of {n} words", "runs", "shared with training"]
    rows = []
    for source, row in report.items():
        counts = (f"{row[name]:,}" for name in ("documents", "hit", "runs"))
        shares = (f"{row['shared'] / max(1, row['runs']):.2%}", f"{row['largest']:.1%}")
        rows.append([escape(str(source)), *counts, *shares])
    return markdown_table([*head, "most in one document"], rows) + "\n"


def main(argv: list[str] | None = None) -> dict:
    """Reads both splits and the tasks, then prints and writes the report."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--suite", required=True, choices=SUITES)
    parser.add_argument("--n", type=int, default=13, help="words in a run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the report, with a .md beside it")
    args = parser.parse_args(argv)
    check_words(parser, args.n)
    files = [args.data / "train.jsonl", args.data / "validation.jsonl"]
    check_report(args.output, *files)
    train, skipped = keep_texts(load_documents(str(files[0]), ["text"]), "text", f"--data {files[0]}")
    validation, others = keep_texts(load_documents(str(files[1]), ["text", "source"]), "text", f"--data {files[1]}")
    check_sources(validation["source"], "source", f"--data {files[1]}")
    train = train["text"]
    splits = shared_runs(train, validation["text"], validation["source"], args.n)
    tasks = contamination(train, task_items(SUITES[args.suite]), args.n)
    figures = {"n": args.n, "skipped_documents": skipped + others, "validation": splits, "tasks": tasks}
    text = f"{table(splits, args.n)}\nBenchmark items in the training text:\n\n{markdown(tasks, args.n)}"
    figures = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    write_texts({args.output: figures, args.output.with_suffix(".md"): text})
    print(text)
    return {"validation": splits, "tasks": tasks}


if __name__ == "__main__":
    run_command(main)
