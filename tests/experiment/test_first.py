# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from experiment.first import measure as measuring
from experiment.first import report as experiment_report
from experiment.first.report import Measured, Table
from experiment.first.train import comparison_runs, main, read_experiment, tuning_runs
from pathmoe import PathMoEForCausalLM
from pathmoe.accounting import count_parameters
from pathmoe.train.model import build_config
from pathmoe.train.recipe import Recipe, RecipeError
from tests.run_helpers import ROOT


SHIPPED = sorted((ROOT / "experiment" / "first").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_row_can_be_trained(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(file)
    for run in tuning_runs(experiment) + comparison_runs(experiment, 1e-3):
        config = build_config(Recipe(**run.recipe, output_dir="out"))
        total = count_parameters(config)["total"]
        if run.row in ("indep-moe", "pathb4-moe"):
            assert (5e6 if file.stem == "cpu" else 45e6) < total < (10e6 if file.stem == "cpu" else 55e6)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_dense_row_has_the_active_parameters_of_the_others(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = {run.row: run for run in comparison_runs(read_experiment(file), 1e-3)}
    active = [
        count_parameters(build_config(Recipe(**runs[row].recipe, output_dir="out")))["active"]
        for row in ("dense", "indep-moe")
    ]
    assert active[0] == pytest.approx(active[1], rel=0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An experiment of three short runs and the folder that they go to."""
    folder = tmp_path_factory.mktemp("experiment")
    model = {
        "model_type": "pathmoe", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 256, "router_block_size": 1,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model))
    for split, first in (("train", 0), ("validation", 1000)):
        rows = [
            {"text": " ".join(f"{i} plus {j} is {i + j};" for j in range(40)), "source": "even" if i % 2 else "odd"}
            for i in range(first, first + 40)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "tiny.yaml"
    experiment = {
        "recipe": {
            "model": str(folder / "model.json"), "dataset": "json", "cache_dir": str(folder / "cache"),
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")},
            "validation_split": "validation", "sequence_length": 32, "batch_size": 4, "micro_batch_size": 4,
            "eval_sequences": 8, "eval_every": 4, "log_every": 2, "routing_every": 2, "checkpoint_every": 2,
        },
        "rows": {"indep-moe-lbl": {"model_overrides": {"router_aux_loss_coef": 0.01}},
                 "pathb4-moe": {"model_overrides": {"router_block_size": 4}}},
        "tune": {"row": "indep-moe-lbl", "tokens": 256, "learning_rates": [1e-5, 1e-2]},
        "stages": [{"tokens": 1024, "seeds": [0], "rows": ["indep-moe-lbl", "pathb4-moe"]}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(experiment))
    return file, folder / "runs"


@pytest.fixture(scope="module")
def trained(tiny):
    """The experiment, stopped while its first comparison run is training and then started again."""
    file, runs = tiny
    command = [sys.executable, "-m", "experiment.first.train", "--config", file, "--output_dir", runs, "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (runs / "indep-moe-lbl-1k-s0" / "metrics.jsonl").exists():
        assert process.poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert not (runs / "pathb4-moe-1k-s0").exists()
    assert subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 0
    return tiny


def test_the_learning_rate_is_the_one_with_the_lowest_loss(trained):
    file, runs = trained
    tuned = json.loads((runs / "tuned.json").read_text())
    assert tuned["learning_rate"] == 1e-2 and tuned["losses"]["0.01"] < tuned["losses"]["1e-05"]
    recipe = yaml.safe_load((runs / "pathb4-moe-1k-s0" / "final" / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 1e-2


def test_what_is_done_is_not_done_again_and_not_under_another_recipe(trained, tmp_path):
    file, runs = trained
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.is_file()}
    assert main(["--config", str(file), "--output_dir", str(runs)]) == 0
    changed = {path.name for path in runs.rglob("*") if path.is_file() and path.stat().st_mtime_ns != before.get(path)}
    assert changed == {"tuned.json"}
    other = yaml.safe_load(file.read_text())
    other["recipe"]["weight_decay"] = 0.2
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(RecipeError, match="tune-1e-05.* was trained with another weight_decay"):
        main(["--config", str(tmp_path / "other.yaml"), "--output_dir", str(runs)])


def test_a_row_that_is_not_there_is_named(tiny, tmp_path):
    experiment = yaml.safe_load(tiny[0].read_text())
    experiment["stages"][0]["rows"].append("pathb5-moe")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(experiment))
    with pytest.raises(RecipeError, match="trains pathb5-moe: add them under rows"):
        read_experiment(tmp_path / "wrong.yaml")


@pytest.fixture(scope="module")
def measured(trained):
    file, runs = trained
    options = ["--config", str(file), "--runs", str(runs), "--data", str(file.parent / "validation.jsonl")]
    sizes = ["--documents", "10", "--tokens", "2000", "--perturbed_tokens", "200", "--resamples", "10"]
    # The benchmark items of its tasks are a package that tests do without.
    for name in ("indep-moe-lbl-1k-s0", "pathb4-moe-1k-s0"):
        (runs / name / "lm_eval").mkdir()
        (runs / name / "lm_eval" / "results.json").touch()
    measuring.main(options + sizes)
    for name in ("indep-moe-lbl-1k-s0", "pathb4-moe-1k-s0"):
        (runs / name / "lm_eval" / "results.json").unlink()
    return trained


def test_a_difference_is_that_of_the_perplexities(measured):
    _, runs = measured
    rows = [Measured(row, 1024, 0, runs / f"{row}-1k-s0") for row in ("indep-moe-lbl", "pathb4-moe")]
    table = Table(rows)
    difference = table.difference("pathb4-moe", "indep-moe-lbl")
    assert difference["value"] == pytest.approx(rows[1].perplexity / rows[0].perplexity - 1)
    assert difference["low"] < difference["value"] < difference["high"]
    assert difference["seeds"] == [pytest.approx(difference["value"])]
    # The log-ratio of all is the mean of the sources' by their tokens.
    sources = {name: of["tokens"].sum() for name, of in rows[0].documents.groupby("source")}
    logs = [math.log1p(table.difference("pathb4-moe", "indep-moe-lbl", name)["value"]) for name in sources]
    mean = sum(log * count for log, count in zip(logs, sources.values())) / sum(sources.values())
    assert math.log1p(difference["value"]) == pytest.approx(mean)


def test_the_tables_come_out_the_same_from_what_is_kept(measured, tmp_path):
    file, runs = measured
    arguments = ["--config", str(file), "--output", str(tmp_path), "--runs"]
    experiment_report.main([*arguments, str(runs)])
    tables = (tmp_path / "tables.md").read_text()
    assert "Not run yet" not in tables and "| pathb4-moe |" in tables
    assert {path.suffix for path in (tmp_path / "runs").rglob("*") if path.is_file()} == {".yaml", ".jsonl", ".json"}
    (tmp_path / "tables.md").unlink()
    experiment_report.main([*arguments, str(tmp_path / "runs")])
    assert (tmp_path / "tables.md").read_text() == tables
    assert all((tmp_path / f"{name}.png").stat().st_size for name in ("learning", "layers", "perturbations"))


def test_what_is_kept_makes_its_tables_in_its_own_folder(measured, tmp_path):
    file, runs = measured
    arguments = ["--config", str(file), "--output"]
    experiment_report.main([*arguments, str(tmp_path / "a"), "--runs", str(runs)])
    with pytest.raises(SystemExit, match=f"--output {tmp_path / 'a'}$"):
        experiment_report.main([*arguments, str(tmp_path / "b"), "--runs", str(tmp_path / "a" / "runs")])


def test_the_best_run_has_its_card_filled(measured, tmp_path):
    file, runs = measured
    experiment_report.main(["--config", str(file), "--output", str(tmp_path), "--runs", str(runs)])
    both = [Measured(row, 1024, 0, runs / f"{row}-1k-s0") for row in ("indep-moe-lbl", "pathb4-moe")]
    best = min(both, key=lambda run: run.perplexity)
    card = (tmp_path / "best_model_card.md").read_text()
    assert f"# {best.folder.name}\n" in card and "learning_rate: 0.01\n" in card
    assert f"| perplexity per token of held-out documents | {best.perplexity:.2f} |" in card


def test_where_nothing_is_added_to_the_stream_routers_see_the_same_in_every_layer(tiny_config):
    model, ids = PathMoEForCausalLM(tiny_config()).eval(), torch.randint(0, 64, (1, 12))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.experts.down_proj)
    stream = measuring.measure_stream(model, [ids[0, :5].tolist(), ids[0, 5:].tolist()])
    embeddings = model.get_input_embeddings().weight[ids[0]].double()
    layers = model.config.num_hidden_layers
    assert stream["norm"] == pytest.approx([embeddings.square().mean(-1).sqrt().mean().item()] * layers)
    assert stream["turn"] == pytest.approx([1.0] * (layers - 1))
    routed = model(ids, output_router_logits=True).router_logits
    assert stream["spread"] == pytest.approx([logits.double().std(-1).mean().item() for logits in routed])


def test_information_beyond_chance_is_none_of_permuted_labels_and_all_of_equal_ones(tmp_path):
    for value, adjusted in ((0.2, 0.0), (1.0, 1.0), (0.6, 0.5)):
        row = {"key": "nmi", "value": value, "baseline": 0.2, "low": None, "high": value}
        (tmp_path / "measures.json").write_text(json.dumps({"measures": [row], "sustained_4": 1.0}))
        found = Measured("pathb4-moe", 1024, 0, tmp_path).path_measures()["adjusted"]
        assert found == {"value": pytest.approx(adjusted), "low": None, "high": pytest.approx(adjusted)}


@pytest.mark.parametrize(
    ("paper", "value", "documents", "seeds", "said"),
    [
        (-1, -0.05, (-0.06, -0.04), (-0.08, -0.02), "yes"),
        (-1, 0.05, (0.04, 0.06), (0.02, 0.08), "**no**"),
        (-1, -0.05, (-0.11, 0.01), (-0.08, -0.02), "undecided"),
        (-1, -0.05, (-0.06, -0.04), (-0.11, 0.01), "undecided"),
        (0, 0.05, (0.04, 0.06), (0.02, 0.08), "**no**"),
        (0, 0.05, (0.04, 0.06), (-1.0, math.inf), "undecided"),
    ],
)
def test_a_direction_needs_its_interval_over_documents_and_over_seeds(paper, value, documents, seeds, said):
    ours = {"value": value, "low": documents[0], "high": documents[1]}
    assert experiment_report.verdict(paper, ours, seeds) == said


def runs_of(folder, perplexities):
    """A table of 1,000 tokens with one document a run: `perplexities` by row and seed."""
    runs = []
    for row, seeds in perplexities.items():
        for seed, perplexity in seeds.items():
            (folder / f"{row}{seed}").mkdir()
            document = {"text_sha": "0", "source": "a", "nll": 10 * math.log(perplexity), "tokens": 10}
            (folder / f"{row}{seed}" / "measures.json").write_text(json.dumps({"documents": [document]}))
            runs.append(Measured(row, 1000, seed, folder / f"{row}{seed}"))
    return Table(runs)


def test_what_seeds_do_is_known_from_runs_that_it_made(tmp_path):
    """Log perplexities of a row's effect, a seed's effect, and noise of a known size; one row has a single seed."""
    random = np.random.default_rng(0)
    rows, seeds, noise = random.normal(size=40), random.normal(size=5), random.normal(scale=0.03, size=(40, 5))
    made = {str(r): {s: math.exp(rows[r] + seeds[s] + noise[r, s]) for s in range(5)} for r in range(40)}
    found = experiment_report.SeedNoise.of({1000: runs_of(tmp_path, made | {"single": {0: 100.0}})})
    assert found.freedom == 39 * 4 and found.deviation == pytest.approx(0.03, rel=0.15)
    low, high = found.interval({"value": 0.2, "seeds": [0.2] * 5})  # of the difference of two means of five
    half = 1.975 * found.deviation * math.sqrt(2 / 5)
    assert (low, high) == pytest.approx((1.2 * math.exp(-half) - 1, 1.2 * math.exp(half) - 1), rel=1e-3)


def test_no_interval_over_seeds_without_a_second_one(tmp_path):
    found = experiment_report.SeedNoise.of({1000: runs_of(tmp_path, {"indep-moe": {0: 9.0}, "pathb4-moe": {0: 8.0}})})
    assert found.freedom == 0 and found.interval({"value": -0.1, "seeds": [-0.1]}) == (-1, math.inf)


def test_runs_of_one_row_and_seed_are_compared_before_the_shorter_ones_rate_decays(tmp_path):
    """Of 10 and 20 steps of 100 tokens, decaying from step 7 and 14: step 6 counts, step 9 does not."""
    tables = {}
    for tokens, losses in ((1000, {3: 4.0, 6: 3.0, 9: 2.0}), (2000, {3: 4.5, 6: 3.1, 9: 2.9, 18: 1.0})):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        recipe = {"batch_size": 4, "sequence_length": 25, "decay_steps": 0.3}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        lines = [json.dumps({"step": step, "eval_loss": loss}) + "\n" for step, loss in losses.items()]
        (folder / "metrics.jsonl").write_text("".join(lines))
        tables[tokens] = Table([Measured("indep-moe", tokens, 0, folder)])
    assert experiment_report.find_repeats(tables) == [("indep-moe", 0, 600, pytest.approx(math.expm1(0.1)))]


def test_the_shipped_tables_come_from_the_shipped_runs(tmp_path):
    shipped = list((ROOT / "experiment" / "first" / "results").glob("*/tables.md"))
    assert shipped
    for kept in (tables.with_name("runs") for tables in shipped):
        scale = kept.parent.name
        copy = tmp_path / scale
        copy.mkdir()
        (copy / "tasks.csv").write_bytes((kept.parent / "tasks.csv").read_bytes())
        config = Path("experiment/first") / f"{scale}.yaml"
        (copy / "runs").symlink_to(kept)
        experiment_report.main(["--config", str(ROOT / config), "--runs", str(kept), "--output", str(copy)])
        assert (copy / "tables.md").read_text() == (kept.parent / "tables.md").read_text()
