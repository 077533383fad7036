# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import contextlib
import json
import os
import random
import signal
import socket
from pathlib import Path


# Read when the libraries are imported, and by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores must not fight over them

# In the background of a shell or under nohup, SIGINT is ignored, and the processes that tests interrupt inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import yaml  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from transformers import set_seed  # noqa: E402

from pathmoe import PathMoEConfig  # noqa: E402


# A busy machine is no failure.
settings.register_profile("pathmoe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pathmoe")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws without a seed of its own must not depend on the tests that its worker ran before."""
    set_seed(0)


# Models that several rooms are tested on.
pytest_plugins = ["tests.tiny_models"]

TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "router_block_size": 2,
}


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    """Accelerate and Trainer keep their engine and precision for the whole process; each test file starts anew."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny_config():
    """Returns a function that makes a tiny config; keyword arguments override its fields."""

    def make(**overrides):
        return PathMoEConfig(**{**TINY, **overrides})

    return make


@pytest.fixture
def free_port():
    """A port on this machine that nothing listens on, as text. It is below those that the system gives to whoever
    asks for any port, which might take it before it is used, and each worker has its own thousand of them."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 12000 + worker % 20 * 1000
    for port in random.SystemRandom().sample(range(first, first + 1000), 1000):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("localhost", port))
            return str(port)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A function that writes a recipe for a tiny model and returns the arguments that run it."""
    folder = tmp_path_factory.mktemp("recipe")
    model = {
        "model_type": "pathmoe", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64, "router_block_size": 2,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(model))
    lines = [f"{i} plus {j} is {i + j}; " * 6 for i in range(20) for j in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    def make(output_dir, **fields):
        values = {
            "model": str(folder / "model.json"), "dataset": str(folder / "text.jsonl"), "sequence_length": 32,
            "batch_size": 8, "micro_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "log_every": 1,
            "eval_sequences": 10, "output_dir": str(output_dir),
        } | fields  # fmt: skip
        file = folder / f"{Path(output_dir).name}-{len(list(folder.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump(values))
        return ["--config", str(file)]

    return make
