# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Folders of tiny models that a test of the converter can damage."""

import hashlib
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from pathmoe import PathMoEConfig
from pathmoe.text.reader import train_tokenizer


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "path": PathMoEConfig(**SIZES, **EXPERTS, moe_intermediate_size=16, router_block_size=2),
    "qwen": Qwen3MoeConfig(**SIZES, **EXPERTS, moe_intermediate_size=16),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, intermediate_size=16),
    "olmoe": OlmoeConfig(**SIZES, **EXPERTS, intermediate_size=16, eos_token_id=2),
    "llama": LlamaConfig(**SIZES, intermediate_size=24),
}
LINES = [f"The {i}th {noun} counts to {i * i}." for i in range(30) for noun in ("line", "town", "river", "bird")]


def save_inputs(folder):
    """Saves a model of each kind with a tokenizer, a text, and a configuration."""
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

    def config(self, model, **fields):
        self.set(f"{model}/config.json", **fields)

    def set(self, name, **fields):
        content = json.loads((self / name).read_text()) | fields
        self.put(name, json.dumps({key: value for key, value in content.items() if value is not ...}))

    def tensors(self, model, edit):
        tensors = load_file(self / model / "model.safetensors")
        edit(tensors)
        save_file(tensors, self / model / "model.safetensors", metadata={"format": "pt"})

    def fill(self, model, name, value):
        self.tensors(model, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))

    def copy(self, name, to):
        (shutil.copytree if (self / name).is_dir() else shutil.copyfile)(self / name, self / to)

    def rename(self, name, to):
        (self / name).rename(self / to)

    def remove(self, name):
        (self / name).unlink()

    def link(self, name, target):
        (self / name).unlink(missing_ok=True)
        (self / name).symlink_to(target)

    def fuse(self, model):
        """Saves a Qwen3-MoE with the experts of a layer in one tensor, as transformers holds them."""
        loaded = AutoModelForCausalLM.from_pretrained(self / model)
        loaded.save_pretrained(self / model, save_original_format=False)

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


class Edits:
    """`do.cut(name)` is a function that calls `cut(name)` of the place that it is given."""

    def __getattr__(self, name):
        return lambda *args, **options: lambda place: getattr(place, name)(*args, **options)


do = Edits()


def contents(folder):
    """The folders, the hash of every file and the target of every link."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.is_dir() or hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }
