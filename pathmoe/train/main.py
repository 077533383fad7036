# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains a PathMoE from a YAML recipe.

    python train_accelerate.py --config configuration/train/quickstart.yaml --output_dir runs/quickstart
    python train_accelerate.py plot RUN [RUN …]
    python train_accelerate.py plan --config configuration/train/paper-16b.yaml
    accelerate launch --config_file configuration/accelerate/ddp.yaml train_accelerate.py --config … --output_dir …

Any field of the recipe can be given on the command line: `--learning_rate 1e-3 --model_overrides '{num_experts: 8}'`.
The run writes the model to OUTPUT_DIR/final, ready for the Hub, and metrics to OUTPUT_DIR/metrics.jsonl. `--resume
auto` continues an interrupted run from its newest checkpoint, with the same result as if it had not been interrupted.
"""

import signal
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from pathmoe.accounting import count_parameters
from pathmoe.command import STOPPING
from pathmoe.files import check_writable
from pathmoe.train.balance import check_balance
from pathmoe.train.checkpoints import Checkpoints, find_checkpoint, step_of
from pathmoe.train.data import build_data, build_tokenizer
from pathmoe.train.engine import build_accelerator
from pathmoe.train.final import save_final
from pathmoe.train.inputs import find_changed_inputs, fingerprint_inputs
from pathmoe.train.log import Log, plot, read_metrics
from pathmoe.train.loop import TrainingLoop
from pathmoe.train.model import build_config, build_model, check_model, find_experts_dtype
from pathmoe.train.optimizer import build_optimizer
from pathmoe.train.output import check_inputs, is_finished, lock_output_dir, write_recipe
from pathmoe.train.plan import plan
from pathmoe.train.recipe import Recipe, RecipeError, parse_recipe
from pathmoe.train.start import check_start, token_frequencies
from pathmoe.train.state import TrainState


INTERRUPTED = 75  # exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL)


def main(args: list[str] | None = None) -> int:
    """Runs a recipe, `plot` or `plan`.

    Returns:
        `int`: The exit status: 0, or `INTERRUPTED` if a signal stopped the run, which has then written a checkpoint.

    Raises:
        RecipeError, DataError: If the recipe or the data cannot be used.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["plot"]:
        print(plot(args[1:]))
        return 0
    if args[:1] == ["plan"]:
        print(plan(args[1:]))
        return 0
    recipe = parse_recipe(args)
    config = build_config(recipe)
    check_start(recipe, config)
    check_balance(recipe, config)
    if config.model_type == "pathmoe" and recipe.precision == "bf16" and recipe.experts_implementation == "grouped_mm":
        try:
            config.check_grouped_mm_rows(torch.bfloat16)
        except ValueError as error:
            raise RecipeError(f"precision='bf16': {error}") from error
    check_model(recipe, config)
    accelerator = build_accelerator(recipe)
    rows = recipe.micro_batch_size * accelerator.num_processes
    if recipe.batch_size % rows:
        raise RecipeError(
            f"batch_size={recipe.batch_size} must be a multiple of micro_batch_size={recipe.micro_batch_size} times "
            f"{accelerator.num_processes} processes."
        )
    if recipe.cache_dir is not None:
        check_writable(Path(recipe.cache_dir) / "tokens", "cache_dir")
    with lock_output_dir(recipe, accelerator):
        status = run(recipe, config, accelerator)
    # Free the model first: if DDP held the last reference to a process group, freeing it would join gloo's threads
    # while holding the interpreter's lock, for which such a thread may be waiting.
    accelerator.free_memory()
    accelerator.end_training()
    return status


def build(
    recipe: Recipe, config: PreTrainedConfig, accelerator: Accelerator, fresh: bool
) -> tuple[TrainState, PreTrainedTokenizerBase, np.ndarray]:
    """Builds the model, the optimizer and the data of a run.

    Args:
        recipe (`Recipe`): The recipe.
        config (`PreTrainedConfig`): The model's configuration.
        accelerator (`Accelerator`): The engine.
        fresh (`bool`): Whether nothing has been trained yet.

    Returns:
        `tuple`: the state before the first step, the tokenizer and the validation blocks.
    """
    model = None
    if not recipe.model.endswith(".json"):  # load a checkpoint before the text is read, so that errors come early
        model = build_model(recipe, config, build_tokenizer(recipe, [], config.vocab_size, accelerator), accelerator)
    tokenizer, batches, held_out = build_data(recipe, accelerator, config.vocab_size, fresh)
    if model is None:
        frequencies = None
        if recipe.unigram_start and fresh:
            frequencies = token_frequencies(batches, config.vocab_size, accelerator)
        model = build_model(recipe, config, tokenizer, accelerator, frequencies)
    optimizer, scheduler = build_optimizer(recipe, model)
    if recipe.ep_size == 1:
        model, optimizer = accelerator.prepare(model, optimizer)
    return TrainState(model, optimizer, scheduler, batches), tokenizer, held_out


def run(recipe: Recipe, config: PreTrainedConfig, accelerator: Accelerator) -> int:
    """Trains from the start or from a checkpoint, and returns the exit status."""
    output = Path(recipe.output_dir)
    check_inputs(recipe)
    checkpoint = find_checkpoint(recipe, accelerator)
    steps = 0 if checkpoint is None else step_of(checkpoint)
    if steps > recipe.max_steps:
        raise RecipeError(f"max_steps={recipe.max_steps} is below the {steps} steps of {checkpoint}: raise it.")
    if is_finished(recipe, checkpoint, steps):
        accelerator.print(f"{output / 'final'} is complete: max_steps={recipe.max_steps}.")
        return 0
    changed = []
    if checkpoint is not None:
        read_metrics(output / "metrics.jsonl")  # raise errors in the file before anything is written
        changed = find_changed_inputs(recipe, checkpoint)
    state, tokenizer, held_out = build(recipe, config, accelerator, fresh=checkpoint is None)
    counters, first_step = state.counters, 0
    checkpoints = Checkpoints(recipe, accelerator, state, fingerprint_inputs(recipe))
    if checkpoint is not None:
        first_step = checkpoints.load(checkpoint)
        counters["changes"] = counters["changes"] + [{"step": first_step} | change for change in changed]
        accelerator.print(f"resumed from {checkpoint}")
    if accelerator.is_main_process:
        write_recipe(recipe)
    log = Log(recipe, accelerator, first_step)
    for change in counters["changes"]:
        if change["step"] == first_step:
            log.write(f"step {first_step} | {change['field']}: {change['before']} → {change['after']}", **change)
    count = count_parameters(config)
    engine = "FSDP x EP" if recipe.ep_size > 1 else accelerator.distributed_type.value
    accelerator.print(
        f"{count['total']:,} parameters, {count['active']:,} active | experts: {config._experts_implementation} in "
        f"{find_experts_dtype(state.model, accelerator)} | {engine} x {accelerator.num_processes} on "
        f"{accelerator.device.type}, {recipe.precision}"
    )
    if not TrainingLoop(recipe, accelerator, state, held_out, checkpoints, log).train(first_step):
        accelerator.print("stopped after writing a checkpoint; pass --resume auto to continue.")
        return INTERRUPTED
    accelerator.print(f"saved {save_final(recipe, accelerator, state.model, tokenizer, counters['changes'])}")
    return 0


def command() -> int:
    for number in STOPPING:  # all are handled alike: the run can be resumed
        signal.signal(number, signal.default_int_handler)
    return main()
