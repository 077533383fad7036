# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs the replication of the paper, one command per part. plan.md describes the parts.

    python -m experiment collapse --corpus FOLDER        the first 200 steps, old and new start
    python -m experiment tune     --corpus FOLDER        a learning rate for each row
    python -m experiment primary                         part 1, seed by seed
    python -m experiment map                             part 2
    python -m experiment report                          tables, gates, verdict and pictures of the results so far
    python -m experiment tune --config experiment/gpu.yaml --corpus FOLDER --jobs 5     part 3, likewise

Run these commands in the root of the repository. FOLDER has train.parquet and validation.parquet (or .jsonl) with the
columns `text` and `source`; `python -m experiment.corpus --output_dir FOLDER` builds one from packages. `--corpus` is
only needed the first time. To resume a command that was stopped, run it again: it skips runs that have a result, and
the results are the same to the bit on the same kind of processor.
"""

import argparse
import json
import os
from pathlib import Path

from filelock import FileLock, Timeout

from experiment.collapse import collapse
from experiment.first.train import ExperimentRun, RunPool, make_tokenizer
from experiment.measure import HELD_OUT_TOKENS, measure
from experiment.report import report
from experiment.runs import (
    PARTS,
    Experiment,
    check_settings,
    corpus_files,
    hash_corpus,
    hash_file,
    place_corpus,
    read_settings,
)
from pathmoe.command import ArgumentParser, UserError, run_command
from pathmoe.files import check_writable, write_text
from pathmoe.text.reader import load_text
from pathmoe.train.recipe import RecipeError


HERE = Path(__file__).parent


def check_options(options: argparse.Namespace, settings: dict):
    """Checks the options before anything is written.

    Raises:
        UserError: If the part cannot be run. The message names the option and the value.
    """
    for option in ("jobs", "held_out_tokens"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option} {getattr(options, option)} must be at least 1.")
    check_settings(settings, options.config)
    builder, files = corpus_files(options.corpus or options.output / "corpus")
    hash_corpus(files)
    for split in files:  # the first rows hold text
        load_text(builder, split, settings["recipe"].get("text_column", "text"), data_files=files, streaming=True)
    check_writable(options.output / "corpus.json", "--output")
    if options.part in ("primary", "map"):
        runs_of(Experiment(settings, options.output, options.results), options.part)  # refuses rows without a rate


def prepare(options: argparse.Namespace, settings: dict) -> Experiment:
    """Links the corpus, and trains the tokenizer if it does not exist."""
    sources = {point["source"] for point in settings.get("map", {}).get("points", {}).values() if "source" in point}
    wanted = sources if options.part == "map" else set()
    builder, files, hashes = place_corpus(options.corpus, options.output, wanted)
    settings["recipe"] |= {"dataset": builder, "data_files": files, "cache_dir": str(options.output / "cache")}
    tokenizer = make_tokenizer(settings, options.output) / "tokenizer.json"
    return Experiment(settings, options.output, options.results, hashes | {"tokenizer": hash_file(tokenizer)})


def runs_of(experiment: Experiment, part: str) -> list[ExperimentRun]:
    """Returns the runs of a part, in order.

    Raises:
        UserError: If a row has no learning rate yet.
    """
    if part == "tune":
        return [run for runs in experiment.tuning_runs().values() for run in runs]
    if missing := set(experiment.settings["rows"]) - set(experiment.learning_rates()):
        raise UserError(f"{', '.join(sorted(missing))} have no learning rate yet: run the part `tune` first.")
    if part == "primary":
        return experiment.primary_runs()
    return [run for runs in experiment.map_runs().values() for run in runs]


def train(experiment: Experiment, part: str, jobs: int, tokens: int) -> int:
    """Trains and measures the runs of a part that have no result yet. Returns 1 if a run failed."""
    pool = RunPool(experiment.output, experiment.output / "tokenizer", jobs)
    pool.environment["OMP_NUM_THREADS"] = "1"

    def finish(run: ExperimentRun):
        result = measure(run, experiment.output, experiment.corpus, None if part == "tune" else tokens)
        write_text(experiment.results / f"{run.name}.json", json.dumps({"part": part} | result) + "\n")

    while True:  # finished runs of the map may require further rows
        runs = [run for run in runs_of(experiment, part) if experiment.read(run) is None]
        for run in runs:
            if run.done(experiment.output):  # the command was stopped between the training and the result
                finish(run)
        runs = [run for run in runs if experiment.read(run) is None]
        if not runs:
            return 0
        if pool.train(runs, part, finish):
            return 1


def main(argv: list[str] | None = None) -> int:
    """Runs one part. Returns the exit status."""
    parser = ArgumentParser(
        prog="python -m experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "collapse", "report"])
    parser.add_argument("--config", type=Path, default=HERE / "cpu.yaml", help="settings")
    parser.add_argument("--corpus", type=Path, help="folder of the corpus; needed once")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/replication/NAME OF CONFIG)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: experiment/results/NAME)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--held_out_tokens", type=int, default=HELD_OUT_TOKENS, help="fewest tokens to score")
    options = parser.parse_args(argv)
    options.output = options.output or Path("runs/replication") / options.config.stem
    options.results = options.results or HERE / "results" / options.config.stem
    settings = read_settings(options.config)
    check_writable(options.results / "report.md", "--results", "# Results so far")
    if options.part == "report":
        print(report(Experiment(settings, options.output, options.results)))
        return 0
    check_options(options, settings)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.output / "experiment.lock", timeout=0):
            experiment = prepare(options, settings)
            if options.part == "collapse":
                return collapse(experiment)
            return train(experiment, options.part, options.jobs, options.held_out_tokens)
    except Timeout:
        raise UserError(f"--output {options.output} is in use by another command: wait for it or stop it.") from None
    except RecipeError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_command(main)
