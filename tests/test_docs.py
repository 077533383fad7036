# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What the README, the contribution guide and docs/ say: code runs, commands exist, links lead somewhere, tables are
those of the files that the commands write."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.bench_report import make_table
from pathmoe import PathMoEConfig, PathMoEForCausalLM
from pathmoe.accounting import count_parameters
from pathmoe.cli import COMMANDS
from pathmoe.text.reader import train_tokenizer
from tests.matrix.run import ENDS


ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}


def page(name):
    """The text of docs/NAME.md."""
    return PAGES[f"docs/{name}.md"]


def blocks(text, language):
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def slugs(text):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), f"{name} links to {link}"
        assert not anchor or anchor in slugs(target.read_text(encoding="utf-8")), f"{name} links to {link}"


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_are_python_and_import_what_exists(name):
    for code in blocks(PAGES[name], "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("pathmoe", "modeling_pathmoe"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_commands_are_understood_by_their_programs():
    shell = [code for text in PAGES.values() for code in blocks(text, "bash")]
    # In a process of its own, which replaces a method of argparse.
    command = [sys.executable, "-m", "tests.docs_commands"]
    result = subprocess.run(command, input=json.dumps(shell), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(shell) > 20 and json.loads(result.stdout) == []


def test_commands_in_the_text_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, text in PAGES.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"`make\s+([a-z-]+)", prose):
            assert target in targets, f"{name}: make {target}"
        for script in re.findall(r"`(?:python\s+)?([\w/.]+\.py)\b", prose):
            found = (
                (ROOT / script).exists() or list(ROOT.glob(f"**/{script}")) or script.startswith(("my_", "test_my_"))
            )
            assert found, f"{name}: {script}"
        for command in re.findall(r"`pathmoe\s+([a-z]+)", prose):
            assert command in COMMANDS, f"{name}: pathmoe {command}"


def test_readme_is_short_and_begins_with_commands_that_work_in_a_fresh_clone():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 200
    assert re.findall(r"^(\S+ \S+)", blocks(readme, "bash")[0], re.MULTILINE) == ["make demo", "make test"]
    assert readme.index("```bash") < readme.index("```python")


def test_pages_state_the_range_of_versions_that_the_matrix_tests():
    oldest, newest = (end.rpartition(".")[0] for end in ENDS)
    for name in ("README.md", "docs/install.md"):
        assert f"transformers {oldest} to {newest}" in PAGES[name]
    assert f"{oldest} to {newest}" in page("limits")
    assert f"transformers>={oldest}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"transformers=={newest}." in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("sharing", ROOT / "docs" / "pictures" / "sharing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "pictures" / "sharing.svg").read_text(encoding="utf-8") == module.draw()


def test_the_site_is_built_without_a_broken_link():
    pytest.importorskip("zensical")
    result = subprocess.run([sys.executable, ROOT / "docs" / "build_site.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


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


LOAD = blocks(PAGES["README.md"], "python")[0]


def test_loading_takes_three_lines_and_gives_a_model_that_writes(run):
    assert run(LOAD + "print(type(model).__name__, len(tokenizer))").split()[-2:] == ["PathMoEForCausalLM", "320"]


def test_the_readmes_code_runs_from_its_first_block_to_its_last(run):
    assert "torch.Size([" in run("\n".join(blocks(PAGES["README.md"], "python")))


def test_the_pages_on_the_model_run(run):
    run("\n".join(blocks(page("model"), "python")))


def test_other_models_run_our_experts_by_name(run):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(run.folder / "qwen3_moe")
    [code] = blocks(page("experts"), "python")
    code = code.replace("path/to/qwen3_moe", str(run.folder / "qwen3_moe"))
    assert run(code + "print(model.config._experts_implementation)").split() == ["pathmoe"]


@pytest.mark.parametrize(
    "command, written",
    [
        ("convert export", "out/qwen3_moe/config.json"),
        ("perplexity", "out/perplexity.json"),
        ("paths", "report/report.html"),
    ],
    ids=["export", "perplexity", "paths"],
)
def test_the_readmes_commands_run(run, command, written):
    [line] = re.findall(rf"^pathmoe ({command} .*)$", PAGES["README.md"], re.MULTILINE)
    line = line.replace("my.jsonl", "runs/quickstart/data/validation.jsonl")
    line = re.sub(r"\b(runs|out)/", lambda match: f"{run.folder}/{'out/' * (match[1] == 'out')}", line)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(run.folder / "cache")}
    arguments = [sys.executable, "-m", "pathmoe", *line.split()]
    result = subprocess.run(arguments, cwd=run.folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (run.folder / written).is_file()


def test_fine_tuning_with_trainer_learns_and_keeps_the_sharing(run):
    losses = "print('LOG', [entry['loss'] for entry in trainer.state.log_history[:-1]])"
    output = run(blocks(page("finetuning"), "python")[0] + losses)
    losses = json.loads(output.split("LOG")[1])
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
    tuned = AutoModelForCausalLM.from_pretrained(run.folder / "finetuned" / "final")
    assert sorted(name for name in tuned.state_dict() if "router" in name) == [
        "model.routers.0.weight",
        "model.routers.1.weight",
    ]


def test_paths_are_recorded_and_measured(run):
    ends = "print(tuple(trace.experts.shape[1:]), path_coverage(trace.experts, 10), adjacent_jaccard(trace.experts))"
    shape, rest = run(LOAD + blocks(page("paths"), "python")[0] + ends).rsplit(")", 1)
    assert shape.endswith("(4, 2") and all(0 < float(value) <= 1 for value in rest.split())


def test_routing_consistency_is_measured(run):
    value = run(
        LOAD
        + blocks(page("evaluation"), "python")[0].replace("metric.compute", "result = metric.compute")
        + "print(result)"
    )
    assert 0 < float(value.split("'routing_consistency': ")[1].split(",")[0]) <= 1


def test_router_of_ones_own_trains(run):
    train = """
ids = torch.randint(0, 4096, (2, 16))
model(ids, labels=ids).loss.backward()
print(len(model.model.routers), all(p.grad is not None for p in model.parameters()))
"""
    assert run(blocks(page("routers"), "python")[0] + train).split() == ["2", "True"]


def test_table_of_presets_is_what_the_command_prints():
    files = sorted((ROOT / "configuration" / "model").glob("*.json"))
    for file in files:
        count = count_parameters(PathMoEConfig.from_json_file(file))
        row = f"| {file.stem} | {count['total']:,} | {count['active']:,} | {count['router']:,} |"
        assert row in page("model")


def test_figures_are_those_of_the_files_that_the_commands_write():
    report = (ROOT / "eval" / "results" / "quickstart.md").read_text(encoding="utf-8")
    assert report.split("\n\nA sample")[0] in page("results")
    comparison = (ROOT / "eval" / "results" / "reference" / "comparison.md").read_text(encoding="utf-8")
    assert comparison.split("\n\n")[0] in page("evaluation")
    for preset, result in json.loads((ROOT / "benchmarks" / "routers.json").read_text())["results"].items():
        low, high = result["quartiles"]
        assert f"| {preset} | {result['relative']:.2f} ({low:.2f} to {high:.2f}) |" in page("routers")


def test_figures_of_conversion_are_those_of_the_files_that_the_commands_write():
    results = ROOT / "benchmarks"
    for trip, moved in json.loads((results / "conversions.json").read_text(encoding="utf-8")).items():
        row = f"| {trip} | {moved['largest_logit']:.1f} | {moved['largest_logit_difference']:.1e} |"
        assert row in page("convert")
    reference = json.loads((results / "convert_reference.json").read_text())
    perplexity = reference["training"]["held_out_perplexity"]
    for figure in (
        f"differ by at most {reference['upcycle']['largest_logit_difference']:.1e}",
        f"{reference['log_likelihoods']['values']} log-likelihoods differ by at most "
        f"{reference['log_likelihoods']['largest_difference']:.1e}",
        f"{perplexity['upcycled']:.2f} → {perplexity['trained']:.2f}",
        f"logits differ by {reference['export']['largest_logit_difference_in_a_fresh_process']:.1e}",
    ):
        assert figure in page("convert")
    for name, measured in json.loads((results / "quantization.json").read_text())["results"].items():
        scheme, implementation = name.split()
        row = f"| {scheme} | `{implementation}` | {measured['megabytes']:.1f} | "
        row += f"{measured['perplexity']:.2f} |" if "perplexity" in measured else "torchao lacks"
        assert row in page("convert")


def test_table_of_speed_is_made_of_the_file_that_make_bench_writes():
    command, shown = re.search(
        r"<!-- python (.*) -->\n(.*?)<!-- end of table -->", page("experts"), re.DOTALL
    ).groups()
    files = [ROOT / file for file in command.split() if file.endswith(".json")]
    assert shown.strip() == make_table(*(json.loads(file.read_text()) for file in files))


def test_comparison_with_the_paper_is_that_of_the_experiment():
    shown = re.search(r"<!-- beside the paper -->\n(.*?)<!-- end -->", page("results"), re.DOTALL).group(1)
    tables = (ROOT / "experiment" / "first" / "results" / "cpu" / "tables.md").read_text(encoding="utf-8")
    assert shown.strip() == tables.split("## Beside the paper\n\n")[1].split("\n\n## ")[0]
    change, low, high = re.search(
        r"against Indep-MoE with LBL \|.*?\| (\S+ %) .*\| \[(\S+), (\S+)\] \|", shown
    ).groups()
    for text in (PAGES["README.md"], page("results")):
        assert f"{low} to {high} %".replace("-", "−") in " ".join(text.split())
    assert f"({change} perplexity" in PAGES["README.md"]


def test_figures_of_the_paths_are_those_of_the_report():
    html = (ROOT / "eval" / "results" / "paths" / "quickstart-beside-independent.html").read_text(encoding="utf-8")
    report = json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    rows = 0
    for measures in zip(*(model["measures"] for model in report["models"])):
        digits = 0 if measures[0]["unit"] == "count" else 3
        row = f"| {measures[0]['name']} | " + " | ".join(
            f"{m['value']:,.{digits}f} ({m['low']:,.{digits}f} to {m['high']:,.{digits}f})" for m in measures
        )
        rows += row + " |" in page("paths")
    assert rows == 7


def test_plan_of_the_16b_model_is_what_make_plan_wrote():
    table = (ROOT / "benchmarks" / "plan-16b.md").read_text(encoding="utf-8").split("\n\n")[1].strip()
    assert table in page("many-gpus")


def test_memory_beside_the_planner_is_that_of_the_file():
    results = json.loads((ROOT / "benchmarks" / "memory.json").read_text(encoding="utf-8"))
    for row in results:
        planned, measured = row["planned"] / 1e9, row["measured"] / 1e9
        assert f"| {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |" in page("many-gpus")


def test_figures_of_the_collapse_are_those_of_the_experiment():
    results = ROOT / "experiment" / "results" / "cpu"
    for start, name in (("usual", "old"), ("new", "new")):
        for routers, row in (("independent", "indep"), ("shared by 4 layers", "pathb4")):
            run = json.loads((results / f"collapse-{name}-{row}.json").read_text(encoding="utf-8"))
            experts = [sum(layers) / len(layers) for layers in run["effective_experts"]]
            shown = f"| {start} | {routers} | {min(experts):.1f} | {experts[-1]:.1f} | {run['loss'][-1]:.2f} |"
            assert shown in page("results")
    variations = []
    for file in sorted((ROOT / "experiment" / "first" / "results" / "cpu" / "runs").glob("*-2500k-*/metrics.jsonl")):
        steps = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        if "lbl" not in file.parent.name:
            [layers] = [step["load_cv"] for step in steps if step["step"] == 20 and "load_cv" in step]
            variations.append(sum(layers) / len(layers))
    assert f"variation\nof {min(variations):.2f} to {max(variations):.2f} at step 20" in page("results")
