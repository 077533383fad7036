# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The example scripts run as they stand there, on a tiny real model: sharing, losses, accumulation, reloading."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from examples import finetune_trainer, grpo_replay, lora_peft, sft_trl
from pathmoe import PathMoEForCausalLM, PathMoERouter
from pathmoe.text.reader import train_tokenizer


SENTENCES = [f"The {i}th {noun} counts to {i * i}." for i in range(0, 40, 2) for noun in ("line", "old town")]
SHARED = ["model.routers.0.weight", "model.routers.1.weight", "model.routers.2.weight"]


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    """Returns a function that saves a tiny checkpoint with a tokenizer; keyword arguments override config fields."""

    def save(**fields):
        torch.manual_seed(0)
        folder = tmp_path / "checkpoint"
        PathMoEForCausalLM(tiny_config(vocab_size=320, initializer_range=0.1, **fields)).save_pretrained(folder)
        train_tokenizer(SENTENCES, 320).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def data(tmp_path):
    """The options that name the data of each script."""
    rows = [{"text": text} for text in SENTENCES]
    chats = [
        {
            "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": text.upper()[: 5 + i]}],
        }
        for i, text in enumerate(SENTENCES)
    ]
    for name, lines in (("text", rows), ("conversations", chats)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = ["--text", str(tmp_path / "text.jsonl")]
    return {
        finetune_trainer: text,
        lora_peft: text,
        sft_trl: ["--conversations", str(tmp_path / "conversations.jsonl")],
    }


@pytest.fixture
def run(data, tmp_path):
    """Returns a function that runs a script on a checkpoint; gives the trainer and the losses of its steps."""

    def execute(script, checkpoint, *options, name="out", steps=6):
        trainer = script.main(
            ["--model", str(checkpoint), *data[script], "--output_dir", str(tmp_path / name),
             "--max_steps", str(steps), "--learning_rate", "3e-3", "--logging_steps", "1",
             "--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false",
             "--save_strategy", "no", *options]
        )  # fmt: skip
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return execute


SCRIPTS = pytest.mark.parametrize(
    "script", [finetune_trainer, lora_peft, sft_trl], ids=lambda script: script.__name__.rpartition(".")[2]
)


@SCRIPTS
def test_it_learns_and_saves_one_router_for_each_block(run, checkpoint, tmp_path, script):
    source = checkpoint()
    _, losses = run(script, source)
    assert losses[-1] < losses[0] - 0.2

    folder = tmp_path / "out" / "merged" if script is lora_peft else tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(folder)
    before, after = load_file(source / "model.safetensors"), model.state_dict()
    assert before.keys() == after.keys() and [name for name in after if "router" in name] == SHARED
    for name in (*SHARED, "model.layers.4.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"):
        assert not torch.equal(before[name], after[name]), f"{name} was not trained"
    assert AutoTokenizer.from_pretrained(folder)("The line").input_ids


@SCRIPTS
def test_four_micro_batches_of_one_are_one_of_four(run, checkpoint, script):
    """Sequences differ in length, so a mean of the micro-batches' means would be another loss."""
    source = checkpoint()
    size, steps = "--per_device_train_batch_size", "--gradient_accumulation_steps"
    _, whole = run(script, source, size, "4", steps, "1", name="whole", steps=3)
    _, parts = run(script, source, size, "1", steps, "4", name="parts", steps=3)
    assert parts == pytest.approx(whole, abs=2e-4)


@SCRIPTS
def test_no_auxiliary_loss_is_added_unasked(run, checkpoint, script):
    """Returning router logits is no wish for a loss on them, in any trainer."""
    _, plain = run(script, checkpoint(), name="plain", steps=2)
    trainer, returning = run(script, checkpoint(output_router_logits=True), name="returning", steps=2)
    assert returning == plain
    assert trainer.model.config.router_aux_loss_coef == 0


@pytest.mark.parametrize("script", [finetune_trainer, sft_trl], ids=["trainer", "trl"])
def test_an_auxiliary_loss_that_is_asked_for_counts_once(run, checkpoint, script):
    """Trainer trains the model's own, per layer; TRL transformers' own, which pools the layers."""
    _, plain = run(script, checkpoint(), "--per_device_train_batch_size", "40", name="plain", steps=1)
    source = checkpoint(router_aux_loss_coef=0.5)
    trainer, balanced = run(script, source, "--per_device_train_batch_size", "40", name="balanced", steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        outputs = model(batch["input_ids"], batch["attention_mask"], output_router_logits=True)
    aux_loss = outputs.aux_loss
    if script is sft_trl:
        aux_loss = load_balancing_loss_func(outputs.router_logits, 8, 2, batch["attention_mask"])
    assert balanced[0] - plain[0] == pytest.approx(0.5 * aux_loss.item(), abs=1e-3)


def test_trl_refuses_what_it_would_leave_out(run, checkpoint):
    with pytest.raises(ValueError, match="router_z_loss_coef=0.001"):
        run(sft_trl, checkpoint(router_z_loss_coef=0.001))


@SCRIPTS
def test_the_selection_bias_moves_and_the_routing_is_logged(run, checkpoint, script):
    trainer, _ = run(script, checkpoint(router_bias_update_rate=0.01), steps=2)
    assert all("routing/load_cv" in entry for entry in trainer.state.log_history if "loss" in entry)
    biases = [router.selection_bias for router in trainer.model.modules() if isinstance(router, PathMoERouter)]
    assert len(biases) >= 3 and all(bias.abs().max() > 0 for bias in biases)


def test_only_the_completion_is_learnt_and_packing_changes_nothing(run, checkpoint):
    """All conversations in one step: padded, packed and one by one, the loss must be the same."""
    source = checkpoint(max_position_embeddings=512)
    options = ["--per_device_train_batch_size", "64", "--max_length", "512"]
    _, padded = run(sft_trl, source, *options, name="padded", steps=1)
    trainer, packed = run(sft_trl, source, *options, "--packing", "true", name="packed", steps=1)
    assert len(trainer.train_dataset) < len(SENTENCES) / 4

    model, tokenizer = AutoModelForCausalLM.from_pretrained(source).eval(), trainer.processing_class
    losses = []
    for row in map(json.loads, open(trainer.args.output_dir.replace("packed", "conversations.jsonl"))):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1]
        losses.append(cross_entropy(logits, torch.tensor(whole[len(prompt) :]), reduction="none"))
    expected = torch.cat(losses).mean().item()
    assert padded[0] == pytest.approx(expected, abs=1e-3)
    assert packed[0] == pytest.approx(expected, abs=1e-3)


def test_the_chat_template_is_saved_with_the_model(run, checkpoint, tmp_path):
    run(sft_trl, checkpoint(), steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "line"}], tokenize=False)
    assert chat == "<|im_start|>user\nline<|im_end|>\n"


def test_the_merged_model_is_the_adapted_one(run, checkpoint, tmp_path):
    source = checkpoint()
    trainer, _ = run(lora_peft, source)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[3 if "routers" in name else 5] for name in trained} == {"routers", "self_attn", "mlp"}
    assert sum("routers" in name for name in trained) == 3

    ids = torch.arange(40).view(2, 20)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(
            merged(ids).logits, AutoModelForCausalLM.from_pretrained(source)(ids).logits, atol=1e-2
        )


def test_lora_trains_experts_under_bf16_autocast(run, checkpoint):
    _, exact = run(lora_peft, checkpoint(), name="fp32", steps=3)
    _, mixed = run(lora_peft, checkpoint(), "--bf16", "true", name="bf16", steps=3)
    assert mixed != exact and mixed == pytest.approx(exact, abs=0.05)


@pytest.fixture
def run_grpo(run, data, tmp_path):
    """Returns a function that runs GRPO on short prompts; gives the trainer and the differences of its steps."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text[:12]}) + "\n" for text in SENTENCES))
    data[grpo_replay] = ["--prompts", str(file)]

    def execute(checkpoint, *options):
        sizes = ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_completion_length", "12"]
        trainer, _ = run(grpo_replay, checkpoint, *sizes, *options, steps=2)
        return trainer, [log["replay/logp_difference"] for log in trainer.state.log_history if "loss" in log]

    return execute


def test_replayed_routing_leaves_only_the_difference_in_arithmetic(run_grpo, checkpoint):
    source = checkpoint(router_bias_update_rate=0.01)
    _, exact = run_grpo(source, "--sampler_dtype", "float32")
    assert max(exact) < 1e-3
    trainer, replayed = run_grpo(source)
    _, plain = run_grpo(source, "--replay", "false")
    assert sum(replayed) < 0.8 * sum(plain)
    before = load_file(source / "model.safetensors")
    for name in SHARED:
        assert not torch.equal(trainer.model.state_dict()[name], before[name]), f"{name} was not trained"
    assert all("routing/load_cv" in log for log in trainer.state.log_history if "loss" in log)
