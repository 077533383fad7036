# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Tables and plots of an experiment whose runs `measure.py` has measured.

    python -m experiment.first.report --config experiment/first/cpu.yaml --runs runs/experiment/cpu \\
        --output experiment/first/results/cpu
    python -m experiment.first.report --config experiment/first/cpu.yaml --runs experiment/first/results/cpu/runs \\
        --output experiment/first/results/cpu

The first one also keeps each run's recipe, metrics and measures in OUTPUT/runs, of which the second one makes the same
tables, and writes the best run's model card with what was measured.
"""

import argparse
import json
import shutil
from pathlib import Path

import pandas as pd
from transformers import AutoConfig

from experiment.first.measured import Measured, SeedNoise, Table, compare_tasks, find_repeats
from experiment.first.plots import plot_differences, plot_layers, plot_learning, plot_perturbations, plot_routing
from experiment.first.tables import (
    BLOCK_SIZES,
    PATH_MEASURES,
    ablation_table,
    layer_table,
    pair_table,
    paper_table,
    path_table,
    perplexity_table,
    repeat_noise,
    source_table,
    table_of,
    task_table,
    top_k_rows,
    with_interval,
)
from experiment.first.train import comparison_runs, read_experiment
from pathmoe.files import write_aside, write_text
from pathmoe.train.final import model_card
from pathmoe.train.recipe import Recipe


KEPT = ("recipe.yaml", "metrics.jsonl", "measures.json")


def write_card(run: Measured, tasks: pd.DataFrame, file: Path) -> None:
    """The run's model card, as training writes it, with what was measured since."""
    lines = [["perplexity per token of held-out documents", f"{run.perplexity:.2f}"]]
    measures = run.path_measures()
    lines += [[name, with_interval(measures[key])] for key, name in PATH_MEASURES.items() if key in measures]
    of_run = tasks[(tasks["model"] == run.row) & (tasks["seed"] == run.seed)]
    lines += [[f"accuracy on {cell.task}", f"{100 * cell.score:.1f} %"] for cell in of_run.itertuples()]
    evaluated = table_of(["evaluated", "value [95 %]"], lines)
    recipe = Recipe(**run.recipe | {"output_dir": str(run.folder)})
    changes = [line for line in run.metrics if "field" in line]
    write_text(file, model_card(recipe, AutoConfig.from_pretrained(run.folder / "final"), changes, evaluated))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True, help="folder of runs that were measured")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(args)
    experiment = read_experiment(options.config)
    wanted = comparison_runs(experiment, learning_rate=1.0)  # runs are found by name, which does not tell it
    done = [run for run in wanted if (options.runs / run.name / "measures.json").is_file()]
    if not done:
        raise SystemExit(f"--runs {options.runs} holds no measured run of {options.config}.")
    kept = options.output / "runs"
    if options.runs.resolve() != kept.resolve():
        if not (options.runs / done[0].name / "final").is_dir():
            raise SystemExit(
                f"--runs {options.runs} holds what a report kept: its tables go to --output {options.runs.parent}"
            )
        for run in done:
            (kept / run.name).mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(options.runs / run.name / name, kept / run.name / name)
        shutil.copyfile(options.runs / "tuned.json", kept / "tuned.json")
        evaluated = [Measured(run.row, run.tokens, run.seed, options.runs / run.name) for run in done]
        tasks = compare_tasks(evaluated)
        with write_aside(options.output / "tasks.csv") as partial:
            tasks.to_csv(partial, index=False)
        most = max(run.tokens for run in evaluated)
        best = min((run for run in evaluated if run.tokens == most), key=lambda run: run.perplexity)
        write_card(best, tasks, options.output / "best_model_card.md")
    tuned = json.loads((kept / "tuned.json").read_text(encoding="utf-8"))
    runs = [Measured(run.row, run.tokens, run.seed, kept / run.name) for run in done]
    tables = {
        tokens: Table([run for run in runs if run.tokens == tokens]) for tokens in sorted({r.tokens for r in runs})
    }
    longest = tables[max(tables)]
    hours = sum(run.tokens / run.tokens_per_s for run in runs) / 3600
    noise = SeedNoise.of(tables)
    missing = [run.name for run in wanted if run not in done]
    rates = ", ".join(f"{float(rate):g}: {loss:.4f}" for rate, loss in tuned["losses"].items())
    parts = [
        f"{len(done)} of {len(wanted)} runs, {hours:.1f} hours of training on one CPU core each. Learning rate "
        f"{tuned['learning_rate']:g}, chosen on `{experiment['tune']['row']}` by validation loss ({rates}).",
        *([f"Not run yet: {', '.join(missing)}."] if missing else []),
        *filter(None, (str(noise), repeat_noise(find_repeats(tables)))),
        "## Beside the paper",
        paper_table(tables, noise),
    ]
    for tokens, table in sorted(tables.items(), reverse=True):
        after = f"after {tokens / 1e6:g}M tokens"
        parts += [f"## Perplexity {after}", perplexity_table(table)]
        parts += [f"## Sharing against not sharing {after}", pair_table(table)]
        for title, number_of, rows, base in (
            ("Block size", "layers that share", BLOCK_SIZES, 1),
            ("Experts of a token, PathMoE", "k", top_k_rows("pathb4-moe"), 4),
            ("Experts of a token, independent", "k", top_k_rows("indep-moe"), 4),
        ):
            if rows[base] in table.rows and len(set(rows.values()) & set(table.rows)) > 2:
                parts += [f"## {title} {after}", ablation_table(table, number_of, rows, base)]
        parts += [f"## Paths {after}", path_table(table)]
        parts += [f"## What the routers of each layer see, and what their choices matter, {after}", layer_table(table)]
    parts += [f"## Perplexity by source after {longest.tokens / 1e6:g}M tokens"]
    parts += [source_table(longest, list(longest.rows))]
    if len(tasks := pd.read_csv(options.output / "tasks.csv")):
        parts += [f"## Tasks after {longest.tokens / 1e6:g}M tokens", task_table(tasks)]
    write_text(options.output / "tables.md", "\n\n".join(parts) + "\n")
    plot_learning(tables, options.output / "learning.png")
    plot_routing(longest, options.output / "routing.png")
    plot_differences(tables, noise, options.output / "perplexity.png")
    plot_perturbations(longest, options.output / "perturbations.png")
    plot_layers(longest, options.output / "layers.png")
    print(f"Wrote {options.output / 'tables.md'} and five plots of {len(done)} runs.")


if __name__ == "__main__":
    main()
