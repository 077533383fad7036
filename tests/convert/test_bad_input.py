# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""What strangers and mistakes give to the converter and the accounting: each is refused by one line that names the
field or file and its value; nothing is written, and the sources stay as they are."""

import math
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from pathmoe import accounting
from pathmoe.command import run_command
from pathmoe.convert.__main__ import main
from tests.convert_helpers import INDEX, NORM, contents, do


UPCYCLE = "upcycle llama out --experts 4 --top-k 2"
PRUNE = "prune path out --experts 2 --text"
# A command, what is done to its inputs (one edit or several), and words of the message.
OPTIONS = [
    (f"{PRUNE} text.jsonl --tokens -5", [], "tokens -5"),
    (f"{PRUNE} text.jsonl --tokens 0", [], "tokens 0"),
    (f"{PRUNE} text.jsonl --tokens 100", [], "100 160"),
    (f"{PRUNE} text.jsonl --tokens x", [], "tokens x"),
    ("import qwen out --block-size 2 --text text.jsonl --tokens -5", [], "tokens -5"),
    ("prune path out --experts -1 --text text.jsonl", [], "experts -1"),
    ("prune path out --experts 1 --text text.jsonl", [], "experts 1"),
    ("prune path out --experts 5 --text text.jsonl", [], "experts 5"),
    ("prune path out --experts 2.5 --text text.jsonl", [], "experts 2.5"),
    ("upcycle llama out --experts 1000000000 --top-k 2", [], "experts 1000000000"),
    ("upcycle llama out --experts 0 --top-k 2", [], "experts 0"),
    ("upcycle llama out --experts -4 --top-k 2", [], "experts -4"),
    ("upcycle llama out --experts 4 --top-k 0", [], "experts_per_tok 0"),
    ("upcycle llama out --experts 4 --top-k 5", [], "experts_per_tok 5"),
    (f"{UPCYCLE} --noise nan", [], "noise nan"),
    (f"{UPCYCLE} --noise inf", [], "noise inf"),
    (f"{UPCYCLE} --noise 1e30", [], "noise 1e+30"),
    (f"{UPCYCLE} --noise 1e30 --no-verify", [], "noise 1e+30"),
    (f"{UPCYCLE} --noise=-1", [], "noise -1"),
    (f"{UPCYCLE} --drop nan", [], "drop nan"),
    (f"{UPCYCLE} --drop 1", [], "drop 1.0"),
    (f"{UPCYCLE} --granularity 0", [], "granularity 0"),
    (f"{UPCYCLE} --granularity 1000000000", [], "granularity 1000000000"),
    (f"{UPCYCLE} --block-size 0", [], "block_size 0"),
    (f"{UPCYCLE} --block-size -3", [], "block_size -3"),
    (f"{UPCYCLE} --seed -1", [], "seed -1"),
    ("upcycle llama out --experts 4", [], "--top-k"),
    ("import qwen out --block-size 0", [], "block_size 0"),
    ("import qwen out --block-size 2", [], "block_size 2 --text"),
    ("average path path out --weights nan nan", [], "weights nan"),
    ("average path path out --weights inf -inf", [], "-inf"),
    ("average path path out --weights 1", [], "weights 1.0"),
    ("average path path out --weights 1 1", [], "weights 1.0"),
    ("average path path out --weights 1e300 -1e300", [], "-1e300"),
    ("average path out --weights x", [], "weights x"),
    ("average path", [], "DST"),
    ("export path out --max-shard-size 0", [], "max-shard-size 0"),
    ("export path out --max-shard-size=-5GB", [], "max-shard-size -5GB"),
    ("export path out --max-shard-size huge", [], "max-shard-size huge"),
    ("export path out --max-shard-size nanGB", [], "max-shard-size nanGB"),
    ("export path out --max-shard-size ''", [], "max-shard-size"),
    ("export path out --to gguf", [], "--to gguf"),
    ("export path out --to mixtral", [], "qk_norm Mixtral"),
    ("export path out --to olmoe", [], "qk_norm OLMoE"),
    ("explode path out", [], "explode"),
    ("inspect", [], "SRC"),
    ("", [], "COMMAND"),
    ("export path out --frobnicate", [], "--frobnicate"),
    (f"{UPCYCLE} --drop inf", [], "drop inf"),
    (f"{UPCYCLE} --seed 99999999999999999999", [], "seed 99999999999999999999"),
    ("average path path path out --weights 0.5 0.5", [], "weights 3"),
    ("export path out --max-shard-size 0.0001KB", [], "max-shard-size 0.0001KB"),
    ("export path out --max-shard-size 1PB", [], "max-shard-size 1PB"),
    (f"{PRUNE} text.jsonl --tokens 999999999999", [], "tokens 999999999999"),
]

TARGETS = [
    ("export path path", [], "path"),
    ("export path path/new", [], "path/new"),
    ("average path path path/../path/x", [], "path/x"),
    ("export path out", do.link("out", "nowhere"), "out"),
    ("export path link/new", do.link("link", "path"), "link/new"),
    (UPCYCLE, do.put("out/precious", "data"), "out"),
    (f"{PRUNE} text.jsonl", do.put("out"), "out"),
    ("import qwen file/out", do.put("file"), "file"),
    ("import qwen /proc/nowhere/out", [], "/proc/nowhere/out"),
    (f"export path {'x' * 300}", [], "x" * 300),
    ("export path ''", [], "''"),
    ("export path .", [], "."),
    ("export path new/deep/out", do.fill("path", NORM, math.nan), f"{NORM} finite"),
    ("export path dangling/out", do.link("dangling", "nowhere"), "dangling"),
    (f"export path {'/'.join(['d' * 200] * 30)}", [], "d" * 200),
]

SOURCES = [
    ("export nowhere out", [], "nowhere"),
    ("export '' out", [], "''"),
    ("import text.jsonl out", [], "text.jsonl"),
    ("inspect nowhere", [], "nowhere"),
    ("average path nowhere out", [], "nowhere"),
    ("export qwen out", [], "qwen3_moe"),
    ("import llama out", [], "llama"),
    ("import path out", [], "pathmoe"),
    ("upcycle qwen out --experts 4 --top-k 2", [], "qwen3_moe"),
    ("upcycle olmoe out --experts 4 --top-k 2", [], "olmoe"),
    ("average path llama out", [], "llama"),
    ("prune mixtral out --experts 2 --text text.jsonl", [], "mixtral"),
    (
        "export path out",
        do.config("path", architectures=["PathMoEForSequenceClassification"]),
        "path PathMoEForSequenceClassification",
    ),
    ("export path out", do.put("path/adapter_config.json", "{}"), "adapter_config.json"),
    ("export loop out", do.link("loop", "loop"), "loop"),
    (f"inspect {'x' * 5000}", [], "x" * 5000),
    ("average path path out", [], "path twice"),
    ("average path other path/../other out", do.copy("path", "other"), "other twice"),
    ("average path other other/out", do.copy("path", "other"), "other/out"),
    ("average path other out", [do.copy("path", "other"), do.config("other", bos_token_id=5)], "other bos_token_id 5"),
    ("average path other out", [do.copy("path", "other"), do.cut("other/tokenizer.json")], "other/tokenizer.json"),
]

CONFIGS = [
    ("export path out", do.remove("path/config.json"), "path config.json"),
    ("export path out", do.put("path/config.json"), "path/config.json"),
    ("import qwen out", do.cut("qwen/config.json"), "qwen/config.json"),
    (UPCYCLE, do.put("llama/config.json", "[1]"), "llama/config.json [1]"),
    ("average path path out", do.put("path/config.json", "null"), "path/config.json null"),
    (f"{PRUNE} text.jsonl", do.put("path/config.json", b"\xff\xfe{"), "config.json"),
    ("inspect path", do.put("path/config.json", "[" * 100_000), "path/config.json"),
    ("inspect path", do.config("path", model_type=...), "config.json model_type"),
    ("inspect path", do.config("path", model_type=7), "config.json model_type 7"),
    ("export path out", do.config("path", model_type="nonesuch", auto_map=...), "nonesuch"),
    ("export path out", do.config("path", model_type="nonesuch"), "nonesuch"),
    ("inspect path", do.config("path", model_type="qwen3_moe"), "config.json intermediate_size"),
    ("import path out", do.config("path", model_type="qwen3_moe"), "config.json intermediate_size"),
    ("upcycle path out --experts 4 --top-k 2", do.config("path", model_type="llama"), "config.json"),
    ("inspect path", do.config("path", model_type="llama"), "config.json intermediate_size"),
    ("export qwen out", do.config("qwen", model_type="pathmoe"), "qwen config.json"),
    ("import qwen out", do.config("qwen", model_type="mixtral"), "qwen config.json"),
    ("import mixtral out", do.config("mixtral", model_type="qwen3_moe"), "mixtral config.json"),
    ("import qwen out", do.config("qwen", model_type="olmoe"), "qwen config.json"),
    ("import olmoe out", do.config("olmoe", clip_qkv=8.0), "clip_qkv 8.0"),
    ("import olmoe out", do.config("olmoe", eos_token_id=320), "eos_token_id 320"),
    ("import olmoe out", do.config("olmoe", head_dim=4), "q_proj"),
    ("export path out", do.config("path", architectures="PathMoE"), "architectures PathMoE"),
    ("export path out", do.config("path", architectures=[7]), "architectures 7"),
    ("export path out", do.config("path", quantization_config={"a": 1}), "quantization_config"),
    ("export path out", do.config("path", transformers_weights="b"), "transformers_weights b"),
    ("export path out", do.config("path", num_hidden_layers=10**6), "num_hidden_layers 1000000"),
    ("export path out", do.config("path", num_hidden_layers=2), "num_hidden_layers 2"),
    ("export path out", do.config("path", router_block_size=1), "config.json model.routers.2"),
    ("export path out", do.config("path", router_type="nonesuch"), "config.json nonesuch"),
    (
        "export path out",
        do.config("path", rms_norm_eps=math.nan),
        "config.json rms_norm_eps nan",
    ),
    ("export path out", do.config("path", hidden_size="32"), "config.json hidden_size '32'"),
    ("export path out", do.config("path", dtype="float99"), "config.json dtype float99"),
    ("export path out", do.config("path", tie_word_embeddings=True), "tie_word_embeddings"),
    ("import qwen out", do.config("qwen", num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    ("inspect llama", do.config("llama", num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    ("import qwen out", do.config("qwen", num_hidden_layers=-1), "num_hidden_layers -1"),
    ("import qwen out", do.config("qwen", num_attention_heads=0), "num_attention_heads 0"),
    ("import qwen out", do.config("qwen", num_attention_heads=2), "q_proj"),
    ("import qwen out", do.config("qwen", rms_norm_eps=math.nan), "rms_norm_eps nan"),
    ("import qwen out", do.config("qwen", hidden_act="nonesuch"), "hidden_act nonesuch"),
    ("import qwen out", do.config("qwen", num_experts_per_tok=5), "num_experts_per_tok 5"),
    (
        "import qwen out --no-verify",
        do.config("qwen", num_experts=2, num_local_experts=2),
        "num_experts 2",
    ),
    ("import qwen out", do.config("qwen", num_local_experts=10**9), "num_local_experts 1000000000"),
    ("import qwen out --no-verify", do.config("qwen", moe_intermediate_size=8), "gate_proj"),
    ("import qwen out --no-verify", do.config("qwen", vocab_size=321), "embed_tokens"),
    ("import mixtral out --no-verify", do.config("mixtral", intermediate_size=8), "w1"),
    ("import mixtral out", do.config("mixtral", sliding_window=8), "sliding_window 8"),
    (
        f"{UPCYCLE} --no-verify",
        do.config("llama", intermediate_size=12),
        "config.json gate_proj",
    ),
    (
        UPCYCLE,
        do.config("llama", intermediate_size=48),
        "config.json gate_proj",
    ),
    (
        f"{UPCYCLE} --no-verify",
        do.config("llama", num_hidden_layers=3),
        "num_hidden_layers 3",
    ),
    (
        UPCYCLE,
        do.config("llama", intermediate_size=0),
        "intermediate_size 0",
    ),
    ("inspect llama", do.config("llama", intermediate_size=12), "config.json gate_proj"),
    (
        UPCYCLE,
        do.config("llama", rope_parameters={"rope_type": "nonesuch", "rope_theta": 1e4}),
        "rope_type nonesuch",
    ),
    ("export path out", do.put("path/config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "path/config.json"),
    ("export path out", do.config("path", quantization_config="gptq"), "quantization_config"),
    ("export path out", do.config("path", num_experts=3, num_local_experts=4), "num_experts 3"),
    ("import qwen out", do.config("qwen", attention_bias=True), "q_proj.bias"),
    ("import qwen out", do.config("qwen", mlp_only_layers=[1]), "config.json model.layers.1.mlp.down_proj.weight"),
    ("import qwen out", do.config("qwen", mlp_only_layers=[0, 1, 2, 3]), "mlp_only_layers [0, 1, 2, 3]"),
    ("import qwen out", do.config("qwen", decoder_sparse_step=0), "decoder_sparse_step 0"),
    ("inspect qwen", do.config("qwen", decoder_sparse_step=0), "decoder_sparse_step 0"),
    ("export path out", do.config("path", mlp_only_layers=[1], intermediate_size=8), "config.json model.layers.1.mlp"),
    ("import mixtral out", do.config("mixtral", rope_theta=0, rope_parameters=None), "rope_theta 0"),
    (
        UPCYCLE,
        do.config("llama", tie_word_embeddings="yes"),
        "tie_word_embeddings yes",
    ),
    (UPCYCLE, do.config("llama", pad_token_id=-1), "pad_token_id -1"),
    (UPCYCLE, do.config("llama", num_key_value_heads=3), "num_key_value_heads 3"),
    (
        "import qwen out --no-verify",
        [do.fuse("qwen"), do.config("qwen", num_experts=2, num_local_experts=2)],
        "gate_up",
    ),
    (
        "export path out",
        do.put("path/config.json", '{"model_type": "llama", "model_type": "pathmoe"}'),
        "path/config.json model_type duplicate",
    ),
    ("import qwen out", do.config("qwen", layer_types=["sliding_attention"] * 4), "layer_types sliding_attention"),
    (UPCYCLE, do.config("llama", text_config={"a": 1}), "llama/config.json"),
]

TENSORS = [
    ("export path out", do.fill("path", NORM, math.nan), f"{NORM} finite"),
    ("export path out --no-verify", do.fill("path", NORM, math.inf), f"{NORM} finite"),
    ("import qwen out", do.fill("qwen", "lm_head.weight", math.nan), "lm_head.weight finite"),
    ("import mixtral out --no-verify", do.fill("mixtral", NORM, math.nan), f"{NORM} finite"),
    (
        "import qwen out --no-verify --block-size 4",
        do.fill("qwen", "model.layers.0.mlp.gate.weight", math.nan),
        "model.layers.0.mlp.gate.weight finite",
    ),
    (UPCYCLE, do.fill("llama", NORM, math.nan), f"{NORM} finite"),
    (
        f"{UPCYCLE} --no-verify",
        do.fill("llama", "model.layers.1.mlp.up_proj.weight", -math.inf),
        "model.layers.1.mlp.up_proj.weight finite",
    ),
    (
        "average path other out",
        [do.copy("path", "other"), do.fill("other", NORM, math.nan)],
        f"other {NORM} finite",
    ),
    (
        "average path other out --weights 1 0 --no-verify",
        [do.copy("path", "other"), do.fill("other", NORM, math.nan)],
        f"other {NORM} finite",
    ),
    (f"{PRUNE} text.jsonl", do.fill("path", NORM, math.nan), f"{NORM} finite"),
    (
        f"{PRUNE} text.jsonl --no-verify",
        do.fill("path", "model.routers.1.weight", math.nan),
        "model.routers.1.weight finite",
    ),
    ("export path out", do.tensors("path", lambda t: t.pop(NORM)), f"config.json {NORM}"),
    ("export path out", do.tensors("path", lambda t: t.update({NORM: torch.ones(3)})), f"{NORM} (3,)"),
    ("inspect path", do.tensors("path", lambda t: t.update(extra=torch.ones(3))), "config.json extra"),
    (
        "import qwen out --no-verify",
        do.tensors("qwen", lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"{NORM} I8",
    ),
    (
        "import qwen out --no-verify",
        do.tensors(
            "qwen",
            lambda t: t.update({"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(16, 32).bfloat16()}),
        ),
        "model.layers.0.mlp bfloat16",
    ),
    (
        "import qwen out --no-verify",
        do.tensors("qwen", lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(3, 32)})),
        "model.layers.0.mlp.gate.weight (3,",
    ),
    (
        "average path other out",
        [do.copy("path", "other"), do.tensors("other", lambda t: t.update({NORM: t[NORM].half()}))],
        f"other {NORM} float16",
    ),
    (
        f"{UPCYCLE} --no-verify",
        do.tensors("llama", lambda t: t.update({"model.layers.999999999999.x": torch.ones(1)})),
        "num_hidden_layers 4",
    ),
    (
        "inspect path",
        do.tensors("path", lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})),
        f"{NORM} F8_E4M3",
    ),
    ("export path out", do.tensors("path", lambda t: t.clear()), "config.json model."),
    (
        "import qwen out",
        [
            do.tensors(
                "qwen", lambda t: t.update({"model.layers.1023.x": torch.ones(1), ".experts.32766.": torch.ones(1)})
            ),
            do.config("qwen", num_hidden_layers=1024, num_experts=32767, num_local_experts=32767),
        ],
        "num_hidden_layers 1024 num_experts 32767",
    ),
    (UPCYCLE, do.tensors("llama", lambda t: t[NORM].fill_(3e38)), f"{NORM} llama 1e+18"),
    (
        "average path other out",
        [do.tensors("path", lambda t: t[NORM].fill_(3e38)), do.copy("path", "other")],
        f"{NORM} path 1e+18",
    ),
]

FILES = [
    ("export path out", do.cut("path/model.safetensors"), "path/model.safetensors"),
    ("export path out", do.put("path/model.safetensors"), "path/model.safetensors"),
    ("export path out", do.put("path/model.safetensors", b"\xff" * 64), "path/model.safetensors"),
    (
        "export path out",
        do.put("path/model.safetensors", "version https://git-lfs"),
        "path/model.safetensors",
    ),
    ("inspect path", do.remove("path/model.safetensors"), "path model.safetensors"),
    (
        "export path out",
        [do.remove("path/model.safetensors"), do.put("path/model.safetensors/x")],
        "path/model.safetensors",
    ),
    ("export path out", [do.shard("path"), do.remove("path/b.safetensors")], "b.safetensors"),
    ("export path out", [do.shard("path"), do.cut("path/b.safetensors")], "b.safetensors"),
    ("export path out", [do.shard("path"), do.put(f"path/{INDEX}")], INDEX),
    ("import qwen out", [do.shard("qwen"), do.cut(f"qwen/{INDEX}")], INDEX),
    ("import qwen out", [do.shard("qwen"), do.put(f"qwen/{INDEX}", "[1]")], f"{INDEX} [1]"),
    (
        "import qwen out",
        [do.shard("qwen"), do.put(f"qwen/{INDEX}", "{}")],
        f"{INDEX} weight_map",
    ),
    (
        "inspect qwen",
        [do.shard("qwen"), do.put(f"qwen/{INDEX}", '{"weight_map": [1]}')],
        f"{INDEX} weight_map",
    ),
    ("export path out", do.shard("path", **{NORM: 7}), f"{INDEX} {NORM} 7"),
    ("export path out", do.shard("path", **{NORM: "../qwen/model.safetensors"}), "../qwen/model.safetensors"),
    ("inspect path", do.shard("path", **{NORM: "/qwen/model.safetensors"}), "qwen/model.safetensors"),
    ("inspect path", do.shard("path", **{NORM: "a.safetensors"}), f"{INDEX} {NORM}"),
    ("inspect path", do.shard("path", **{NORM: ...}), NORM),
    ("inspect path", do.shard("path", ghost="a.safetensors"), "ghost"),
    (
        "average path path out",
        [do.copy("path/model.safetensors", "a"), do.shard("path"), do.rename("a", "path/model.safetensors")],
        f"model.safetensors {INDEX}",
    ),
    ("export path out", do.put("path/tokenizer.json"), "path/tokenizer.json"),
    ("export path out", do.cut("path/tokenizer.json"), "path/tokenizer.json"),
    ("export path out", do.put("path/tokenizer.json", "7"), "path/tokenizer.json 7"),
    ("export path out", do.put("path/tokenizer.json", "{}"), "path tokenizer"),
    ("import qwen out", do.put("qwen/tokenizer_config.json", "[1]"), "qwen/tokenizer_config.json [1]"),
    ("import qwen out", do.cut("qwen/tokenizer_config.json"), "qwen/tokenizer_config.json"),
    ("export path out", do.set("path/tokenizer_config.json", tokenizer_class=7), "path tokenizer"),
    (
        "export path out",
        do.set("path/tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["x.X", "x.X"]}),
        "path tokenizer",
    ),
    ("export path out", do.put("path/generation_config.json", "{"), "path/generation_config.json"),
    ("export path out", do.put("path/generation_config.json", "[1]"), "path/generation_config.json [1]"),
    (
        f"{PRUNE} text.jsonl",
        [do.remove("path/tokenizer.json"), do.remove("path/tokenizer_config.json")],
        "path tokenizer",
    ),
    ("inspect path", do.put("path/conversion.json", "{"), "path/conversion.json"),
    ("inspect path", do.put("path/conversion.json", "[1]"), "path/conversion.json [1]"),
    ("inspect path", do.put("path/conversion.json", "{}"), "path/conversion.json operation"),
    ("export path out", do.shard("path", **{NORM: ".."}), f"{INDEX} '..'"),
    ("export path out", do.shard("path", **{NORM: "b.bin"}), f"{INDEX} b.bin"),
    ("export path out", do.rename("path/model.safetensors", "path/pytorch_model.bin"), "model.safetensors"),
    ("export path out", do.put("path/chat_template.jinja", b"\xff\xfe\xfa"), "path tokenizer"),
    ("export path out", do.put("path/special_tokens_map.json", '{"bos'), "special_tokens_map.json"),
    ("export path out", do.put("path/LICENSE.md/mine"), "path/LICENSE.md is not a file"),
]

LINKS = [
    ("export path out", do.move_out("path/LICENSE"), "path/LICENSE"),
    (UPCYCLE, do.link("llama/NOTICE", "/etc/hostname"), "llama/NOTICE"),
    ("import qwen out", do.link("qwen/NOTICE", "../text.jsonl"), "qwen/NOTICE"),
    ("average path path out", do.move_out("path/tokenizer.json"), "path/tokenizer.json"),
    ("export path out", do.move_out("path/model.safetensors"), "path/model.safetensors"),
    ("inspect path", do.move_out("path/config.json"), "path/config.json"),
    ("import qwen out", [do.shard("qwen"), do.move_out("qwen/a.safetensors")], "a.safetensors"),
    (
        f"{PRUNE} text.jsonl",
        [do.put("path/generation_config.json", "{}"), do.move_out("path/generation_config.json")],
        "path/generation_config.json",
    ),
    ("export path out", do.link("path/NOTICE", "nowhere"), "path/NOTICE"),
    ("export path out", do.link("path/LICENSE", "LICENSE"), "path/LICENSE"),
    ("export path out", do.link("path/additional_chat_templates", "/etc"), "additional_chat_templates /etc"),
]

TEXTS = [
    (f"{PRUNE} nowhere.jsonl", [], "nowhere.jsonl"),
    (f"{PRUNE} path", [], "path"),
    (f"{PRUNE} t.txt", do.put("t.txt"), "t.txt"),
    (f"{PRUNE} t.txt", do.put("t.txt", "short"), "t.txt"),
    (f"{PRUNE} t.txt", do.put("t.txt", b"caf\xe9 " * 500), "t.txt"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": "a"}\n{"text": \n'), "t.jsonl line 2"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": "a"}\n[1]\n'), "t.jsonl line 2"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": "a"}\n{"text": 7}\n'), "t.jsonl 'row 2' 7"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": null}\n' * 9), "t.jsonl text"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"body": "a"}\n' * 900), "t.jsonl text"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", b'{"text": "caf\xe9"}\n' * 900), "t.jsonl"),
    (f"{PRUNE} t.csv", do.put("t.csv", "text\n" + "word and word\n" * 300), "t.csv .jsonl"),
    (f"{PRUNE} t.txt.gz", do.put("t.txt.gz", b"\x1f\x8b" * 300), "t.txt.gz .txt"),
    ("import qwen out --block-size 2 --text nowhere.txt", [], "nowhere.txt"),
    ("import qwen out --text nowhere.txt", [], "nowhere.txt"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": "a"}\n' + "[" * 200_000), "t.jsonl line 2"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": "a\\ud800b"}\n' * 500), "t.jsonl line 1"),
    (f"{PRUNE} t.jsonl", do.put("t.jsonl", '{"text": ""}\n' * 900), "t.jsonl text"),
    (f"{PRUNE} t.txt", do.put("t.txt", " \n" * 900), "t.txt 'no rows'"),
    (
        f"{PRUNE} text.jsonl",
        do.config("path", max_position_embeddings=1),
        "max_position_embeddings 1",
    ),
    (f"{PRUNE} text.jsonl", do.tensors("path", lambda t: t[NORM].fill_(3e38)), f"{NORM} path 1e+18"),
]

COST = "accounting model.json"
ACCOUNTING = [
    ("accounting", [], "FILE"),
    ("accounting nowhere.json", [], "nowhere.json"),
    (f"{COST} nowhere.json", [], "nowhere.json"),
    ("accounting path", [], "path"),
    ("accounting ''", [], "''"),
    ("accounting model.json --frobnicate", [], "--frobnicate"),
    (COST, do.put("model.json"), "model.json"),
    (COST, do.cut("model.json"), "model.json"),
    (COST, do.put("model.json", "[1]"), "model.json [1]"),
    (COST, do.put("model.json", b"\xff\xfe{"), "model.json"),
    ("accounting llama/config.json", [], "llama/config.json model_type"),
    (COST, do.set("model.json", num_hidden_layers=10**6), "model.json num_hidden_layers 1000000"),
    (COST, do.set("model.json", num_experts=10**9, num_local_experts=...), "model.json num_experts"),
    (COST, do.set("model.json", vocab_size=2**60), "model.json vocab_size"),
    (COST, do.set("model.json", hidden_size="32"), "model.json hidden_size '32'"),
    (COST, do.set("model.json", rms_norm_eps=math.inf), "model.json rms_norm_eps inf"),
    (COST, do.set("model.json", num_expert=3), "model.json num_expert"),
    (COST, do.set("model.json", router_type=[1]), "model.json router_type"),
    ("accounting text.jsonl", [], "text.jsonl"),
    ("accounting path/model.safetensors", [], "model.safetensors"),
    (COST, do.set("model.json", model_type=...), "model.json model_type None"),
    (COST, do.set("model.json", router_block_size=0), "model.json router_block_size 0"),
    (COST, do.set("model.json", rope_parameters=7), "model.json rope_parameters"),
    (f"accounting {'x' * 5000}", [], "x" * 5000),
]

CASES = [*OPTIONS, *TARGETS, *SOURCES, *CONFIGS, *TENSORS, *FILES, *LINKS, *TEXTS, *ACCOUNTING]


def damage_place(place, edits):
    for edit in edits if isinstance(edits, list) else [edits]:
        edit(place)


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


@pytest.mark.parametrize(("argv", "damage", "words"), CASES, ids=[argv[:80] for argv, _, _ in CASES])
def test_bad_input_is_refused_in_one_line_and_leaves_everything_as_it_was(place, capfd, argv, damage, words):
    damage_place(place, damage)
    before = contents(place.folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(argv)
    check_refusal(ended.value.code, capfd.readouterr().err, words)
    assert contents(place.folder) == before


@pytest.mark.parametrize(
    ("argv", "damage", "words"),
    [
        ("convert upcycle llama out --experts 4 --top-k 2 --noise nan", [], "noise nan"),
        ("accounting model.json", do.put("model.json"), "model.json"),
    ],
    ids=["convert", "accounting"],
)
def test_a_process_says_the_same(place, argv, damage, words):
    damage_place(place, damage)
    before = contents(place.folder)
    module, *arguments = shlex.split(argv)
    command = [sys.executable, "-m", f"pathmoe.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    check_refusal(done.returncode, done.stderr, words)
    assert contents(place.folder) == before
