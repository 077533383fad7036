# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lm_eval.api.metrics import mean_stderr
from scipy.stats import binom

from pathmoe import PathMoEForCausalLM
from pathmoe.evaluate import compare as script
from pathmoe.evaluate import perplexity, run_lm_eval
from pathmoe.evaluate.compare import RunError, compare, holm, interval, mean_and_error, read_run, sign_flip_p


TASKS = ["pathmoe_offline_piqa", "pathmoe_offline_sciq"]
signs = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=12)


def every_flip(differences):
    """The sign-flip test by its definition: all 2^n assignments of signs."""
    sums = [abs(np.dot(flip, differences)) for flip in itertools.product((-1, 1), repeat=len(differences))]
    return np.mean(np.array(sums) >= abs(sum(differences)) - 1e-9)


@given(signs)
def test_test_of_right_and_wrong_items_is_exact(differences):
    assert sign_flip_p(np.array(differences)) == pytest.approx(every_flip(differences))


def test_test_of_right_and_wrong_items_is_mcnemars():
    differences = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    assert sign_flip_p(differences) == pytest.approx(2 * binom.cdf(2, 11, 0.5))


@settings(max_examples=20)
@example([0.1, 0.2, 0.3, -0.6])
@given(st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 0.01), min_size=2, max_size=10))
def test_test_of_other_items_is_that_of_all_flips(differences):
    expected = every_flip(differences)
    assert sign_flip_p(np.array(differences)) == pytest.approx(expected, abs=6 * math.sqrt(0.25 / script.FLIPS) + 1e-4)


def test_test_is_true_to_its_level(monkeypatch):
    """Of 400 comparisons of equal models, about one in twenty has a p below 0.05, and not many more."""
    monkeypatch.setattr(script, "FLIPS", 399)
    generator = np.random.default_rng(0)
    found = [sign_flip_p(generator.standard_t(3, 60)) < 0.05 for _ in range(400)]
    assert binom.ppf(0.001, 400, 0.05) <= sum(found) <= binom.ppf(0.999, 400, 0.05)


def test_interval_covers_the_true_difference():
    generator = np.random.default_rng(0)
    for draw, truth in (
        (lambda: generator.choice([-1.0, 0.0, 1.0], size=40, p=[0.05, 0.8, 0.15]), 0.1),
        (lambda: generator.normal(0.3, 2.0, 40), 0.3),
    ):
        ends = [interval(draw(), np.ones(40)) for _ in range(1000)]
        assert 0.93 <= np.mean([low <= truth <= high for low, high in ends]) <= 0.985


def test_interval_is_not_empty_where_all_items_agree():
    low, high = interval(np.zeros(40), np.ones(40))
    assert low < 0 < high and high - low < 0.15


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_correction_is_holms_definition(p):
    ordered = sorted(range(len(p)), key=lambda i: p[i])
    expected, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(ordered):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        expected[i] = largest
    assert list(holm(np.array(p))) == pytest.approx(expected)


def test_standard_error_is_lm_evals():
    right = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert mean_and_error(np.array(right), np.ones(5)) == pytest.approx((0.6, mean_stderr(right)))


def test_weighted_mean_of_rates_is_the_rate_of_the_sums():
    generator = np.random.default_rng(0)
    rates, weights = generator.normal(2, 1, 300), generator.integers(1, 100, 300)
    mean, error = mean_and_error(rates, weights)
    assert mean == pytest.approx((rates * weights).sum() / weights.sum())
    many = generator.integers(0, 300, (4000, 300))  # the spread of the bootstrap
    means = (rates * weights)[many].sum(1) / weights[many].sum(1)
    assert error == pytest.approx(means.std(), rel=0.05)


@pytest.fixture(scope="module")
def other_folder(model, tokenizer, tmp_path_factory):
    """Another model with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    PathMoEForCausalLM(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(model_folder, other_folder, tmp_path_factory):
    """Two models' runs on the same items."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("one", model_folder), ("two", other_folder)):
        options = ["--tasks", ",".join(TASKS), "--limit", "20", "--device", "cpu", "--output", str(folder / name)]
        run_lm_eval.main(["--model", str(model), *options])
    return folder


@pytest.fixture(scope="module")
def perplexities(model_folder, other_folder, texts, tmp_path_factory):
    """Two models' perplexities of the same documents."""
    folder = tmp_path_factory.mktemp("perplexities")
    Dataset.from_dict({"text": texts, "source": ["a", "b", "a", "b"]}).to_json(folder / "data.jsonl")
    for name, model in (("one", model_folder), ("two", other_folder)):
        options = ["--data", str(folder / "data.jsonl"), "--source_column", "source", "--device", "cpu"]
        perplexity.main(["--model", str(model), *options, "--output", str(folder / f"{name}.json")])
    return folder


def samples(folder, task):
    return [json.loads(line) for line in (folder / "tasks" / f"{task}.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_results(folders):
    table = compare([read_run(folders / name, name) for name in ("one", "two")]).set_index(["task", "model"])
    for name in ("one", "two"):
        results = json.loads((folders / name / "results.json").read_text())
        for task in TASKS:
            row = table.loc[(task, name)]
            assert row["score"] == pytest.approx(results["results"][task]["acc,none"])
            assert row["stderr"] == pytest.approx(results["results"][task]["acc_stderr,none"])
        assert table.loc[("average", name), "score"] == pytest.approx(results["average"]["value"])
        assert table.loc[("average", name), "stderr"] == pytest.approx(results["average"]["stderr"])


def test_differences_are_counted_by_item(folders):
    table = compare([read_run(folders / name, name) for name in ("one", "two")]).set_index(["task", "model"])
    for task in TASKS:
        pairs = [(a["acc"], b["acc"]) for a, b in zip(*(samples(folders / name, task) for name in ("one", "two")))]
        row = table.loc[(task, "two")]
        assert row["win"] == sum(b > a for a, b in pairs) and row["loss"] == sum(b < a for a, b in pairs)
        assert row["win"] + row["tie"] + row["loss"] == row["items"] == 20
        assert row["difference"] == pytest.approx((row["win"] - row["loss"]) / 20)
        assert row["p"] == pytest.approx(sign_flip_p(np.array([b - a for a, b in pairs])))
        assert row["low"] <= row["difference"] <= row["high"] and row["p"] <= row["p_holm"]
    assert table.loc[("average", "two"), "win"] == sum(table.loc[(task, "two"), "win"] for task in TASKS)


def test_model_compared_with_itself_is_equal(folders):
    table = compare([read_run(folders / "one", name) for name in ("one", "same")])
    same = table[table["model"] == "same"]
    assert (same["difference"] == 0).all() and (same["p_holm"] == 1).all() and (same["tie"] == same["items"]).all()


def test_group_is_one_task_of_all_its_items(folders, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(folders / name, tmp_path / name)
        file = tmp_path / name / "results.json"
        results = json.loads(file.read_text())
        file.write_text(json.dumps(results | {"entries": ["both"], "group_subtasks": {"both": TASKS}}))
    table = compare([read_run(tmp_path / name, name) for name in ("one", "two")])
    assert list(table["task"]) == ["both", "both"] and list(table["items"]) == [40, 40]
    right = [sample["acc"] for task in TASKS for sample in samples(tmp_path / "one", task)]
    assert table["score"][0] == pytest.approx(np.mean(right))


def test_perplexities_are_compared_by_document(perplexities):
    table = compare([read_run(perplexities / f"{name}.json", name) for name in ("one", "two")])
    table = table.set_index(["task", "model"])
    for name in ("one", "two"):
        result = json.loads((perplexities / f"{name}.json").read_text())
        assert table.loc[("total", name), "score"] == pytest.approx(result["bits_per_byte"])
        for source in ("a", "b"):
            assert table.loc[(source, name), "score"] == pytest.approx(result["sources"][source]["bits_per_byte"])
    one, two = (pd.read_json(perplexities / f"{name}.jsonl", lines=True) for name in ("one", "two"))
    row = table.loc[("total", "two")]
    assert row["difference"] == pytest.approx((two["nll"] - one["nll"]).sum() / one["bytes"].sum() / math.log(2))
    assert row["win"] == (two["nll"] < one["nll"]).sum() and row["items"] == 4  # fewer bits are better
    assert row["p"] == pytest.approx(every_flip(two["nll"] - one["nll"]), abs=0.03)


def change(folder, task, edit):
    """Edits a task's result file and its items in place."""
    file = folder / "tasks" / f"{task}.json"
    result, items = json.loads(file.read_text()), samples(folder, task)
    edit(result, items)
    file.write_text(json.dumps(result))
    file.with_suffix(".jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda result, items: result["versions"].update({TASKS[0]: 7}), f"version of {TASKS[0]} is 1.0 in one, 7 in"),
        (lambda result, items: result["n-shot"].update({TASKS[0]: 5}), f"num_fewshot of {TASKS[0]} is 0 in one, 5 in"),
        (lambda result, items: result["settings"].update(limit=30), "limit is 20.0 in one, 30 in two"),
        (lambda result, items: items[0].update(doc_id=999), r"the items differ \(20 in one, 20 in two\)"),
        (lambda result, items: items[3]["arguments"][1].__setitem__(0, "Q"), f"1 items differ, such as {TASKS[0]}/3"),
        (lambda result, items: items[4].update(target="9"), f"1 items differ, such as {TASKS[0]}/4"),
    ],
)
def test_runs_that_asked_something_else_are_refused(folders, tmp_path, edit, message):
    shutil.copytree(folders / "two", tmp_path / "two")
    change(tmp_path / "two", TASKS[0], edit)
    with pytest.raises(RunError, match=f"{TASKS[0]}: .*{message}") as refused:
        compare([read_run(folders / "one", "one"), read_run(tmp_path / "two", "two")])
    assert TASKS[1] not in str(refused.value)


def test_items_of_another_evaluation_than_the_result_are_refused(folders, tmp_path):
    shutil.copytree(folders / "two", tmp_path / "two")
    change(tmp_path / "two", TASKS[0], lambda result, items: items.pop())
    with pytest.raises(RunError, match=f"{TASKS[0]}.jsonl but .* of different evaluations"):
        read_run(tmp_path / "two", "two")


def test_perplexities_of_other_windows_are_refused(perplexities, tmp_path):
    result = json.loads((perplexities / "two.json").read_text())
    result["settings"]["stride"] = 8
    (tmp_path / "two.json").write_text(json.dumps(result))
    shutil.copy(perplexities / "two.jsonl", tmp_path)
    with pytest.raises(RunError, match="total: stride is 256 in one, 8 in two"):
        compare([read_run(perplexities / "one.json", "one"), read_run(tmp_path / "two.json", "two")])


def test_command_line_writes_table_figures_and_picture(folders, tmp_path, capsys):
    runs = [str(folders / "one"), str(folders / "two")]
    table = script.main([*runs, "--names", "one", "two", "--output", str(tmp_path)])
    text = (tmp_path / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    row = table[(table["task"] == TASKS[1]) & (table["model"] == "two")].iloc[0]
    assert f"| {row['win']} / {row['tie']} / {row['loss']} |" in text.split(TASKS[1])[1].split("\n")[0]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "comparison.csv"), table, check_dtype=False)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    only = script.main([*runs, "--tasks", TASKS[0], "--output", str(tmp_path)])
    assert set(only["task"]) == {TASKS[0]}


def test_runs_that_cannot_be_read_are_named(folders, perplexities, tmp_path, capsys):
    for arguments, message in (
        ([str(folders / "one"), "absent"], "absent is neither a folder of run_lm_eval.py"),
        ([str(folders / "one"), str(perplexities / "one.json")], "Some runs are of run_lm_eval.py and some of"),
        ([str(folders / "one"), str(folders / "one")], "give each of the 2 runs a different name"),
        ([str(folders / "one"), str(folders / "two"), "--tasks", "piqa"], "has no piqa: choose from pathmoe_offline_"),
    ):
        with pytest.raises(SystemExit):
            script.main([*arguments, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err
