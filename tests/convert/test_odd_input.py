# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Odd inputs that are valid, and what does not go along with them."""

import json
import os
import shlex
import shutil

import pytest

from pathmoe.command import UserError
from pathmoe.convert import checkpoint, export_checkpoint
from pathmoe.convert.__main__ import main
from tests.convert_helpers import NORM, contents


@pytest.mark.parametrize("folder", ["0123abc", "0123abc/subfolder"])
def test_a_snapshot_of_the_hub_is_converted_though_its_files_are_links(place, folder):
    """In the Hub's cache the files of a revision are links to blobs, which the revisions share."""
    blobs = place / "hub/models--a--b/blobs"
    snapshot = place / "hub/models--a--b/snapshots" / folder
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate((place / "path").iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    place.link("current", snapshot)
    before = contents(place.folder)

    export_checkpoint("current", "out")

    assert (place / "out/LICENSE").read_text() == "free" and not any(f.is_symlink() for f in (place / "out").iterdir())
    assert {k: v for k, v in contents(place.folder).items() if k.split("/")[0] != "out"} == before
    place.link("current/LICENSE", place / "text.jsonl")
    with pytest.raises(UserError, match="LICENSE is a link"):
        export_checkpoint("current", "again")


CODE = {"auto_map": {"AutoTokenizer": ["theirs.T", None]}, "custom_generate": "theirs.py"}


@pytest.mark.parametrize(
    "argv",
    [
        "export path out",
        "import qwen out",
        "upcycle llama out --experts 4 --top-k 2",
        "average path other out",
        "prune path out --experts 2 --text text.jsonl",
    ],
)
def test_references_to_code_of_others_are_left_behind(place, argv):
    model = argv.split()[1]
    place.put(f"{model}/generation_config.json", '{"temperature": 0.7, "do_sample": true}')
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        place.set(f"{model}/{name}", **CODE, custom_pipelines={"x": {"impl": "theirs.P"}})
    (place / model / "theirs.py").write_text("")
    shutil.copytree(place / model, place / "other")

    main(shlex.split(argv))

    written = {file.name: file.read_text() for file in (place / "out").iterdir() if file.suffix in (".json", ".py")}
    assert not any("theirs" in text or "custom_pipelines" in text for name, text in written.items()), written
    config = json.loads(written["config.json"])
    assert config.get("auto_map", {}).get("AutoModelForCausalLM") == (
        None if argv.startswith("export") else "modeling_pathmoe.PathMoEForCausalLM"
    )
    assert json.loads(written["generation_config.json"]) == {"temperature": 0.7, "do_sample": True}


def test_lines_without_text_are_skipped_and_counted(place, capsys):
    lines = (place / "text.jsonl").read_text().splitlines()
    place.put("t.jsonl", "\n".join([lines[0], '{"text": null}', '{"body": "x"}', "", *lines[1:]]))
    main(shlex.split("prune path out --experts 2 --text t.jsonl"))
    main(shlex.split("prune path without --experts 2 --text text.jsonl"))
    assert f"t.jsonl: skipped 2 of {len(lines) + 2} rows" in capsys.readouterr().err
    kept = [json.loads((place / name / "conversion.json").read_text())["kept"] for name in ("out", "without")]
    assert kept[0] == kept[1]


def test_results_that_are_not_finite_are_not_written(place):
    """Finite checkpoints whose weighted sum overflows."""
    place.tensors("path", lambda tensors: tensors.update({NORM: tensors[NORM].half().fill_(6e4)}))
    shutil.copytree(place / "path", place / "other")
    place.tensors("other", lambda tensors: tensors[NORM].neg_())
    before = contents(place.folder)
    with pytest.raises(UserError, match=f"{NORM} of the target would hold values that are not finite"):
        main(shlex.split("average path other out --weights 2 -1 --no-verify"))
    assert contents(place.folder) == before


def test_a_target_that_appears_meanwhile_is_not_overwritten(place, monkeypatch):
    proper = checkpoint._write_shards

    def write_shards(*args):
        place.put("out/precious", "data")
        return proper(*args)

    monkeypatch.setattr(checkpoint, "_write_shards", write_shards)
    with pytest.raises(UserError, match="out could not be written"):
        export_checkpoint("path", "out")
    assert contents(place / "out").keys() == {"precious"} and not list(place.folder.glob(".out*"))


def test_inspect_says_what_it_cannot_check(place, capsys):
    place.config("llama", model_type="gemma")
    main(["inspect", "llama"])
    assert "whether the tensors are those of a gemma" in capsys.readouterr().out
