# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import subprocess
import sys

import pytest

from tests.run_helpers import ROOT


@pytest.mark.parametrize(
    ("module", "args", "complaint"),
    [
        ("bench", ["--suite", "fast"], "argument --suite: invalid choice: 'fast'"),
        ("bench", ["--json", "mine.yaml"], "mine.yaml exists and is not an earlier result"),
        ("bench", ["--seconds", "nan"], "--seconds nan must be at least 0"),
        ("bench", ["--length", "0"], "--length 0 must be at least 1"),
        ("bench", ["--device", "tpu"], "--device tpu cannot be used here"),
        ("bench", ["--plot", "a.png", "--suite", "loss"], "--plot a.png draws the scaling suite"),
        ("bench", ["--shape", "mine.yaml", "--suite", "loss"], "mine.yaml is damaged"),
        ("bench", ["--table", "absent.json"], "absent.json cannot be read"),
        ("operators", ["--table", "empty.json"], "empty.json has no list 'results'"),
        ("operators", ["--calls", "0"], "--calls 0 must be at least 1"),
        ("paths", ["--top_k", "99"], "--top_k 99 must be at most --experts 16"),
        ("paths", ["--rounds", "1"], "--rounds 1 must be at least 2"),
        ("routers", ["--shrink", "1000"], "--shrink 1000 must be at most 18"),
        ("conversions", ["--json", "mine.yaml"], "mine.yaml exists and is not an earlier result"),
        ("memory", ["--json", "."], "--json . is a folder"),
        ("convert_reference", ["--dense", ".", "--text", ".", "--output", "o"], "config.json is missing"),
        ("reference_model", ["--output_dir", "mine.yaml"], "--output_dir mine.yaml/config.json cannot be written"),
    ],
)
def test_wrong_options_are_refused_in_one_line_before_anything_is_measured(tmp_path, module, args, complaint):
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "empty.json").write_text("{}")
    command = [sys.executable, "-m", f"benchmarks.{module}", *args]
    ended = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 2 and complaint in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.json", "mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "mine"
