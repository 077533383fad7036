# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import pytest
from safetensors import safe_open

from pathmoe.train.checkpoints import CheckpointError, list_checkpoints
from pathmoe.train.main import main
from pathmoe.train.recipe import parse_recipe
from tests.crash_recovery import run_with_kills
from tests.run_helpers import assert_same_weights, launch, metrics


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """An uninterrupted run with a checkpoint after every third step."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    assert main(recipe(folder, checkpoint_every=3, keep_last=9, max_steps=9)) == 0
    return folder


def copy_of(whole, folder, *, up_to):
    """The run as it was when it had been killed after step `up_to`."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) > up_to:
            shutil.rmtree(checkpoint)
    return folder


def recipe_of(whole, folder):
    return ["--config", str(whole / "recipe.yaml"), "--output_dir", str(folder)]


def test_killed_runs_end_as_the_uninterrupted_one(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the killed runs; with more, the bits of a run are not its own
    fields = {"checkpoint_every": 2, "max_steps": 150, "model_overrides": {"router_bias_update_rate": 0.01}}
    kills = run_with_kills(recipe(tmp_path / "run", **fields), tmp_path / "run", kills=3, seed=1)
    assert len(kills) == 3
    process = launch(recipe(tmp_path / "whole", **fields))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert_same_weights(tmp_path / "run", tmp_path / "whole", rtol=0, atol=0)
    for key in ("loss", "grad_norm", "lr", "eval_loss"):
        assert metrics(tmp_path / "run", key=key) == metrics(tmp_path / "whole", key=key)


def test_checkpoint_holds_nothing_that_could_be_unpickled(whole):
    files = list((whole / "checkpoints" / "step-00000009").iterdir())
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            with safe_open(file, framework="pt") as tensors:
                assert tensors.keys()
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def damage_flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("shard-00001-model-00001-of-00001.safetensors", damage_truncate, "is truncated"),
        ("shard-00001-model-00001-of-00001.safetensors", damage_flip, "is damaged"),
        ("state.json", damage_truncate, "is truncated"),
        ("rank-0.json", lambda file: file.unlink(), "is missing"),
        ("manifest.json", lambda file: file.unlink(), "is missing"),
    ],
)
def test_damaged_file_is_named_and_the_checkpoint_before_it_used(whole, tmp_path, capsys, name, damage, complaint):
    run = copy_of(whole, tmp_path / "run", up_to=6)
    damage(run / "checkpoints" / "step-00000006" / name)
    assert main([*recipe_of(whole, run), "--resume", "auto"]) == 0
    output = capsys.readouterr().out
    assert f"step-00000006/{name} {complaint}" in output and "resumed from" in output.split(complaint)[1]
    assert "step-00000003" in output
    assert_same_weights(run, whole, rtol=0, atol=0)


def test_run_whose_checkpoints_are_all_damaged_does_not_start_over(whole, tmp_path):
    run = copy_of(whole, tmp_path / "run", up_to=6)
    for checkpoint in (run / "checkpoints").iterdir():
        damage_truncate(checkpoint / "state.json")
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match="no checkpoint is intact .*step-00000006/state.json is truncated"):
        main([*recipe_of(whole, run), "--resume", "auto"])
    assert (run / "metrics.jsonl").read_text() == before


def test_full_disk_stops_the_run_and_leaves_the_old_checkpoints_whole(whole, tmp_path):
    run = copy_of(whole, tmp_path / "run", up_to=6)
    # No file may grow beyond 64 kB: as for a full disk, a write fails half-way.
    code = """
import resource, signal, sys
from pathmoe.train.checkpoints import Checkpoints
from pathmoe.train.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Checkpoints.save
def limited(self, step):
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    save(self, step)
Checkpoints.save = limited
main(sys.argv[1:])
"""
    process = launch([*recipe_of(whole, run), "--resume", "auto"], script=["-c", code])
    output, _ = process.communicate()
    assert process.returncode != 0 and "step-00000009 could not be written" in output and "File too large" in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert main([*recipe_of(whole, run), "--resume", "auto"]) == 0
    assert_same_weights(run, whole, rtol=0, atol=0)


def test_last_checkpoints_and_every_so_manieth_are_kept(recipe, tmp_path):
    args = recipe(tmp_path / "run", checkpoint_every=1, keep_last=2, keep_every=3, max_steps=8)
    main(args)
    assert [path.name[-1] for path in list_checkpoints(parse_recipe(args))] == ["3", "6", "7", "8"]


def test_any_older_checkpoint_can_be_gone_on_from(whole, tmp_path):
    run = copy_of(whole, tmp_path / "run", up_to=9)
    assert main([*recipe_of(whole, run), "--resume", str(run / "checkpoints" / "step-00000003")]) == 0
    assert_same_weights(run, whole, rtol=0, atol=0)
    assert metrics(run) == metrics(whole)


def test_checkpoint_is_the_same_wherever_the_run_lies_and_however_it_was_started(whole, tmp_path):
    run = copy_of(whole, tmp_path / "run", up_to=6)
    assert main([*recipe_of(whole, run), "--resume", "auto", "--keep_last", "5"]) == 0
    state, expected = (folder / "checkpoints" / "step-00000009" / "state.json" for folder in (run, whole))
    assert state.read_text() == expected.read_text()


def test_unfinished_last_line_of_the_metrics_is_cut_off(whole, tmp_path):
    run = copy_of(whole, tmp_path / "run", up_to=6)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert main([*recipe_of(whole, run), "--resume", "auto"]) == 0
    assert metrics(run) == metrics(whole)
