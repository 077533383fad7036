# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints carry their code: they load in a process that cannot import this package."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from modeling_pathmoe import (
    PathMoEConfig,
    PathMoEForCausalLM,
    PathMoEForQuestionAnswering,
    PathMoEForSequenceClassification,
    PathMoEForTokenClassification,
    PathMoEModel,
)
from tests.hub.hub_server import hub_server


REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("attention", "cache", "configuration", "loss", "mlp", "modeling", "norm", "routing")
CODE_FILES = [f"{name}_pathmoe.py" for name in PARTS]
AUTO_CLASSES = {
    "AutoModel": PathMoEModel,
    "AutoModelForCausalLM": PathMoEForCausalLM,
    "AutoModelForSequenceClassification": PathMoEForSequenceClassification,
    "AutoModelForTokenClassification": PathMoEForTokenClassification,
    "AutoModelForQuestionAnswering": PathMoEForQuestionAnswering,
}


def output(model):
    """What is compared: logits, or hidden states where there is no head."""
    with torch.no_grad():
        return model.eval()(torch.arange(24).view(2, 12))[0]


OUTPUT = "import torch\n\n" + inspect.getsource(output)

LOAD = """
import json, sys
import transformers

folder = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(f"{folder}/AutoModel", trust_remote_code=True)
report = {"config": type(config).__module__}
for name in sys.argv[2:]:
    model = getattr(transformers, name).from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    difference = (output(model) - torch.load(f"{folder}/{name}.pt")).abs().max().item()
    report[name] = [type(model).__name__, difference, model.config._experts_implementation]
print(json.dumps(report))
"""

TRAIN = """
import sys
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

folder, new_folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
before = output(model)
data = [{"input_ids": torch.arange(12), "labels": torch.arange(12)}] * 4
args = TrainingArguments(
    new_folder, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
    save_strategy="no",
)
trainer = Trainer(model, args, train_dataset=data)
trainer.train()
trainer.save_model(new_folder)
assert not torch.allclose(output(model), before, atol=1e-3), "nothing was trained"
torch.save(output(model), f"{new_folder}/output.pt")
"""

COMPARE = """
import sys
from transformers import AutoModelForCausalLM

name, expected = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
print((output(model) - torch.load(expected)).abs().max().item())
"""

PUSH = """
import sys
from modeling_pathmoe import PathMoEForCausalLM

folder, repo = sys.argv[1:]
PathMoEForCausalLM.from_pretrained(folder).push_to_hub(repo, token="hf_dummy")
"""

ENTRY_POINT = """
import sys
from importlib.metadata import distributions
from transformers import AutoConfig

(point,) = (p for d in distributions(path=[sys.argv[1]]) for p in d.entry_points if p.group == "vllm.general_plugins")
point.load()()
import modeling_pathmoe
assert modeling_pathmoe.__file__.startswith(sys.argv[1]), modeling_pathmoe.__file__
print(type(AutoConfig.for_model("pathmoe")).__name__)
"""


def run(command, env, cwd):
    done = subprocess.run(list(map(str, command)), env={**os.environ, **env}, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def without_package(tmp_path):
    """Environment variables for a process that cannot import this package, with Hub caches of its own."""
    site = tmp_path / "site"
    site.mkdir()
    # Python runs a module of this name when it starts.
    (site / "sitecustomize.py").write_text(
        'import sys\n\nsys.modules["modeling_pathmoe"] = sys.modules["pathmoe"] = None\n'
    )
    return {
        "PYTHONPATH": str(site),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture
def run_fresh(without_package, tmp_path):
    """Returns a function that runs code with arguments in a fresh process without the package."""

    def run_code(code, *args, **env):
        return run([sys.executable, "-c", OUTPUT + code, *args], {**without_package, **env}, tmp_path)

    return run_code


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a saved model per Auto class, named like it, and that model's output."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = PathMoEConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        router_block_size=2,
        pad_token_id=0,
        mlp_only_layers=[0],
        intermediate_size=24,
        initializer_range=0.2,
    )
    for name, model_class in AUTO_CLASSES.items():
        set_seed(0)
        model = model_class(config)
        model.save_pretrained(folder / name)
        torch.save(output(model), folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed this package alone."""
    folder = tmp_path_factory.mktemp("installed")
    # From a copy: a build leaves files in its source folder.
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(REPOSITORY, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", source, "--no-deps", "--no-compile", "--target", folder / "site"]
    # Where setuptools is here already, pip need not fetch it.
    offline = Version(version("setuptools")) >= Version("77") if find_spec("setuptools") else False
    run([*pip, "--no-build-isolation"] if offline else pip, {}, folder)
    return folder / "site"


def test_the_package_cannot_be_imported_in_the_fresh_processes(run_fresh):
    with pytest.raises(AssertionError, match="ModuleNotFoundError: import of modeling_pathmoe halted"):
        run_fresh("import modeling_pathmoe")


def test_a_checkpoint_of_every_class_loads_without_the_package(checkpoints, run_fresh):
    report = json.loads(run_fresh(LOAD, checkpoints, *AUTO_CLASSES).splitlines()[-1])

    assert report.pop("config").startswith("transformers_modules.")
    for name, (class_name, difference, experts_implementation) in report.items():
        assert class_name == AUTO_CLASSES[name].__name__
        assert difference <= 1e-5  # grouped_mm there, our own experts here
        assert experts_implementation == "grouped_mm"
    assert report.keys() == AUTO_CLASSES.keys()


def test_trainer_trains_and_saves_without_the_package(checkpoints, run_fresh, tmp_path):
    run_fresh(TRAIN, checkpoints / "AutoModelForCausalLM", tmp_path / "trained")

    assert float(run_fresh(COMPARE, tmp_path / "trained", tmp_path / "trained" / "output.pt").split()[-1]) <= 1e-6


def test_stock_lm_eval_command_works_without_the_package(checkpoints, without_package, tmp_path):
    model = shutil.copytree(checkpoints / "AutoModelForCausalLM", tmp_path / "model")
    words = ["the cat sat on the mat", "a dog ran to the door"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=99, special_tokens=["<unk>", "<eos>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(model)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "choices": ["the", "a"]}) + "\n" for text in words))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = {
        "task": "pathmoe_tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    # JSON is YAML.
    (tasks / "tiny.yaml").write_text(json.dumps(task))

    arguments = ["--model", "hf", "--model_args", f"pretrained={model},trust_remote_code=True", "--device", "cpu"]
    arguments += ["--tasks", "pathmoe_tiny", "--include_path", tasks, "--output_path", tmp_path / "results"]
    run([sys.executable, "-m", "lm_eval", *arguments], without_package, tmp_path)

    (results,) = (tmp_path / "results").rglob("results_*.json")
    results = json.loads(results.read_text())
    assert results["n-samples"]["pathmoe_tiny"]["effective"] == len(words)
    assert "acc,none" in results["results"]["pathmoe_tiny"]


@pytest.mark.parametrize("saved", AUTO_CLASSES)
def test_auto_map_names_every_class_whichever_was_saved(checkpoints, saved):
    auto_map = json.loads((checkpoints / saved / "config.json").read_text())["auto_map"]

    assert auto_map == {
        "AutoConfig": "configuration_pathmoe.PathMoEConfig",
        **{name: f"modeling_pathmoe.{model_class.__name__}" for name, model_class in AUTO_CLASSES.items()},
    }


@pytest.mark.parametrize("saved", AUTO_CLASSES)
def test_weights_are_saved_as_safetensors_only(checkpoints, saved):
    others = {"config.json", "generation_config.json", *CODE_FILES}

    assert {path.name for path in (checkpoints / saved).iterdir()} - others == {"model.safetensors"}


@pytest.mark.parametrize("saved", AUTO_CLASSES)
def test_the_saved_code_is_the_model_files(checkpoints, saved):
    assert sorted(path.name for path in (checkpoints / saved).glob("*.py")) == CODE_FILES


@pytest.mark.parametrize("name", CODE_FILES)
def test_the_saved_code_imports_only_what_every_transformers_user_has(checkpoints, name):
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub"}
    imported = set()
    for node in ast.walk(ast.parse((checkpoints / "AutoModel" / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and f"{node.module}.py" in CODE_FILES

    assert imported and imported <= allowed


def test_push_to_hub_and_load_from_there_without_the_package(checkpoints, run_fresh, tmp_path):
    with hub_server() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        push = [sys.executable, "-c", PUSH, checkpoints / "AutoModelForCausalLM", "someone/tiny-pathmoe"]
        run(push, {**env, "HF_HOME": str(tmp_path / "pusher"), "CUDA_VISIBLE_DEVICES": ""}, REPOSITORY)
        result = run_fresh(COMPARE, "someone/tiny-pathmoe", checkpoints / "AutoModelForCausalLM.pt", **env)

    assert float(result.split()[-1]) <= 1e-5


def test_the_installed_packages_are_the_model_and_the_toolkit_alone(installed):
    assert {path.name for path in installed.iterdir()} == {
        "bin",  # the command
        "modeling_pathmoe",
        "pathmoe",
        f"pathmoe-{version('pathmoe')}.dist-info",
    }


def test_the_vllm_entry_point_registers_the_model(installed):
    done = run([sys.executable, "-c", ENTRY_POINT, installed], {"PYTHONPATH": str(installed)}, installed.parent)
    assert done.split()[-1] == "PathMoEConfig"


def test_a_checkpoint_with_an_unregistered_router_says_to_register_it(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "AutoModelForCausalLM", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "router_type": "my_router"}))

    with pytest.raises(StrictDataclassError, match=r"router_type='my_router'.*register_router"):
        AutoModelForCausalLM.from_pretrained(folder)
