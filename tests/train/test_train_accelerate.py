# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
import json
import shutil
import signal

import pytest
import torch
from datasets.distributed import split_dataset_by_node
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_pathmoe.routing_pathmoe import LinearRouter
from pathmoe import register_router
from pathmoe.text.reader import DataError
from pathmoe.train.checkpoints import find_checkpoint
from pathmoe.train.data import build_data, load_source
from pathmoe.train.divergence import Diverged
from pathmoe.train.engine import build_accelerator
from pathmoe.train.main import INTERRUPTED, main
from pathmoe.train.model import build_config
from pathmoe.train.recipe import RecipeError, parse_recipe
from tests.run_helpers import ROOT, assert_same_weights, held_at, launch, metrics, wait_for_step, weights


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trained"
    assert main(recipe(folder)) == 0
    return folder


def test_run_writes_the_documented_metrics_and_learns(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "lr", "tokens", "tokens_per_s"} <= set(lines[0])
    assert set(lines[-1]) == {"step", "eval_loss", "eval_perplexity"}
    assert lines[0]["tokens"] == 8 * 32
    losses = list(metrics(trained).values())
    assert losses[-1] < losses[0] - 0.5


def test_final_folder_loads_generates_and_has_a_card(trained):
    model = AutoModelForCausalLM.from_pretrained(trained / "final")
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    ids = tokenizer("1 plus", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    card = (trained / "final" / "README.md").read_text()
    assert (
        "AutoModelForCausalLM.from_pretrained" in card and "validation perplexity" in card and "max_steps: 6" in card
    )
    carried = {file.name for file in (trained / "final").glob("*.py")}
    assert carried == {file.name for file in (ROOT / "modeling_pathmoe").glob("*_pathmoe.py")}


def split_at(block, *, after):
    ends = [0, *((block == after).nonzero().flatten() + 1).tolist(), len(block)]
    return [block[start:end] for start, end in zip(ends, ends[1:])]


def test_reported_validation_loss_is_that_of_the_saved_model(trained, recipe):
    parsed = parse_recipe(recipe(trained))
    accelerator = build_accelerator(parsed)
    _, _, held_out = build_data(parsed, accelerator, 300)
    model = AutoModelForCausalLM.from_pretrained(trained / "final").eval()
    total = count = 0
    for block in torch.from_numpy(held_out.astype("int64")):
        for document in split_at(block, after=0):
            if len(document) > 1:
                with torch.no_grad():
                    total += model(document[None], labels=document[None]).loss.item() * (len(document) - 1)
                count += len(document) - 1
    loss = total / count
    assert metrics(trained, key="eval_loss")[6] == pytest.approx(loss, abs=1e-5)


def test_accumulated_micro_batches_equal_one_batch_though_their_targets_differ_in_number(recipe, tmp_path, trained):
    main(recipe(tmp_path / "parts", micro_batch_size=1))
    assert metrics(tmp_path / "parts") == pytest.approx(metrics(trained), abs=1e-5)


def test_accumulation_does_not_inflate_the_router_losses(recipe, tmp_path, trained):
    # The load-balancing loss is not linear in the batch, so it is compared where all sequences are alike.
    tokenizer = str(trained / "final")
    (tmp_path / "same.jsonl").write_text((json.dumps({"text": "~" * 31}) + "\n") * 99)
    overrides = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    files = {"train": str(tmp_path / "same.jsonl"), "validation": str(tmp_path / "same.jsonl")}
    fields = {"dataset": "json", "data_files": files, "validation_split": "validation", "tokenizer": tokenizer}
    fields["model_overrides"] = overrides
    main(recipe(tmp_path / "whole", **fields))
    main(recipe(tmp_path / "parts", micro_batch_size=1, **fields))
    assert metrics(tmp_path / "parts", key="grad_norm") == pytest.approx(
        metrics(tmp_path / "whole", key="grad_norm"), rel=1e-4
    )


def test_reported_loss_leaves_the_router_losses_out(trained, recipe, tmp_path):
    main(recipe(tmp_path / "aux", model_overrides={"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}))
    assert metrics(tmp_path / "aux")[1] == pytest.approx(metrics(trained)[1], abs=1e-5)
    assert metrics(tmp_path / "aux")[6] != pytest.approx(metrics(trained)[6], abs=1e-5)


def test_signalled_run_saves_and_resumes_to_the_same_bits(recipe, tmp_path):
    fields = {"max_steps": 40, "micro_batch_size": 4, "schedule": "wsd", "decay_steps": 0.25}
    args = recipe(tmp_path / "whole", model_overrides={"attention_dropout": 0.1}, **fields)
    process = launch(args)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    args = [*args, "--output_dir", str(tmp_path / "cut"), "--resume", "auto"]
    for number, step in ((signal.SIGINT, 3), (signal.SIGTERM, 15)):
        process = launch(args, script=held_at(step, tmp_path))
        wait_for_step(process, tmp_path / "cut", step)
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == INTERRUPTED, output
        assert not (tmp_path / "cut" / "final").exists()
    process = launch(args)
    output, _ = process.communicate()
    assert process.returncode == 0 and "resumed from" in output, output
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", rtol=0, atol=0)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_streamed_run_resumes_to_the_same_bits(recipe, tmp_path):
    whole = recipe(tmp_path / "whole", streaming=True, checkpoint_every=3, max_steps=6)
    main(whole)
    cut = recipe(tmp_path / "cut", streaming=True, checkpoint_every=3, max_steps=6)
    main(cut)
    for folder in ("final", "checkpoints/step-00000006"):
        shutil.rmtree(tmp_path / "cut" / folder)
    main([*cut, "--resume", "auto"])
    assert_same_weights(tmp_path / "cut", tmp_path / "whole", rtol=0, atol=0)


def test_folder_that_another_run_writes_to_is_left_alone(recipe, tmp_path):
    process = launch(recipe(tmp_path / "run"), script=held_at(1, tmp_path))
    wait_for_step(process, tmp_path / "run", 1)
    with pytest.raises(RecipeError, match="is being written by another run"):
        main([*recipe(tmp_path / "run"), "--resume", "auto"])
    process.kill()
    process.communicate()
    assert main([*recipe(tmp_path / "run"), "--resume", "auto"]) == 0


def test_finished_run_is_not_trained_again(trained, recipe):
    before = (trained / "metrics.jsonl").read_text()
    assert main([*recipe(trained), "--resume", "auto"]) == 0
    assert (trained / "metrics.jsonl").read_text() == before


def test_bfloat16_run_trains_float32_weights_to_nearly_the_same_losses(recipe, tmp_path, trained):
    process = launch(recipe(tmp_path / "low", precision="bf16"))
    output, _ = process.communicate()
    assert process.returncode == 0 and "experts: pathmoe in bfloat16 " in output, output
    assert {tensor.dtype for tensor in weights(tmp_path / "low").values()} == {torch.float32}
    low, full = metrics(tmp_path / "low"), metrics(trained)
    assert low != full and low == pytest.approx(full, abs=0.05)


def test_longer_run_replaces_the_result_of_a_shorter_one(recipe, tmp_path):
    args = recipe(tmp_path / "run", max_steps=2)
    main(args)
    short = weights(tmp_path / "run")
    main([*args, "--resume", "auto", "--max_steps", "4"])
    assert any(not torch.equal(tensor, short[name]) for name, tensor in weights(tmp_path / "run").items())
    assert "max_steps: 4" in (tmp_path / "run" / "final" / "README.md").read_text()


def test_tokenizer_of_a_run_that_never_trained_is_not_used(recipe, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "0123456789 other text"}\n' * 3)
    with pytest.raises(DataError):
        main(recipe(tmp_path / "run", dataset=str(tmp_path / "short.jsonl"), holdout_every=3, sequence_length=64))
    main(recipe(tmp_path / "run", max_steps=1))
    assert "plus" in " ".join(AutoTokenizer.from_pretrained(tmp_path / "run" / "final").get_vocab())


class FlakyRouter(LinearRouter):
    """A linear router whose scores are not a number in some calls of the training."""

    calls, bad_calls = 0, range(0)

    def compute_logits(self, hidden_states, layer_idx, state):
        logits, state = super().compute_logits(hidden_states, layer_idx, state)
        if self.training and layer_idx == 2 and hidden_states.device.type != "meta":
            FlakyRouter.calls += 1
            if FlakyRouter.calls in FlakyRouter.bad_calls:
                logits = logits * float("nan")
        return logits, state


register_router("flaky", FlakyRouter)
FLAKY = {"router_type": "flaky", "router_bias_update_rate": 0.01}


def test_step_that_is_not_finite_is_skipped_counted_and_named(recipe, tmp_path):
    FlakyRouter.calls, FlakyRouter.bad_calls = 0, range(3, 4)
    main(recipe(tmp_path / "run", model_overrides=FLAKY))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if "not_finite" in line]
    assert skipped["step"] == 3 and "model.embed_tokens.weight" in skipped["not_finite"]
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0, 0, 1, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run").values())


def test_run_stops_after_several_bad_steps_in_a_row_and_keeps_what_it_saved(recipe, tmp_path):
    FlakyRouter.calls, FlakyRouter.bad_calls = 0, range(4, 9)
    args = recipe(tmp_path / "run", model_overrides=FLAKY, checkpoint_every=3, max_bad_steps=2)
    with pytest.raises(Diverged, match=r"2 steps in a row .* step 5 .* gradients of model.* Lower learning_rate"):
        main(args)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    FlakyRouter.bad_calls = range(0)
    assert main([*args, "--resume", "auto"]) == 0


def test_signals_are_the_callers_again_after_a_run(recipe, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    main(recipe(tmp_path / "run", max_steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_run_is_not_overwritten_or_resumed_with_another_recipe(trained, recipe):
    with pytest.raises(RecipeError, match="pass --resume auto"):
        main(recipe(trained))
    with pytest.raises(RecipeError, match="learning_rate: 0.01 → 0.5"):
        main([*recipe(trained), "--resume", "auto", "--learning_rate", "0.5"])
    with pytest.raises(RecipeError, match="'nowhere' is not a checkpoint in"):
        main([*recipe(trained), "--resume", "nowhere"])


def test_checkpoint_that_was_not_finished_is_not_used(trained, recipe):
    (trained / "checkpoints" / "step-00000009.partial").mkdir()
    parsed = parse_recipe([*recipe(trained), "--resume", "auto"])
    assert find_checkpoint(parsed, build_accelerator(parsed)).name == "step-00000006"


def test_only_the_last_checkpoints_are_kept(recipe, tmp_path):
    main(recipe(tmp_path / "run", checkpoint_every=1, keep_last=2))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000006"]


def test_goes_on_from_a_checkpoint_with_its_tokenizer(trained, recipe, tmp_path):
    main(recipe(tmp_path / "on", model=str(trained / "final")))
    assert metrics(tmp_path / "on")[1] < metrics(trained)[1] - 0.5


def test_engine_of_the_recipe_must_be_in_force(recipe, tmp_path):
    with pytest.raises(RecipeError, match="engine='ddp' was requested .* but Accelerate runs 'cpu'"):
        main(recipe(tmp_path / "run", engine="ddp"))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"lerning_rate": 1.0}, "unknown recipe field lerning_rate in --config .* Did you mean learning_rate"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"max_steps": "many"}, "max_steps"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a number"),
        ({"schedule": "linear"}, "schedule='linear' must be one of cosine, wsd"),
        ({"schedule": "wsd"}, "decay_steps=0 with schedule='wsd'"),
        ({"warmup_steps": 7}, "do not fit into max_steps=6"),
        ({"decay_steps": 3}, "decay_steps=3 has no effect with schedule='cosine'"),
        ({"min_lr_ratio": -1.0}, "min_lr_ratio=-1.0 must be from 0 to 1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        (
            {
                "precision": "bf16",
                "experts_implementation": "grouped_mm",
                "model_overrides": {"moe_intermediate_size": 20},
            },
            "moe_intermediate_size=20 in torch.bf",
        ),
        ({"precision": "fp8"}, "precision='fp8' must be one of fp32, bf16"),
        ({"batch_size": 9}, "batch_size=9 must be a multiple of micro_batch_size=8"),
        ({"model": "nowhere.json"}, "model='nowhere.json' does not exist"),
        ({"model_overrides": {"num_experts_per_tok": 9}}, "num_experts_per_tok=9 must not exceed num_experts=8"),
        ({"model_overrides": {"num_expert": 9}}, "num_expert=9 is not a field of PathMoE: did you mean num_experts"),
        ({"sequence_length": 65}, "exceeds the model's max_position_embeddings=64"),
        ({"tokenizer": "nowhere"}, "tokenizer='nowhere' could not be loaded"),
    ],
)
def test_wrong_recipe_is_refused_by_field_value_and_fix(recipe, tmp_path, fields, complaint):
    with pytest.raises((RecipeError, DataError), match=complaint):
        main(recipe(tmp_path / "run", **fields))


def test_bad_data_is_reported_before_there_is_a_model(recipe, tmp_path, monkeypatch):
    def no_model(*args):
        raise AssertionError("the model was built before the data was read")

    monkeypatch.setattr("pathmoe.train.main.build_model", no_model)
    (tmp_path / "short.jsonl").write_text('{"text": "short"}\n' * 5)
    files = {"train": str(tmp_path / "short.jsonl"), "validation": str(tmp_path / "short.jsonl")}
    with pytest.raises(DataError, match="fewer than one sequence"):
        main(recipe(tmp_path / "run", dataset="json", data_files=files, validation_split="validation"))
    (tmp_path / "single.jsonl").write_text('{"text": "one document"}\n')
    with pytest.raises(DataError, match="too few documents to hold out one in 40"):
        main(recipe(tmp_path / "single", dataset=str(tmp_path / "single.jsonl")))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stream_never_trains_on_what_it_holds_out(tmp_path, world_size):
    """Several shards, read in another order in each epoch and by several ranks."""
    texts = [f"document {i}" for i in range(200)]
    for shard in range(5):
        rows = [json.dumps({"text": text}) + "\n" for text in texts[shard::5]]
        (tmp_path / f"{shard}.jsonl").write_text("".join(rows))
    parsed = parse_recipe(
        ["--model", "m.json", "--output_dir", "o", "--max_steps", "1", "--sequence_length", "2", "--batch_size", "1"]
        + ["--micro_batch_size", "1", "--dataset", "json", "--streaming", "true", "--holdout_every", "5"]
        + ["--data_files", f"{{train: '{tmp_path}/*.jsonl'}}"]
    )
    _, train, validation = load_source(parsed, parsed.sources[0])
    held_out = {row["text"] for row in validation}
    trained = []
    for rank in range(world_size):
        part = split_dataset_by_node(train.shuffle(seed=1, buffer_size=1), rank, world_size)
        for epoch in range(2):
            part.set_epoch(epoch)
            trained += [row["text"] for row in part]
    assert held_out and not held_out & set(trained)
    assert sorted([*trained, *held_out, *held_out]) == sorted(texts * 2)


def test_several_sources_are_mixed(recipe, tmp_path):
    for name, letter in (("a", "a"), ("b", "b")):
        rows = [json.dumps({"text": f"{letter}{i} " * 40}) + "\n" for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    mixture = [{"dataset": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    parsed = parse_recipe(recipe(tmp_path / "run", dataset=None, mixture=mixture, holdout_every=10))
    accelerator = build_accelerator(parsed)
    tokenizer, batches, held_out = build_data(parsed, accelerator, 300)
    texts = [tokenizer.decode(row) for row in batches.next_batch(40)]
    assert sum("a" in text for text in texts) == 30 and sum("b" in text for text in texts) == 10
    assert {"a", "b"} <= set("".join(tokenizer.decode(block) for block in held_out))
    for wrong, complaint in (
        ([], "has no source"),
        ([{"dataset": "x"}], "must be a mapping with a dataset and a weight"),
        ([{"dataset": "x", "weight": 1, "wieght": 2}], r"has unknown fields \['wieght'\]"),
        ([{"dataset": "x", "weight": -1}], "weight=-1 must be a positive number"),
    ):
        with pytest.raises(RecipeError, match=complaint):
            parse_recipe(recipe(tmp_path / "run", dataset=None, mixture=wrong))
    with pytest.raises(RecipeError, match="exactly one of dataset and mixture"):
        parse_recipe(recipe(tmp_path / "run", mixture=mixture))


@pytest.mark.slow  # needs a C++ compiler
def test_compiled_run_with_the_dashboard_gives_the_losses_of_an_eager_one(recipe, tmp_path, trained):
    main(recipe(tmp_path / "compiled", compile=True, routing_every=2))
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(trained), abs=1e-4)


def test_command_line_overrides_the_recipe(recipe, tmp_path):
    args = [
        *recipe(tmp_path),
        "--learning_rate",
        "1e-4",
        "--model_overrides",
        "{num_experts: 4}",
        "--streaming",
        "true",
    ]
    parsed = parse_recipe(args)
    assert (parsed.learning_rate, parsed.model_overrides, parsed.streaming) == (1e-4, {"num_experts": 4}, True)


@pytest.mark.parametrize("file", sorted((ROOT / "configuration" / "train").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipe_is_valid_for_its_model(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    build_config(parse_recipe(["--config", str(file)]))
    parse_recipe(["--config", str(file), "--max_steps", "5"])


def test_unknown_field_of_a_model_file_is_refused(recipe, tmp_path):
    (tmp_path / "model.json").write_text('{"model_type": "pathmoe", "router_blocksize": 1}')
    with pytest.raises(
        RecipeError, match="router_blocksize=1 is not a field of PathMoE: did you mean router_block_size"
    ):
        main(recipe(tmp_path / "run", model=str(tmp_path / "model.json")))
