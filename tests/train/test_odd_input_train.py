# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Wrong and odd inputs to the training command. Each is refused in one clear line before the text is tokenised, with
nothing lost and nothing left half-written; or it is one of the odd inputs that are valid, and trains."""

import gzip
import hashlib
import json
import os
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pathmoe import PathMoEConfig, PathMoEForCausalLM
from pathmoe.command import UserError, one_line
from pathmoe.text.reader import train_tokenizer
from pathmoe.train.main import main


TEXTS = [f"{i} plus {j} is {i + j}; " * 6 for i in range(12) for j in range(12)]
MODEL = {
    "model_type": "pathmoe", "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "router_block_size": 2,
}  # fmt: skip


def to_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text, a tokenizer and a checkpoint, which every case gets a copy of."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "text.jsonl").write_text(to_lines(TEXTS))
    tokenizer = train_tokenizer(TEXTS, 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    model = PathMoEForCausalLM(PathMoEConfig(**{k: v for k, v in MODEL.items() if k != "model_type"}))
    model.save_pretrained(folder / "checkpoint")
    tokenizer.save_pretrained(folder / "checkpoint")
    return folder


@pytest.fixture
def place(inputs, tmp_path, monkeypatch):
    """The working directory of a case."""
    shutil.copytree(inputs, tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path / "in"


def recipe_text(**fields):
    values = {
        "model": "model.json", "tokenizer": "tokenizer", "dataset": "text.jsonl", "sequence_length": 32,
        "batch_size": 4, "micro_batch_size": 4, "max_steps": 1, "eval_sequences": 2, "output_dir": "run",
        "cache_dir": "cache",
    } | fields  # fmt: skip
    return yaml.safe_dump({name: value for name, value in values.items() if value is not ...})


def train(*args, **fields):
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        file.write(recipe_text(**fields))
    return main(["--config", "recipe.yaml", *args])


def contents(folder):
    """A hash of every file and the target of every link, but for the lock and what `datasets` caches."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name not in {"run.lock", "recipe.yaml"}
    }


def assert_refused(place, complaint, run):
    before = contents(place)
    with pytest.raises(UserError) as refusal:
        run()
    line = one_line(refusal.value)
    assert re.search(complaint, line), line
    assert len(line) < 1000, line
    after = contents(place)
    assert before == after


# Fields of the recipe, and what the line must name.
FIELDS = [
    ({"learning_rate": 1e39}, "learning_rate=1e.39"),
    ({"learning_rate": 0}, "learning_rate=0"),
    ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
    ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ({"learning_rate": float("inf")}, "learning_rate=inf"),
    ({"learning_rate": True}, "learning_rate"),
    ({"learning_rate": "1e-3x"}, "learning_rate='1e-3x'"),
    ({"learning_rate": [1e-3]}, "learning_rate"),
    ({"learning_rate": None}, "learning_rate"),
    ({"max_steps": True}, "max_steps"),
    ({"max_steps": 1.5}, "max_steps"),
    ({"max_steps": "3"}, "max_steps"),
    ({"max_steps": -1}, "max_steps=-1"),
    ({"max_steps": 10**30}, "max_steps"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"batch_size": 10**15, "micro_batch_size": 10**15}, "batch_size"),
    ({"micro_batch_size": 3}, "micro_batch_size=3"),
    ({"sequence_length": 1}, "sequence_length=1"),
    ({"sequence_length": 65}, "sequence_length=65"),
    ({"eval_sequences": 0}, "eval_sequences=0"),
    ({"holdout_every": 1}, "holdout_every=1"),
    ({"warmup_steps": 1.5, "max_steps": 9}, "warmup_steps=1.5"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"warmup_steps": True}, "warmup_steps"),
    ({"warmup_steps": float("nan")}, "warmup_steps=nan"),
    ({"schedule": "wsd", "decay_steps": 0.1, "max_steps": 3}, "decay_steps=0.1"),
    ({"schedule": "wsd", "decay_steps": 0}, "decay_steps=0"),
    ({"schedule": ""}, "schedule=''"),
    ({"beta1": 1.0}, "beta1=1.0"),
    ({"beta2": 1.0}, "beta2=1.0"),
    ({"beta2": -0.1}, "beta2=-0.1"),
    ({"epsilon": 0}, "epsilon=0"),
    ({"weight_decay": -1}, "weight_decay=-1"),
    ({"max_grad_norm": 0}, "max_grad_norm=0"),
    ({"min_lr_ratio": 2}, "min_lr_ratio=2"),
    ({"seed": -1}, "seed=-1"),
    ({"seed": 2**64}, "seed=18446744073709551616"),
    ({"seed": True}, "seed"),
    ({"precision": "int8"}, "precision='int8'"),
    ({"engine": "tpu"}, "engine='tpu'"),
    ({"ep_size": 2}, "ep_size=2"),
    ({"streaming": "yes please"}, "streaming"),
    ({"streaming": 1}, "streaming"),
    ({"output_dir": ""}, "output_dir=''"),
    ({"output_dir": "a\0b"}, "output_dir"),
    ({"output_dir": "x" * 300}, "output_dir='xxx"),
    ({"output_dir": "text.jsonl"}, "output_dir='text.jsonl'"),
    ({"output_dir": "text.jsonl/run"}, "output_dir='text.jsonl/run'"),
    ({"output_dir": "/proc/run"}, "output_dir='/proc/run'"),
    ({"output_dir": ...}, "output_dir"),
    ({"output_dir": None}, "output_dir"),
    ({"output_dir": ["a"]}, "output_dir"),
    ({"cache_dir": "text.jsonl"}, "cache_dir text.jsonl"),
    ({"cache_dir": ""}, "cache_dir=''"),
    ({"tracker": "no_such_tracker"}, "tracker='no_such_tracker'"),
    ({"tracker": "comet_ml"}, "tracker='comet_ml'"),
    ({"attn_implementation": "no_such_attention"}, "attn_implementation': 'no_such_attention'"),
    ({"experts_implementation": "no_such_experts"}, "experts_implementation': 'no_such_experts'"),
    ({"model": "checkpoint", "attn_implementation": "no_such"}, "attn_implementation': 'no_such'"),
    ({"resume": "nowhere"}, "resume='nowhere'"),
    ({"resume": ""}, "resume=''"),
    ({"unknown_field": 1}, "unknown_field"),
    ({"learning-rate": 1}, "learning-rate"),
    ({"text_column": "body"}, "no column 'body'"),
    ({"train_split": "validation"}, "no split 'validation'"),
    ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    ({"dataset": "nowhere/of/all"}, "nowhere/of/all"),
    ({"dataset": None}, "dataset"),
    ({"dataset": ""}, "dataset=''"),
    ({"dataset": "json", "data_files": {"train": 3}}, "data_files"),
    ({"dataset": "json", "data_files": "nowhere*.jsonl"}, r"nowhere\*.jsonl"),
    ({"dataset": "json", "data_files": "tokenizer"}, "'tokenizer' is a folder"),
    ({"mixture": [], "dataset": ...}, r"mixture=\[\]"),
    ({"mixture": ["text.jsonl"], "dataset": ...}, r"mixture\[0\]"),
    ({"mixture": [{"dataset": "text.jsonl", "weight": True}], "dataset": ...}, r"mixture\[0\]"),
    ({"mixture": [{"dataset": 3, "weight": 1}], "dataset": ...}, r"mixture\[0\]"),
    ({"mixture": [{"dataset": "text.jsonl", "weight": 1e400}], "dataset": ...}, r"mixture\[0\]"),
    ({"mixture": [{"dataset": "text.jsonl", "weight": 1, "text_column": 7}], "dataset": ...}, r"mixture\[0\]"),
    ({"model": "nowhere.json"}, "model='nowhere.json'"),
    ({"model": "nowhere"}, "model='nowhere'"),
    ({"model": "tokenizer"}, "model='tokenizer'"),
    ({"model": ""}, "model=''"),
    ({"model": "."}, "model='.'"),
    ({"tokenizer": "nowhere"}, "tokenizer='nowhere'"),
    ({"tokenizer": ""}, "tokenizer=''"),
    ({"tokenizer": "text.jsonl"}, "tokenizer='text.jsonl'"),
    ({"model_overrides": {"rope_theta": 0.0}}, "rope_theta"),
    ({"model_overrides": {"rope_theta": -1.0}}, "rope_theta"),
    ({"model_overrides": {"num_hidden_layers": 10**6}}, "num_hidden_layers"),
    ({"model_overrides": {"num_experts": 10**9}}, "num_experts="),
    ({"model_overrides": {"vocab_size": 10**12}}, "vocab_size="),
    ({"model_overrides": {"vocab_size": 256}}, "vocab_size"),
    ({"model_overrides": {"hidden_size": -16}}, "hidden_size"),
    ({"model_overrides": {"hidden_size": True}}, "hidden_size"),
    ({"model_overrides": {"dtype": "bfloat16"}}, "dtype"),
    ({"model_overrides": {"torch_dtype": "bfloat16"}}, "torch_dtype"),
    ({"model_overrides": {"model_type": "bert"}}, "model_type"),
    ({"model_overrides": {"num_expert": 8}}, "num_expert"),
    ({"model_overrides": {"initializer_range": 1e30}}, "initializer_range|not finite"),
    ({"model_overrides": {"router_z_loss_coef": "1e-3x"}}, "router_z_loss_coef"),
    ({"model_overrides": []}, "model_overrides"),
    ({"model_overrides": {3: 4}}, "model_overrides"),
    ({"model": "checkpoint", "model_overrides": {"router_block_size": 1}}, "missing"),
    ({"model": "checkpoint", "model_overrides": {"num_experts": 8}}, "of a different shape|num_experts"),
    ({"model": "checkpoint", "model_overrides": {"num_hidden_layers": 1}}, "unknown"),
    ({"model": "checkpoint", "model_overrides": {"hidden_size": 32}}, "of a different shape"),
]


@pytest.mark.parametrize(("fields", "complaint"), FIELDS, ids=lambda value: str(value)[:60])
def test_wrong_field_is_refused(place, fields, complaint):
    assert_refused(place, complaint, lambda: train(**fields))


# Arguments of the command line, and what the line must name.
ARGUMENTS = [
    (["--output_dir", "--resume"], "--output_dir has no value: --resume follows it"),
    (["--max_steps"], "max_steps"),
    (["--max_steps", "4", "r.yaml"], "'r.yaml' has no --field before it"),
    (["--model_overrides", "{num_experts:", "8}"], "model_overrides {num_experts: lacks a closing bracket"),
    (["max_steps", "3"], "max_steps"),
    (["--max_steps", "3.5"], "max_steps"),
    (["--max_steps", "[1"], "max_steps"),
    (["--max_steps", "2", "--max_steps", "3"], "max_steps"),
    (["--model_overrides", "{router_z_loss_coef: 1, router_z_loss_coef: 2}"], "router_z_loss_coef"),
    (["--model_overrides", "num_experts=4"], "model_overrides"),
    (["--model_overrides", "{num_experts: "], "model_overrides"),
    (["--", "3"], "field"),
    (["--no_such", "3"], "no_such"),
    (["--learning_rate", ""], "learning_rate"),
    (["--output_dir", ""], "output_dir=''"),
    (["--streaming", "maybe"], "streaming"),
]


@pytest.mark.parametrize(("args", "complaint"), ARGUMENTS, ids=str)
def test_wrong_argument_is_refused(place, args, complaint):
    assert_refused(place, complaint, lambda: train(*args))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
RECIPES = {
    "twice": (recipe_text().encode() + b"max_steps: 5\n", "duplicate key max_steps"),
    "twice-nested": (b"model_overrides: {num_experts: 4, num_experts: 8}\n", "duplicate key num_experts"),
    "latin-1": ("# für\n".encode("latin-1"), "UTF-8"),
    "utf-16": (recipe_text().encode("utf-16"), "r.yaml"),
    "binary": (bytes(range(256)), "r.yaml"),
    "empty": (b"", "r.yaml"),
    "a model": (b"hidden_size: 16\n", "hidden_size in --config r.yaml. It is the configuration of a model"),
    "list": (b"- a\n- b\n", "r.yaml"),
    "number": (b"3\n", "r.yaml"),
    "tabs": (b"max_steps:\t3\n\tmodel: x\n", "r.yaml"),
    "bomb": (BOMB.encode(), "aliases"),
    "loop": (b"model_overrides: &a {x: *a}\n", "r.yaml"),
    "deep": (b"model_overrides: " + b"[" * 5000 + b"]" * 5000, "r.yaml"),
    "python": (b"model: !!python/object/apply:os.system ['touch hacked']\n", "r.yaml"),
    "two documents": (b"model: a\n---\nmodel: b\n", "r.yaml"),
    "not a key": (b"[1, 2]: 3\n", "r.yaml|field"),
    "number as key": (b"3: 3\n", "3"),
    "to the base of 60": (b"max_steps: 1:30\n", "1:30 would be read as 90"),
    "to the base of 8": (b"max_steps: 010\n", "010 would be read as 8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipe_file_is_refused(place, name):
    content, complaint = RECIPES[name]
    (place / "r.yaml").write_bytes(content)
    assert_refused(place, complaint, lambda: main(["--config", "r.yaml"]))


def damage(name, content):
    def spoil(place):
        file = place / name
        file.write_bytes(content(file.read_bytes()) if callable(content) else content)

    return spoil


def with_tensors(change):
    def spoil(place):
        file = place / "checkpoint" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def set_entry(tensors, value):
    tensors[next(name for name in tensors if "router" in name)].view(-1)[0] = value


def set_config(name, **fields):
    return damage(name, lambda before: json.dumps(json.loads(before) | fields).encode())


def drop(tensors, part):
    del tensors[next(name for name in tensors if part in name)]


CHECKPOINT = {"model": "checkpoint", "tokenizer": ...}
FILES = {
    "model.json empty": (damage("model.json", b""), {}, "model.json"),
    "model.json truncated": (damage("model.json", lambda x: x[:-5]), {}, "model.json"),
    "model.json a list": (damage("model.json", b"[]"), {}, "model.json"),
    "model.json a number": (damage("model.json", b"3"), {}, "model.json"),
    "model.json not UTF-8": (damage("model.json", b'{"a": "\xff"}'), {}, "model.json"),
    "model.json key twice": (damage("model.json", lambda x: b'{"num_experts": 8, ' + x[1:]), {}, "num_experts"),
    "model.json NaN": (set_config("model.json", rope_theta=float("nan")), {}, "rope_theta"),
    "model.json bert": (set_config("model.json", model_type="bert"), {}, "bert"),
    "model.json unknown type": (set_config("model.json", model_type="no_such"), {}, "no_such"),
    "model.json type a list": (set_config("model.json", model_type=["pathmoe"]), {}, "model_type"),
    "model.json deep": (damage("model.json", b"[" * 100000), {}, "model.json"),
    "model.json a folder": (lambda place: (place / "folder.json").mkdir(), {"model": "folder.json"}, "folder.json"),
    "config.json empty": (damage("checkpoint/config.json", b""), CHECKPOINT, "config.json|model='checkpoint'"),
    "config.json a list": (damage("checkpoint/config.json", b"[]"), CHECKPOINT, "config.json|model='checkpoint'"),
    "config.json null": (damage("checkpoint/config.json", b"null"), CHECKPOINT, "config.json|model='checkpoint'"),
    "config.json truncated": (damage("checkpoint/config.json", lambda x: x[:9]), CHECKPOINT, "model='checkpoint'"),
    "config.json no type": (damage("checkpoint/config.json", b"{}"), CHECKPOINT, "model='checkpoint'"),
    "config.json bert": (set_config("checkpoint/config.json", model_type="bert"), CHECKPOINT, "bert|intermediate"),
    "config.json missing": (lambda p: (p / "checkpoint/config.json").unlink(), CHECKPOINT, "model='checkpoint'"),
    "config.json block size": (set_config("checkpoint/config.json", router_block_size=1), CHECKPOINT, "missing"),
    "weights missing": (lambda p: (p / "checkpoint/model.safetensors").unlink(), CHECKPOINT, "model='checkpoint'"),
    "weights empty": (damage("checkpoint/model.safetensors", b""), CHECKPOINT, "model='checkpoint'"),
    "weights truncated": (damage("checkpoint/model.safetensors", lambda x: x[:-9]), CHECKPOINT, "model='checkpoint'"),
    "weights are text": (damage("checkpoint/model.safetensors", b"version https://"), CHECKPOINT, "'checkpoint'"),
    "weights NaN": (with_tensors(lambda t: set_entry(t, float("nan"))), CHECKPOINT, "not finite"),
    "weights infinite": (with_tensors(lambda t: set_entry(t, float("inf"))), CHECKPOINT, "not finite"),
    "weights lack a router": (with_tensors(lambda t: drop(t, "router")), CHECKPOINT, "missing.*initialize_missing"),
    "weights lack experts": (with_tensors(lambda t: drop(t, "experts")), CHECKPOINT, "missing"),
    "weights have more": (with_tensors(lambda t: t.update(extra=torch.ones(2))), CHECKPOINT, "unknown.*extra"),
    "tokenizer.json empty": (damage("tokenizer/tokenizer.json", b""), {}, "tokenizer='tokenizer'"),
    "tokenizer.json truncated": (damage("tokenizer/tokenizer.json", lambda x: x[:99]), {}, "tokenizer='tokenizer'"),
    "tokenizer.json a list": (damage("tokenizer/tokenizer.json", b"[]"), {}, "tokenizer='tokenizer'"),
    "tokenizer.json an object": (damage("tokenizer/tokenizer.json", b"{}"), {}, "tokenizer='tokenizer'"),
    "tokenizer.json missing": (lambda p: (p / "tokenizer/tokenizer.json").unlink(), {}, "tokenizer='tokenizer'"),
    "tokenizer_config.json a list": (damage("tokenizer/tokenizer_config.json", b"[]"), {}, "tokenizer='tokenizer'"),
    "tokenizer_config.json empty": (damage("tokenizer/tokenizer_config.json", b""), {}, "tokenizer='tokenizer'"),
    "no end of text": (set_config("tokenizer/tokenizer_config.json", eos_token=None), {}, "end-of-text"),
    "text empty": (damage("text.jsonl", b""), {}, "text.jsonl"),
    "text blank": (damage("text.jsonl", b"\n\n\n"), {}, "text.jsonl"),
    "text a number": (damage("text.jsonl", b"3\n"), {}, "text.jsonl"),
    "text all null": (damage("text.jsonl", b'{"text": null}\n' * 9), {}, "text.jsonl"),
    "text of numbers": (damage("text.jsonl", b'{"text": 3}\n' * 9), {}, "text"),
    "text binary": (damage("text.jsonl", bytes(range(256)) * 9), {}, "text.jsonl"),
    "text of one document": (damage("text.jsonl", b'{"text": "one"}\n'), {}, "text.jsonl"),
    "text of empty documents": (damage("text.jsonl", b'{"text": ""}\n' * 99), {"sequence_length": 64}, "text"),
    "text with many bad rows": (damage("text.jsonl", lambda x: x + b"{bad\n" * 9), {"max_bad_rows": 8}, "line 153"),
    "stream with many bad rows": (
        damage("text.jsonl", lambda x: b'{"text": null}\n' * 9 + x),
        {"max_bad_rows": 8, "streaming": True},
        "line 9",
    ),
    "stream all null": (damage("text.jsonl", b'{"text": null}\n' * 9), {"streaming": True}, "text.jsonl"),
    "stream short": (
        damage("text.jsonl", b'{"text": "a"}\n' * 99),
        {"streaming": True, "sequence_length": 64},
        "text",
    ),
    "parquet is no parquet": (lambda p: (p / "a.parquet").write_text("no"), {"dataset": "a.parquet"}, "a.parquet"),
    "gz is no gz": (lambda p: (p / "a.jsonl.gz").write_text("no"), {"dataset": "a.jsonl.gz"}, "a.jsonl.gz"),
    "gz truncated": (
        lambda p: (p / "a.jsonl.gz").write_bytes(gzip.compress(to_lines(TEXTS).encode())[:-20]),
        {"dataset": "a.jsonl.gz"},
        "a.jsonl.gz",
    ),
    "text behind a dangling link": (
        lambda p: (p / "link.jsonl").symlink_to("gone.jsonl"),
        {"dataset": "link.jsonl"},
        "'link.jsonl' does not exist",
    ),
    "dataset folder damaged": (
        lambda p: ((p / "saved").mkdir(), (p / "saved" / "dataset_info.json").write_text("{")),
        {"dataset": "saved"},
        "saved",
    ),
    "final is a link": (
        lambda p: ((p / "run").mkdir(), (p / "run/final").symlink_to(p / "checkpoint")),
        {"resume": "auto"},
        "run/final",
    ),
    "final is a file": (
        lambda p: ((p / "run").mkdir(), (p / "run/final").write_text("mine")),
        {"resume": "auto"},
        "run/final",
    ),
    "final is a stranger's": (
        lambda p: ((p / "run").mkdir(), shutil.copytree(p / "checkpoint", p / "run/final")),
        {"resume": "auto"},
        "run/final",
    ),
    "final is a stranger's, no resume": (
        lambda p: ((p / "run").mkdir(), shutil.copytree(p / "checkpoint", p / "run/final")),
        {},
        "run/final",
    ),
    "model lies in final": (
        lambda p: ((p / "run").mkdir(), shutil.copytree(p / "checkpoint", p / "run/final")),
        {"model": "run/final"},
        "model='run/final'",
    ),
    "model lies in final behind a link": (
        lambda p: (
            (p / "run").mkdir(),
            shutil.copytree(p / "checkpoint", p / "run/final"),
            (p / "link").symlink_to(p / "run"),
        ),
        {"model": "link/final"},
        "model='link/final'",
    ),
    "text lies in final": (
        lambda p: ((p / "run/final").mkdir(parents=True), shutil.copy(p / "text.jsonl", p / "run/final")),
        {"dataset": "run/final/text.jsonl"},
        "run/final/text.jsonl",
    ),
    "checkpoints is a file": (
        lambda p: ((p / "run").mkdir(), (p / "run/checkpoints").write_text("")),
        {"resume": "auto"},
        "run/checkpoints",
    ),
    "metrics are not ours": (
        lambda p: ((p / "run").mkdir(), (p / "run/metrics.jsonl").write_text("mine\n")),
        {"resume": "auto"},
        "metrics.jsonl",
    ),
    "recipe of the run is damaged": (
        lambda p: ((p / "run").mkdir(), (p / "run/recipe.yaml").write_text("a: [")),
        {"resume": "auto"},
        "run/recipe.yaml",
    ),
    "recipe of the run is another thing": (
        lambda p: ((p / "run").mkdir(), (p / "run/recipe.yaml").write_text("- mine")),
        {"resume": "auto"},
        "run/recipe.yaml",
    ),
    "output holds a run": (
        lambda p: ((p / "run").mkdir(), (p / "run/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')),
        {},
        "--resume auto",
    ),
    "text a link to itself": (
        lambda p: ((p / "text.jsonl").unlink(), (p / "text.jsonl").symlink_to("text.jsonl")),
        {},
        "text.jsonl",
    ),
    "recipe.yaml a folder": (
        lambda p: (p / "run" / "recipe.yaml").mkdir(parents=True),
        {},
        "recipe.yaml is not a file",
    ),
    "metrics.jsonl a pipe": (
        lambda p: ((p / "run").mkdir(), os.mkfifo(p / "run" / "metrics.jsonl")),
        {},
        "is not a file",
    ),
    "stream of blanks": (damage("text.jsonl", to_lines([" "] * 99).encode()), {"streaming": True}, "only blanks"),
    "text of blanks": (damage("text.jsonl", to_lines([" \n"] * 200).encode()), {}, "no row of dataset='text.jsonl'"),
    "too little text for a tokenizer": (
        damage("text.jsonl", to_lines(["a", "b", "c", "d"]).encode()),
        {"tokenizer": None, "holdout_every": 2},
        "tokens, fewer than one sequence|too few documents",
    ),
    "output is a dangling link": (lambda p: (p / "run").symlink_to(p / "nowhere/at/all"), {}, "output_dir='run'"),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_file_is_refused(place, name):
    spoil, fields, complaint = FILES[name]
    spoil(place)
    assert_refused(place, complaint, lambda: train(**fields))


ROWS = [
    b'{"text": null}\n',
    b"{}\n",
    b'{"text": 3}\n',
    b'{"text": "unfinished\n',
    b'{"text": "\xff\xfe"}\n',
    b'{"text": "\\ud800"}\n',
    b"[1, 2]\n",
    b"3\n",
    b"\0\0\0\n",
]


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_left_out_and_said(place, capsys, streaming):
    rows = to_lines(TEXTS).encode().splitlines(keepends=True)
    (place / "text.jsonl").write_bytes(b"".join(rows[:20] + ROWS + rows[20:]))
    assert train(streaming=streaming, max_steps=9, max_bad_rows=9, checkpoint_every=3) == 0
    assert "line 21" in "".join(capsys.readouterr())
    shutil.rmtree(place / "run" / "checkpoints" / "step-00000009")
    shutil.rmtree(place / "run" / "final")
    assert train(streaming=streaming, max_steps=9, max_bad_rows=9, checkpoint_every=3, resume="auto") == 0


def write_gz(file, text):
    with gzip.open(file, "wt") as stream:
        stream.write(text)


ODD = {
    "a.jsonl.gz": lambda file: write_gz(file, to_lines(TEXTS)),
    "a.JSONL": lambda file: file.write_text(to_lines(TEXTS)),
    "a.txt.gz": lambda file: write_gz(file, "\n\n".join(TEXTS)),
    "a.md": lambda file: file.write_text("\n\n".join(TEXTS)),
    "a[1].jsonl": lambda file: file.write_text(to_lines(TEXTS)),
    "a b'ü.jsonl": lambda file: file.write_text(to_lines(TEXTS)),
    "crlf.jsonl": lambda file: file.write_bytes(to_lines(TEXTS).replace("\n", "\r\n").encode()),
    "bom.jsonl": lambda file: file.write_bytes(b"\xef\xbb\xbf" + to_lines(TEXTS).encode()),
    "list.json": lambda file: file.write_text(json.dumps([{"text": text} for text in TEXTS])),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_file_is_read(place, name, streaming):
    ODD[name](place / name)
    assert train(dataset=name, streaming=streaming) == 0


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        (["--model_overrides", "{router_z_loss_coef: 1e-3}"], {}),
        ([], {"model_overrides": {"embedding_initializer_range": 1}}),
        ([], {"model": "checkpoint", "model_overrides": {"router_block_size": 1}, "initialize_missing": True}),
        ([], {"output_dir": "deep/er/run"}),
        ([], {"output_dir": "<img src=x> [a](b)"}),
        ([], {"seed": 2**32 - 1}),
    ],
    ids=str,
)
def test_odd_recipe_is_valid(place, args, fields):
    assert train(*args, **fields) == 0
    (card,) = place.rglob("final/README.md")
    assert "<img" not in card.read_text().split("```yaml")[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"validation_split": "train"},
        {
            "dataset": "json",
            "data_files": {"train": "text.jsonl", "validation": "./text.jsonl"},
            "validation_split": "validation",
        },
        {
            "dataset": "json",
            "data_files": {"train": "text.jsonl", "validation": "copy.jsonl"},
            "validation_split": "validation",
        },
    ],
    ids=str,
)
def test_validation_on_the_training_text_is_said(place, capsys, fields):
    shutil.copy("text.jsonl", "copy.jsonl")
    assert train(**fields) == 0
    assert "WARNING: validation_split=" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "8", "1000000000000"], "--gpus 1000000000000"),
        (["--memory", "-80"], "--memory -80"),
        (["--memory", "nan"], "--memory nan"),
        (["--batch_size", "5", "--micro_batch_size", "4"], "batch_size=5 must be a multiple of micro_batch_size=4"),
        (["--ep_size", "3"], "ep_size=3 must divide num_experts=4"),
        (["--ep_size", "4", "--gpus", "2"], "ep_size=4 must divide"),
        (["--model", "llama.json"], "not llama"),
    ],
    ids=str,
)
def test_wrong_plan_is_refused(place, capsys, args, complaint):
    fields = {name: value for name, value in MODEL.items() if "expert" not in name and "router" not in name}
    (place / "llama.json").write_text(json.dumps(fields | {"model_type": "llama"} | {"intermediate_size": 8}).replace(
        '"moe_intermediate_size": 8, ', ""))  # fmt: skip
    (place / "recipe.yaml").write_text(recipe_text(batch_size=4))
    with pytest.raises((UserError, SystemExit)) as refusal:
        main(["plan", "--config", "recipe.yaml", *args])
    said = capsys.readouterr().err if isinstance(refusal.value, SystemExit) else one_line(refusal.value)
    assert complaint in said, said


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 1, "loss": {"a": 1}}', "loss of step 1"),
        ('{"step": 1, "loss": "low"}', "loss of step 1"),
        ('{"step": 1, "loss": null}', "nothing to draw"),
        ('{"step": 1, "loss": 1.0, "load": [[0.5, 0.5], [1.0]]}', "load of step 1"),
        ('{"step": 1, "loss": 1.0, "load": [0.5, "x"]}', "load of step 1"),
    ],
)
def test_wrong_figures_are_not_drawn(place, line, complaint):
    (place / "run").mkdir()
    (place / "run" / "metrics.jsonl").write_text(line + "\n")
    assert_refused(place, complaint, lambda: main(["plot", "run"]))
    assert_refused(place, "names a run twice", lambda: main(["plot", "run", "./run"]))
