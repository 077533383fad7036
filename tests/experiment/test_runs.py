# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The replication at a tiny shape, through its command line."""

import json
import shutil

import pytest
import yaml

from experiment.__main__ import main
from experiment.first.train import RunPool
from experiment.runs import Experiment, digest, place_corpus, read_settings
from pathmoe.command import UserError
from pathmoe.files import write_text
from tests.run_helpers import ROOT, launch, metrics, wait_for_step, weights


TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4,
        "num_experts_per_tok": 2}  # fmt: skip


@pytest.fixture
def settings(tmp_path):
    """A function that writes the shipped settings with a tiny shape, and makes a corpus of two sources.

    It returns the options of a command; keyword arguments replace parts of the settings.
    """
    found = yaml.safe_load((ROOT / "experiment" / "cpu.yaml").read_text())
    found["recipe"] |= {"model_overrides": TINY, "model": str(ROOT / "experiment" / "model.json"),
                        "sequence_length": 32, "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 1,
                        "eval_every": 5, "eval_sequences": 8, "log_every": 1, "routing_every": 2,
                        "checkpoint_every": 3}  # fmt: skip
    found["tune"] = {"tokens": 256, "seed": 100, "learning_rates": [1e-2]}
    found["primary"] = {"tokens": 256, "seeds": [11, 12, 13]}
    found["map"]["points"] = {"pilot": {"tokens": 256}, "one-source": {"tokens": 256, "source": "sums"}}
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for split, count in (("train", 300), ("validation", 60)):
        texts = [f"{i} plus {count} is {i * 3}; " * 8 for i in range(count)]
        lines = [{"text": text, "source": ("other", "sums")[i % 2]} for i, text in enumerate(texts)]
        (corpus / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(**changes):
        if "rows" in changes:  # a map of other rows would be refused
            changes = {"map": {"seeds": [21], "rows": list(changes["rows"]), "points": {}}} | changes
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(found | changes, sort_keys=False))
        return ["--config", str(file), "--corpus", str(corpus), "--output", str(tmp_path / "runs"),
                "--results", str(tmp_path / "results"), "--held_out_tokens", "500"]  # fmt: skip

    return make


def invent(experiment, runs, nats):
    """Writes results that nothing was trained for; `nats` takes a run."""
    for run in runs:
        result = {"name": run.name, "row": run.row, "seed": run.seed, "steps": 40, "settings": digest(run),
                  "learning_rate": run.recipe["learning_rate"], "validation_loss": 3.5, "nats": nats(run),
                  "corpus": {"train": "ab"}, "seconds": 3600, "processor": "abacus", "commit": "beef",
                  "validation_curve": [[20, 4.0], [40, 3.5]], "cosine_to_next_layer": [0.5, 0.75],
                  "effective_experts": {"steps": [2, 40], "layers": [[13.0, 14.0], [1.0, 1.0]]}}  # fmt: skip
        write_text(experiment.results / f"{run.name}.json", json.dumps(result))


def test_report_names_what_is_missing_and_makes_tables_gates_verdict_and_pictures(settings, tmp_path, capsys):
    options = settings()
    experiment = Experiment(read_settings(tmp_path / "tiny.yaml"), tmp_path / "runs", tmp_path / "results")
    invent(experiment, experiment.tuning_runs()["rand"], lambda run: None)
    main(["report", *options])
    assert "no learning rate yet for indep, indep-bias, indep-lbl, pathb4" in capsys.readouterr().out
    invent(experiment, [run for runs in experiment.tuning_runs().values() for run in runs], lambda run: None)
    main(["report", *options])
    assert "15 of 15 runs have no result yet: primary-indep-lbl-s11, primary-pathb4-s11" in capsys.readouterr().out

    effects = {"indep-lbl": 0.0, "pathb4": 0.015, "indep": -0.015, "indep-bias": -0.01, "rand": 0.014}
    invent(experiment, experiment.primary_runs(), lambda run: 3.4 + effects[run.row] + run.seed * 0.02)
    points = [run for runs in experiment.map_runs(extra=False).values() for run in runs]
    invent(experiment, points, lambda run: 3.4 + (run.row == "pathb4") * (0.02 + 0.03 * ("sums" in str(run.recipe))))
    main(["report", *options])
    text = capsys.readouterr().out
    assert "| G1 no collapse | 13.5 effective experts (smallest layer 13.0) | at least 12 | holds |" in text
    assert "| G3 assay sensitivity | +0.0290 nats | at least 0.02 | holds |" in text
    assert "| 3 | 0.01 | +0.0150 |" in text and "**worse (an effect of the paper's size is excluded)**" in text
    assert "| indep | +0.0300 |" in text and "| rand | +0.0010 |" in text
    assert "| pilot | +0.0200 |" in text and "| one-source | +0.0500 |" in text
    # The contrast moved, so that the point asks for two more rows.
    assert "map-one-source-indep-lbl-s21" in text and "map-pilot-rand" not in text
    assert {file.name for file in (tmp_path / "results").glob("*.png")} == {"curves.png", "map.png"}


def test_part_trains_and_measures_what_has_no_result(settings, tmp_path, monkeypatch):
    rows = {"indep": {}}
    options = settings(rows=rows, primary={"tokens": 1280, "seeds": [11]})
    with pytest.raises(UserError, match="indep have no learning rate yet: run the part `tune` first"):
        main(["primary", *options])
    assert main(["tune", *options]) == 0
    assert main(["primary", *options]) == 0
    result = json.loads((tmp_path / "results" / "primary-indep-s11.json").read_text())
    assert result["held_out_tokens"] >= 500 and set(result["sources"]) == {"sums", "other"}
    sources = result["sources"].values()
    assert result["nats"] == pytest.approx(
        sum(source["nats"] * source["tokens"] for source in sources) / result["held_out_tokens"], abs=1e-4
    )
    assert result["effective_experts"]["steps"] == [2, 4, 6, 8, 10] and len(result["learning_curve"]) == 10
    assert str(tmp_path) not in json.dumps(result)
    monkeypatch.setattr(RunPool, "train", lambda *_: pytest.fail("trained again"))
    shutil.rmtree(tmp_path / "runs" / "primary-indep-s11")
    assert main(["primary", *options]) == 0


def test_point_of_one_source_is_trained_and_measured_on_it(settings, tmp_path):
    points = {"one-source": {"tokens": 256, "source": "sums"}}
    options = settings(
        rows={"pathb4": {}}, map={"seeds": [21], "rows": ["pathb4"], "extra_rows": [], "points": points}
    )
    main(["tune", *options])
    assert main(["map", *options]) == 0
    result = json.loads((tmp_path / "results" / "map-one-source-pathb4-s21.json").read_text())
    assert set(result["sources"]) == {"sums"}


def test_stopped_part_goes_on_to_the_same_bits(settings, tmp_path):
    options = settings(rows={"indep": {}}, tune={"tokens": 12800, "seed": 100, "learning_rates": [1e-2]})
    main(["tune", *options])
    whole, name = weights(tmp_path / "runs" / "tune-indep-0.01"), "tune-indep-0.01"
    losses = metrics(tmp_path / "runs" / name)
    shutil.rmtree(tmp_path / "runs" / name)
    (tmp_path / "results" / f"{name}.json").unlink()
    process = launch(["tune", *options], "-m", "experiment", script=())
    wait_for_step(process, tmp_path / "runs" / name, 20)
    process.terminate()
    process.communicate()
    assert not (tmp_path / "results" / f"{name}.json").exists() and len(metrics(tmp_path / "runs" / name)) < 100
    main(["tune", *options])
    assert metrics(tmp_path / "runs" / name) == losses
    again = weights(tmp_path / "runs" / name)
    assert all(again[key].equal(tensor) for key, tensor in whole.items())


def test_result_of_other_settings_or_another_corpus_is_refused(settings, tmp_path):
    options = settings(rows={"indep": {}}, tune={"tokens": 256, "seed": 100, "learning_rates": [1e-2]})
    main(["tune", *options])
    changed = settings(
        rows={"indep": {"weight_decay": 0.2}}, tune={"tokens": 256, "seed": 100, "learning_rates": [1e-2]}
    )
    with pytest.raises(UserError, match="was trained with different settings"):
        main(["tune", *changed])
    (tmp_path / "corpus" / "validation.jsonl").write_text('{"text": "other", "source": "sums"}\n')
    with pytest.raises(UserError, match="is not the one that"):
        main(["tune", *options])


def test_folder_without_a_corpus_and_settings_that_lack_a_part_are_refused(settings, tmp_path):
    options = settings()
    with pytest.raises(UserError, match="has no train.parquet"):
        main(["tune", *options, "--corpus", str(tmp_path)])
    (tmp_path / "tiny.yaml").write_text("rows: {}")
    with pytest.raises(UserError, match="lacks primary, recipe, tune"):
        read_settings(tmp_path / "tiny.yaml")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--jobs", "0"], "--jobs 0"),
        (["--held_out_tokens", "-5"], "--held_out_tokens -5"),
        (["--output", "tiny.yaml"], "--output tiny.yaml"),
        (["--results", "tiny.yaml"], "--results tiny.yaml"),
        (["--config", "no.yaml"], "--config no.yaml does not exist"),
        (["--config", "binary.yaml"], "--config binary.yaml"),
        (["--config", "elsewhere.yaml"], "model='no/model.json'"),
        (["--corpus", "no"], "has no train.parquet"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_and_leave_nothing(settings, tmp_path, monkeypatch, args, complaint):
    monkeypatch.chdir(tmp_path)
    options = settings()
    (tmp_path / "binary.yaml").write_bytes(b"\xb8\xff")
    tiny = (tmp_path / "tiny.yaml").read_text()
    (tmp_path / "elsewhere.yaml").write_text(tiny.replace(str(ROOT / "experiment/model.json"), "no/model.json"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=complaint):
        main(["tune", *options, *args])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tune": {"tokens": 256, "sed": 100, "learning_rates": [1e-2]}}, "tune.seed=None must be of type int"),
        ({"tune": {"tokens": 256, "seed": 100, "learning_rates": []}}, "tune.learning_rates="),
        ({"tune": {"tokens": 256, "seed": 100, "learning_rates": ["low"]}}, "'low'"),
        ({"tune": {"tokens": 0, "seed": 100, "learning_rates": [1e-2]}}, "tune.tokens=0 must be at least one"),
        ({"primary": {"tokens": 256, "seeds": 11}}, "primary.seeds=11 must be a list of int"),
        ({"primary": {"tokens": 256, "seeds": [11, 11]}}, "primary.seeds=.* must be different seeds"),
        ({"rows": {"a/../b": {}}, "map": None}, "row='a/../b' must be a name of letters"),
        ({"map": {"seeds": [21], "rows": ["indep", "zz"], "points": {}}}, r"map.rows=\['zz'\] must be rows"),
        (
            {"map": {"seeds": [21], "rows": ["indep"], "points": {"p": {"rows": {"zz": {}}}}}},
            r"map.points.p.rows=\['zz'\] must be rows",
        ),
        ({"recipe": []}, "recipe=.* must be a mapping"),
        ({"rows": {"indep": 3}, "map": None}, "rows.indep=3 must be a mapping"),
        ({"rows": {"indep": {"schedule": "linear"}}, "map": None}, "row indep of tune: schedule='linear'"),
        ({"rows": {"indep": {"scedule": "wsd"}}, "map": None}, "row indep of tune: unknown recipe field 'scedule'"),
        ({"rows": {"indep": {"model_overrides": {"router_block_sze": 4}}}, "map": None}, "router_block_sze=4"),
        ({"map": {"seeds": 21, "rows": ["indep"], "points": {}}}, "map.seeds=21 must be a list of int"),
    ],
    ids=str,
)
def test_settings_of_runs_that_cannot_be_trained_are_refused_and_leave_nothing(settings, tmp_path, changes, complaint):
    options = settings(**changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"tiny.yaml: .*{complaint}"):
        main(["tune", *options])
    assert sorted(tmp_path.rglob("*")) == before


def test_files_of_the_user_in_the_folder_of_runs_are_kept(settings, tmp_path):
    options, corpus = settings(), tmp_path / "corpus"
    text = (corpus / "train.jsonl").read_text()
    place_corpus(corpus, tmp_path, set())  # whose folder `corpus` it is: nothing is to be linked
    assert (corpus / "train.jsonl").read_text() == text
    mine = tmp_path / "runs" / "corpus" / "train.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="not a link to a corpus"):
        main(["tune", *options])
    assert mine.read_text() == "mine"


def test_a_wrong_corpus_is_refused_and_leaves_the_one_that_was_placed(settings, tmp_path):
    settings()
    corpus, runs = tmp_path / "corpus", tmp_path / "other-runs"
    place_corpus(corpus, runs, set())
    shutil.copytree(corpus, wrong := tmp_path / "wrong")
    for content, complaint in (
        ("", "train.jsonl is empty"),
        ("one\n", "is not the one that"),
        (None, "the same text"),
    ):
        (wrong / "train.jsonl").write_text((wrong / "validation.jsonl").read_text() if content is None else content)
        with pytest.raises(UserError, match=complaint):
            place_corpus(wrong, runs, set())
    assert (runs / "corpus" / "train.jsonl").samefile(corpus / "train.jsonl")


def test_parts_without_what_they_need_are_refused_and_leave_nothing(settings, tmp_path):
    options = settings()
    before = sorted(tmp_path.rglob("*"))
    for part, complaint in (("primary", "no learning rate yet"), ("map", "no learning rate"), ("report", "no result")):
        with pytest.raises(UserError, match=complaint):
            main([part, *options])
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_result_of_a_run_is_named(settings, tmp_path):
    options = settings(rows={"indep": {}})
    (tmp_path / "results").mkdir()
    for content in ("{", "{}"):
        (tmp_path / "results" / "tune-indep-0.01.json").write_text(content)
        with pytest.raises(UserError, match="tune-indep-0.01.json"):
            main(["report", *options])
