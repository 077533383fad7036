# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import math
import random

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pathmoe.command import UserError
from pathmoe.train.log import is_spike
from pathmoe.train.main import main
from pathmoe.train.recipe import RecipeError
from tests.run_helpers import metrics


PNG = b"\x89PNG"


def new_counters():
    return {"losses_seen": 0, "loss_mean": 0.0, "loss_variance": 0.0}


def test_spike_is_seen_and_a_falling_noisy_loss_is_none():
    rng, counters = random.Random(0), new_counters()
    for step in range(2000):
        assert not is_spike(counters, 3 + 5 * math.exp(-step / 300) + rng.gauss(0, 0.05))
    assert is_spike(counters, 4.5)
    assert not is_spike(counters, 3.0)
    assert is_spike(counters, 4.5)


def test_curves_of_several_runs_are_drawn(recipe, tmp_path, capsys):
    main(recipe(tmp_path / "a", routing_every=2))
    main(recipe(tmp_path / "b", routing_every=0, eval_every=2))
    output = tmp_path / "both.png"
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(output)]) == 0
    assert main(["plot", str(tmp_path / "b")]) == 0
    assert main(["plot", str(tmp_path / "b")]) == 0  # replaces its own picture
    assert str(tmp_path / "b" / "training.png") in capsys.readouterr().out
    for file in (output, tmp_path / "b" / "training.png"):
        assert file.read_bytes()[:4] == PNG and file.stat().st_size > 20_000
    assert output.stat().st_size > (tmp_path / "b" / "training.png").stat().st_size


@pytest.mark.parametrize("name", ["notes.txt", "photo.png"])
def test_a_picture_replaces_no_other_file(tmp_path, name):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=name):
        main(["plot", str(tmp_path), "--output", str(tmp_path / name)])
    assert (tmp_path / name).read_text() == "mine"


def test_damaged_metrics_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step\n')
    with pytest.raises(RecipeError, match="metrics.jsonl line 2"):
        main(["plot", str(tmp_path)])


def test_folder_without_a_run_cannot_be_drawn(tmp_path):
    with pytest.raises(RecipeError, match="holds no metrics.jsonl"):
        main(["plot", str(tmp_path)])


def test_tracker_gets_what_the_metrics_file_gets(recipe, tmp_path):
    main(recipe(tmp_path / "run", tracker="tensorboard", routing_every=3))
    events = EventAccumulator(str(tmp_path / "run" / "pathmoe"))
    events.Reload()
    logged = {scalar.step: scalar.value for scalar in events.Scalars("loss")}
    assert logged == pytest.approx(metrics(tmp_path / "run"))
    assert {"load_cv/max", "effective_experts/mean", "router_grad_norm/max"} <= set(events.Tags()["scalars"])
