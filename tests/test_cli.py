# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The command `pathmoe`, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pathmoe import presets
from pathmoe.cli import COMMANDS
from pathmoe.command import UserError
from pathmoe.train.main import INTERRUPTED
from pathmoe.train.model import build_config
from pathmoe.train.recipe import parse_recipe
from tests.run_helpers import ROOT


def pathmoe(*args, cwd=ROOT, status=0, **env):
    """Runs the command and returns what it printed, and said on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "pathmoe", *map(str, args)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | env,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_help_shows_every_command_with_an_example():
    for arguments in ([], ["--help"], ["-h"]):
        shown, _ = pathmoe(*arguments)
        assert all(f"  pathmoe {name} {command.example}" in shown for name, command in COMMANDS.items())


def test_version_is_that_of_the_package():
    shown, _ = pathmoe("--version")
    assert shown == f"pathmoe {__import__('pathmoe').__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself_with_an_example(name):
    shown, _ = pathmoe(name, "--help")
    example, _, rest = shown.partition("\n\n")
    assert example == f"example: pathmoe {name} {COMMANDS[name].example}"
    assert len(rest) > 100 and "train_accelerate.py" not in rest.split("\n")[0]


@pytest.mark.parametrize(
    "name, hint", [("trian", "did you mean train?"), ("x", "choose from train, plan, plot, eval")]
)
def test_an_unknown_command_is_one_line(name, hint):
    shown, said = pathmoe(name, status=2)
    assert shown == "" and said.startswith(f"error: {name} is not a command: {hint}") and said.count("\n") == 1


def test_a_mistake_is_one_line_as_in_the_scripts():
    _, said = pathmoe("train", "--config", "nowhere.yaml", status=2)
    assert said.startswith("error: --config nowhere.yaml does not exist: ") and said.count("\n") == 1


def test_a_package_that_is_missing_is_named_with_the_extra(tmp_path):
    (tmp_path / "sitecustomize.py").write_text('import sys\n\nsys.modules["lm_eval"] = None\n')
    _, said = pathmoe("eval", "--help", status=2, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert said == "error: pathmoe eval needs the package lm_eval: pip install 'pathmoe[eval]'\n"


STARTS = "import sys; sys.argv = {argv}; import pathmoe.cli; print('torch' in sys.modules)"


@pytest.mark.parametrize("argv, loaded", [(["/somewhere/bin/pathmoe", "train"], False), (["script.py"], True)])
def test_the_command_starts_without_torch_and_the_library_with_it(argv, loaded):
    code = STARTS.format(argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{loaded}\n"


@pytest.mark.parametrize("name, status", [("train", INTERRUPTED), ("perplexity", 130)])
def test_interrupted_while_the_libraries_load(name, status, tmp_path):
    # A torch that takes as long as it likes.
    (tmp_path / "torch.py").write_text('import pathlib, time\n\npathlib.Path("loading").touch()\ntime.sleep(600)\n')
    process = subprocess.Popen(
        [sys.executable, "-m", "pathmoe", name], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    while not (tmp_path / "loading").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == status and process.stderr.read() == ""


def test_presets_are_listed_and_printed():
    shown = pathmoe("presets")[0].split()
    assert "train/quickstart" in shown and "accelerate/fsdp" in shown
    assert len(shown) == sum(1 for file in (ROOT / "configuration").rglob("*.*"))
    recipe = (ROOT / "configuration" / "train" / "quickstart.yaml").read_text(encoding="utf-8")
    assert pathmoe("presets", "train/quickstart")[0] == recipe
    assert pathmoe("presets", "--folder")[0] == f"{ROOT / 'configuration'}\n"
    assert "nothing is not a preset: choose from train/" in pathmoe("presets", "nothing", status=2)[1]


def test_recipes_and_models_go_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(["--config", "quickstart", "--model", "quickstart-indep"])
    assert recipe.model == "configuration/model/quickstart-indep.json"
    fields = json.loads((ROOT / recipe.model).read_text(encoding="utf-8"))
    assert build_config(recipe).router_block_size == fields["router_block_size"]
    assert (
        parse_recipe(["--config", "configuration/train/quickstart.yaml"]).model
        == "configuration/model/quickstart.json"
    )


def test_a_file_of_the_user_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert presets.expand("quickstart", "model") == "quickstart"
    assert presets.expand("some/name", "model") == "some/name"
    (tmp_path / "configuration" / "train").mkdir(parents=True)
    own = tmp_path / "configuration" / "train" / "quickstart.yaml"
    own.write_text("model: mine\n")
    assert presets.find("configuration/train/quickstart.yaml").read_text() == "model: mine\n"
    with pytest.raises(UserError, match="none.yaml does not exist"):
        parse_recipe(["--config", "configuration/train/none.yaml"])
