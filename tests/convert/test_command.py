# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The command line, what it carries along, and what happens when something goes wrong."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.initialization import no_init_weights

from pathmoe import PathMoEConfig, PathMoEForSequenceClassification
from pathmoe.accounting import count_parameters
from pathmoe.command import UserError
from pathmoe.convert import export_checkpoint, import_checkpoint, inspect_checkpoint
from pathmoe.convert.__main__ import main


def listing(folder):
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(folder, edit):
    """Edits the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_commands_chain_and_say_what_they_did(saved, tmp_path, capsys, tiny_tokenizer, text):
    source = str(saved(vocab_size=320))
    tiny_tokenizer.save_pretrained(source)
    exported, back, average, pruned = (str(tmp_path / name) for name in ("exported", "back", "average", "pruned"))

    main(["export", source, exported, "--to", "qwen3_moe", "--max-shard-size", "100KB"])
    said = re.search(r"largest logit difference to the source on 128 tokens, float32: (\S+) ", capsys.readouterr().out)
    assert float(said[1]) < 1e-4
    main(["import", exported, back, "--block-size", "2"])
    main(["average", source, back, average, "--weights", "0.25", "0.75"])
    main(["prune", average, pruned, "--experts", "4", "--text", str(text), "--no-verify"])
    out = capsys.readouterr().out
    assert "tokens whose whole path is kept:" in out and "NOT VERIFIED" in out

    main(["inspect", exported])
    assert "shared routers layers 0-1, 2-3, 4" in capsys.readouterr().out
    main(["inspect", pruned])
    found = capsys.readouterr().out
    assert "experts        4" in found and "exports_to     qwen3_moe" in found
    assert AutoTokenizer.from_pretrained(pruned)("The river").input_ids == tiny_tokenizer("The river").input_ids


def test_manifest_says_what_became_what(saved, tmp_path):
    export_checkpoint(saved(), tmp_path / "exported")
    manifest = json.loads((tmp_path / "exported" / "conversion.json").read_text())
    assert manifest["source"] == {"name": "source", "model_type": "pathmoe"}
    assert manifest["tensors"]["model.layers.3.mlp.gate.weight"] == ["model.routers.1.weight"]
    assert manifest["tensors"]["model.layers.3.mlp.experts.5.up_proj.weight"] == [
        "model.layers.3.mlp.experts.gate_up_proj[5, 16:32]"
    ]
    assert manifest["tensors"].keys() == load_file(tmp_path / "exported" / "model.safetensors").keys()
    assert str(tmp_path) not in json.dumps(manifest)


def test_generation_config_tokenizer_and_licence_are_carried_along(saved, tmp_path, tiny_tokenizer):
    source = saved(vocab_size=320)
    tiny_tokenizer.chat_template = "{{ messages }}"
    tiny_tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    (source / "LICENSE").write_text("free")

    export_checkpoint(source, tmp_path / "exported")
    import_checkpoint(tmp_path / "exported", tmp_path / "back", 2)

    ours, theirs = listing(source), listing(tmp_path / "back")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    ):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    "fields", [{}, {"tie_word_embeddings": True}, {"router_type": "low_rank"}, {"qk_norm": "full"}], ids=str
)
def test_inspect_counts_what_accounting_counts(saved, fields):
    source = saved(shards="50KB", **fields)
    found = inspect_checkpoint(source)
    count = count_parameters(PathMoEConfig.from_pretrained(source))
    assert (found["parameters"], found["active"], found["routers"]) == (
        count["total"], count["active"], count["router"],
    )  # fmt: skip
    assert found["blocks"] == [[0, 1], [2, 3], [4]] and found["bytes"] == 4 * count["total"]


def test_inspect_says_why_a_model_cannot_be_exported(saved):
    assert "router_type='cosine'" in inspect_checkpoint(saved(router_type="cosine"))["exports_to"]


EDITS = {
    "missing": (
        lambda t: t.pop("model.layers.2.self_attn.q_norm.weight"),
        r"1 missing \(model.layers.2.self_attn.q_norm",
    ),
    "extra": (lambda t: t.update(surplus=torch.ones(3)), r"1 extra \(surplus\)"),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"1 misshapen \(model.norm.weight \(3,\) instead of \(32,\)\)",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        "model.norm.weight .* is I8",
    ),
}


@pytest.mark.parametrize("edit, reason", EDITS.values(), ids=EDITS)
def test_tensors_that_do_not_fit_the_configuration_are_named(saved, tmp_path, edit, reason):
    source = saved()
    change(source, edit)
    before = listing(source)
    with pytest.raises(ValueError, match=reason):
        export_checkpoint(source, tmp_path / "exported", verify=False)
    assert listing(source) == before and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_shared_expert_in_the_source_is_named(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "source")
    name = "model.layers.1.mlp.shared_expert.up_proj.weight"
    change(tmp_path / "source", lambda tensors: tensors.update({name: torch.ones(16, 32)}))
    with pytest.raises(ValueError, match=rf"1 extra \({name}\)"):
        import_checkpoint(tmp_path / "source", tmp_path / "imported")


def test_a_damaged_or_missing_file_is_named(saved, tmp_path):
    source = saved(shards="50KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged or incomplete"):
        export_checkpoint(source, tmp_path / "exported")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        export_checkpoint(source, tmp_path / "exported")
    with pytest.raises(UserError, match="nowhere' is not a folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "exported")


def test_a_tokenizer_that_does_not_fit_is_refused(saved, tmp_path, tiny_tokenizer):
    source = saved(vocab_size=99)
    tiny_tokenizer.save_pretrained(source)
    with pytest.raises(ValueError, match="token id 319, but vocab_size is 99"):
        export_checkpoint(source, tmp_path / "exported")


def test_other_heads_and_quantised_weights_are_refused(saved, tmp_path, tiny_config):
    PathMoEForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="PathMoEForSequenceClassification; only causal"):
        export_checkpoint(tmp_path / "classifier", tmp_path / "exported")
    source = saved()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match="is quantised"):
        export_checkpoint(source, tmp_path / "exported")


def test_a_difference_that_must_not_be_leaves_nothing(saved, tmp_path, monkeypatch):
    """The check itself: a converter that mixed up two experts would be caught."""
    from pathmoe.convert import exporting

    proper = exporting.experts_of
    monkeypatch.setattr(exporting, "experts_of", lambda source, layer: proper(source, layer)[::-1])
    with pytest.raises(ValueError, match="must preserve the function.*Nothing was written"):
        export_checkpoint(saved(), tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


CONVERT = [sys.executable, "-m", "pathmoe.convert"]


def test_a_full_disk_leaves_nothing(saved, tmp_path):
    """Files may not grow beyond 100 kB here, which fails the second shard as a full disk would."""
    source = saved()
    done = subprocess.run(
        [*CONVERT, "export", source, tmp_path / "exported", "--max-shard-size", "200KB", "--no-verify"],
        capture_output=True, text=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)
        ),
    )  # fmt: skip
    assert done.returncode == 2 and "could not be written" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_small_a_disk_is_noticed_beforehand(saved, tmp_path, monkeypatch):
    from pathmoe.convert import checkpoint

    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs 0.0 GB, but .* has only 0.0 GB free"):
        export_checkpoint(saved(), tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


HELD = """
import runpy, sys, time
from pathlib import Path
from pathmoe.convert import checkpoint

owner, name = {"mkdir": (Path, "mkdir"), "shards": (checkpoint, "_write_shards")}[sys.argv.pop(1)]
proper = getattr(owner, name)

def held(folder, *args, **options):
    result = proper(folder, *args, **options)
    if folder.parent.suffix == ".partial":
        print(folder.name, flush=True)
        time.sleep(600)
    return result

setattr(owner, name, held)
runpy.run_module("pathmoe.convert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "moment, by, status",
    [("mkdir", signal.SIGTERM, 143), ("shards", signal.SIGTERM, 143), ("shards", signal.SIGINT, 130)],
)
def test_a_terminated_conversion_leaves_nothing(saved, tmp_path, moment, by, status):
    """It stays where it is until it is terminated: as soon as there is a folder, or with all weights in it."""
    command = [sys.executable, "-c", HELD, moment, "export", saved(), tmp_path / "exported"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "exported\n"
    assert len(list(tmp_path.glob(".exported.*.partial/exported"))) == 1
    process.send_signal(by)
    assert process.wait() == status
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


MEASURE = """
import sys
from pathlib import Path
from pathmoe.convert.__main__ import main
def peak():  # of this process alone: ru_maxrss begins with the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
main(sys.argv[1:])
print("PEAK", peak(), before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, qk_norm",
    [("export", False), ("import", False), ("import", "full"), ("average", False), ("upcycle", False)],
    ids=["export", "import Mixtral", "import OLMoE", "average", "upcycle"],
)
def test_peak_memory_is_a_shard_and_two_gigabytes(tmp_path, command, qk_norm):
    """A model of 4 GB in shards of 0.6 GB; the peak of a fresh process is measured by the kernel."""
    config = PathMoEConfig(
        vocab_size=32000, hidden_size=2048, num_hidden_layers=12, num_attention_heads=16, num_experts=16,
        num_experts_per_tok=2, moe_intermediate_size=1408, qk_norm=qk_norm, router_block_size=4, dtype=torch.bfloat16,
    )  # fmt: skip
    if command == "upcycle":
        fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "dtype")
        config = LlamaConfig(**{name: getattr(config, name) for name in fields}, intermediate_size=1408)
    with no_init_weights():  # what the weights are does not matter
        model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if ".routers." in name:  # import compares them
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source", max_shard_size="600MB")
    del model
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    arguments = [command, source, target, "--no-verify"]
    if command == "import":
        export_checkpoint(source, tmp_path / "exported", verify=False, max_shard_size="600MB")
        arguments = [command, str(tmp_path / "exported"), target, "--block-size", "4", "--no-verify"]
    elif command == "average":
        arguments = [command, source, source, source, target, "--no-verify"]
    elif command == "upcycle":
        arguments += ["--experts", "16", "--top-k", "2"]

    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    peak, before = (int(value) / 1e9 for value in done.stdout.split("PEAK")[1].split())
    written = sum(path.stat().st_size for path in Path(target).glob("*.safetensors")) / 1e9
    print(f"{command}: {written:.1f} GB written, peak {peak:.2f} GB, of which {before:.2f} GB before it began")
    assert written > 3.9 and peak < 0.6 + 2
