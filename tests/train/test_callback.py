# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import math
from collections import Counter

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pathmoe import PathMoECallback, PathMoEForCausalLM, record_paths, update_selection_bias
from pathmoe.train import callback
from tests.run_helpers import launch


LENGTHS = (12, 7, 9, 12)  # of the real tokens of a row, in turn


class Rows(Dataset):
    """Rows of random tokens that are padded on the right."""

    def __len__(self):
        return 32

    def __getitem__(self, number):
        ids = torch.randint(1, 99, (12,), generator=torch.Generator().manual_seed(number))
        mask = (torch.arange(12) < LENGTHS[number % 4]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


class Tracker(TrainerCallback):
    """Keeps the logs that it is given, as TensorBoard's or W&B's callback does."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def build_trainer(model, folder, *, callbacks=(), routing_steps=None, **options):
    fields = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 2,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **fields | options)
    set_seed(0)
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks))
    trainer.add_callback(PathMoECallback(trainer, routing_steps))
    return trainer


def qwen():
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=16,
            num_experts=8,
            num_experts_per_tok=2,
        )  # fmt: skip
    )


@pytest.mark.parametrize("kind", ["pathmoe", "qwen3_moe"])
def test_the_logs_are_counts_of_the_whole_step_without_padding(tiny_config, tmp_path, kind):
    model = PathMoEForCausalLM(tiny_config()) if kind == "pathmoe" else qwen()
    tracker = Tracker()
    seen = []
    trainer = build_trainer(model, tmp_path, callbacks=[tracker], learning_rate=0.0, eval_strategy="steps",
                            eval_steps=1, logging_steps=1, max_steps=2)  # fmt: skip
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()

    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    tracked = [log for log in tracker.logs if "loss" in log]
    assert [{**log, "step": step} for step, log in enumerate(tracked, start=1)] == training
    micro_batches = [batch for batch in seen if len(batch["input_ids"]) == 4][:2]  # evaluation draws 8 at a time
    layers = model.config.num_hidden_layers
    counts, entropies, jaccards, tops = [Counter() for _ in range(layers)], [], [], Counter()
    for batch in micro_batches:
        with torch.no_grad():
            logits = model(batch["input_ids"], batch["attention_mask"], output_router_logits=True).router_logits
        for token in batch["attention_mask"].flatten().nonzero().flatten().tolist():
            chosen = [layer[token].topk(2).indices.tolist() for layer in logits]
            for layer, experts in enumerate(chosen):
                counts[layer].update(experts)
                entropies.append(torch.distributions.Categorical(logits=logits[layer][token]).entropy() / math.log(2))
            jaccards += [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(chosen, chosen[1:])]
            tops[tuple(experts[0] for experts in chosen)] += 1
    loads = torch.tensor([[count[expert] for expert in range(8)] for count in counts]).double()
    shares = loads / loads.sum(dim=1, keepdim=True)
    expected = {
        "routing/load_cv": (loads.std(dim=1, correction=0) / loads.mean(dim=1)).max().item(),
        "routing/effective_experts": torch.special.entr(shares).sum(dim=1).exp().min().item(),
        "routing/dead_experts": (loads == 0).sum().item(),
        "routing/entropy": torch.stack(entropies).mean().item(),
        "routing/agreement": sum(jaccards) / len(jaccards),
        "routing/path_coverage_100": sum(count for _, count in tops.most_common(100)) / tops.total(),
    }
    assert {name: training[0][name] for name in expected} == pytest.approx(expected, abs=1e-3)


def biases(model):
    return torch.cat([router.selection_bias for router in model.model.routers.values()])


@pytest.mark.parametrize("fields", [{}, {"mlp_only_layers": [0, 2], "intermediate_size": 24}], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["own loss", "loss of the trainer"])
def test_the_selection_bias_follows_the_load_of_each_step(tiny_config, tmp_path, options, fields):
    """Also where the trainer computes the loss; evaluation between the steps does not count."""
    torch.manual_seed(0)
    model = PathMoEForCausalLM(tiny_config(router_bias_update_rate=0.01, **fields))
    twin = PathMoEForCausalLM(tiny_config(router_bias_update_rate=0.01, **fields)).train()
    twin.load_state_dict(model.state_dict())
    seen = []
    trainer = build_trainer(model, tmp_path, learning_rate=0.0, eval_strategy="steps", eval_steps=1, **options)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    trainer.train()
    micro_batches = [batch for batch in seen if len(batch["input_ids"]) == 4]
    for step in range(4):
        for batch in micro_batches[2 * step : 2 * step + 2]:
            twin(**batch)
        update_selection_bias(twin)
    assert biases(model).abs().max() > 0
    torch.testing.assert_close(biases(model), biases(twin), rtol=0, atol=0)


def test_a_resumed_run_has_the_bias_and_the_logs_of_an_uninterrupted_one(tiny_config, tmp_path):
    def run(folder, resume=None, **options):
        torch.manual_seed(0)
        model = PathMoEForCausalLM(tiny_config(router_bias_update_rate=0.01))
        trainer = build_trainer(model, tmp_path / folder, save_strategy="steps", save_steps=2, **options)
        trainer.train(resume_from_checkpoint=resume)
        return biases(trainer.model), [e["routing/load_cv"] for e in trainer.state.log_history if "loss" in e]

    whole, whole_logs = run("whole")
    resumed, resumed_logs = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert resumed_logs == pytest.approx(whole_logs, abs=1e-5)


SCRIPT = """
import json, sys
import torch
from pathmoe import PathMoEConfig, PathMoEForCausalLM
from tests.train.test_callback import biases, build_trainer

folder, size = sys.argv[1:]
torch.manual_seed(0)
model = PathMoEForCausalLM(PathMoEConfig.from_pretrained(folder))
trainer = build_trainer(model, folder, per_device_train_batch_size=int(size))
trainer.train()
trainer.model_wrapped = trainer.model  # DDP must not hold the last reference to the process group
trainer.accelerator.free_memory()
logs = [entry for entry in trainer.state.log_history if "loss" in entry]
keys = [name for name in logs[-1] if name in ("routing/load_cv", "routing/dead_experts", "routing/entropy")]
print("RESULT", json.dumps([biases(trainer.model).tolist(), [[log[key] for key in keys] for log in logs]]))
"""


def test_two_processes_balance_and_log_the_load_of_both(tiny_config, tmp_path, free_port):
    tiny_config(router_bias_update_rate=0.01).save_pretrained(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    results = {}
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port]
        script = [str(tmp_path / "script.py")]
        process = launch([str(tmp_path), str(4 // count)], *(launcher if count == 2 else []), script=script)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        results[count] = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT")]
    (one,), two = results[1], results[2]
    assert len(two) == 2 and two[0][0] == two[1][0]  # both ranks have the same bias
    torch.testing.assert_close(torch.tensor(two[0][0]), torch.tensor(one[0]), rtol=0, atol=0)
    logs = next(logs for _, logs in two if logs)
    assert [x for log in logs for x in log] == pytest.approx([x for log in one[1] for x in log], abs=1e-3)


def test_a_collapsed_router_is_named(tiny_config, tmp_path, monkeypatch):
    model = PathMoEForCausalLM(tiny_config(router_bias_update_rate=0.0, router_selection_bias=True))
    for router in model.model.routers.values():
        router.selection_bias[:, :2] = 10.0
    trainer = build_trainer(model, tmp_path, logging_steps=1, max_steps=1)
    messages = []
    monkeypatch.setattr(callback.logger, "warning", messages.append)
    trainer.train()
    assert len(messages) == 5 and messages[4].startswith("step 1: routing collapse in layer 4: expert ")
    assert trainer.state.log_history[0]["routing/dead_experts"] == 5 * 6


def test_measuring_changes_nothing_of_the_training_and_leaves_no_hook(tiny_config, tmp_path):
    def run(steps, **options):
        torch.manual_seed(0)
        trainer = build_trainer(PathMoEForCausalLM(tiny_config()), tmp_path, routing_steps=steps, **options)
        trainer.train()
        return trainer

    plain, measured = run(0), run(1, gradient_checkpointing=True)
    assert not any("/" in name for entry in plain.state.log_history for name in entry)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(measured.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks for module in measured.model.modules() if "Router" in type(module).__name__)


def test_what_cannot_be_measured_is_refused(tiny_config, tmp_path):
    dense = LlamaForCausalLM(LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=32))  # fmt: skip
    with pytest.raises(TypeError, match="LlamaForCausalLM has no routers that are recognised"):
        build_trainer(dense, tmp_path)
    with pytest.raises(ValueError, match="torch_compile=True hides the routing: set it to False"):
        build_trainer(PathMoEForCausalLM(tiny_config()), tmp_path, torch_compile=True)
    with pytest.raises(ValueError, match="routing_steps=-1 must not be negative"):
        build_trainer(PathMoEForCausalLM(tiny_config()), tmp_path, routing_steps=-1)
    for steps in (0.5, "10"):
        with pytest.raises(ValueError, match=f"routing_steps={steps!r} must not be negative or a fraction"):
            build_trainer(PathMoEForCausalLM(tiny_config()), tmp_path, routing_steps=steps)
    with pytest.raises(TypeError, match="trainer=PathMoEForCausalLM.* must be a Trainer"):
        PathMoECallback(PathMoEForCausalLM(tiny_config()))


def test_generation_and_evaluation_are_not_recorded(tiny_config):
    model = PathMoEForCausalLM(tiny_config()).train()
    ids = torch.randint(1, 99, (2, 6))
    with record_paths(model, only_training=True) as trace:
        model(ids)
        with torch.no_grad():
            model(ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)
        model.eval()(ids)
    assert torch.equal(trace.token_ids, ids.flatten().int())
