# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The README's Python runs as it stands there, on a small checkpoint in place of the quick start's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.bench_report import make_table
from modeling_pathmoe.configuration_pathmoe import PathMoEConfig
from pathmoe import PathMoEForCausalLM
from pathmoe.accounting import count_parameters
from pathmoe.text.reader import train_tokenizer


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_of(heading):
    """The Python block under a heading."""
    return re.search(rf"^## {re.escape(heading)}\n.*?```python\n(.*?)```", README, re.MULTILINE | re.DOTALL).group(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs code in a fresh process, with a tiny checkpoint and text where the README has its run."""
    folder = tmp_path_factory.mktemp("runs")
    texts = [f"The {i}th line counts to {i * i}, which is the square of {i}." for i in range(64)]
    tokenizer = train_tokenizer(texts, 320)
    torch.manual_seed(0)
    config = PathMoEConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, moe_intermediate_size=16,
        num_experts=8, num_experts_per_tok=2, max_position_embeddings=128, router_block_size=2,
    )  # fmt: skip
    PathMoEForCausalLM(config).save_pretrained(folder / "quickstart" / "final")
    tokenizer.save_pretrained(folder / "quickstart" / "final")
    (folder / "quickstart" / "data").mkdir()
    lines = "".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in texts)
    (folder / "quickstart" / "data" / "validation.jsonl").write_text(lines)

    def execute(code):
        code = code.replace('"runs/', f'"{folder}/').replace("configuration/", f"{ROOT}/configuration/")
        env = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    execute.folder = folder
    return execute


LOAD = python_of("Load it")


def test_loading_takes_three_lines_and_gives_a_model(run):
    assert run(LOAD + "print(type(model).__name__, len(tokenizer))").split() == ["PathMoEForCausalLM", "320"]


def test_fine_tuning_with_trainer_learns_and_keeps_the_sharing(run):
    losses = "print('LOG', [entry['loss'] for entry in trainer.state.log_history[:-1]])"
    output = run(python_of("Fine-tune with Trainer") + losses)
    losses = json.loads(output.split("LOG")[1])
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    tuned = AutoModelForCausalLM.from_pretrained(run.folder / "finetuned" / "final")
    assert sorted(name for name in tuned.state_dict() if "router" in name) == [
        "model.routers.0.weight",
        "model.routers.1.weight",
    ]


def test_paths_are_recorded_and_measured(run):
    ends = "print(tuple(trace.experts.shape[1:]), path_coverage(trace.experts, 10), adjacent_jaccard(trace.experts))"
    shape, rest = run(LOAD + python_of("Look at the paths") + ends).rsplit(")", 1)
    assert shape.endswith("(4, 2") and all(0 < float(value) <= 1 for value in rest.split())


def test_routing_consistency_is_measured(run):
    value = run(LOAD + python_of("Evaluate").replace("metric.compute", "result = metric.compute") + "print(result)")
    assert 0 < float(value.split("'routing_consistency': ")[1].split(",")[0]) <= 1


def test_router_of_ones_own_trains(run):
    train = """
ids = torch.randint(0, 4096, (2, 16))
model(ids, labels=ids).loss.backward()
print(len(model.model.routers), all(p.grad is not None for p in model.parameters()))
"""
    assert run(python_of("Routers") + train).split() == ["2", "True"]


def test_table_of_presets_is_what_the_command_prints():
    files = sorted((ROOT / "configuration" / "model").glob("*.json"))
    for file in files:
        count = count_parameters(PathMoEConfig.from_json_file(file))
        row = f"| {file.stem} | {count['total']:,} | {count['active']:,} | {count['router']:,} |"
        assert row in README


def test_figures_are_those_of_the_files_that_the_commands_write():
    report = (ROOT / "eval" / "results" / "quickstart.md").read_text(encoding="utf-8")
    assert report.split("\n\nA sample")[0] in README
    comparison = (ROOT / "eval" / "results" / "reference" / "comparison.md").read_text(encoding="utf-8")
    assert comparison.split("\n\n")[0] in README
    for preset, result in json.loads((ROOT / "benchmarks" / "routers.json").read_text())["results"].items():
        low, high = result["quartiles"]
        assert f"| {preset} | {result['relative']:.2f} ({low:.2f} to {high:.2f}) |" in README


def test_figures_of_conversion_are_those_of_the_files_that_the_commands_write():
    results = ROOT / "benchmarks"
    for trip, moved in json.loads((results / "conversions.json").read_text(encoding="utf-8")).items():
        row = f"| {trip} | {moved['largest_logit']:.1f} | {moved['largest_logit_difference']:.1e} |"
        assert row in README
    reference = json.loads((results / "convert_reference.json").read_text())
    perplexity = reference["training"]["held_out_perplexity"]
    for figure in (
        f"differ by at most {reference['upcycle']['largest_logit_difference']:.1e}",
        f"{reference['log_likelihoods']['values']} log-likelihoods differ by at most "
        f"{reference['log_likelihoods']['largest_difference']:.1e}",
        f"{perplexity['upcycled']:.2f} → {perplexity['trained']:.2f}",
        f"logits differ by {reference['export']['largest_logit_difference_in_a_fresh_process']:.1e}",
    ):
        assert figure in README
    for name, measured in json.loads((results / "quantization.json").read_text())["results"].items():
        scheme, implementation = name.split()
        row = f"| {scheme} | `{implementation}` | {measured['megabytes']:.1f} | "
        assert row + (f"{measured['perplexity']:.2f} |" if "perplexity" in measured else "torchao lacks") in README


def test_table_of_speed_is_made_of_the_file_that_make_bench_writes():
    command, shown = re.search(r"<!-- python (.*) -->\n(.*?)<!-- end of table -->", README, re.DOTALL).groups()
    files = [ROOT / file for file in command.split() if file.endswith(".json")]
    assert shown.strip() == make_table(*(json.loads(file.read_text()) for file in files))


def test_comparison_with_the_paper_is_that_of_the_experiment():
    shown = re.search(r"<!-- beside the paper -->\n(.*?)<!-- end -->", README, re.DOTALL).group(1)
    tables = (ROOT / "experiment" / "first" / "results" / "cpu" / "tables.md").read_text(encoding="utf-8")
    assert shown.strip() == tables.split("## Beside the paper\n\n")[1].split("\n\n## ")[0]


def test_figures_of_the_paths_are_those_of_the_report():
    page = (ROOT / "eval" / "results" / "paths" / "quickstart-beside-independent.html").read_text(encoding="utf-8")
    report = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    rows = 0
    for measures in zip(*(model["measures"] for model in report["models"])):
        digits = 0 if measures[0]["unit"] == "count" else 3
        row = f"| {measures[0]['name']} | " + " | ".join(
            f"{m['value']:,.{digits}f} ({m['low']:,.{digits}f} to {m['high']:,.{digits}f})" for m in measures
        )
        rows += row + " |" in README
    assert rows == 7
