# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Trains a PathMoE from a YAML recipe.

    python train_accelerate.py --config configuration/train/quickstart.yaml --output_dir runs/quickstart
    accelerate launch --config_file configuration/accelerate/ddp.yaml train_accelerate.py --config … --output_dir …

Any field of the recipe can be given on the command line: `--learning_rate 1e-3 --model_overrides '{num_experts: 8}'`.
The model ends in OUTPUT_DIR/final, ready for the Hub; metrics are in OUTPUT_DIR/metrics.jsonl. `--resume auto`
continues an interrupted run from its newest checkpoint, with the same result as if it had not been interrupted.
"""

import os


# Read when torch is imported. Threads that spin while they wait cost a busy machine most of its speed.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import shutil
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from datasets.distributed import split_dataset_by_node
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from data.text import DataError, PackedBlocks, PackedStream, load_text, pack, train_tokenizer
from modeling_pathmoe import update_selection_bias
from modeling_pathmoe.accounting import count_parameters, forward_flops_per_token
from modeling_pathmoe.modeling_pathmoe import check_grouped_mm_rows


INTERRUPTED = 75  # exit status of a run that was asked to stop and can be resumed (EX_TEMPFAIL)


class RecipeError(ValueError):
    """The recipe cannot be run as asked. The message names the field, the value and the fix."""


class Diverged(ArithmeticError):
    """The loss or the gradient is not finite any more. No checkpoint of that state was written."""


@strict
@dataclasses.dataclass
class Recipe:
    """One training run. Paths are relative to the working directory.

    Args:
        model (`str`): A model configuration (JSON file), or a checkpoint (folder or Hub name) to go on from.
        dataset (`str`): A text file, a folder written by `save_to_disk`, or what `datasets.load_dataset` takes.
        output_dir (`str`): Where everything goes.
        max_steps (`int`): Optimizer steps.
        sequence_length (`int`): Tokens in a sequence. Documents are packed, nothing is padded.
        batch_size (`int`): Sequences in an optimizer step, over all processes and micro-batches.
        micro_batch_size (`int`): Sequences that a process runs at once; the rest of the batch is accumulated.
        model_overrides (`dict`): Configuration fields that differ from `model`.
        tokenizer (`str`, *optional*): A tokenizer (folder or Hub name). When unset, that of the checkpoint to go on
            from; for a new model, a byte-level BPE trained on the text.
        dataset_config, data_files, text_column, train_split, streaming: As for `datasets.load_dataset`. A stream is
            read in its own order.
        validation_split (`str`, *optional*): When unset, every `holdout_every`-th document is held out.
        eval_sequences (`int`): How many validation sequences an evaluation reads at most.
        learning_rate, weight_decay, beta1, beta2, epsilon, max_grad_norm: AdamW and gradient clipping. Matrices decay,
            norms and biases do not.
        schedule (`str`): `"cosine"`, or `"wsd"` (constant, then falling in the last `decay_steps`).
        warmup_steps, decay_steps (`int` or `float`): Steps over which the learning rate rises linearly and, with
            `"wsd"`, falls; below 1, a share of `max_steps`.
        min_lr_ratio (`float`): What is left of the learning rate at the end.
        precision (`str`): `"fp32"`, or `"bf16"` (autocast over float32 weights).
        engine (`str`): `"auto"`, or one that must be in force: `"cpu"`, `"gpu"`, `"ddp"`, `"fsdp"`.
        gradient_checkpointing, compile (`bool`): Memory against time; `torch.compile`.
        attn_implementation, experts_implementation (`str`, *optional*): As in transformers.
        eval_every, log_every, checkpoint_every (`int`): In steps; 0 means never, but at the end it evaluates.
        keep_last (`int`): How many checkpoints are kept.
        tracker (`str`, *optional*): `"tensorboard"`, `"wandb"` or another of Accelerate's trackers.
        seed (`int`): Seed of the weights and of the data order.
        resume (`str`, *optional*): `"auto"`, or a checkpoint folder of this run.
    """

    model: str
    dataset: str
    output_dir: str
    max_steps: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    model_overrides: dict = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    dataset_config: str | None = None
    data_files: str | list | dict | None = None
    text_column: str = "text"
    train_split: str = "train"
    validation_split: str | None = None
    holdout_every: int = 40
    streaming: bool = False
    eval_sequences: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int | float = 0
    decay_steps: int | float = 0
    min_lr_ratio: float = 0.1
    precision: str = "fp32"
    engine: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    eval_every: int = 0
    log_every: int = 10
    checkpoint_every: int = 0
    keep_last: int = 2
    tracker: str | None = None
    seed: int = 0
    resume: str | None = None

    def validate_choices(self):
        for name, choices in (
            ("schedule", ("cosine", "wsd")),
            ("precision", ("fp32", "bf16")),
            ("engine", ("auto", "cpu", "gpu", "ddp", "fsdp")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")

    def validate_numbers(self):
        for name in ("max_steps", "sequence_length", "batch_size", "micro_batch_size", "keep_last", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("learning_rate", "max_grad_norm", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("eval_every", "log_every", "checkpoint_every", "warmup_steps", "decay_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("min_lr_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1.")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2, or nothing is predicted.")
        if self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every} must be at least 2, or nothing is left to train on.")
        if self.schedule == "cosine" and self.decay_steps:
            raise ValueError(f"decay_steps={self.decay_steps} means nothing to schedule='cosine': use 'wsd'.")
        if self.steps("warmup_steps") + self.steps("decay_steps") > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit into "
                f"max_steps={self.max_steps}: shorten them, or give them as shares below 1."
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("decay_steps=0 with schedule='wsd' never lowers the learning rate: set it above 0.")

    def steps(self, name: str) -> int:
        """The number of steps that `warmup_steps` or `decay_steps` stands for."""
        value = getattr(self, name)
        return round(value * self.max_steps) if 0 < value < 1 else int(value)


# A run may be resumed with another value of these.
FREE_TO_CHANGE = {
    "resume", "output_dir", "max_steps", "eval_every", "log_every", "checkpoint_every", "keep_last", "tracker",
    "engine", "micro_batch_size",
}  # fmt: skip


def parse_recipe(args: list[str]) -> Recipe:
    """Reads `--config RECIPE.yaml` and the overrides after it.

    Raises:
        RecipeError: If the file or a field is missing, unknown or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if "--help" in args or "-h" in args:
        sys.exit(f"{__doc__}\n{Recipe.__doc__}")
    given = {}
    for name, value in zip(args[::2], args[1::2]):
        if not name.startswith("--"):
            raise RecipeError(f"expected --field value, got {name!r}.")
        given[name[2:].replace("-", "_")] = value
    if len(args) % 2:
        raise RecipeError(f"{args[-1]!r} has no value: write --field value (and true or false for a switch).")
    values, config = {}, given.pop("config", None)
    if config is not None:
        if not Path(config).is_file():
            raise RecipeError(f"--config {config}: there is no such file.")
        values = parse_yaml(Path(config).read_text(encoding="utf-8"), f"--config {config}")
        if not isinstance(values, dict):
            raise RecipeError(f"--config {config} must hold 'field: value' lines.")
    for name, value in given.items():
        text = name in fields and str in getattr(fields[name].type, "__args__", (fields[name].type,))
        values[name] = value if text and value != "null" and value[:1] not in "{[" else parse_yaml(value, name)
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            raise RecipeError(f"{name} is no field of a recipe." + (f" Did you mean {close[0]}?" if close else ""))
        if fields[name].type is float and isinstance(value, str | int):
            try:
                values[name] = float(value)  # YAML reads 1e-3 as text
            except ValueError:
                raise RecipeError(f"{name}={value!r} must be a number.") from None
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"the recipe lacks {', '.join(missing)}: add them to the YAML or pass --{missing[0]} VALUE.")
    try:
        return Recipe(**values)
    except StrictDataclassError as error:
        raise RecipeError(str(error.__cause__ or error)) from error


def parse_yaml(text: str, what: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{what} is no valid YAML: {error}") from error


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Starts Accelerate and makes sure that it is the engine that was asked for.

    Raises:
        RecipeError: If it is another one. Accelerate falls back in silence: without a GPU it leaves FSDP out, and it
            can leave the processes of one launch unaware of each other.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        log_with=recipe.tracker,
        project_dir=recipe.output_dir,
        # The other processes wait while the first one prepares the text.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
    )
    on_cpu = accelerator.device.type == "cpu"
    engines = {
        DistributedType.NO: "cpu" if on_cpu else "gpu",
        DistributedType.MULTI_CPU: "ddp",
        DistributedType.MULTI_GPU: "ddp",
        DistributedType.FSDP: "fsdp",
    }
    found = engines.get(accelerator.distributed_type, accelerator.distributed_type.value)
    wanted = recipe.engine
    if wanted == "auto":
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        wanted = "ddp" if world_size > 1 else "cpu" if on_cpu else "gpu"
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
            wanted = "fsdp"
        if world_size != accelerator.num_processes:
            raise RecipeError(
                f"{world_size} processes were launched but each trains alone: launch with `accelerate launch` and a "
                "file of configuration/accelerate/."
            )
    if found != wanted:
        raise RecipeError(
            f"engine={wanted!r} was asked for but Accelerate runs {found!r} on {accelerator.device.type}: launch with "
            f"`accelerate launch --config_file configuration/accelerate/{wanted}.yaml` on a machine that has what it "
            f"needs (FSDP needs GPUs), or set engine={found!r}."
        )
    return accelerator


def build_tokenizer(recipe: Recipe, train_text, vocab_size: int, accelerator: Accelerator) -> PreTrainedTokenizerBase:
    """Loads the recipe's tokenizer, or the one that this run has trained or now trains on its text."""
    name = recipe.tokenizer
    if name is None and not recipe.model.endswith(".json"):
        name = recipe.model
    if name is None:
        folder = Path(recipe.output_dir) / "tokenizer"
        if accelerator.is_main_process and not folder.exists():
            # A sample is enough for the merges and keeps this short on large data.
            texts = (document[recipe.text_column] for document in train_text.take(50_000))
            tokenizer = train_tokenizer(tqdm(texts, desc="train tokenizer", disable=None, unit="doc"), vocab_size)
            tokenizer.save_pretrained(folder.with_suffix(".partial"))
            folder.with_suffix(".partial").rename(folder)
        accelerator.wait_for_everyone()
        name = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RecipeError(f"tokenizer={name!r} could not be loaded: {error}") from error
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"tokenizer={name!r} has no end-of-text token, which separates packed documents.")
    if len(tokenizer) > vocab_size:
        raise RecipeError(
            f"tokenizer={name!r} has {len(tokenizer)} tokens but the model's vocab_size is {vocab_size}: "
            f"set model_overrides={{vocab_size: {len(tokenizer)}}} or more."
        )
    return tokenizer


def build_data(recipe: Recipe, accelerator: Accelerator, vocab_size: int):
    """Loads and packs the text; every complaint about the data is made here, before there is a model.

    Returns:
        `tuple`: the tokenizer, the training batches and the validation blocks, an int array of shape
        `(blocks, sequence_length)`.
    """
    cache = Path(recipe.output_dir) / "cache"

    def load(split):
        return load_text(
            recipe.dataset,
            split,
            recipe.text_column,
            recipe.dataset_config,
            recipe.data_files,
            recipe.streaming,
            cache,
        )

    with accelerator.main_process_first():
        train = load(recipe.train_split)
        if recipe.validation_split is not None:
            validation = load(recipe.validation_split)
        else:
            every = recipe.holdout_every
            validation = train.filter(lambda _, index: index % every == 0, with_indices=True)
            train = train.filter(lambda _, index: index % every != 0, with_indices=True)
            if not recipe.streaming and not (len(train) and len(validation)):
                raise DataError(
                    f"dataset={recipe.dataset!r} has too few documents to hold out every {every}th of them for "
                    "validation: name a validation_split or lower holdout_every."
                )
    tokenizer = build_tokenizer(recipe, train, vocab_size, accelerator)
    column, length = recipe.text_column, recipe.sequence_length
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if recipe.streaming:
        held_out = list(
            itertools.islice(PackedStream(validation, tokenizer, column, length).read(), recipe.eval_sequences)
        )
        if not held_out:
            raise DataError(f"the validation text is shorter than one sequence of sequence_length={length} tokens.")
        batches = PackedStream(split_dataset_by_node(train, rank, world_size), tokenizer, column, length)
        return tokenizer, batches, np.array(held_out)
    with accelerator.main_process_first():
        batches = PackedBlocks(pack(train, tokenizer, column, length, cache), recipe.seed, rank, world_size)
        held_out = pack(validation, tokenizer, column, length, cache)
        # Spread over the whole text, whose sources may follow one another.
        spread = np.linspace(0, len(held_out) - 1, min(len(held_out), recipe.eval_sequences)).round().astype(int)
        return tokenizer, batches, held_out[spread]


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """Reads the model configuration that the recipe names and applies its overrides.

    Raises:
        RecipeError: If there is none, or if it is wrong.
    """
    if recipe.model.endswith(".json") and not Path(recipe.model).is_file():
        raise RecipeError(f"model={recipe.model!r}: there is no such file.")
    try:
        if recipe.model.endswith(".json"):
            fields = json.loads(Path(recipe.model).read_text(encoding="utf-8")) | recipe.model_overrides
            config = AutoConfig.for_model(fields.pop("model_type", "pathmoe"), **fields)
        else:
            config = AutoConfig.from_pretrained(recipe.model, **recipe.model_overrides)
    except (StrictDataclassError, OSError, ValueError) as error:
        raise RecipeError(f"model={recipe.model!r}: {error.__cause__ or error}") from error
    known = set(type(config)().to_dict()) | set(type(config).attribute_map) | {"model_type", "architectures"}
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


def build_model(recipe: Recipe, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Builds a new model from the seed, or loads the checkpoint to go on from."""
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    kwargs = {"dtype": torch.float32}
    for name in ("attn_implementation", "experts_implementation"):
        if getattr(recipe, name) is not None:
            kwargs[name] = getattr(recipe, name)
    set_seed(recipe.seed)
    if recipe.model.endswith(".json"):
        model = AutoModelForCausalLM.from_config(config, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(recipe.model, config=config, **kwargs)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.compile:
        model.compile()
    return model


def build_optimizer(recipe: Recipe, model: torch.nn.Module):
    """AdamW in which matrices decay and vectors do not, and its schedule."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon, fused=True
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


@torch.no_grad()
def evaluate(model, held_out: np.ndarray, recipe: Recipe, accelerator: Accelerator) -> dict[str, float]:
    """Mean cross-entropy of the next token (nats) and its exponential over the validation blocks.

    Every rank runs equally many forwards, because a sharded model's forward is collective.
    """
    model.eval()
    # Other MoE models add their balancing loss whenever they return router logits.
    config = accelerator.unwrap_model(model).config
    plain = {"output_router_logits": False} if hasattr(config, "output_router_logits") else {}
    rows = recipe.micro_batch_size
    stride = rows * accelerator.num_processes
    totals = torch.zeros(2, dtype=torch.float64)
    starts = range(accelerator.process_index * rows, -(-len(held_out) // stride) * stride, stride)
    for start in tqdm(starts, desc="validate", leave=False, disable=None if accelerator.is_main_process else True):
        real = held_out[start : start + rows]
        batch = torch.from_numpy(np.array(real if len(real) else held_out[:1], dtype=np.int64)).to(accelerator.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False, **plain).loss.double().cpu()
        totals += torch.stack([loss * len(real), torch.tensor(float(len(real)))])
    total, count = accelerator.reduce(totals.to(accelerator.device, torch.float32), reduction="sum").tolist()
    model.train()
    return {"eval_loss": total / count, "eval_perplexity": math.exp(total / count)}


def list_checkpoints(recipe: Recipe) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((Path(recipe.output_dir) / "checkpoints").glob("step-*[0-9]"))


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step-"))


class Checkpoints:
    """The checkpoints of one run: complete or not there at all, because each is written aside and then renamed."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, batches):
        self.recipe, self.accelerator, self.batches = recipe, accelerator, batches

    def save(self, step: int):
        folder = Path(self.recipe.output_dir) / "checkpoints" / f"step-{step:08d}"
        partial = folder.with_name(folder.name + ".partial")
        self.accelerator.save_state(str(partial))
        state = {"world_size": self.accelerator.num_processes, "batches": self.batches.state_dict()}
        (partial / f"data-{self.accelerator.process_index}.json").write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
            for old in list_checkpoints(self.recipe)[: -self.recipe.keep_last]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> int:
        """Restores everything and returns the number of steps done."""
        state = json.loads((folder / "data-0.json").read_text())
        if isinstance(self.batches, PackedStream):
            if state["world_size"] != self.accelerator.num_processes:
                raise RecipeError(
                    f"{folder} was written by {state['world_size']} processes that each read a part of the stream: "
                    f"resume with as many, not {self.accelerator.num_processes}."
                )
            state = json.loads((folder / f"data-{self.accelerator.process_index}.json").read_text())
        self.accelerator.load_state(str(folder))
        self.batches.load_state_dict(state["batches"])
        return step_of(folder)


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint to resume from; `None` starts anew.

    Raises:
        RecipeError: If the folder holds a run and `resume` is not set, if the checkpoint is missing, or if the run was
            started from another recipe.
    """
    output = Path(recipe.output_dir)
    checkpoints = list_checkpoints(recipe)
    if recipe.resume is None:
        if (output / "metrics.jsonl").exists():
            raise RecipeError(f"output_dir={recipe.output_dir!r} holds a run: pass --resume auto, or another folder.")
        return None
    if recipe.resume == "auto":
        checkpoint = checkpoints[-1] if checkpoints else None
    else:
        checkpoint = Path(recipe.resume)
        if checkpoint not in checkpoints:
            raise RecipeError(f"resume={recipe.resume!r} is no checkpoint of {output / 'checkpoints'}: use 'auto'.")
    if (output / "recipe.yaml").exists():
        before = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
        now = dataclasses.asdict(recipe)
        changed = [name for name in now if name not in FREE_TO_CHANGE and before.get(name) != now[name]]
        if changed:
            changes = ", ".join(f"{name}: {before.get(name)!r} → {now[name]!r}" for name in changed)
            raise RecipeError(f"the run in {output} has another recipe ({changes}): use a new output_dir.")
    return checkpoint


class Log:
    """`metrics.jsonl`, the log line and the tracker, on the main process alone."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, first_step: int):
        self.accelerator, self.file = accelerator, Path(recipe.output_dir) / "metrics.jsonl"
        if accelerator.is_main_process:
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= first_step] if first_step else []
            self.file.write_text("".join(line + "\n" for line in kept))
        if recipe.tracker is not None:
            accelerator.init_trackers("pathmoe", config={k: str(v) for k, v in dataclasses.asdict(recipe).items()})

    def write(self, line: str, **values):
        if self.accelerator.is_main_process:
            tqdm.write(line)
            with self.file.open("a") as file:
                file.write(json.dumps(values) + "\n")
        self.accelerator.log({k: v for k, v in values.items() if k != "step"}, step=values["step"])


def train(
    recipe: Recipe,
    accelerator: Accelerator,
    model,
    optimizer,
    scheduler,
    batches,
    held_out,
    checkpoints,
    log,
    first_step,
    stop,
):
    """Runs the optimizer steps.

    Returns:
        `bool`: Whether all steps are done; `False` when the run was asked to stop.
    """
    flops = 3 * forward_flops_per_token(accelerator.unwrap_model(model).config, recipe.sequence_length)
    peak = measure_matmul_peak(accelerator.device, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    accumulation = recipe.batch_size // (recipe.micro_batch_size * accelerator.num_processes)
    tokens_per_step = recipe.batch_size * recipe.sequence_length
    targets = accumulation * recipe.micro_batch_size * (recipe.sequence_length - 1)
    model.train()
    clock, steps_timed = time.perf_counter(), 0
    bar = tqdm(
        range(first_step + 1, recipe.max_steps + 1),
        initial=first_step,
        total=recipe.max_steps,
        desc="train",
        disable=None if accelerator.is_main_process else True,
    )
    for step in bar:
        loss_sum = torch.zeros((), device=accelerator.device)
        for micro in range(accumulation):
            batch = batches.next_batch(recipe.micro_batch_size).to(accelerator.device, non_blocking=True)
            sync = contextlib.nullcontext() if micro == accumulation - 1 else accelerator.no_sync(model)
            with sync:
                output = model(input_ids=batch, labels=batch, num_items_in_batch=targets, use_cache=False)
                accelerator.backward(output.loss)
            loss_sum += cross_entropy(output, accelerator.unwrap_model(model).config, accumulation)
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        lr = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        update_selection_bias(accelerator.unwrap_model(model))

        steps_timed += 1
        last = step == recipe.max_steps
        stopping = stop.requested()
        logs = last or (recipe.log_every and step % recipe.log_every == 0)
        saves = last or stopping or (recipe.checkpoint_every and step % recipe.checkpoint_every == 0)
        if logs or saves:
            loss, norm = accelerator.reduce(loss_sum, reduction="mean").item(), float(grad_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"loss={loss}, gradient norm={norm} at step {step}: lower learning_rate={recipe.learning_rate}."
                )
        if logs:
            seconds_per_step = (time.perf_counter() - clock) / steps_timed
            tokens_per_s = tokens_per_step / seconds_per_step
            utilisation = tokens_per_s * flops / accelerator.num_processes / peak
            eta = str(timedelta(seconds=int(seconds_per_step * (recipe.max_steps - step))))
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
            )
            clock, steps_timed = time.perf_counter(), 0
        if last or (recipe.eval_every and step % recipe.eval_every == 0):
            began = time.perf_counter()
            metrics = evaluate(model, held_out, recipe, accelerator)
            log.write("step {step} | validation loss {eval_loss:.4f} | perplexity {eval_perplexity:.2f}".format(
                step=step, **metrics), step=step, **metrics)  # fmt: skip
            clock += time.perf_counter() - began
        if saves:
            began = time.perf_counter()
            checkpoints.save(step)
            clock += time.perf_counter() - began
        if stopping and not last:
            return False
    return True


def cross_entropy(output, config: PreTrainedConfig, accumulation: int) -> torch.Tensor:
    """The cross-entropy in a micro-batch's loss: what is reported leaves the auxiliary router losses out."""
    loss = output.loss.detach()
    share = accumulation if config.model_type == "pathmoe" else 1  # others add theirs whole in each micro-batch
    for name, coefficient in (("aux_loss", "router_aux_loss_coef"), ("z_loss", "router_z_loss_coef")):
        value = getattr(output, name, None)
        if value is not None:
            loss = loss - getattr(config, coefficient, 0.0) * value.detach() / share
    return loss


class StopOnSignal:
    """Turns SIGINT and SIGTERM into a stop after the current step, agreed upon by all processes."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self._signalled, self._before = accelerator, False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self._signalled = True

    def requested(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self._signalled
        flag = torch.tensor(float(self._signalled), device=self.accelerator.device)
        return self.accelerator.reduce(flag, reduction="sum").item() > 0


def save_final(recipe: Recipe, accelerator: Accelerator, model, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Writes the Hub-ready folder: weights, code, tokenizer, recipe and model card."""
    folder = Path(recipe.output_dir) / "final"
    partial = folder.with_name("final.partial")
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        unwrapped = accelerator.unwrap_model(model)
        unwrapped.save_pretrained(partial, state_dict=state_dict)
        tokenizer.save_pretrained(partial)
        shutil.copy(Path(recipe.output_dir) / "recipe.yaml", partial)
        (partial / "README.md").write_text(model_card(recipe, unwrapped.config), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    accelerator.wait_for_everyone()
    return folder


def model_card(recipe: Recipe, config: PreTrainedConfig) -> str:
    """The model card: how to load the model, how it was trained, and the numbers that were measured."""
    lines = (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    trained = [m for m in metrics if "loss" in m][-1]
    evaluated = [m for m in metrics if "eval_loss" in m][-1]
    count = count_parameters(config)
    blocks = f", router block size {config.router_block_size}" if config.model_type == "pathmoe" else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{config.model_type}, mixture-of-experts]
---
# {Path(recipe.output_dir).resolve().name}

A {config.model_type} language model ({count["total"]:,} parameters, {count["active"]:,} active per token{blocks}).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER_OR_REPOSITORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER_OR_REPOSITORY")
```

With the `pathmoe` package imported, `trust_remote_code` is not needed.

| measured | |
|---|---|
| tokens trained on | {trained["tokens"]:,} |
| training loss, last step | {trained["loss"]:.4f} |
| validation loss | {evaluated["eval_loss"]:.4f} |
| validation perplexity (per token) | {evaluated["eval_perplexity"]:.2f} |

Trained with this recipe (`recipe.yaml`):

```yaml
{yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False).strip()}
```
"""


def main(args: list[str] | None = None) -> int:
    """Runs a recipe. Returns the exit status: 0, or `INTERRUPTED` when stopped by a signal after a checkpoint.

    Raises:
        RecipeError, DataError: If the recipe or the data cannot be used; nothing has been trained then.
    """
    recipe = parse_recipe(sys.argv[1:] if args is None else args)
    config = build_config(recipe)
    if config.model_type == "pathmoe" and recipe.precision == "bf16" and recipe.experts_implementation != "eager":
        try:
            check_grouped_mm_rows(config, torch.bfloat16)
        except ValueError as error:
            raise RecipeError(f"precision='bf16': {error}") from error
    accelerator = build_accelerator(recipe)
    rows = recipe.micro_batch_size * accelerator.num_processes
    if recipe.batch_size % rows:
        raise RecipeError(
            f"batch_size={recipe.batch_size} must be a multiple of micro_batch_size={recipe.micro_batch_size} times "
            f"{accelerator.num_processes} processes."
        )
    checkpoint = find_checkpoint(recipe)
    output = Path(recipe.output_dir)
    if checkpoint is not None and step_of(checkpoint) >= recipe.max_steps and (output / "final").is_dir():
        accelerator.print(f"{output / 'final'} is done: {checkpoint.name} of max_steps={recipe.max_steps}.")
        return 0
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))
        # What an earlier run left is not this one's: its result, and its tokenizer if nothing was trained with it.
        shutil.rmtree(output / "final", ignore_errors=True)
        if checkpoint is None:
            shutil.rmtree(output / "tokenizer", ignore_errors=True)
    accelerator.wait_for_everyone()

    tokenizer, batches, held_out = build_data(recipe, accelerator, config.vocab_size)
    model = build_model(recipe, config, tokenizer)
    optimizer, scheduler = build_optimizer(recipe, model)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    checkpoints, first_step = Checkpoints(recipe, accelerator, batches), 0
    if checkpoint is not None:
        first_step = checkpoints.load(checkpoint)
        accelerator.print(f"resumed from {checkpoint}")
    log = Log(recipe, accelerator, first_step)
    count = count_parameters(config)
    accelerator.print(
        f"{count['total']:,} parameters, {count['active']:,} active | experts: {config._experts_implementation} | "
        f"{accelerator.distributed_type.value} x {accelerator.num_processes} on {accelerator.device.type}, "
        f"{recipe.precision}"
    )
    with StopOnSignal(accelerator) as stop:
        done = train(
            recipe, accelerator, model, optimizer, scheduler, batches, held_out, checkpoints, log, first_step, stop
        )
    if done:
        accelerator.print(f"saved {save_final(recipe, accelerator, model, tokenizer)}")
    else:
        accelerator.print("stopped after a checkpoint; --resume auto goes on.")
    accelerator.end_training()
    return 0 if done else INTERRUPTED


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RecipeError, DataError, Diverged) as error:
        sys.exit(f"error: {error}")
