# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains the rows of an experiment: one run of `train_accelerate.py` each, as many at once as asked for.

    python -m experiment.first.train --config experiment/first/cpu.yaml --output_dir runs/experiment/cpu

The YAML holds the `recipe` that all share, the `rows` with what differs, what is tuned (`tune`), and the `stages`:
which rows are trained on how many tokens from which seeds, in order. One tokenizer serves all, and runs of one seed
read the text in the same order. A run ends in OUTPUT_DIR/ROW-TOKENSk-sSEED. Stopped at any moment, the same command
goes on, and does nothing twice.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm

from pathmoe.command import handle_signal
from pathmoe.files import write_text
from pathmoe.text.reader import load_text, train_tokenizer
from pathmoe.train.log import read_metrics
from pathmoe.train.recipe import OPERATIONAL_FIELDS, Recipe, RecipeError, list_changes, published, read_recipe


SCRIPT = Path(__file__).resolve().parents[2] / "train_accelerate.py"
TOKENIZER_DOCUMENTS = 20_000
TUNING_SEED = 100  # none that the comparison uses
POLL_SECONDS = 2


@dataclass(frozen=True)
class ExperimentRun:
    """One training run of an experiment.

    Args:
        row (`str`): The row of the table that it belongs to.
        tokens (`int`): How many tokens it is trained on.
        seed (`int`): Seed of its weights and of the data order.
        recipe (`dict`): Its recipe, without `output_dir` and `tokenizer`.
        name (`str`): The folder that it is kept in.
    """

    row: str
    tokens: int
    seed: int
    recipe: dict = field(compare=False)
    name: str

    def done(self, folder: Path) -> bool:
        """Whether it has been trained to its end.

        Raises:
            RecipeError: If it has, but with another recipe.
        """
        final = folder / self.name / "final"
        if not (final / "config.json").is_file():
            return False
        trained = read_recipe(final / "recipe.yaml")
        wanted = published(vars(Recipe(**self.recipe, output_dir=str(folder), tokenizer=trained["tokenizer"])))
        if changed := list_changes(trained, wanted, OPERATIONAL_FIELDS):
            raise RecipeError(
                f"{final} was trained with another {', '.join(sorted(changed))}: remove {folder / self.name} to train "
                "it anew, or choose another --output_dir."
            )
        return True

    def trained(self, folder: Path) -> int:
        """Tokens that it has been trained on so far."""
        seen = [line["tokens"] for line in read_metrics(folder / self.name / "metrics.jsonl") if "tokens" in line]
        return seen[-1] if seen else 0


def read_experiment(file: Path) -> dict:
    """An experiment's YAML.

    Raises:
        RecipeError: If it lacks a part, or a stage names a row that is not there.
    """
    if not file.is_file():
        raise RecipeError(f"--config {file}: there is no such file.")
    experiment = yaml.safe_load(file.read_text(encoding="utf-8"))
    if missing := {"recipe", "rows", "tune", "stages"} - set(experiment):
        raise RecipeError(f"{file} lacks {', '.join(sorted(missing))}.")
    used = [experiment["tune"]["row"], *(row for stage in experiment["stages"] for row in stage["rows"])]
    if unknown := set(used) - set(experiment["rows"]):
        raise RecipeError(f"{file} trains {', '.join(sorted(unknown))}: add them under rows, or correct the name.")
    return experiment


def make_run(
    experiment: dict, row: str, tokens: int, seed: int, learning_rate: float, name: str | None = None
) -> ExperimentRun:
    """A run of a row: the shared recipe with what the row changes."""
    shared, changes = experiment["recipe"], experiment["rows"][row]
    recipe = shared | changes | {"seed": seed, "learning_rate": learning_rate}
    recipe["model_overrides"] = shared.get("model_overrides", {}) | changes.get("model_overrides", {})
    recipe["max_steps"] = round(tokens / (recipe["batch_size"] * recipe["sequence_length"]))
    return ExperimentRun(row, tokens, seed, recipe, name or f"{row}-{tokens // 1000}k-s{seed}")


def tuning_runs(experiment: dict) -> list[ExperimentRun]:
    """The runs among which the learning rate is chosen."""
    tune = experiment["tune"]
    return [
        make_run(experiment, tune["row"], tune["tokens"], TUNING_SEED, rate, f"tune-{rate:g}")
        for rate in map(float, tune["learning_rates"])
    ]


def comparison_runs(experiment: dict, learning_rate: float) -> list[ExperimentRun]:
    """The runs of all stages, in order."""
    return [
        make_run(experiment, row, stage["tokens"], seed, learning_rate)
        for stage in experiment["stages"]
        for seed in stage["seeds"]
        for row in stage["rows"]
    ]


def final_loss(folder: Path, run: ExperimentRun) -> float:
    """The validation loss at the end of a run, in nats."""
    return [line["eval_loss"] for line in read_metrics(folder / run.name / "metrics.jsonl") if "eval_loss" in line][-1]


def make_tokenizer(experiment: dict, folder: Path) -> Path:
    """The tokenizer of all runs, trained on a sample of the training text unless it is there."""
    target = folder / "tokenizer"
    if not target.exists():
        recipe = experiment["recipe"]
        fields = json.loads(Path(recipe["model"]).read_text(encoding="utf-8")) | recipe.get("model_overrides", {})
        column = recipe.get("text_column", "text")
        text = load_text(recipe["dataset"], "train", column, data_files=recipe["data_files"]).shuffle(seed=0)
        sample = (row[column] for row in text.take(TOKENIZER_DOCUMENTS))
        tokenizer = train_tokenizer(tqdm(sample, desc="train tokenizer", unit="doc"), fields["vocab_size"])
        tokenizer.save_pretrained(target.with_suffix(".partial"))
        target.with_suffix(".partial").rename(target)
    return target


class RunPool:
    """Trains runs in processes of their own.

    Args:
        folder (`Path`): Where runs are kept.
        tokenizer (`Path`): The tokenizer of all.
        jobs (`int`): How many run at once. They share the cores.
    """

    def __init__(self, folder: Path, tokenizer: Path, jobs: int):
        self.folder, self.tokenizer, self.jobs = folder, tokenizer, jobs
        self.environment = os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}

    def start(self, run: ExperimentRun) -> subprocess.Popen:
        output = self.folder / run.name
        output.mkdir(exist_ok=True)
        recipe = run.recipe | {"output_dir": str(output), "tokenizer": str(self.tokenizer), "resume": "auto"}
        Recipe(**recipe)
        file = self.folder / f"{run.name}.yaml"
        write_text(file, yaml.safe_dump(recipe, sort_keys=False))
        with (output / "train.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, SCRIPT, "--config", file],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,  # a key that stops this process must not reach them twice
            )

    def train(
        self, runs: list[ExperimentRun], description: str, finished: Callable[[ExperimentRun], None] = lambda run: None
    ) -> list[ExperimentRun]:
        """Trains what is not done yet, and calls `finished` with each run as soon as it has ended well.

        Returns:
            `list[ExperimentRun]`: Those that failed; their `train.log` says why.
        """
        waiting = [run for run in runs if not run.done(self.folder)]
        done_before = sum(run.tokens for run in runs) - sum(run.tokens for run in waiting)
        everything, running, failed = list(waiting), {}, []
        started = sum(run.trained(self.folder) for run in waiting)
        with tqdm(
            total=sum(run.tokens for run in runs),
            initial=done_before + started,
            desc=description,
            unit="tok",
            unit_scale=True,
        ) as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < self.jobs:
                        run = waiting.pop(0)
                        running[run] = self.start(run)
                    time.sleep(POLL_SECONDS)
                    for run, process in list(running.items()):
                        if process.poll() is None:
                            continue
                        del running[run]
                        if process.returncode:
                            failed.append(run)
                            log = self.folder / run.name / "train.log"
                            tqdm.write(f"{run.name} failed with status {process.returncode}: see {log}")
                        else:
                            tqdm.write(f"{run.name}: validation loss {final_loss(self.folder, run):.4f}")
                            finished(run)
                    trained = sum(run.trained(self.folder) for run in everything)
                    bar.set_postfix_str(", ".join(run.name for run in running), refresh=False)
                    bar.update(done_before + trained - bar.n)
            finally:
                for process in running.values():
                    process.terminate()  # it saves a checkpoint
                for process in running.values():
                    process.wait()
        return failed


def choose_learning_rate(experiment: dict, pool: RunPool) -> float:
    """The learning rate with the lowest validation loss; OUTPUT_DIR/tuned.json has all of them.

    Raises:
        RecipeError: If a run failed.
    """
    runs = tuning_runs(experiment)
    if failed := pool.train(runs, "tune"):
        raise RecipeError(f"{', '.join(run.name for run in failed)} failed, so that no learning rate can be chosen.")
    losses = {run.recipe["learning_rate"]: final_loss(pool.folder, run) for run in runs}
    best = min(losses, key=losses.get)
    write_text(pool.folder / "tuned.json", json.dumps({"learning_rate": best, "losses": losses}, indent=1) + "\n")
    return best


def main(argv: list[str] | None = None) -> int:
    """Trains everything. Returns 1 when a run failed, 0 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if torch.cuda.is_available() else cores,
        help="runs at once; on a CPU as many as cores, because small models gain little from a second one",
    )
    args = parser.parse_args(argv)
    experiment = read_experiment(args.config)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    handle_signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = RunPool(args.output_dir, make_tokenizer(experiment, args.output_dir), args.jobs)
    rate = choose_learning_rate(experiment, pool)
    tqdm.write(f"learning rate {rate:g}")
    failed = pool.train(comparison_runs(experiment, rate), "experiment")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RecipeError as error:
        sys.exit(f"error: {error}")
