# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What strangers and mistakes give to the trainer: each is refused by a message that names it, or handled, and no file
that was there before is lost."""

import gzip
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pathmoe.command import STOPPING, UserError
from pathmoe.train.divergence import Diverged
from pathmoe.train.engine import StopOnSignal
from pathmoe.train.main import main
from tests.run_helpers import metrics


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "trained"
    assert main(recipe(folder, max_steps=2, checkpoint_every=1)) == 0
    return folder


def contents(folder):
    """Every file below a folder with its checksum, without the run's lock and log."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.lock"
    }


RECIPES = [
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"beta1": 1.0}, "beta1=1.0"),
    ({"beta2": 1.0}, "beta2=1.0"),
    ({"model": ""}, "model=''"),
    ({"text_column": ""}, "text_column=''"),
    ({"max_steps": True}, "max_steps"),
    ({"learning_rate": True}, "learning_rate"),
    ({"weight_decay": False}, "weight_decay"),
    ({"warmup_steps": True}, "warmup_steps"),
    ({"streaming": 1}, "streaming"),
    ({"warmup_steps": 1.5}, "warmup_steps=1.5"),
    ({"warmup_steps": math.nan}, "warmup_steps=nan"),
    ({"schedule": "wsd", "decay_steps": 0.01}, "decay_steps=0.01"),
    ({"learning_rate": 1e39}, "learning_rate=1e[+]39"),
    ({"learning_rate": 0}, "learning_rate=0"),
    ({"epsilon": math.inf}, "epsilon=inf"),
    ({"weight_decay": 1e39}, "weight_decay=1e[+]39"),
    ({"weight_decay": 1e6}, "weight_decay=1000000.0 times learning_rate=0.01"),
    ({"max_grad_norm": 1e39}, "max_grad_norm=1e[+]39"),
    ({"max_grad_norm": 1e-300}, "max_grad_norm=1e-300"),
    ({"learning_rate": 1e-45}, "learning_rate=1e-45"),
    ({"epsilon": 1e30}, "epsilon=1e[+]30 must be at most 1"),
    ({"router_learning_rate_scale": 1e30}, "router_learning_rate_scale=1e[+]30 times learning_rate=0.01"),
    ({"min_lr_ratio": math.nan}, "min_lr_ratio=nan"),
    ({"beta1": math.nan}, "beta1=nan"),
    ({"beta2": -1e-9}, "beta2=-1e-09"),
    ({"dataset": None, "mixture": [{"dataset": "a.jsonl", "weight": 1e-300}]}, "weight=1e-300"),
    ({"max_bad_rows": -1}, "max_bad_rows=-1"),
    ({"max_bad_steps": 0}, "max_bad_steps=0"),
    ({"tracker": "nonesuch"}, "tracker='nonesuch'"),
    ({"attn_implementation": "nonesuch"}, "nonesuch"),
    ({"experts_implementation": "nonesuch"}, "nonesuch"),
    ({"model_overrides": {"dtype": "float16"}}, "'dtype'"),
    ({"model_overrides": {"model_type": "bert"}}, "bert"),
    ({"model_overrides": {"num_hidden_layers": 1000000}}, "num_hidden_layers=1000000"),
    ({"model_overrides": {"num_hidden_layers": "three"}}, "num_hidden_layers"),
    ({"model_overrides": {"vocab_size": 2**45}}, "vocab_size=35184372088832.* parameters"),
    ({"model_overrides": {"num_expert": 4}}, "num_expert"),
    ({"model_overrides": [1]}, "model_overrides"),
    ({"tokenizer": "nonesuch"}, "tokenizer='nonesuch'"),
    ({"dataset": "nonesuch.jsonl"}, "nonesuch.jsonl"),
    ({"dataset": "json", "data_files": {"test": "x"}}, "'x' does not exist"),
    ({"dataset": "json", "data_files": [3]}, "3 where the name of a file"),
    ({"max_steps": "6 steps"}, "max_steps='6 steps' must be a whole number"),
    ({"tokenizer": ["tok"]}, "tokenizer=.*tok.* must be text or null"),
    ({"warmup_steps": "5%"}, "warmup_steps='5%' must be a number"),
    ({"cache_dir": "~/cache"}, "cache_dir='~/cache' is not expanded"),
    ({"cache_dir": " "}, "cache_dir=' ' is empty"),
    ({"tokenizer": "nonesuch"}, "tokenizer='nonesuch' could not be loaded: it is not a folder here"),
    ({"model_overrides": {"n_shared_experts": 1}}, "n_shared_experts"),
    ({"model_overrides": {"n_layers": 4}}, "n_layers=4 is not a field of PathMoE: did you mean num_hidden_layers"),
    ({"tokenizer": __file__}, "is a file: name the folder of a saved tokenizer"),
    ({"tokenizer": str(Path(__file__).parent)}, "it holds no tokenizer.json. Name the folder of a saved tokenizer"),
    ({"attn_implementation": "paged|eager"}, "does not apply the masks of training: use 'eager'"),
    ({"model": __file__}, "is a file: name the folder of a checkpoint"),
    ({"dataset": "json", "data_files": None}, "dataset='json' names a type of file: list the files"),
    ({"model": "pathmoe_0.9b"}, "neither a folder here nor a preset. .*Did you mean the shipped pathmoe-0.9b"),
    ({"dataset": "jsonl", "data_files": __file__}, "for such files, set dataset='json'"),
    ({"dataset": "json", "data_files": __file__, "dataset_config": "en"}, "dataset_config='en' has no effect"),
]


@pytest.mark.parametrize(("fields", "complaint"), RECIPES)
def test_recipe_is_refused_before_the_text_is_read(recipe, tmp_path, fields, complaint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=complaint):
        main(recipe(tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists() or not contents(tmp_path / "run")


def test_output_folder_that_cannot_be_written_is_refused(recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, complaint in (
        ("", "output_dir=''"),
        (tmp_path / "file", "cannot be written"),
        ("x" * 300, "too long"),
    ):
        with pytest.raises(UserError, match=complaint):
            main([*recipe(tmp_path / "run"), "--output_dir", str(output)])
    assert (tmp_path / "file").read_text() == "mine"


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"seed: 1\nseed: 2\n", "duplicate key seed"),
        (b"model_overrides: {a: 1, a: 2}\n", "duplicate key a"),
        (BOMB.encode(), "too large"),
        (b"a: &a [*a]\n", "too large"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[1, 2]", "must hold 'field: value' lines"),
        (b"", "must hold 'field: value' lines"),
        (b"model: [", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b"!!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_recipe_file_is_refused(tmp_path, content, complaint):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        main(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "recipe.yaml").read_bytes() == content and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "model="),
        (b"{}", "it has no fields"),
        (b"// mine", "model.json is damaged: it is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b'{"num_experts": 8', "model="),
        (b'{"num_experts": 8, "num_experts": 4}', "duplicate key 'num_experts'"),
        (b"\xff", "model="),
        (b'{"model_type": "nonesuch"}', "nonesuch"),
        (b'{"model_type": "bert"}', "bert.*is not a causal"),
        (b'{"model_type": 3}', "model="),
    ],
)
def test_model_file_is_refused(recipe, tmp_path, content, complaint):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        main(recipe(tmp_path / "run", model=str(tmp_path / "model.json")))


GOOD = b'{"text": "%d and some more text, which is long enough to fill a few sequences"}\n'
BAD_LINES = {
    "null": (b'{"text": null}\n', "holds null"),
    "missing": (b'{"body": "x"}\n', "has no column 'text'"),
    "number": (b'{"text": 3}\n', "holds int"),
    "broken": (b'{"text": "x\n', "is not valid JSON"),
    "not an object": (b"[1]\n", "holds list"),
    "UTF-8": (b'{"text": "\xff"}\n', "is not valid UTF-8"),
    "surrogate": (b'{"text": "\\ud800"}\n', "half of a surrogate"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_row_without_text_is_skipped_or_named(recipe, tmp_path, capsys, kind, streaming):
    bad, complaint = BAD_LINES[kind]
    file = tmp_path / "text.jsonl"
    lines = [GOOD % number for number in range(200)]
    file.write_bytes(b"".join([*lines[:50], bad, *lines[50:]]))
    args = recipe(tmp_path / "run", dataset=str(file), streaming=streaming, max_steps=1, holdout_every=5)
    with pytest.raises(UserError, match=f"max_bad_rows=0 .*text.jsonl line 51.*{complaint}"):
        main([*args, "--max_bad_rows", "0", "--output_dir", str(tmp_path / "strict")])
    assert main(args) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["text.jsonl.gz", "TEXT.JSONL", "text[1].jsonl", "text.json"])
def test_file_of_another_name_is_read(recipe, tmp_path, name):
    content = b"".join(GOOD % number for number in range(200))
    if name == "text.json":
        content = b"[" + content.strip().replace(b"\n", b",") + b"]"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert main(recipe(tmp_path / "run", dataset=str(tmp_path / name), max_steps=1, holdout_every=5)) == 0


@pytest.mark.parametrize("field", ["model", "tokenizer"])
@pytest.mark.parametrize("link", [False, True])
def test_input_in_the_output_folder_is_kept(trained, recipe, tmp_path, field, link):
    run = tmp_path / "sft"
    run.mkdir()
    shutil.copytree(trained / "final", run / "final")
    if link:
        (tmp_path / "link").symlink_to(run)
    before = contents(run)
    with pytest.raises(UserError, match=f"{field}=.* lies in .*final, which this run would overwrite"):
        main([*recipe(run, **{field: str((tmp_path / "link" if link else run) / "final")}), "--resume", "auto"])
    assert contents(run) == before


def test_tokenizer_in_the_output_folder_is_kept(trained, recipe, tmp_path):
    shutil.copytree(trained / "tokenizer", tmp_path / "mine" / "tokenizer")
    before = contents(tmp_path / "mine" / "tokenizer")
    assert main(recipe(tmp_path / "mine", tokenizer=str(tmp_path / "mine" / "tokenizer"), max_steps=1)) == 0
    assert contents(tmp_path / "mine" / "tokenizer") == before


def finished(trained, folder):
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints")
    return folder


def test_finished_run_without_checkpoints_is_done(trained, recipe, tmp_path):
    run = finished(trained, tmp_path / "run")
    before = contents(run)
    assert main([*recipe(run, max_steps=2, checkpoint_every=1), "--resume", "auto"]) == 0
    assert contents(run) == before


def foreign_final(run):
    (run / "final" / "recipe.yaml").unlink()


def link_final(run):
    (run / "final").rename(run / "elsewhere")
    (run / "final").symlink_to("elsewhere")


def spoil_recipe(run):
    (run / "recipe.yaml").write_text("[1]")


@pytest.mark.parametrize(
    ("spoil", "fields", "complaint"),
    [
        (lambda run: None, {"max_steps": 3}, "max_steps: 2 → 3"),
        (lambda run: None, {"seed": 3}, "seed: 0 → 3"),
        (lambda run: None, {"dataset": "gone.jsonl"}, "a run of a different recipe"),
        (foreign_final, {}, "has no recipe.yaml"),
        (link_final, {}, "not a folder that this run wrote"),
        (spoil_recipe, {}, "recipe.yaml is damaged"),
        (lambda run: (run / "final" / "config.json").unlink(), {}, "it is incomplete"),
    ],
)
def test_result_that_is_not_this_runs_is_kept(trained, recipe, tmp_path, spoil, fields, complaint):
    run = finished(trained, tmp_path / "run")
    spoil(run)
    before = contents(run)
    with pytest.raises(UserError, match=complaint):
        main([*recipe(run, **{"max_steps": 2, "checkpoint_every": 1} | fields), "--resume", "auto"])
    assert contents(run) == before


def test_longer_run_without_its_text_keeps_the_result(trained, recipe, tmp_path):
    run, text = tmp_path / "run", tmp_path / "text.jsonl"
    text.write_bytes(b"".join(GOOD % number for number in range(200)))
    fields = {"dataset": str(text), "holdout_every": 5}
    main(recipe(run, max_steps=1, **fields))
    text.unlink()
    before = contents(run)
    with pytest.raises(UserError, match="text.jsonl was removed since"):
        main([*recipe(run, max_steps=2, **fields), "--resume", "auto"])
    assert contents(run) == before


def test_what_the_trainer_did_not_write_is_left_alone(trained, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    checkpoints = run / "checkpoints"
    for name in ("step-00000002-best1", "step-99999999.bak1", "best.partial", "step-00000002/notes"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "mine").write_text(name)
    (checkpoints / "step-123").write_text("mine")
    (run / "final" / "notes.txt").write_text("mine")
    (run / ".final.partial").mkdir()
    (run / ".final.partial" / "notes.txt").write_text("mine")
    card, edited = run / "final" / "README.md", "# A card that someone has edited for days"
    assert main([*recipe(run, max_steps=3, checkpoint_every=1), "--resume", "auto"]) == 0
    assert main([*recipe(run, max_steps=5, checkpoint_every=1), "--resume", "auto"]) == 0
    for name in ("step-00000002-best1", "step-99999999.bak1", "best.partial", "step-00000002/notes"):
        assert (checkpoints / name / "mine").read_text() == name
    assert (checkpoints / "step-123").read_text() == "mine"
    assert (run / "final.set-aside-1" / "notes.txt").read_text() == "mine"
    assert (run / ".final.partial.set-aside-1" / "notes.txt").read_text() == "mine"
    assert not (run / "final.set-aside-2").exists() and not (checkpoints / "step-00000001").exists()
    card.write_text(edited)
    os.utime(card, (time := card.stat().st_mtime + 60, time))
    assert main([*recipe(run, max_steps=6, checkpoint_every=1), "--resume", "auto"]) == 0
    assert (run / "final.set-aside-2" / "README.md").read_text() == edited


def test_renamed_checkpoint_is_not_taken_for_another_step(trained, recipe, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "step-00000002").rename(run / "checkpoints" / "step-00000009")
    assert main([*recipe(run, max_steps=3), "--resume", "auto"]) == 0
    assert "step-00000009 holds the checkpoint of step 2" in capsys.readouterr().out
    assert list(metrics(run)) == [1, 2, 3]


@pytest.mark.parametrize("end", [b"hello\n", b"\xff\xfe"], ids=str)
def test_damaged_metrics_are_found_before_anything_is_written(trained, recipe, tmp_path, end):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(end)
    before = contents(run)
    with pytest.raises(UserError, match="metrics.jsonl line .* is damaged"):
        main([*recipe(run, max_steps=3), "--resume", "auto"])
    assert contents(run) == before


def changed_text(folder):
    (folder / "text.jsonl").write_bytes(b"".join(GOOD % (7 * number) for number in range(200)))


def new_text(folder):
    (folder / "more.jsonl").write_bytes(GOOD % 1)


def changed_model(folder):
    fields = json.loads((folder / "model.json").read_text()) | {"router_aux_loss_coef": 0.01}
    (folder / "model.json").write_text(json.dumps(fields))


def changed_tokenizer(folder):
    file = folder / "run" / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace(" ", "  ", 1))


def changed_validation(folder):
    np.save(folder / "run" / "validation-0.npy", np.ones((5, 32), dtype=np.int32))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (changed_text, "text.jsonl has changed"),
        (new_text, "more.jsonl was added"),
        (changed_model, "model.json has changed"),
        (changed_tokenizer, "output_dir/tokenizer/tokenizer.json has changed"),
        (changed_validation, "output_dir/validation-0.npy has changed"),
    ],
)
def test_resumed_run_goes_on_with_the_same_inputs(recipe, tmp_path, change, name):
    (tmp_path / "text.jsonl").write_bytes(b"".join(GOOD % number for number in range(200)))
    args = recipe(tmp_path / "run", dataset="json", data_files=str(tmp_path / "*.jsonl"), holdout_every=5)
    shutil.copy(yaml.safe_load(Path(args[1]).read_text())["model"], tmp_path / "model.json")
    args += ["--model", str(tmp_path / "model.json"), "--streaming", "true", "--resume", "auto"]
    assert main([*args, "--max_steps", "1"]) == 0
    # A copy elsewhere, or another date, is the same text.
    os.utime(tmp_path / "text.jsonl", (0, 0))
    assert main([*args, "--max_steps", "2"]) == 0
    change(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{name} since .*step-00000002.*another output_dir"):
        main([*args, "--max_steps", "3"])
    assert contents(tmp_path) == before
    if change is new_text:  # there is no place to go on from in a stream of other files
        with pytest.raises(UserError, match=name):
            main([*args, "--max_steps", "3", "--accept_changed_inputs", "true"])
        return
    assert main([*args, "--max_steps", "3", "--accept_changed_inputs", "true"]) == 0
    assert f"- from step 3: {name.split('/')[-1].split()[0]}" in (
        (tmp_path / "run" / "final" / "README.md").read_text().replace("output_dir/", "").replace("tokenizer/", "")
    )


def test_validation_text_of_a_run_is_made_again(recipe, tmp_path):
    args = [*recipe(tmp_path / "run", streaming=True), "--resume", "auto"]
    assert main([*args, "--max_steps", "1"]) == 0
    file = tmp_path / "run" / "validation-0.npy"
    before = file.read_bytes()
    file.unlink()
    assert main([*args, "--max_steps", "2"]) == 0
    assert file.read_bytes() == before


def test_files_of_the_user_in_a_new_output_folder_are_kept(recipe, tmp_path, capsys):
    args = recipe(tmp_path / "run", streaming=True, max_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "validation-0.npy").write_text("mine")
    mine = f"# With a comment.\n{Path(args[1]).read_text()}"
    (tmp_path / "run" / "recipe.yaml").write_text(mine)
    assert main(["--config", str(tmp_path / "run" / "recipe.yaml"), "--resume", "auto"]) == 0
    assert (tmp_path / "run" / "recipe.yaml.set-aside-1").read_text() == mine
    assert (tmp_path / "run" / "validation-0.npy.set-aside-1").read_text() == "mine"
    assert "kept as" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", None])
def test_damaged_token_cache_is_named(recipe, tmp_path, content):
    args = recipe(tmp_path / "run", cache_dir=str(tmp_path / "cache"), max_steps=1)
    assert main(args) == 0
    for file in (tmp_path / "cache").glob("tokens-*.npy"):
        file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match="tokens-.*npy is damaged .*remove it"):
        main([*args, "--output_dir", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("notes.docx", b"PK", "notes.docx must end in one of .jsonl"),
        ("blank.txt", b"\n \n", "holds no text: it is empty or blank"),
        ("cut.parquet", b"PAR1", "cut.parquet.*arquet"),
    ],
)
def test_data_file_that_holds_no_text_is_refused_in_one_line(recipe, tmp_path, caplog, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        main(recipe(tmp_path / "run", dataset=str(tmp_path / name)))
    assert not caplog.records  # of `datasets`, which would be printed before the error


def test_configuration_of_a_saved_model_is_read(trained, recipe, tmp_path):
    assert "auto_map" in json.loads((trained / "final" / "config.json").read_text())
    assert main(recipe(tmp_path / "run", model=str(trained / "final" / "config.json"), max_steps=1)) == 0


def test_integers_in_the_place_of_weights_are_refused(trained, recipe, tmp_path):
    shutil.copytree(trained / "final", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.norm.weight in .* holds integers .I8., not weights"):
        main(recipe(tmp_path / "run", model=str(tmp_path / "model")))


def test_fewer_steps_than_the_checkpoint_has_are_refused(trained, recipe, tmp_path):
    shutil.copytree(trained, run := tmp_path / "run")
    shutil.rmtree(run / "final")
    before = contents(run)
    with pytest.raises(UserError, match="max_steps=1 is below the . steps of .*step-"):
        main([*recipe(run, max_steps=1), "--resume", "auto"])
    assert contents(run) == before


def test_damaged_result_of_a_finished_run_is_made_again_from_its_checkpoint(trained, recipe, tmp_path):
    shutil.copytree(trained, run := tmp_path / "run")
    file = run / "final" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    args = ["--config", str(run / "recipe.yaml"), "--output_dir", str(run), "--resume", "auto"]
    assert main(args) == 0 and file.read_bytes() == whole


def test_stream_that_breaks_before_the_first_step_leaves_nothing(recipe, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_bytes(b"".join([GOOD % 0, *[b'{"text": null}\n'] * 3, *(GOOD % number for number in range(200))]))
    with pytest.raises(UserError, match="line 2 holds null"):
        main(recipe(tmp_path / "run", dataset=str(text), streaming=True, max_bad_rows=0))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", sorted(STOPPING), ids=str)
def test_each_signal_that_asks_to_stop_is_recorded(number):
    with StopOnSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.signalled


@pytest.mark.parametrize("manifest", ["{}", "[]", "3", '{"a": 1}', '{"state.json": null}', ""])
def test_damaged_manifest_is_named(trained, recipe, tmp_path, capsys, manifest):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text(manifest)
    assert main([*recipe(run, max_steps=3, checkpoint_every=1), "--resume", "auto"]) == 0
    assert "step-00000002/manifest.json is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["row", "gz"])
def test_stream_that_breaks_in_training_leaves_a_checkpoint(trained, recipe, tmp_path, kind):
    lines = [GOOD % number for number in range(300)]
    text, validation = tmp_path / ("text.jsonl.gz" if kind == "gz" else "text.jsonl"), tmp_path / "validation.jsonl"
    whole = gzip.compress(b"".join(lines), mtime=0) if kind == "gz" else b"".join(lines)
    text.write_bytes(whole[: len(whole) // 4] if kind == "gz" else whole.replace(lines[60], b'{"text": null}\n'))
    validation.write_bytes(b"".join(lines[::10]))
    fields = {
        "dataset": "json", "data_files": {"train": str(text), "validation": str(validation)}, "max_steps": 20,
        "validation_split": "validation", "streaming": True, "max_bad_rows": 0, "shuffle_window": 1,
        "micro_batch_size": 4, "tokenizer": str(trained / "tokenizer"),
    }  # fmt: skip
    with pytest.raises(UserError, match=f"{text.name}.*step-[0-9]* holds the run up to there"):
        main(recipe(tmp_path / "run", **fields))
    done = list(metrics(tmp_path / "run"))
    assert done and done[-1] < 20
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done[-1]:08d}"]
    text.write_bytes(whole)
    assert main([*recipe(tmp_path / "run", **fields, resume="auto", accept_changed_inputs=True)]) == 0
    assert main(recipe(tmp_path / "at-once", **fields)) == 0
    resumed, at_once = metrics(tmp_path / "run"), metrics(tmp_path / "at-once")
    assert list(resumed) == list(at_once) == list(range(1, 21))
    assert resumed == pytest.approx(at_once, rel=1e-4)


def test_diverged_run_goes_on_from_an_older_checkpoint_with_a_lower_rate(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    args = recipe(run, max_steps=6, checkpoint_every=1, keep_last=3, max_grad_norm=1e9, max_bad_steps=3)
    assert main([*args, "--max_steps", "2"]) == 0
    shutil.rmtree(run / "final")
    with monkeypatch.context() as patch, pytest.raises(Diverged, match="lower learning rate"):
        patch.setattr("pathmoe.train.loop.cross_entropy", lambda *args: torch.tensor(math.nan))
        main([*args, "--resume", "auto", "--learning_rate", "1e-3"])
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept[:2] == ["step-00000001", "step-00000002"]
    older = str(run / "checkpoints" / "step-00000001")
    assert main([*args, "--resume", older, "--learning_rate", "1e-4"]) == 0
    assert "learning_rate = 0.0001 (before: 0.01)" in (run / "final" / "README.md").read_text()
    assert any("learning_rate" in line for line in (run / "metrics.jsonl").read_text().splitlines())
    assert all(math.isfinite(loss) for loss in metrics(run).values())


def drop_router(tensors):
    del tensors[next(name for name in tensors if "routers." in name)]


def spoil_embedding(tensors):
    tensors["model.embed_tokens.weight"][0, 0] = torch.nan


def shorten_norm(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [(drop_router, "1 missing .*initialize_missing"), (spoil_embedding, "not finite"), (shorten_norm, "norm")],
)
def test_checkpoint_that_does_not_fit_is_refused(trained, recipe, tmp_path, change, complaint):
    model = tmp_path / "model"
    shutil.copytree(trained / "final", model)
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=complaint):
        main(recipe(tmp_path / "run", model=str(model), dataset=str(tmp_path / "not-read.jsonl")))
    if change is drop_router:
        assert main(recipe(tmp_path / "run", model=str(model), max_steps=1, initialize_missing=True)) == 0


def test_truncated_weights_are_refused(trained, recipe, tmp_path):
    shutil.copytree(trained / "final", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-99])
    with pytest.raises(UserError, match="could not be loaded: .*/model.safetensors is damaged or incomplete"):
        main(recipe(tmp_path / "run", model=str(tmp_path / "model")))


def test_final_holds_nothing_private_or_foreign_and_follows_the_umask(trained, recipe, tmp_path):
    source = tmp_path / "tokenizer"
    shutil.copytree(trained / "tokenizer", source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil--code.Tokenizer", None]}, "custom_generate": "evil"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    run, umask = tmp_path / "<b>run", os.umask(0o027)
    try:
        assert main(recipe(run, tokenizer=str(source), max_steps=1)) == 0
    finally:
        os.umask(umask)
    for file in (run / "final").iterdir():
        if file.suffix in (".json", ".yaml", ".md", ".jinja"):
            text = file.read_text()
            assert str(tmp_path) not in text and "evil" not in text and "# <b>" not in text, file
    files = [*(run / "final").iterdir(), *(run / "checkpoints").glob("step-*/*")]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}
