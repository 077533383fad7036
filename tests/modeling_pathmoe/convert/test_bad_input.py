# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What strangers and mistakes give to the converter and the accounting: each is refused by one line that names the
field or file and its value; nothing is written, and the sources stay as they are."""

import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from data.text import train_tokenizer
from modeling_pathmoe import PathMoEConfig, accounting
from modeling_pathmoe.command import UserError, run_command
from modeling_pathmoe.convert import export_checkpoint
from modeling_pathmoe.convert.__main__ import main


SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "path": PathMoEConfig(**SIZES, **EXPERTS, moe_intermediate_size=16, router_block_size=2),
    "qwen": Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, intermediate_size=16),
    "llama": LlamaConfig(**SIZES, intermediate_size=24),
}
LINES = [f"The {i}th {noun} counts to {i * i}." for i in range(30) for noun in ("line", "town", "river", "bird")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of each kind with a tokenizer, a text, and a configuration."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer(LINES, 320)
    for name, config in MODELS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "LICENSE").write_text("free")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    shutil.copyfile(folder / "path" / "config.json", folder / "model.json")
    return folder


class Place:
    """A folder with a copy of the inputs, to be damaged; the methods take names in it."""

    def __init__(self, folder, inputs):
        self.folder = folder
        shutil.copytree(inputs, folder, dirs_exist_ok=True)

    def __truediv__(self, name):
        return self.folder / name

    def put(self, name, content=""):
        (self / name).parent.mkdir(exist_ok=True, parents=True)
        (self / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def cut(self, name):
        self.put(name, (self / name).read_bytes()[:-100])

    def set(self, name, **fields):
        content = json.loads((self / name).read_text()) | fields
        self.put(name, json.dumps({key: value for key, value in content.items() if value is not ...}))

    def tensors(self, model, edit):
        tensors = load_file(self / model / "model.safetensors")
        edit(tensors)
        save_file(tensors, self / model / "model.safetensors", metadata={"format": "pt"})

    def fill(self, model, name, value):
        self.tensors(model, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))

    def remove(self, name):
        (self / name).unlink()

    def link(self, name, target):
        (self / name).unlink(missing_ok=True)
        (self / name).symlink_to(target)

    def move_out(self, name):
        """Moves a file of a model out of it and leaves a link."""
        target = self / f"private-{name.split('/')[-1]}"
        (self / name).rename(target)
        self.link(name, target)

    def shard(self, model, **changes):
        """Splits the weights in two files; `changes` go into the index' `weight_map`."""
        tensors = load_file(self / model / "model.safetensors")
        self.remove(f"{model}/model.safetensors")
        names = sorted(tensors)
        files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
        for file, part in files.items():
            save_file({name: tensors[name] for name in part}, self / model / file, metadata={"format": "pt"})
        weight_map = {name: file for file, part in files.items() for name in part} | changes
        weight_map = {name: file for name, file in weight_map.items() if file is not ...}
        self.put(f"{model}/{INDEX}", json.dumps({"metadata": {}, "weight_map": weight_map}))


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def nothing(place):
    pass


def many(*edits):
    return lambda place: [edit(place) for edit in edits]


OPTIONS = [
    ("prune path out --experts 2 --text text.jsonl --tokens -5", nothing, "tokens -5"),
    ("prune path out --experts 2 --text text.jsonl --tokens 0", nothing, "tokens 0"),
    ("prune path out --experts 2 --text text.jsonl --tokens 100", nothing, "100 160"),
    ("prune path out --experts 2 --text text.jsonl --tokens x", nothing, "tokens x"),
    ("import qwen out --block-size 2 --text text.jsonl --tokens -5", nothing, "tokens -5"),
    ("prune path out --experts -1 --text text.jsonl", nothing, "experts -1"),
    ("prune path out --experts 1 --text text.jsonl", nothing, "experts 1"),
    ("prune path out --experts 5 --text text.jsonl", nothing, "experts 5"),
    ("prune path out --experts 2.5 --text text.jsonl", nothing, "experts 2.5"),
    ("upcycle llama out --experts 1000000000 --top-k 2", nothing, "experts 1000000000"),
    ("upcycle llama out --experts 0 --top-k 2", nothing, "experts 0"),
    ("upcycle llama out --experts -4 --top-k 2", nothing, "experts -4"),
    ("upcycle llama out --experts 4 --top-k 0", nothing, "experts_per_tok 0"),
    ("upcycle llama out --experts 4 --top-k 5", nothing, "experts_per_tok 5"),
    ("upcycle llama out --experts 4 --top-k 2 --noise nan", nothing, "noise nan"),
    ("upcycle llama out --experts 4 --top-k 2 --noise inf", nothing, "noise inf"),
    ("upcycle llama out --experts 4 --top-k 2 --noise 1e30", nothing, "noise 1e+30"),
    ("upcycle llama out --experts 4 --top-k 2 --noise 1e30 --no-verify", nothing, "noise 1e+30"),
    ("upcycle llama out --experts 4 --top-k 2 --noise=-1", nothing, "noise -1"),
    ("upcycle llama out --experts 4 --top-k 2 --drop nan", nothing, "drop nan"),
    ("upcycle llama out --experts 4 --top-k 2 --drop 1", nothing, "drop 1.0"),
    ("upcycle llama out --experts 4 --top-k 2 --granularity 0", nothing, "granularity 0"),
    ("upcycle llama out --experts 4 --top-k 2 --granularity 1000000000", nothing, "granularity 1000000000"),
    ("upcycle llama out --experts 4 --top-k 2 --block-size 0", nothing, "block_size 0"),
    ("upcycle llama out --experts 4 --top-k 2 --block-size -3", nothing, "block_size -3"),
    ("upcycle llama out --experts 4 --top-k 2 --seed -1", nothing, "seed -1"),
    ("upcycle llama out --experts 4", nothing, "--top-k"),
    ("import qwen out --block-size 0", nothing, "block_size 0"),
    ("import qwen out --block-size 2", nothing, "block_size 2 --text"),
    ("average path path out --weights nan nan", nothing, "weights nan"),
    ("average path path out --weights inf -inf", nothing, "-inf"),
    ("average path path out --weights 1", nothing, "weights 1.0"),
    ("average path path out --weights 1 1", nothing, "weights 1.0"),
    ("average path path out --weights 1e300 -1e300", nothing, "-1e300"),
    ("average path out --weights x", nothing, "weights x"),
    ("average path", nothing, "DST"),
    ("export path out --max-shard-size 0", nothing, "max-shard-size 0"),
    ("export path out --max-shard-size=-5GB", nothing, "max-shard-size -5GB"),
    ("export path out --max-shard-size huge", nothing, "max-shard-size huge"),
    ("export path out --max-shard-size nanGB", nothing, "max-shard-size nanGB"),
    ("export path out --max-shard-size ''", nothing, "max-shard-size"),
    ("export path out --to gguf", nothing, "--to gguf"),
    ("export path out --to mixtral", nothing, "qk_norm Mixtral"),
    ("explode path out", nothing, "explode"),
    ("inspect", nothing, "SRC"),
    ("", nothing, "COMMAND"),
    ("export path out --frobnicate", nothing, "--frobnicate"),
]

TARGETS = [
    ("export path path", nothing, "path"),
    ("export path path/new", nothing, "path/new"),
    ("average path path path/../path/x", nothing, "path/x"),
    ("export path out", lambda p: p.link("out", p / "nowhere"), "out"),
    ("export path link/new", lambda p: p.link("link", p / "path"), "link/new"),
    ("upcycle llama out --experts 4 --top-k 2", lambda p: p.put("out/precious", "data"), "out"),
    ("prune path out --experts 2 --text text.jsonl", lambda p: p.put("out"), "out"),
    ("import qwen file/out", lambda p: p.put("file"), "file"),
    ("import qwen /proc/nowhere/out", nothing, "/proc/nowhere/out"),
    (f"export path {'x' * 300}", nothing, "x" * 300),
    ("export path ''", nothing, "''"),
    ("export path .", nothing, "."),
    ("export path new/deep/out", lambda p: p.fill("path", NORM, torch.nan), f"{NORM} finite"),
]

SOURCES = [
    ("export nowhere out", nothing, "nowhere"),
    ("export '' out", nothing, "''"),
    ("import text.jsonl out", nothing, "text.jsonl"),
    ("inspect nowhere", nothing, "nowhere"),
    ("average path nowhere out", nothing, "nowhere"),
    ("export qwen out", nothing, "qwen3_moe"),
    ("import llama out", nothing, "llama"),
    ("import path out", nothing, "pathmoe"),
    ("upcycle qwen out --experts 4 --top-k 2", nothing, "qwen3_moe"),
    ("average path llama out", nothing, "llama"),
    ("prune mixtral out --experts 2 --text text.jsonl", nothing, "mixtral"),
    (
        "export path out",
        lambda p: p.set("path/config.json", architectures=["PathMoEForSequenceClassification"]),
        "path PathMoEForSequenceClassification",
    ),
    ("export path out", lambda p: p.put("path/adapter_config.json", "{}"), "adapter_config.json"),
]

CONFIGS = [
    ("export path out", lambda p: p.remove("path/config.json"), "path config.json"),
    ("export path out", lambda p: p.put("path/config.json"), "path/config.json"),
    ("import qwen out", lambda p: p.cut("qwen/config.json"), "qwen/config.json"),
    ("upcycle llama out --experts 4 --top-k 2", lambda p: p.put("llama/config.json", "[1]"), "llama/config.json [1]"),
    ("average path path out", lambda p: p.put("path/config.json", "null"), "path/config.json null"),
    ("prune path out --experts 2 --text text.jsonl", lambda p: p.put("path/config.json", b"\xff\xfe{"), "config.json"),
    ("inspect path", lambda p: p.put("path/config.json", "[" * 100_000), "path/config.json"),
    ("inspect path", lambda p: p.set("path/config.json", model_type=...), "config.json model_type"),
    ("inspect path", lambda p: p.set("path/config.json", model_type=7), "config.json model_type 7"),
    ("export path out", lambda p: p.set("path/config.json", model_type="nonesuch", auto_map=...), "nonesuch"),
    ("export path out", lambda p: p.set("path/config.json", model_type="nonesuch"), "nonesuch"),
    ("inspect path", lambda p: p.set("path/config.json", model_type="qwen3_moe"), "config.json model.routers"),
    ("import path out", lambda p: p.set("path/config.json", model_type="qwen3_moe"), "config.json model.routers"),
    ("upcycle path out --experts 4 --top-k 2", lambda p: p.set("path/config.json", model_type="llama"), "config.json"),
    ("inspect path", lambda p: p.set("path/config.json", model_type="llama"), "config.json llama"),
    ("export qwen out", lambda p: p.set("qwen/config.json", model_type="pathmoe"), "qwen config.json"),
    ("import qwen out", lambda p: p.set("qwen/config.json", model_type="mixtral"), "qwen config.json"),
    ("import mixtral out", lambda p: p.set("mixtral/config.json", model_type="qwen3_moe"), "mixtral config.json"),
    ("export path out", lambda p: p.set("path/config.json", architectures="PathMoE"), "architectures PathMoE"),
    ("export path out", lambda p: p.set("path/config.json", architectures=[7]), "architectures 7"),
    ("export path out", lambda p: p.set("path/config.json", quantization_config={"a": 1}), "quantization_config"),
    ("export path out", lambda p: p.set("path/config.json", transformers_weights="b"), "transformers_weights b"),
    ("export path out", lambda p: p.set("path/config.json", num_hidden_layers=10**6), "num_hidden_layers 1000000"),
    ("export path out", lambda p: p.set("path/config.json", num_hidden_layers=2), "num_hidden_layers 2"),
    ("export path out", lambda p: p.set("path/config.json", router_block_size=1), "config.json model.routers.2"),
    ("export path out", lambda p: p.set("path/config.json", router_type="nonesuch"), "config.json nonesuch"),
    (
        "export path out",
        lambda p: p.set("path/config.json", rms_norm_eps=math.nan),
        "config.json rms_norm_eps nan",
    ),
    ("export path out", lambda p: p.set("path/config.json", hidden_size="32"), "config.json hidden_size '32'"),
    ("export path out", lambda p: p.set("path/config.json", dtype="float99"), "config.json dtype float99"),
    ("export path out", lambda p: p.set("path/config.json", tie_word_embeddings=True), "tie_word_embeddings"),
    ("import qwen out", lambda p: p.set("qwen/config.json", num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    ("inspect llama", lambda p: p.set("llama/config.json", num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    ("import qwen out", lambda p: p.set("qwen/config.json", num_hidden_layers=-1), "num_hidden_layers -1"),
    ("import qwen out", lambda p: p.set("qwen/config.json", num_attention_heads=0), "num_attention_heads 0"),
    ("import qwen out", lambda p: p.set("qwen/config.json", num_attention_heads=2), "q_proj"),
    ("import qwen out", lambda p: p.set("qwen/config.json", rms_norm_eps=math.nan), "rms_norm_eps nan"),
    ("import qwen out", lambda p: p.set("qwen/config.json", hidden_act="nonesuch"), "hidden_act nonesuch"),
    ("import qwen out", lambda p: p.set("qwen/config.json", num_experts_per_tok=5), "num_experts_per_tok 5"),
    (
        "import qwen out --no-verify",
        lambda p: p.set("qwen/config.json", num_experts=2, num_local_experts=2),
        "num_experts 2",
    ),
    ("import qwen out", lambda p: p.set("qwen/config.json", num_local_experts=10**9), "num_local_experts 1000000000"),
    ("import qwen out --no-verify", lambda p: p.set("qwen/config.json", moe_intermediate_size=8), "gate_proj"),
    ("import qwen out --no-verify", lambda p: p.set("qwen/config.json", vocab_size=321), "embed_tokens"),
    ("import mixtral out --no-verify", lambda p: p.set("mixtral/config.json", intermediate_size=8), "w1"),
    ("import mixtral out", lambda p: p.set("mixtral/config.json", sliding_window=8), "sliding_window 8"),
    (
        "upcycle llama out --experts 4 --top-k 2 --no-verify",
        lambda p: p.set("llama/config.json", intermediate_size=12),
        "config.json gate_proj",
    ),
    (
        "upcycle llama out --experts 4 --top-k 2",
        lambda p: p.set("llama/config.json", intermediate_size=48),
        "config.json gate_proj",
    ),
    (
        "upcycle llama out --experts 4 --top-k 2 --no-verify",
        lambda p: p.set("llama/config.json", num_hidden_layers=3),
        "num_hidden_layers 3",
    ),
    (
        "upcycle llama out --experts 4 --top-k 2",
        lambda p: p.set("llama/config.json", intermediate_size=0),
        "intermediate_size 0",
    ),
    ("inspect llama", lambda p: p.set("llama/config.json", intermediate_size=12), "config.json gate_proj"),
    (
        "upcycle llama out --experts 4 --top-k 2",
        lambda p: p.set("llama/config.json", rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}),
        "rope_type nonesuch",
    ),
]

TENSORS = [
    ("export path out", lambda p: p.fill("path", NORM, torch.nan), f"{NORM} finite"),
    ("export path out --no-verify", lambda p: p.fill("path", NORM, torch.inf), f"{NORM} finite"),
    ("import qwen out", lambda p: p.fill("qwen", "lm_head.weight", torch.nan), "lm_head.weight finite"),
    ("import mixtral out --no-verify", lambda p: p.fill("mixtral", NORM, torch.nan), f"{NORM} finite"),
    (
        "import qwen out --no-verify --block-size 4",
        lambda p: p.fill("qwen", "model.layers.0.mlp.gate.weight", torch.nan),
        "model.layers.0.mlp.gate.weight finite",
    ),
    ("upcycle llama out --experts 4 --top-k 2", lambda p: p.fill("llama", NORM, torch.nan), f"{NORM} finite"),
    (
        "upcycle llama out --experts 4 --top-k 2 --no-verify",
        lambda p: p.fill("llama", "model.layers.1.mlp.up_proj.weight", -torch.inf),
        "model.layers.1.mlp.up_proj.weight finite",
    ),
    (
        "average path other out",
        many(lambda p: shutil.copytree(p / "path", p / "other"), lambda p: p.fill("other", NORM, torch.nan)),
        f"other {NORM} finite",
    ),
    (
        "average path other out --weights 1 0 --no-verify",
        many(lambda p: shutil.copytree(p / "path", p / "other"), lambda p: p.fill("other", NORM, torch.nan)),
        f"other {NORM} finite",
    ),
    ("prune path out --experts 2 --text text.jsonl", lambda p: p.fill("path", NORM, torch.nan), f"{NORM} finite"),
    (
        "prune path out --experts 2 --text text.jsonl --no-verify",
        lambda p: p.fill("path", "model.routers.1.weight", torch.nan),
        "model.routers.1.weight finite",
    ),
    ("export path out", lambda p: p.tensors("path", lambda t: t.pop(NORM)), f"config.json {NORM}"),
    ("export path out", lambda p: p.tensors("path", lambda t: t.update({NORM: torch.ones(3)})), f"{NORM} (3,)"),
    ("inspect path", lambda p: p.tensors("path", lambda t: t.update(extra=torch.ones(3))), "config.json extra"),
    (
        "import qwen out --no-verify",
        lambda p: p.tensors("qwen", lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"{NORM} I8",
    ),
    (
        "import qwen out --no-verify",
        lambda p: p.tensors(
            "qwen",
            lambda t: t.update({"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(16, 32).bfloat16()}),
        ),
        "model.layers.0.mlp bfloat16",
    ),
    (
        "import qwen out --no-verify",
        lambda p: p.tensors("qwen", lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(3, 32)})),
        "model.layers.0.mlp.gate.weight (3,",
    ),
]

FILES = [
    ("export path out", lambda p: p.cut("path/model.safetensors"), "path/model.safetensors"),
    ("export path out", lambda p: p.put("path/model.safetensors"), "path/model.safetensors"),
    ("export path out", lambda p: p.put("path/model.safetensors", b"\xff" * 64), "path/model.safetensors"),
    (
        "export path out",
        lambda p: p.put("path/model.safetensors", "version https://git-lfs"),
        "path/model.safetensors",
    ),
    ("inspect path", lambda p: p.remove("path/model.safetensors"), "path model.safetensors"),
    (
        "export path out",
        many(lambda p: p.remove("path/model.safetensors"), lambda p: p.put("path/model.safetensors/x")),
        "path/model.safetensors",
    ),
    ("export path out", many(lambda p: p.shard("path"), lambda p: p.remove("path/b.safetensors")), "b.safetensors"),
    ("export path out", many(lambda p: p.shard("path"), lambda p: p.cut("path/b.safetensors")), "b.safetensors"),
    ("export path out", many(lambda p: p.shard("path"), lambda p: p.put(f"path/{INDEX}")), INDEX),
    ("import qwen out", many(lambda p: p.shard("qwen"), lambda p: p.cut(f"qwen/{INDEX}")), INDEX),
    ("import qwen out", many(lambda p: p.shard("qwen"), lambda p: p.put(f"qwen/{INDEX}", "[1]")), f"{INDEX} [1]"),
    (
        "import qwen out",
        many(lambda p: p.shard("qwen"), lambda p: p.put(f"qwen/{INDEX}", "{}")),
        f"{INDEX} weight_map",
    ),
    (
        "inspect qwen",
        many(lambda p: p.shard("qwen"), lambda p: p.put(f"qwen/{INDEX}", '{"weight_map": [1]}')),
        f"{INDEX} weight_map",
    ),
    ("export path out", lambda p: p.shard("path", **{NORM: 7}), f"{INDEX} {NORM} 7"),
    ("export path out", lambda p: p.shard("path", **{NORM: "../qwen/model.safetensors"}), "../qwen/model.safetensors"),
    ("inspect path", lambda p: p.shard("path", **{NORM: str(p / "qwen/model.safetensors")}), "qwen/model.safetensors"),
    ("inspect path", lambda p: p.shard("path", **{NORM: "a.safetensors"}), f"{INDEX} {NORM}"),
    ("inspect path", lambda p: p.shard("path", **{NORM: ...}), NORM),
    ("inspect path", lambda p: p.shard("path", ghost="a.safetensors"), "ghost"),
    (
        "average path path out",
        many(
            lambda p: shutil.copyfile(p / "path/model.safetensors", p / "saved"),
            lambda p: p.shard("path"),
            lambda p: (p / "saved").rename(p / "path/model.safetensors"),
        ),
        f"model.safetensors {INDEX}",
    ),
    ("export path out", lambda p: p.put("path/tokenizer.json"), "path/tokenizer.json"),
    ("export path out", lambda p: p.cut("path/tokenizer.json"), "path/tokenizer.json"),
    ("export path out", lambda p: p.put("path/tokenizer.json", "7"), "path/tokenizer.json 7"),
    ("export path out", lambda p: p.put("path/tokenizer.json", "{}"), "path tokenizer"),
    ("import qwen out", lambda p: p.put("qwen/tokenizer_config.json", "[1]"), "qwen/tokenizer_config.json [1]"),
    ("import qwen out", lambda p: p.cut("qwen/tokenizer_config.json"), "qwen/tokenizer_config.json"),
    ("export path out", lambda p: p.set("path/tokenizer_config.json", tokenizer_class=7), "path tokenizer"),
    (
        "export path out",
        lambda p: p.set("path/tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["x.X", "x.X"]}),
        "path tokenizer",
    ),
    ("export path out", lambda p: p.put("path/generation_config.json", "{"), "path/generation_config.json"),
    ("export path out", lambda p: p.put("path/generation_config.json", "[1]"), "path/generation_config.json [1]"),
    (
        "export path out",
        lambda p: p.set(
            "path/tokenizer.json",
            added_tokens=[
                {
                    "id": 320,
                    "content": "zz",
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            ],
        ),
        "320 vocab_size",
    ),  # fmt: skip
    (
        "prune path out --experts 2 --text text.jsonl",
        lambda p: [file.unlink() for file in (p / "path").glob("tokenizer*")],
        "path tokenizer",
    ),
    ("inspect path", lambda p: p.put("path/conversion.json", "{"), "path/conversion.json"),
    ("inspect path", lambda p: p.put("path/conversion.json", "[1]"), "path/conversion.json [1]"),
    ("inspect path", lambda p: p.put("path/conversion.json", "{}"), "path/conversion.json operation"),
]

LINKS = [
    ("export path out", lambda p: p.move_out("path/LICENSE"), "path/LICENSE"),
    ("upcycle llama out --experts 4 --top-k 2", lambda p: p.link("llama/NOTICE", "/etc/hostname"), "llama/NOTICE"),
    ("import qwen out", lambda p: p.link("qwen/NOTICE", "../text.jsonl"), "qwen/NOTICE"),
    ("average path path out", lambda p: p.move_out("path/tokenizer.json"), "path/tokenizer.json"),
    ("export path out", lambda p: p.move_out("path/model.safetensors"), "path/model.safetensors"),
    ("inspect path", lambda p: p.move_out("path/config.json"), "path/config.json"),
    ("import qwen out", many(lambda p: p.shard("qwen"), lambda p: p.move_out("qwen/a.safetensors")), "a.safetensors"),
    (
        "prune path out --experts 2 --text text.jsonl",
        many(
            lambda p: p.put("path/generation_config.json", "{}"), lambda p: p.move_out("path/generation_config.json")
        ),
        "path/generation_config.json",
    ),
]

PRUNE = "prune path out --experts 2 --text"
TEXTS = [
    (f"{PRUNE} nowhere.jsonl", nothing, "nowhere.jsonl"),
    (f"{PRUNE} path", nothing, "path"),
    (f"{PRUNE} t.txt", lambda p: p.put("t.txt"), "t.txt"),
    (f"{PRUNE} t.txt", lambda p: p.put("t.txt", "short"), "t.txt"),
    (f"{PRUNE} t.txt", lambda p: p.put("t.txt", b"caf\xe9 " * 500), "t.txt"),
    (f"{PRUNE} t.jsonl", lambda p: p.put("t.jsonl", '{"text": "a"}\n{"text": \n'), "t.jsonl line 2"),
    (f"{PRUNE} t.jsonl", lambda p: p.put("t.jsonl", '{"text": "a"}\n[1]\n'), "t.jsonl line 2"),
    (f"{PRUNE} t.jsonl", lambda p: p.put("t.jsonl", '{"text": "a"}\n{"text": 7}\n'), "t.jsonl line 2 7"),
    (f"{PRUNE} t.jsonl", lambda p: p.put("t.jsonl", '{"text": null}\n' * 9), "t.jsonl text"),
    (f"{PRUNE} t.jsonl", lambda p: p.put("t.jsonl", '{"body": "a"}\n' * 900), "t.jsonl text"),
    (f"{PRUNE} t.jsonl", lambda p: p.put("t.jsonl", b'{"text": "caf\xe9"}\n' * 900), "t.jsonl"),
    (f"{PRUNE} t.csv", lambda p: p.put("t.csv", "text\n" + "word and word\n" * 300), "t.csv .jsonl"),
    (f"{PRUNE} t.txt.gz", lambda p: p.put("t.txt.gz", b"\x1f\x8b" * 300), "t.txt.gz .txt"),
    ("import qwen out --block-size 2 --text nowhere.txt", nothing, "nowhere.txt"),
    ("import qwen out --text nowhere.txt", nothing, "nowhere.txt"),
]

COST = "accounting model.json"
ACCOUNTING = [
    ("accounting", nothing, "FILE"),
    ("accounting nowhere.json", nothing, "nowhere.json"),
    (f"{COST} nowhere.json", nothing, "nowhere.json"),
    ("accounting path", nothing, "path"),
    ("accounting ''", nothing, "''"),
    ("accounting model.json --frobnicate", nothing, "--frobnicate"),
    (COST, lambda p: p.put("model.json"), "model.json"),
    (COST, lambda p: p.cut("model.json"), "model.json"),
    (COST, lambda p: p.put("model.json", "[1]"), "model.json [1]"),
    (COST, lambda p: p.put("model.json", b"\xff\xfe{"), "model.json"),
    ("accounting llama/config.json", nothing, "llama/config.json model_type"),
    (COST, lambda p: p.set("model.json", num_hidden_layers=10**6), "model.json num_hidden_layers 1000000"),
    (COST, lambda p: p.set("model.json", num_experts=10**9, num_local_experts=...), "model.json num_experts"),
    (COST, lambda p: p.set("model.json", vocab_size=2**60), "model.json vocab_size"),
    (COST, lambda p: p.set("model.json", hidden_size="32"), "model.json hidden_size '32'"),
    (COST, lambda p: p.set("model.json", rms_norm_eps=math.inf), "model.json rms_norm_eps inf"),
    (COST, lambda p: p.set("model.json", num_expert=3), "model.json num_expert"),
    (COST, lambda p: p.set("model.json", router_type=[1]), "model.json router_type"),
    ("accounting text.jsonl", nothing, "text.jsonl"),
    ("accounting path/model.safetensors", nothing, "model.safetensors"),
]

CASES = [*OPTIONS, *TARGETS, *SOURCES, *CONFIGS, *TENSORS, *FILES, *LINKS, *TEXTS, *ACCOUNTING]


def contents(folder):
    """The folders, the hash of every file and the target of every link."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, inputs)


def run(argv):
    """Runs a command as its module does, in this process."""
    command, *arguments = shlex.split(argv) or [None]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if command == "accounting":
            run_command(lambda: accounting.main(arguments))
        run_command(lambda: main(shlex.split(argv)))
    finally:
        signal.signal(signal.SIGTERM, handler)


def check_refusal(status, said, words):
    assert status == 2 and len(said.splitlines()) == 1, said
    assert all(word in said for word in shlex.split(words)) and "trust_remote_code" not in said, said


@pytest.mark.parametrize(("argv", "damage", "words"), CASES, ids=[argv for argv, _, _ in CASES])
def test_bad_input_is_refused_in_one_line_and_leaves_everything_as_it_was(place, capfd, argv, damage, words):
    damage(place)
    before = contents(place.folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(argv)
    check_refusal(ended.value.code, capfd.readouterr().err, words)
    assert contents(place.folder) == before


@pytest.mark.parametrize(
    ("argv", "damage", "words"),
    [
        ("convert upcycle llama out --experts 4 --top-k 2 --noise nan", nothing, "noise nan"),
        ("accounting model.json", lambda p: p.put("model.json"), "model.json"),
    ],
    ids=["convert", "accounting"],
)
def test_a_process_says_the_same(place, argv, damage, words):
    damage(place)
    before = contents(place.folder)
    module, *arguments = shlex.split(argv)
    command = [sys.executable, "-m", f"modeling_pathmoe.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    check_refusal(done.returncode, done.stderr, words)
    assert contents(place.folder) == before


def test_a_snapshot_of_the_hub_is_converted_though_its_files_are_links(place):
    """In the Hub's cache the files of a revision are links to blobs, which the revisions share."""
    blobs = place / "hub/models--a--b/blobs"
    snapshot = place / "hub/models--a--b/snapshots/0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate((place / "path").iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    place.link("current", snapshot)
    before = contents(place.folder)

    export_checkpoint("current", "out")

    assert (place / "out/LICENSE").read_text() == "free" and not any(f.is_symlink() for f in (place / "out").iterdir())
    assert {k: v for k, v in contents(place.folder).items() if k.split("/")[0] != "out"} == before
    place.link("hub/models--a--b/snapshots/0123abc/LICENSE", "../../../../text.jsonl")
    with pytest.raises(UserError, match="LICENSE is a link"):
        export_checkpoint("current", "again")


CODE = {"auto_map": {"AutoTokenizer": ["theirs.T", None]}, "custom_generate": "theirs.py"}


@pytest.mark.parametrize(
    "argv",
    [
        "export path out",
        "import qwen out",
        "upcycle llama out --experts 4 --top-k 2",
        "average path path out",
        "prune path out --experts 2 --text text.jsonl",
    ],
)
def test_references_to_code_of_others_are_left_behind(place, argv):
    model = argv.split()[1]
    place.put(f"{model}/generation_config.json", '{"temperature": 0.7, "do_sample": true}')
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        place.set(f"{model}/{name}", **CODE, custom_pipelines={"x": {"impl": "theirs.P"}})
    (place / model / "theirs.py").write_text("")

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
    assert f"t.jsonl: skipped 2 of {len(lines) + 2} lines" in capsys.readouterr().err
    kept = [json.loads((place / name / "conversion.json").read_text())["kept"] for name in ("out", "without")]
    assert kept[0] == kept[1]


def test_results_that_are_not_finite_are_not_written(place):
    """Finite checkpoints whose weighted sum overflows."""
    place.tensors("path", lambda tensors: tensors[NORM].fill_(3e38))
    shutil.copytree(place / "path", place / "other")
    place.tensors("other", lambda tensors: tensors[NORM].neg_())
    before = contents(place.folder)
    with pytest.raises(UserError, match=f"{NORM} of the target would hold values that are not finite"):
        main(shlex.split("average path other out --weights 2 -1 --no-verify"))
    assert contents(place.folder) == before
