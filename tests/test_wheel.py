# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The distributions are built, and the wheel is tried in a fresh environment, from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.run_helpers import ROOT


BUILD = "from setuptools import build_meta; print(getattr(build_meta, 'build_{kind}')({folder!r}))"


def run(*command, cwd, **env):
    """Runs a command without this repository on its path, and returns what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=inherited | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind, source, folder):
    """Builds a distribution with the setuptools that is here, so that nothing is fetched; returns its file."""
    pytest.importorskip("setuptools", minversion="77")
    return folder / run(sys.executable, "-c", BUILD.format(kind=kind, folder=str(folder)), cwd=source).split()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # From a copy: a build leaves files in its source folder.
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    sdist = build("sdist", source, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder)


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The folder with the programs of a fresh environment into which the wheel is installed.

    Its other packages are those that run this test, but nothing that these point to, such as a clone.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    packages = {str(distribution(name).locate_file("")) for name in ("torch", "transformers", "accelerate")}
    (Path(site) / "others.pth").write_text("\n".join(sorted(packages)) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--force-reinstall", distributions[1], cwd=folder)
    return folder / "bin"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def test_both_distributions_hold_the_packages_and_the_presets(distributions):
    sdist, wheel = distributions
    with tarfile.open(sdist) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    built = set(zipfile.ZipFile(wheel).namelist())
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = files or [str(file.relative_to(ROOT)) for file in ROOT.rglob("*.*")]
    rooms = {file for file in files if file.startswith(("modeling_pathmoe/", "pathmoe/", "configuration/"))}
    rooms = {file for file in rooms if "__pycache__" not in file}
    assert "pathmoe/py.typed" in rooms and "configuration/train/quickstart.yaml" in rooms
    assert rooms <= source
    # Nothing else is importable.
    placed = {file.replace("configuration/", "pathmoe/configuration/") for file in rooms}
    assert {name for name in built if ".dist-info/" not in name} == placed


def test_the_package_is_that_of_the_wheel(installed, empty):
    code = "import pathmoe, modeling_pathmoe; print(pathmoe.__file__, modeling_pathmoe.__file__)"
    for file in run(installed / "python", "-c", code, cwd=empty).split():
        assert Path(file).is_relative_to(installed.parent)


@pytest.mark.parametrize("package", ["pathmoe", "modeling_pathmoe"])
def test_importing_either_package_registers_the_model_and_the_fast_experts(installed, empty, package):
    code = f"""
import {package}
from transformers import AutoConfig, AutoModel
config = AutoConfig.for_model("pathmoe", vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
print(AutoModel.from_config(config).config._experts_implementation)
"""
    assert run(installed / "python", "-c", code, cwd=empty).split() == ["pathmoe"]


def test_the_command_helps_and_lists_its_presets(installed, empty):
    assert run(installed / "pathmoe", "--help", cwd=empty) == run(installed / "python", "-m", "pathmoe", cwd=empty)
    names = run(installed / "pathmoe", "presets", cwd=empty).split()
    assert "train/quickstart" in names and "data/quickstart" in names
    assert run(installed / "pathmoe", "presets", "model/quickstart", cwd=empty).startswith("{")
    assert not list(empty.iterdir())


def test_the_quick_start_trains_and_its_model_is_inspected(installed, empty):
    """By name, on text that lies where the recipe expects it; smaller, and for two steps."""
    data = empty / "runs" / "quickstart" / "data"
    data.mkdir(parents=True)
    for split, count in (("train", 200), ("validation", 20)):
        lines = [json.dumps({"text": f"{i} plus {count} is {i + count}; " * 6}) for i in range(count)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    overrides = (
        "{tie_word_embeddings: false, vocab_size: 300, hidden_size: 32, num_hidden_layers: 4, num_attention_heads: 4, "
        "num_key_value_heads: 2, head_dim: 8, moe_intermediate_size: 16}"
    )
    sizes = ["--sequence_length", "32", "--batch_size", "4", "--micro_batch_size", "4", "--eval_sequences", "4"]
    output = run(
        installed / "pathmoe", "train", "--config", "quickstart", "--model_overrides", overrides, "--max_steps", "2",
        *sizes, cwd=empty, CUDA_VISIBLE_DEVICES="", HF_DATASETS_CACHE=str(empty / "cache"),
    )  # fmt: skip
    assert "experts: pathmoe in float32" in output and "saved runs/quickstart/final" in output
    shown = run(installed / "pathmoe", "convert", "inspect", "runs/quickstart/final", cwd=empty)
    assert "shared routers" in shown and "pathmoe" in shown
