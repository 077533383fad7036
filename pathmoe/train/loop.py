# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains a PathMoE from a YAML recipe.

    python train_accelerate.py --config configuration/train/quickstart.yaml --output_dir runs/quickstart
    python train_accelerate.py plot RUN [RUN …]
    python train_accelerate.py plan --config configuration/train/paper-16b.yaml
    accelerate launch --config_file configuration/accelerate/ddp.yaml train_accelerate.py --config … --output_dir …

Any field of the recipe can be given on the command line: `--learning_rate 1e-3 --model_overrides '{num_experts: 8}'`.
The model ends in OUTPUT_DIR/final, ready for the Hub; metrics are in OUTPUT_DIR/metrics.jsonl. `--resume auto`
continues an interrupted run from its newest checkpoint, with the same result as if it had not been interrupted.
"""

import copy
import glob
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from huggingface_hub.errors import StrictDataclassError
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.output_capturing import install_all_output_capturing_hooks

from modeling_pathmoe import PathMoERouter, update_selection_bias
from pathmoe import presets
from pathmoe.accounting import count_parameters, forward_flops_per_token
from pathmoe.command import UserError
from pathmoe.files import check_writable, write_aside
from pathmoe.loading import load_model
from pathmoe.text.batches import Batches, PackedBlocks, PackedStream, Prefetch, document_positions
from pathmoe.text.reader import DataError, load_text, pack, read_blocks, train_tokenizer
from pathmoe.train.checkpoints import Checkpoints, find_checkpoint, list_checkpoints, step_of
from pathmoe.train.engine import (
    StopOnSignal,
    accumulate,
    build_accelerator,
    clip_gradients,
    gather_full,
    gradient_norm,
)
from pathmoe.train.final import save_final
from pathmoe.train.inputs import find_changed_inputs, fingerprint_inputs
from pathmoe.train.log import Log, is_spike, plot, read_metrics
from pathmoe.train.output import check_inputs, is_finished, lock_output_dir, set_aside, write_recipe
from pathmoe.train.plan import plan
from pathmoe.train.recipe import Recipe, RecipeError, Source, parse_recipe
from pathmoe.train.routing_monitor import RoutingMonitor
from pathmoe.train.start import apply_start, check_start, parameters_of_start, token_frequencies


INTERRUPTED = 75  # exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL)


WAY_OUT = (
    "Go on from an older checkpoint with a lower learning rate: --resume OUTPUT_DIR/checkpoints/step-… "
    "--learning_rate …"
)


class Diverged(UserError, ArithmeticError):
    """The loss or the gradients have not been finite for several steps. What was saved before that is whole."""


def build_tokenizer(
    recipe: Recipe,
    texts: list[tuple[Source, Dataset]],
    vocab_size: int,
    accelerator: Accelerator,
    fresh: bool = True,
) -> PreTrainedTokenizerBase:
    """Loads the recipe's tokenizer, or the one that this run has trained or now trains on its text.

    Args:
        recipe (`Recipe`): The recipe.
        texts (`list`): The sources and their text, needed where a tokenizer is trained.
        vocab_size (`int`): The model's.
        accelerator (`Accelerator`): The engine.
        fresh (`bool`, defaults to `True`): Whether nothing has been trained yet. A tokenizer that an earlier start
            left, on whatever text, is then set aside.
    """
    name = recipe.tokenizer
    if name is None and not recipe.model.endswith(".json"):
        name = recipe.model
    if name is None:
        folder = Path(recipe.output_dir) / "tokenizer"
        if accelerator.is_main_process and fresh and os.path.lexists(folder):
            accelerator.print(f"{folder} was there before this run and is kept as {set_aside(folder)}.")
        if accelerator.is_main_process and not folder.exists():
            # A sample is enough for the merges and keeps this short on large data.
            sample = (row[source.text_column] for source, text in texts for row in text.take(50_000 // len(texts)))
            tokenizer = train_tokenizer(tqdm(sample, desc="train tokenizer", disable=None, unit="doc"), vocab_size)
            with write_aside(folder) as partial:
                tokenizer.save_pretrained(partial)
        accelerator.wait_for_everyone()
        name = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged file ends in an error of any kind
        raise RecipeError(f"tokenizer={name!r} could not be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"tokenizer={name!r} has no end-of-text token, which separates packed documents.")
    if len(tokenizer) > vocab_size:
        raise RecipeError(
            f"tokenizer={name!r} has {len(tokenizer)} tokens but the model's vocab_size is {vocab_size}: "
            f"set model_overrides={{vocab_size: {len(tokenizer)}}} or more."
        )
    return tokenizer


def build_data(recipe: Recipe, accelerator: Accelerator, vocab_size: int, fresh: bool = True):
    """Loads and packs the text; every complaint about the data is made here, before there is a model.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        vocab_size (`int`): The model's.
        fresh (`bool`, defaults to `True`): Whether nothing has been trained yet, so that nothing which an earlier
            start left is used.

    Returns:
        `tuple`: the tokenizer, the training batches and the validation blocks, an int array of shape
        `(blocks, sequence_length)`.
    """
    with accelerator.main_process_first():
        texts = [load_source(recipe, source) for source in recipe.sources]
    readable = [(source, train) for source, train, _ in texts]
    tokenizer = build_tokenizer(recipe, readable, vocab_size, accelerator, fresh)
    weights = [source.weight for source in recipe.sources]
    rank, world_size, length = accelerator.process_index, accelerator.num_processes, recipe.sequence_length
    cache = Path(recipe.cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "pathmoe")
    held_out, sources = [], []
    for number, (source, train, validation) in enumerate(texts):
        share = max(1, round(recipe.eval_sequences * source.weight / sum(weights)))
        if recipe.streaming:
            file = Path(recipe.output_dir) / f"validation-{number}.npy"
            if accelerator.is_main_process and fresh and os.path.lexists(file):
                accelerator.print(f"{file} was there before this run and is kept as {set_aside(file)}.")
            if accelerator.is_main_process and not file.exists():
                hold_out_stream(recipe, file, validation, tokenizer, source, share)
            accelerator.wait_for_everyone()
            held_out.append(read_blocks(file, length))
            train = split_dataset_by_node(train, rank, world_size)
            sources.append(
                PackedStream(train, tokenizer, source.text_column, length, recipe.seed, recipe.shuffle_window)
            )
            continue
        with accelerator.main_process_first():
            sources.append(PackedBlocks(pack(train, tokenizer, source.text_column, length, cache), recipe.seed))
            blocks = pack(validation, tokenizer, source.text_column, length, cache)
        if source.validation_split is not None and np.array_equal(blocks[:1], sources[-1].blocks[:1]):
            warn_of_same_text(source)
        # Spread over the whole text, whose parts may follow one another.
        held_out.append(blocks[np.linspace(0, len(blocks) - 1, min(len(blocks), share)).round().astype(int)])
    batches = Batches(sources, weights, rank, world_size, split=recipe.streaming)
    return tokenizer, Prefetch(batches) if recipe.streaming else batches, np.concatenate(held_out)


def warn_of_same_text(source: Source):
    tqdm.write(
        f"WARNING: validation_split={source.validation_split!r} of dataset={source.dataset!r} is what is trained on: "
        "the validation loss will be too low."
    )


def hold_out_stream(recipe: Recipe, file: Path, validation, tokenizer, source: Source, share: int):
    """Writes the first `share` validation blocks of a stream to a file. They are read once, by the main process, and
    kept: to come by one held-out document a hundred others may have to be read."""
    stream = PackedStream(validation, tokenizer, source.text_column, recipe.sequence_length)
    try:
        blocks = [stream.next_block() for _ in tqdm(range(share), desc="read validation text", disable=None)]
    except DataError as error:
        raise DataError(f"validation text of dataset={source.dataset!r}: {error}") from error
    with write_aside(file) as partial:
        np.save(partial, np.array(blocks, dtype=np.int32))


def is_held_out(text: str, every: int) -> bool:
    """Whether a document belongs to the validation text: one in `every` does, wherever it stands and whoever reads it,
    and all copies of it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % every == 0


def find_paths(source: Source, split: str) -> set[str]:
    """What a split is read from: its files under their real names, or without files the split itself."""
    files = source.data_files
    files = files.get(split) if isinstance(files, dict) else split if files is None else files
    entries = files if isinstance(files, list) else [files]
    found = [
        name for entry in entries if isinstance(entry, str) for name in (glob.glob(entry, recursive=True) or [entry])
    ]
    return {os.path.realpath(name) for name in found}


def load_source(recipe: Recipe, source: Source):
    """One source of text, its training part and its validation part."""
    load = partial(
        load_text,
        source.dataset,
        text_column=source.text_column,
        config=source.dataset_config,
        data_files=source.data_files,
        streaming=recipe.streaming,
        max_bad_rows=recipe.max_bad_rows,
    )
    train = load(source.train_split)
    if source.validation_split is not None:
        if find_paths(source, source.train_split) & find_paths(source, source.validation_split):
            warn_of_same_text(source)
        return source, train, load(source.validation_split)
    column, every = source.text_column, recipe.holdout_every
    validation = train.filter(lambda row: is_held_out(row[column], every))
    train = train.filter(lambda row: not is_held_out(row[column], every))
    if not recipe.streaming and not (len(train) and len(validation)):
        raise DataError(
            f"dataset={source.dataset!r} has too few documents to hold out one in {every} of them for validation: "
            "name a validation_split or lower holdout_every."
        )
    return source, train, validation


FIXED = {"dtype", "torch_dtype", "model_type", "architectures", "auto_map", "transformers_version"}
MAX_LAYERS = 10_000


def read_fields(file: Path) -> dict:
    """The fields of a model configuration file; one that stands there twice is an error."""

    def unique(pairs: list[tuple]) -> dict:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]} stands there twice.")
        return dict(pairs)

    fields = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    if not isinstance(fields, dict):
        raise ValueError("the file must hold a JSON object.")
    if (kind := fields.get("model_type", "pathmoe")) not in list(CONFIG_MAPPING):
        raise ValueError(f"model_type={kind!r} is not known to transformers.")
    return fields


def check_fields(fields: dict):
    """Refuses sizes that no machine can build, before anything is built."""
    layers = fields.get("num_hidden_layers", 1)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers={layers} must be at most {MAX_LAYERS}.")


def check_model(recipe: Recipe, config: PreTrainedConfig):
    """Finds out before the text is read what would stop the model from being built.

    Raises:
        RecipeError: If an implementation is not known or the weights do not fit into the memory of the machine.
    """
    kwargs = {
        name: getattr(recipe, name)
        for name in ("attn_implementation", "experts_implementation")
        if getattr(recipe, name) is not None
    }
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **kwargs)
    except (ValueError, ImportError, KeyError, RuntimeError) as error:
        raise RecipeError(f"model={recipe.model!r} with {kwargs} cannot be built: {error}") from error
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size")
        said = ", ".join(f"{name}={getattr(config, name)}" for name in sizes if hasattr(config, name))
        raise RecipeError(
            f"model={recipe.model!r}: its weights take {size / 1e9:,.0f} GB in float32 and this machine has "
            f"{memory / 1e9:,.0f} GB of memory ({said}): take a smaller model, or run `plan` for this one."
        )


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """Reads the model configuration that the recipe names and applies its overrides.

    Raises:
        RecipeError: If there is none, or if it is wrong.
    """
    if recipe.model.endswith(".json") and not presets.find(recipe.model).is_file():
        raise RecipeError(f"model={recipe.model!r}: there is no such file.")
    try:
        if recipe.model.endswith(".json"):
            fields = read_fields(presets.find(recipe.model)) | recipe.model_overrides
            check_fields(fields)
            config = AutoConfig.for_model(fields.pop("model_type", "pathmoe"), **fields)
        else:
            check_fields(recipe.model_overrides)
            config = AutoConfig.from_pretrained(recipe.model, **recipe.model_overrides)
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RecipeError(f"model={recipe.model!r}: {error.__cause__ or error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise RecipeError(f"model={recipe.model!r}: model_type={config.model_type!r} is not a causal language model.")
    known = set(type(config)().to_dict()) | set(type(config).attribute_map) | {"model_type", "architectures"}
    if fixed := FIXED & set(recipe.model_overrides):
        raise RecipeError(f"model_overrides has {sorted(fixed)}, which cannot be overridden: see precision and model.")
    if unknown := set(recipe.model_overrides) - known:
        raise RecipeError(f"model_overrides has {sorted(unknown)}, no fields of a {config.model_type} configuration.")
    if recipe.model.endswith(".json") and (unknown := set(fields) - known):
        raise RecipeError(
            f"model={recipe.model!r} has {sorted(unknown)}, no fields of a {config.model_type} configuration."
        )
    if recipe.sequence_length > config.max_position_embeddings:
        raise RecipeError(
            f"sequence_length={recipe.sequence_length} exceeds the model's max_position_embeddings="
            f"{config.max_position_embeddings}: shorten it or override that field."
        )
    return config


def build_model(
    recipe: Recipe,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    frequencies: np.ndarray | None = None,
) -> PreTrainedModel:
    """Builds a new model from the seed, or loads the checkpoint to go on from. `frequencies` is for `apply_start`.

    With expert parallelism each rank loads its shards alone, which takes a checkpoint: a new model is first written to
    OUTPUT_DIR/initial by the main process, which has it whole in its memory for that time.
    """
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    kwargs = {"dtype": torch.float32}
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(recipe, name) is not None:
            kwargs[name] = getattr(recipe, name)
    set_seed(recipe.seed)
    new, source = recipe.model.endswith(".json"), recipe.model
    if recipe.ep_size > 1:
        kwargs["distributed_config"] = DistributedConfig(
            fsdp_size=accelerator.num_processes,
            ep_size=recipe.ep_size,
            fsdp_mixed_precision=recipe.precision == "bf16",
        )
        if new:
            source = Path(recipe.output_dir) / "initial"
            if accelerator.is_main_process:
                if os.path.lexists(source) and not list_checkpoints(recipe):
                    accelerator.print(f"{source} was there before and is kept as {set_aside(source)}.")
                initial = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
                apply_start(recipe, initial, frequencies)
                initial.save_pretrained(source)
            accelerator.wait_for_everyone()
            set_seed(recipe.seed)
    if new and recipe.ep_size == 1:
        model = AutoModelForCausalLM.from_config(config, **kwargs)
        apply_start(recipe, model, frequencies)
    else:
        model = load_model(
            source,
            what=f"model={recipe.model!r}",
            allow_missing=recipe.initialize_missing,
            switch="initialize_missing=true",
            config=config,
            **kwargs,
        )
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.compile:
        if recipe.routing_every:
            install_all_output_capturing_hooks(model.base_model)  # a compiled forward cannot
        model.compile()
    return model


def build_optimizer(recipe: Recipe, model: torch.nn.Module):
    """AdamW in which matrices decay and vectors do not, and its schedule."""
    groups, keeps_start = defaultdict(list), parameters_of_start(recipe, model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = recipe.router_learning_rate_scale if "routers." in name else 1.0
            groups[parameter.ndim >= 2 and id(parameter) not in keeps_start, scale].append(parameter)
    groups = [
        {
            "params": groups[key],
            "weight_decay": recipe.weight_decay if key[0] else 0.0,
            "lr": recipe.learning_rate * key[1],
        }
        for key in sorted(groups, reverse=True)
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=recipe.ep_size == 1,  # no kernel takes parameters of several device meshes at once
        foreach=False if recipe.ep_size > 1 else None,
    )
    if recipe.schedule == "cosine":
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, recipe.steps("warmup_steps"), recipe.max_steps, min_lr_rate=recipe.min_lr_ratio
        )
    else:
        scheduler = get_wsd_schedule(
            optimizer,
            recipe.steps("warmup_steps"),
            recipe.steps("decay_steps"),
            num_training_steps=recipe.max_steps,
            min_lr_ratio=recipe.min_lr_ratio,
        )
    return optimizer, scheduler


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of five: what the utilisation is measured against."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)  # drawing numbers would change what a resumed run draws
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure_peak_memory(accelerator: Accelerator) -> int:
    """The most memory in bytes that any rank has had in use so far: of its GPU's, or of the machine's."""
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(gather_object([peak]))


def make_inputs(tokens: torch.Tensor, recipe: Recipe, end_of_text: int) -> dict[str, torch.Tensor]:
    """What the model is given for a batch of packed sequences of shape `(rows, sequence_length)`."""
    if not recipe.document_mask:
        return {"input_ids": tokens, "labels": tokens}
    positions = document_positions(tokens, end_of_text)
    # The first token of a document would be predicted from the end of another.
    return {"input_ids": tokens, "position_ids": positions, "labels": tokens.masked_fill(positions == 0, -100)}


def count_targets(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["labels"][:, 1:] != -100).sum()


def loss_only_kwargs(model) -> dict[str, bool]:
    """What makes a forward compute the loss without holding all logits: PathMoE can, unless its head is sharded."""
    return {"skip_logits": True} if getattr(model, "can_skip_logits", False) else {}


@torch.no_grad()
def evaluate(
    model, held_out: np.ndarray, recipe: Recipe, accelerator: Accelerator, end_of_text: int
) -> dict[str, float]:
    """Mean cross-entropy of the next token (nats) and its exponential over the validation blocks.

    Every rank runs equally many forwards, because a sharded model's forward is collective.
    """
    model.eval()
    # Other MoE models add their balancing loss whenever they return router logits.
    unwrapped = accelerator.unwrap_model(model)
    plain = {"output_router_logits": False} if hasattr(unwrapped.config, "output_router_logits") else {}
    plain |= loss_only_kwargs(unwrapped)
    rows = recipe.micro_batch_size
    stride = rows * accelerator.num_processes
    totals = torch.zeros(2, dtype=torch.float64)
    starts = range(accelerator.process_index * rows, -(-len(held_out) // stride) * stride, stride)
    for start in tqdm(starts, desc="validate", leave=False, disable=None if accelerator.is_main_process else True):
        real = held_out[start : start + rows]
        tokens = torch.from_numpy(np.array(real if len(real) else held_out[:1], dtype=np.int64))
        inputs = make_inputs(tokens.to(accelerator.device), recipe, end_of_text)
        total = model(**inputs, num_items_in_batch=1, use_cache=False, **plain).loss
        totals += torch.stack([total.double().cpu(), count_targets(inputs).double().cpu()]) * bool(len(real))
    total, count = accelerator.reduce(totals.to(accelerator.device, torch.float32), reduction="sum").tolist()
    model.train()
    loss = total / count if count else math.nan
    return {"eval_loss": loss, "eval_perplexity": float(np.exp(loss))}


@torch.no_grad()
def find_experts_dtype(model, accelerator: Accelerator) -> str:
    """The dtype in which the experts compute, seen in a forward of a few tokens: a kernel can ignore autocast, and
    then runs float32 weights in float32, slowly and without a word. `"none"` for a model without experts."""
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, module.down_proj.dtype)))
        for name, module in model.named_modules()
        if name.endswith("experts") and hasattr(module, "down_proj")
    ]
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device=accelerator.device), use_cache=False)
    model.train()
    for handle in handles:
        handle.remove()
    return " and ".join(sorted({str(dtype).removeprefix("torch.") for pair in seen for dtype in pair})) or "none"


def train(
    recipe: Recipe,
    accelerator: Accelerator,
    model,
    optimizer,
    scheduler,
    batches,
    held_out,
    checkpoints: Checkpoints,
    log: Log,
    first_step: int,
    end_of_text: int,
) -> bool:
    """Runs the optimizer steps.

    Returns:
        `bool`: Whether all steps are done; `False` when the run was asked to stop.

    Raises:
        Diverged: After `max_bad_steps` steps in a row whose loss or gradients were not finite.
    """
    unwrapped, counters = accelerator.unwrap_model(model), checkpoints.counters
    config, alone = unwrapped.config, loss_only_kwargs(unwrapped)
    flops = 3 * forward_flops_per_token(config, recipe.sequence_length)
    peak = measure_matmul_peak(accelerator.device, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    accumulation = recipe.batch_size // (recipe.micro_batch_size * accelerator.num_processes)
    tokens_per_step = recipe.batch_size * recipe.sequence_length
    monitor = RoutingMonitor(unwrapped, accelerator) if config.model_type == "pathmoe" else None
    model.train()
    clock, steps_timed, spent = time.perf_counter(), 0, Counter()
    bar = tqdm(
        range(first_step + 1, recipe.max_steps + 1),
        initial=first_step,
        total=recipe.max_steps,
        desc="train",
        disable=None if accelerator.is_main_process else True,
    )
    with StopOnSignal() as stop:
        for step in bar:
            began = time.perf_counter()
            drawn = checkpoints.draw_step(step, accumulation)
            if accelerator.device.type == "cuda":
                drawn = [tokens.pin_memory() for tokens in drawn]
            spent["data"] += time.perf_counter() - began
            micro = [
                make_inputs(tokens.to(accelerator.device, non_blocking=True), recipe, end_of_text) for tokens in drawn
            ]
            targets = torch.stack([count_targets(inputs) for inputs in micro]).sum()
            if accelerator.num_processes > 1:
                # Gradients are averaged over the ranks, each of which has its share of the targets.
                targets = accelerator.reduce(targets.float(), reduction="mean")

            monitored = monitor is not None and recipe.routing_every and step % recipe.routing_every == 0
            loss_sum, router_logits = torch.zeros((), device=accelerator.device), None
            for number, inputs in enumerate(micro):
                wanted = {"output_router_logits": True} if monitored and number == 0 else {}
                with accumulate(accelerator, model, last=number == accumulation - 1):
                    output = model(**inputs, num_items_in_batch=targets, use_cache=False, **alone, **wanted)
                    loss = output.loss
                    loss_sum += cross_entropy(output, config, count_targets(inputs) / targets)
                    router_logits = output.router_logits if wanted else router_logits
                    del output  # and with it, in most models, the logits: the largest tensor of all
                    accelerator.backward(loss)
            norm = gradient_norm(unwrapped)
            loss, norm, stopping = reduce_step_stats(accelerator, loss_sum, norm, stop.signalled)
            began = time.perf_counter()
            routing = monitor.measure(router_logits) if monitored else None
            spent["routing"] += time.perf_counter() - began
            router_logits = None

            if finite := math.isfinite(loss) and math.isfinite(norm):
                clip_gradients(unwrapped, recipe.max_grad_norm, norm)
                lr = scheduler.get_last_lr()[0]
                optimizer.step()
                update_selection_bias(unwrapped)
                counters["bad_steps_in_a_row"] = 0
                counters["healthy"] = not is_spike(counters, loss)
                if not counters["healthy"]:
                    log.write(f"step {step} | loss spike: {loss:.4f}, running mean {counters['loss_mean']:.4f}",
                              step=step, loss_spike=loss, grad_norm=norm)  # fmt: skip
            else:
                skip_bad_step(recipe, unwrapped, counters, log, step, loss, norm)
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            steps_timed += 1
            last = step == recipe.max_steps
            if finite and (last or (recipe.log_every and step % recipe.log_every == 0)):
                seconds = time.perf_counter() - clock
                tokens_per_s = tokens_per_step * steps_timed / seconds
                utilisation = tokens_per_s * flops / accelerator.num_processes / peak
                eta = timedelta(seconds=int(seconds / steps_timed * (recipe.max_steps - step)))
                log.write(
                    f"step {step}/{recipe.max_steps} | loss {loss:.4f} | lr {lr:.2e} | {tokens_per_s:,.0f} tokens/s | "
                    f"MFU {utilisation:.1%} | ETA {eta}",
                    step=step,
                    loss=loss,
                    lr=lr,
                    tokens=step * tokens_per_step,
                    tokens_per_s=tokens_per_s,
                    mfu=utilisation,
                    grad_norm=norm,
                    skipped_steps=counters["skipped_steps"],
                    peak_memory=measure_peak_memory(accelerator),
                    # What the loop costs beside the step, as shares of the time since the last line.
                    data_share=spent["data"] / seconds,
                    log_share=spent["log"] / seconds,
                    routing_share=spent["routing"] / seconds,
                )
                written = time.perf_counter()
                spent, steps_timed, clock = Counter(log=written - clock - seconds), 0, clock + seconds
            if routing is not None and finite:
                began = time.perf_counter()
                report_routing(routing, monitor.find_collapse(routing), log, step)
                spent["log"] += time.perf_counter() - began
            paused = time.perf_counter()
            if last or (recipe.eval_every and step % recipe.eval_every == 0):
                metrics = evaluate(model, held_out, recipe, accelerator, end_of_text)
                log.write("step {step} | validation loss {eval_loss:.4f} | perplexity {eval_perplexity:.2f}".format(
                    step=step, **metrics), step=step, **metrics)  # fmt: skip
                if last:
                    check_evaluation(metrics, step)
            if last or stopping or (recipe.checkpoint_every and step % recipe.checkpoint_every == 0):
                check_weights(unwrapped, step)
                checkpoints.save(step)
            clock += time.perf_counter() - paused
            if stopping and not last:
                return False
    return True


def reduce_step_stats(
    accelerator: Accelerator, loss: torch.Tensor, norm: torch.Tensor, signalled: bool
) -> tuple[float, float, bool]:
    """The step's loss, its gradient norm, and whether any rank was asked to stop: one exchange and one wait a step."""
    values = torch.stack([loss, norm.to(loss), torch.tensor(float(signalled), device=loss.device)])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, reduction="mean")
    loss, norm, signalled = values.tolist()
    return loss, norm, signalled > 0


def skip_bad_step(recipe: Recipe, model, counters: dict, log: Log, step: int, loss: float, norm: float):
    """Notes a step whose loss or gradients are not finite, which is not taken, and gives up after several in a row."""
    counters["skipped_steps"] += 1
    counters["bad_steps_in_a_row"] += 1
    counters["healthy"] = False
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not math.isfinite(gather_full(parameter.grad.norm()).item())
    ]
    where = (
        f"gradients of {', '.join(bad[:4])}{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}" if bad else "loss"
    )
    log.write(
        f"step {step} | WARNING: skipped, not finite: {where} (loss {loss}, gradient norm {norm})",
        step=step,
        skipped_steps=counters["skipped_steps"],
        not_finite=bad[:16] or ["loss"],
    )
    for module in model.modules():
        if isinstance(module, PathMoERouter) and module.bias_update_rate:
            module.load.zero_()
    if counters["bad_steps_in_a_row"] >= recipe.max_bad_steps:
        raise Diverged(
            f"{recipe.max_bad_steps} steps in a row were not finite, the last at step {step} (loss {loss}, gradient "
            f"norm {norm}); not finite: {where}. Lower learning_rate={recipe.learning_rate}. {WAY_OUT}"
        )


def check_weights(model: torch.nn.Module, step: int):
    """Refuses to save weights that are not finite.

    Raises:
        Diverged: On all ranks, if any of them has such weights.
    """
    bad = [
        name
        for name, parameter in model.named_parameters()
        if not torch.isfinite(parameter.to_local() if isinstance(parameter, DTensor) else parameter).all()
    ]
    if bad := sorted(set(gather_object(bad))):
        raise Diverged(f"step {step}: {bad[0]} holds values that are not finite. {WAY_OUT}")


def check_evaluation(metrics: dict[str, float], step: int):
    """Refuses a result whose evaluation is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name}={value} is not finite, so that no result is written. {WAY_OUT}")


def report_routing(measured: dict, collapse: list[str], log: Log, step: int):
    effective = measured["effective_experts"]
    agreement = "" if measured["adjacent_jaccard"] is None else f"agreement {measured['adjacent_jaccard']:.2f}, "
    log.write(
        f"step {step} | routing: {agreement}{measured['distinct_paths']} paths of {measured['sampled_tokens']} "
        f"tokens, effective experts {min(effective):.1f} to {max(effective):.1f}, "
        f"{sum(measured['dead_experts'])} dead",
        step=step,
        **measured,
    )
    for warning in collapse:
        log.write(f"step {step} | WARNING: {warning}", step=step, warning=warning)


def cross_entropy(output, config: PreTrainedConfig, share: torch.Tensor) -> torch.Tensor:
    """The cross-entropy in a micro-batch's loss: what is reported leaves the auxiliary router losses out.

    Args:
        output: The model's output.
        config (`PreTrainedConfig`): Its configuration.
        share (`torch.Tensor`): The micro-batch's share of the step's targets, by which PathMoE weighs its router
            losses. Other models add theirs whole.
    """
    loss = output.loss.detach()
    for name, coefficient in (("aux_loss", "router_aux_loss_coef"), ("z_loss", "router_z_loss_coef")):
        value = getattr(output, name, None)
        if value is not None:
            loss = loss - getattr(config, coefficient, 0.0) * value * (share if config.model_type == "pathmoe" else 1)
    return loss.detach()


def main(args: list[str] | None = None) -> int:
    """Runs a recipe. Returns the exit status: 0, or `INTERRUPTED` when stopped by a signal after a checkpoint.

    Raises:
        RecipeError, DataError: If the recipe or the data cannot be used; nothing has been trained then.
    """
    args = sys.argv[1:] if args is None else args
    if args[:1] == ["plot"]:
        print(plot(args[1:]))
        return 0
    if args[:1] == ["plan"]:
        print(plan(args[1:], build_config))
        return 0
    recipe = parse_recipe(args)
    config = build_config(recipe)
    check_start(recipe, config)
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


def run(recipe: Recipe, config: PreTrainedConfig, accelerator: Accelerator) -> int:
    """Trains, from the start or from a checkpoint, and returns the exit status."""
    output = Path(recipe.output_dir)
    check_inputs(recipe)
    checkpoint = find_checkpoint(recipe, accelerator)
    if is_finished(recipe, checkpoint, 0 if checkpoint is None else step_of(checkpoint)):
        accelerator.print(f"{output / 'final'} is done: max_steps={recipe.max_steps}.")
        return 0
    changed = []
    if checkpoint is not None:
        read_metrics(output / "metrics.jsonl")  # damaged ones are found before anything is written
        changed = find_changed_inputs(recipe, checkpoint)
    model = None
    if not recipe.model.endswith(".json"):  # what is wrong with a checkpoint is found before the text is read
        model = build_model(recipe, config, build_tokenizer(recipe, [], config.vocab_size, accelerator), accelerator)
    tokenizer, batches, held_out = build_data(recipe, accelerator, config.vocab_size, fresh=checkpoint is None)
    if model is None:
        frequencies = None
        if recipe.unigram_start and checkpoint is None:
            frequencies = token_frequencies(batches, config.vocab_size, accelerator)
        model = build_model(recipe, config, tokenizer, accelerator, frequencies)
    optimizer, scheduler = build_optimizer(recipe, model)
    if recipe.ep_size == 1:
        model, optimizer = accelerator.prepare(model, optimizer)
    counters = {"skipped_steps": 0, "bad_steps_in_a_row": 0, "losses_seen": 0, "loss_mean": 0.0, "loss_variance": 0.0}
    counters |= {"healthy": True, "changes": []}
    inputs, first_step = fingerprint_inputs(recipe), 0
    checkpoints = Checkpoints(recipe, accelerator, model, optimizer, scheduler, batches, counters, inputs)
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
        f"{find_experts_dtype(model, accelerator)} | {engine} x {accelerator.num_processes} on "
        f"{accelerator.device.type}, {recipe.precision}"
    )
    done = train(
        recipe,
        accelerator,
        model,
        optimizer,
        scheduler,
        batches,
        held_out,
        checkpoints,
        log,
        first_step,
        tokenizer.eos_token_id,
    )
    if done:
        accelerator.print(f"saved {save_final(recipe, accelerator, model, tokenizer, counters['changes'])}")
    else:
        accelerator.print("stopped after a checkpoint; --resume auto goes on.")
    return 0 if done else INTERRUPTED


def command() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the same: the run can be resumed
        signal.signal(number, signal.default_int_handler)
    return main()
