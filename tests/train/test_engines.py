# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Two real processes over gloo against one, through the shipped Accelerate files."""

import json
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from pathmoe.train.main import main
from tests.run_helpers import accelerate_launch, held_at, metrics, start_with_accelerate, wait_for_step, weights


# Ten validation sequences in batches of eight: the second one is uneven.
FIELDS = {"max_steps": 20, "batch_size": 8, "micro_batch_size": 4, "eval_sequences": 10, "routing_every": 10,
          "model_overrides": {"tie_word_embeddings": True}}  # fmt: skip


@pytest.fixture(scope="module")
def single(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    assert main(recipe(folder, **FIELDS)) == 0
    return folder


def assert_same_training(run, other, key):
    """Other engines sum in another order. At first that is the rounding of float32 sums of about 4e4 numbers,
    eps * sqrt(4e4) = 2e-5. Adam then divides by gradients near zero and a token between two experts may take the
    other, so later steps agree less; what an engine does wrong shows in the first ones."""
    actual, expected = metrics(run, key=key), metrics(other, key=key)
    late = 5e-2 if key == "grad_norm" else 1e-3
    assert actual.keys() == expected.keys()
    for step, value in expected.items():
        assert actual[step] == pytest.approx(value, rel=2e-5 if step <= 5 else late), (key, step)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "fsdp_ep"])
def test_two_processes_train_the_model_of_one(single, recipe, tmp_path, free_port, engine):
    ep_size = 2 if engine == "fsdp_ep" else 1
    args = recipe(tmp_path / "two", **FIELDS, engine=engine, ep_size=ep_size)
    output = accelerate_launch(args, "ddp" if engine == "fsdp_ep" else engine, free_port)
    assert {"ddp": "MULTI_CPU x 2", "fsdp": "FSDP x 2", "fsdp_ep": "FSDP x EP x 2"}[engine] in output
    for key in ("loss", "eval_loss", "grad_norm"):
        assert_same_training(tmp_path / "two", single, key)
    # Half of a run's first micro-batch each, so the routing is measured on other tokens.
    assert metrics(tmp_path / "two", key="router_grad_norm")[10] == pytest.approx(
        metrics(single, key="router_grad_norm")[10], rel=1e-2
    )
    # The routers are as many as there are blocks, and whole.
    routers = {name: tensor.shape for name, tensor in weights(tmp_path / "two").items() if "router" in name}
    assert routers == {"model.routers.0.weight": (8, 32), "model.routers.1.weight": (8, 32)}
    for name, tensor in weights(single).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0.05, atol=5e-3)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "final", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    assert "distributed_config" not in json.loads((tmp_path / "two" / "final" / "config.json").read_text())


@pytest.mark.parametrize("engine", ["fsdp", "fsdp_ep"])
def test_dense_layers_are_sharded_like_others(recipe, tmp_path, free_port, engine):
    dense = {"num_hidden_layers": 4, "mlp_only_layers": [1], "intermediate_size": 48}
    fields = FIELDS | {"max_steps": 5, "model_overrides": FIELDS["model_overrides"] | dense}
    assert main(recipe(tmp_path / "one", **fields)) == 0
    args = recipe(tmp_path / "two", **fields, engine=engine, ep_size=2 if engine == "fsdp_ep" else 1)
    accelerate_launch(args, "ddp" if engine == "fsdp_ep" else engine, free_port)
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "two", key=key) == pytest.approx(metrics(tmp_path / "one", key=key), rel=1e-3)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0.05, atol=5e-3)


def test_sharded_checkpoint_goes_on_in_one_process_and_back(single, recipe, tmp_path, free_port):
    run, fields = tmp_path / "run", FIELDS | {"checkpoint_every": 6, "keep_last": 9}
    args = [*recipe(run, **fields), "--resume", "auto"]

    def cut(*, after):
        shutil.rmtree(run / "final")
        for checkpoint in (run / "checkpoints").iterdir():
            if int(checkpoint.name[-8:]) > after:
                shutil.rmtree(checkpoint)

    accelerate_launch(args, "fsdp", free_port)
    cut(after=6)
    assert main(args) == 0
    cut(after=12)
    output = accelerate_launch(args, "fsdp", free_port)
    assert "step-00000012 was written by 1 processes and continues with 2" in output
    assert_same_training(run, single, "loss")


def test_two_processes_that_are_asked_to_stop_save_the_step_they_are_in(single, recipe, tmp_path, free_port):
    args = [*recipe(tmp_path / "run", **FIELDS), "--resume", "auto"]
    process = start_with_accelerate(args, "ddp", free_port, script=held_at(2, tmp_path))
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name[-8:]) == max(metrics(tmp_path / "run")) < 20
    accelerate_launch(args, "ddp", free_port)
    assert_same_training(tmp_path / "run", single, "loss")


def test_a_stream_that_breaks_on_one_of_two_processes_leaves_a_checkpoint_of_both(single, recipe, tmp_path, free_port):
    rows = [json.dumps({"text": f"In row {i} the ship came in late and stayed for {i} days."}) for i in range(300)]
    texts = [tmp_path / name for name in ("even.jsonl", "odd.jsonl", "validation.jsonl")]  # a process reads one each
    for text in texts:
        text.write_text("\n".join(rows))
    texts[1].write_text("\n".join([*rows[:20], '{"text": null}', *rows[21:]]))
    fields = FIELDS | {
        "dataset": "json", "data_files": {"train": [str(file) for file in texts[:2]], "validation": str(texts[2])},
        "validation_split": "validation", "streaming": True, "max_bad_rows": 0, "shuffle_window": 1,
        "tokenizer": str(single / "tokenizer"),
    }  # fmt: skip
    run = tmp_path / "run"
    process = start_with_accelerate(recipe(run, **fields), "ddp", free_port)
    output, _ = process.communicate(timeout=1800)
    done = max(metrics(run))
    assert process.returncode
    assert "odd.jsonl line 21 " in output and f"{run}/checkpoints/step-{done:08d} holds the run up to there" in output
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    texts[1].write_text("\n".join(rows))
    accelerate_launch(recipe(run, **fields, resume="auto", accept_changed_inputs=True), "ddp", free_port)
    accelerate_launch(recipe(tmp_path / "at-once", **fields), "ddp", free_port)
    assert 1 <= done < 20 and list(metrics(run)) == list(range(1, 21))
    assert metrics(run) == pytest.approx(metrics(tmp_path / "at-once"), rel=1e-4)


WORKER = """
import os, sys
import torch
from pathmoe.train.engine import build_accelerator, gather_full
from pathmoe.train.recipe import parse_recipe
from pathmoe import PathMoEConfig, PathMoEForCausalLM

fields = dict(vocab_size=99, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
              head_dim=8, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, max_position_embeddings=64)
accelerator = build_accelerator(parse_recipe(sys.argv[1:]))
torch.manual_seed(0)
shared = PathMoEForCausalLM(PathMoEConfig(**fields, router_block_size=2))
single = PathMoEForCausalLM(PathMoEConfig(**fields, router_block_size=1))
state = {name: tensor for name, tensor in shared.state_dict().items() if "router" not in name}
for layer in range(5):
    state[f"model.routers.{layer}.weight"] = shared.model.routers[str(layer // 2)].weight.detach().clone()
single.load_state_dict(state)
torch.manual_seed(1)
tokens = torch.randint(0, 99, (2, 3))  # three tokens with two experts each leave experts of a rank without any
model, optimizer = accelerator.prepare(shared, torch.optim.AdamW(shared.parameters()))
names = [name for name, _ in model.named_parameters() if "router" in name]
assert names == ["model.routers.0.weight", "model.routers.1.weight", "model.routers.2.weight"], names
rank = accelerator.process_index
output = model(input_ids=tokens[rank : rank + 1], labels=tokens[rank : rank + 1], output_router_logits=True)
accelerator.backward(output.loss)
single(input_ids=tokens, labels=tokens).loss.backward()
for block, layers in enumerate(([0, 1], [2, 3], [4])):
    expected = sum(single.model.routers[str(layer)].weight.grad for layer in layers)
    torch.testing.assert_close(gather_full(model.model.routers[str(block)].weight.grad), expected)
idle = [len(logits.topk(2).indices.unique()) < 8 for logits in output.router_logits]
assert all(idle)
optimizer.step()
print("rank", rank, "is right")
"""


def test_router_gradients_are_summed_over_layers_where_experts_of_a_rank_are_idle(recipe, tmp_path, free_port):
    (tmp_path / "worker.py").write_text(WORKER)
    output = accelerate_launch(recipe(tmp_path / "run"), "fsdp", free_port, script=[str(tmp_path / "worker.py")])
    assert "rank 0 is right" in output and "rank 1 is right" in output


def test_bfloat16_shards_run_the_experts_in_bfloat16_over_float32_weights(single, recipe, tmp_path, free_port):
    fields = FIELDS | {"max_steps": 4, "precision": "bf16", "gradient_checkpointing": True}
    output = accelerate_launch(recipe(tmp_path / "run", **fields), "fsdp", free_port)
    assert "experts: pathmoe in bfloat16" in output
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    assert metrics(tmp_path / "run")[1] == pytest.approx(metrics(single)[1], abs=0.01)
