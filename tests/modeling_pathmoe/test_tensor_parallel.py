# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Two real ranks that share the model's tensors by its plan, against one."""

import os
import subprocess
import sys
from pathlib import Path

import torch


QK_NORM = [True, False, "full"]


def run_rank(folder):
    """Saves loss, logits and whole gradients of each model in the folder, computed by both ranks together."""
    from torch import distributed
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import pathmoe  # noqa: F401

    distributed.init_process_group("gloo")
    for qk_norm in QK_NORM:
        model = AutoModelForCausalLM.from_pretrained(
            f"{folder}/{qk_norm}", distributed_config=DistributedConfig(tp_size=2)
        )
        assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
        ids = torch.load(f"{folder}/ids.pt")
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        found = {"loss": outputs.loss, "logits": outputs.logits, **gradients}
        found = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in found.items()}
        torch.save(found, f"{folder}/{qk_norm}/rank{distributed.get_rank()}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_ranks_compute_what_one_does(tiny_model, tokens, gradients, assert_same, tmp_path, free_port):
    """Logits, loss and every gradient, on both ranks. A norm over all heads cannot be cut with the heads."""
    ids = tokens(2, 7)
    torch.save(ids, tmp_path / "ids.pt")
    for qk_norm in QK_NORM:
        tiny_model(vocab_size=100, qk_norm=qk_norm).save_pretrained(tmp_path / str(qk_norm))
    code = "import sys; from tests.modeling_pathmoe.test_tensor_parallel import run_rank; run_rank(sys.argv[1])"
    shared = {"PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_ADDR": "localhost", "MASTER_PORT": free_port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    for qk_norm in QK_NORM:
        model = tiny_model(vocab_size=100, qk_norm=qk_norm)
        outputs = model(ids, labels=ids)
        expected = {"loss": outputs.loss, "logits": outputs.logits, **gradients(model, outputs.loss)}
        for rank in range(2):
            assert_same(torch.load(tmp_path / str(qk_norm) / f"rank{rank}.pt"), expected, tolerance=1e-4)
