# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import time

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from pathmoe.evaluate import contamination as script
from pathmoe.evaluate.contamination import Words, contamination, ngram_digests


texts = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat"]), max_size=30).map(" ".join)


@given(texts, texts, st.integers(1, 4))
def test_digests_are_equal_where_the_words_are(one, two, n):
    runs = [[tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)] for text in (one, two)]
    digests = [ngram_digests(text, n, Words()).tolist() for text in (one, two)]
    assert [len(of_text) for of_text in digests] == [len(of_text) for of_text in runs]
    for a, run in zip(digests[0], runs[0]):
        assert [b == a for b in digests[1]] == [other == run for other in runs[1]]


@given(st.lists(texts, max_size=5), st.lists(texts, min_size=1, max_size=5), st.integers(2, 4))
def test_hits_are_those_of_a_search_for_strings(training, items, n):
    report = contamination(training, {"task": items}, n)["task"]
    expected = []
    for i, item in enumerate(items):
        words = item.split()
        runs = [" ".join(words[at : at + n]) for at in range(len(words) - n + 1)]
        if any(f" {run} " in f" {text} " for run in runs for text in training):
            expected.append(i)
    assert report["hit_items"] == expected and report["hit"] == len(expected)
    assert report["short"] == sum(len(item.split()) < n for item in items)


def test_case_and_punctuation_do_not_hide_an_item():
    report = contamination(["He said: THE CAT, sat\non a mat!"], {"task": ["The cat sat on -- a mat.", "A dog."]}, 6)
    assert report["task"]["share"] == 1.0 and report["task"]["short"] == 1
    assert report["task"]["examples"] == [{"item": 0, "words": "the cat sat on a mat"}]


def test_no_run_spans_two_documents():
    assert contamination(["the cat sat", "on a mat"], {"task": ["the cat sat on a mat"]}, 4)["task"]["hit"] == 0


def test_a_megabyte_takes_at_most_a_second_and_a_half():
    text = " ".join(f"w{i * i % 9973}" for i in range(1000))
    started = time.process_time()
    contamination([text] * 180, {"task": [text]}, 13)
    assert time.process_time() - started < 1.5


@pytest.mark.parametrize("task", ["piqa", "winogrande", "boolq", "lambada_openai"])
def test_planted_item_of_every_kind_of_task_is_found(task, tmp_path):
    """Item 7 stands in the training text, with its right answer."""
    name = f"pathmoe_offline_{task}"
    items = script.task_items([name], limit=20)[name]
    data, output = tmp_path / "train.jsonl", tmp_path / "report.json"
    Dataset.from_dict({"text": ["An unrelated text.", f"Some say {items[7]} and go on."]}).to_json(data)
    script.main(["--data", str(data), "--tasks", name, "--n", "8", "--limit", "20", "--output", str(output)])
    report = json.loads(output.read_text())["tasks"][name]
    assert 7 in report["hit_items"] and report["hit"] <= 3
    assert f"| {name} | 20 |" in output.with_suffix(".md").read_text()


def test_right_answer_is_part_of_the_item():
    items = script.task_items(["pathmoe_offline_winogrande"], limit=1)["pathmoe_offline_winogrande"]
    assert items[0].startswith("Sarah was a much better surgeon than Maria so Maria always got the easier cases.")


def test_arguments_that_cannot_work_are_named(tmp_path, capsys):
    for options, message in (
        (["--suite", "absent"], "--suite absent must be one of quickstart"),
        ([], "give a --suite, --tasks or both"),
        (["--suite", "quickstart", "--n", "0"], "--n 0 must be from 1 to 1000"),
    ):
        with pytest.raises(SystemExit):
            script.main(["--data", "x.txt", "--output", str(tmp_path / "x.json"), *options])
        assert message in capsys.readouterr().err
