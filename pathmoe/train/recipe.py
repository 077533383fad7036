# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The recipe of a training run: its fields, their defaults and their validation.

    pathmoe train --config quickstart --output_dir runs/mine --learning_rate 1e-3

`--config` takes a YAML file or the name of a shipped recipe. Any field can be set on the command line.
"""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from pathmoe import presets
from pathmoe.command import UserError


MAX_COUNT = 10**9  # the most steps, tokens, sequences etc. that a recipe may ask for
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # the range in which float32 has full precision

TYPES: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping", list: "a list",
    type(None): "null",
}  # fmt: skip


class RecipeError(UserError, ValueError):
    """The recipe cannot be run as asked. The message names the field, the value and the fix."""


@strict
@dataclasses.dataclass
class Recipe:
    """The configuration of one training run. Paths are relative to the working directory.

    Args:
        model (`str`): A model configuration (a JSON file, or the name of a shipped one) for a new model, or a
            checkpoint (folder or Hub name) to continue from.
        output_dir (`str`): The folder that the run writes to.
        max_steps (`int`): Number of optimizer steps.
        sequence_length (`int`): Number of tokens in a sequence. Documents are packed, so there is no padding.
        batch_size (`int`): Number of sequences in an optimizer step, over all processes and micro-batches.
        micro_batch_size (`int`): Number of sequences in one forward of a process. Gradients are accumulated until the
            batch is complete.
        model_overrides (`dict`): Configuration fields that replace those of `model`.
        tokenizer (`str`, *optional*): A tokenizer (folder or Hub name). Defaults to the tokenizer of the checkpoint
            `model`; for a new model, the run trains a byte-level BPE on the text.
        dataset (`str`, *optional*): A text file, a folder written by `save_to_disk`, or a name that
            `datasets.load_dataset` accepts. Set either this or `mixture`.
        dataset_config, data_files, train_split, streaming: The arguments `name`, `data_files`, `split` and `streaming`
            of `datasets.load_dataset`.
        text_column (`str`): The column that holds the text.
        validation_split (`str`, *optional*): The split to validate on. When unset, one in `holdout_every` documents is
            held out, selected by a hash of its text.
        max_bad_rows (`int`): Number of rows without readable text that are skipped in each source. If there are more,
            the run stops.
        mixture (`list` of `dict`, *optional*): Several sources. Each has a `weight`, its share of the sequences in any
            stretch of training, and any of the data fields above; the others are taken from the recipe.
        document_mask (`bool`): Whether attention stays within a document. If not, a token attends to all tokens before
            it in its sequence, and the first token of a document is predicted from the previous document.
        shuffle_window (`int`): Number of consecutive documents of a stream that are shuffled among themselves. A
            resumed run reads one window again. Text that is not streamed is shuffled as a whole, by sequences.
        cache_dir (`str`, *optional*): The folder that caches token ids, so that other runs on the same text can reuse
            them. Defaults to `pathmoe` in the cache folder of `datasets`.
        eval_sequences (`int`): The most validation sequences that an evaluation reads.
        optimizer (`str`): `"adamw"`, or `"muon"`: Muon for the matrices of attention and experts, and AdamW for
            embeddings, head, norms and routers. Both use the same learning rate and weight decay.
        muon_momentum (`float`): Momentum of Muon. 0.95 is the value of its authors.
        learning_rate, weight_decay, beta1, beta2, epsilon, max_grad_norm: Settings of the optimizer and of gradient
            clipping. Weight decay applies to matrices, not to norms and biases.
        router_learning_rate_scale (`float`): Factor on the learning rate of the routers.
        balance_over (`str`): The tokens over which the load-balancing loss (`router_aux_loss_coef`) is computed:
            `"micro_batch"`, or `"global_batch"`, all tokens of a step (arXiv 2501.11873). With several micro-batches
            per rank, the latter takes one more forward of each.
        unigram_start (`bool`): Whether a new model starts from the token frequencies of the training text and from
            embeddings of standard deviation 1. Embeddings and head then have no weight decay, and the head must not be
            tied to the embeddings. Together with `zero_init_projections`, this keeps the routing from collapsing in
            the first steps; see `pathmoe/train/start.py`.
        zero_init_projections (`bool`): Whether `o_proj` and `down_proj` of a new model are initialized to zero, so
            that no layer changes the hidden state before the first step.
        schedule (`str`): `"cosine"`, or `"wsd"` (constant, then a decay over the last `decay_steps`).
        warmup_steps, decay_steps (`int` or `float`): Number of steps over which the learning rate rises linearly and,
            with `"wsd"`, decays. A value below 1 is a fraction of `max_steps`.
        min_lr_ratio (`float`): The final learning rate as a fraction of `learning_rate`.
        precision (`str`): `"fp32"`, or `"bf16"` (autocast over float32 weights).
        engine (`str`): `"auto"`, or the engine that the launch must provide: `"cpu"`, `"gpu"`, `"ddp"`, `"fsdp"`,
            `"fsdp_ep"`.
        ep_size (`int`): Number of ranks that share one copy of the experts. Above 1, the run uses transformers' own
            FSDP2 with expert parallelism instead of Accelerate's engine (launch with the DDP file).
        gradient_checkpointing (`bool`): Whether to recompute activations in the backward pass, which saves memory.
        compile (`bool`): Whether to use `torch.compile`.
        attn_implementation, experts_implementation (`str`, *optional*): Same as in transformers.
        eval_every, log_every, checkpoint_every (`int`): Intervals in steps; 0 means never. The last step is always
            evaluated, logged and saved.
        routing_every (`int`): Number of steps between two measurements of the routing; 0 means never.
        keep_last, keep_every (`int`): The run keeps the last `keep_last` checkpoints, and those of steps divisible by
            `keep_every` (0: none).
        max_bad_steps (`int`): Number of consecutive steps with a non-finite loss or gradient after which the run
            stops. Such steps are skipped and counted.
        initialize_missing (`bool`): Whether tensors that are missing in the checkpoint `model` are initialized at
            random. If not, the run refuses such a checkpoint.
        tracker (`str`, *optional*): `"tensorboard"`, `"wandb"` or any other of Accelerate's trackers.
        seed (`int`): Seed of the weights and of the data order.
        resume (`str`, *optional*): `"auto"`, or a checkpoint folder of this run.
        accept_changed_inputs (`bool`): Whether a resumed run may continue although files of its text, tokenizer or
            model have changed since the checkpoint was written. The log and the model card record the change.
    """

    model: str
    output_dir: str
    max_steps: int
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    model_overrides: dict = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    data_files: str | list | dict | None = None
    text_column: str = "text"
    train_split: str = "train"
    validation_split: str | None = None
    holdout_every: int = 40
    streaming: bool = False
    max_bad_rows: int = 100
    mixture: list | None = None
    document_mask: bool = True
    shuffle_window: int = 1000
    cache_dir: str | None = None
    eval_sequences: int = 256
    optimizer: str = "adamw"
    muon_momentum: float = 0.95
    learning_rate: float = 1e-3
    router_learning_rate_scale: float = 1.0
    balance_over: str = "micro_batch"
    unigram_start: bool = False
    zero_init_projections: bool = False
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
    ep_size: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    experts_implementation: str | None = None
    eval_every: int = 0
    log_every: int = 10
    routing_every: int = 50
    checkpoint_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    max_bad_steps: int = 5
    initialize_missing: bool = False
    tracker: str | None = None
    seed: int = 0
    resume: str | None = None
    accept_changed_inputs: bool = False

    def validate_choices(self):
        for name, choices in (
            ("optimizer", ("adamw", "muon")),
            ("balance_over", ("micro_batch", "global_batch")),
            ("schedule", ("cosine", "wsd")),
            ("precision", ("fp32", "bf16")),
            ("engine", ("auto", "cpu", "gpu", "ddp", "fsdp", "fsdp_ep")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}.")

    def validate_types(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = getattr(field.type, "__args__", (field.type,))
            if isinstance(value, bool) and bool not in kinds:
                raise ValueError(f"{field.name}={value} must not be a boolean.")
            if isinstance(value, int) and value > MAX_COUNT and field.name != "seed":
                raise ValueError(f"{field.name}={value} must be at most {MAX_COUNT:,}.")
            if isinstance(value, str) and (not value.strip() or "\0" in value):
                raise ValueError(f"{field.name}={value!r} is empty or has a null byte: set a value or omit the field.")
            if field.name in ("output_dir", "cache_dir") and str(value).startswith(("~", "$")):
                raise ValueError(f"{field.name}={value!r} is not expanded: write the path without {value[0]}.")

    def validate_numbers(self):
        for name in (
            "max_steps", "sequence_length", "batch_size", "micro_batch_size", "keep_last", "eval_sequences",
            "shuffle_window", "ep_size", "max_bad_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("learning_rate", "router_learning_rate_scale", "max_grad_norm", "epsilon"):
            if not SMALLEST <= getattr(self, name) <= LARGEST:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be positive and in the range of float32, {SMALLEST:.1e} to "
                    f"{LARGEST:.1e}."
                )
        for name in (
            "eval_every", "log_every", "routing_every", "checkpoint_every", "keep_every", "warmup_steps",
            "decay_steps", "weight_decay", "max_bad_rows",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or a positive number.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must be from 0 to 1.")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to below 1.")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) >= 1 and getattr(self, name) % 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a whole number of steps or a fraction < 1.")
        if self.optimizer == "muon" and self.ep_size > 1:
            raise ValueError(
                f"optimizer='muon' does not support ep_size={self.ep_size}: set ep_size=1, or use 'adamw'."
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be from 0 to {2**32 - 1}.")
        if self.epsilon > 1:
            raise ValueError(f"epsilon={self.epsilon} must be at most 1, or it outweighs the gradients.")
        if self.learning_rate > 1e3:
            raise ValueError(f"learning_rate={self.learning_rate} is too large to train with: lower it.")
        for name, what, most in (
            ("router_learning_rate_scale", "the routers' learning rate", 1e3),
            ("weight_decay", "the fraction by which weights shrink in a step", 1.0),
        ):
            product = self.learning_rate * getattr(self, name)
            if product > most:
                raise ValueError(
                    f"{name}={getattr(self, name)} times learning_rate={self.learning_rate} makes {what} "
                    f"{product:.3g}, but it must be at most {most:g}: lower one of them."
                )
        if (self.attn_implementation or "").startswith("paged|"):
            raise ValueError(
                f"attn_implementation={self.attn_implementation!r} is for serving, and does not apply the masks of "
                f"training: use {self.attn_implementation[6:]!r}."
            )
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2, or nothing is predicted.")
        if self.holdout_every < 2:
            raise ValueError(f"holdout_every={self.holdout_every} must be at least 2, or nothing is left to train on.")
        if self.schedule == "cosine" and self.decay_steps:
            raise ValueError(f"decay_steps={self.decay_steps} has no effect with schedule='cosine': use 'wsd'.")
        if self.steps("warmup_steps") + self.steps("decay_steps") > self.max_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} do not fit into "
                f"max_steps={self.max_steps}: shorten them, or set them to fractions below 1."
            )
        if self.schedule == "wsd" and self.steps("decay_steps") == 0:
            raise ValueError(
                f"decay_steps={self.decay_steps} with schedule='wsd' never lowers the learning rate (max_steps="
                f"{self.max_steps}): set it to 1 or more."
            )

    def validate_sources(self):
        if (self.dataset is None) == (self.mixture is None):
            raise ValueError("give exactly one of dataset and mixture.")
        fields = {field.name for field in dataclasses.fields(Source)}
        for number, source in enumerate(self.mixture or []):
            where = f"mixture[{number}]"
            if not isinstance(source, dict) or "dataset" not in source or "weight" not in source:
                raise ValueError(f"{where}={source!r} must be a mapping with a dataset and a weight.")
            if unknown := set(source) - fields:
                raise ValueError(f"{where} has unknown fields {sorted(unknown)}: choose from {sorted(fields)}.")
            weight = source["weight"]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not SMALLEST <= weight <= LARGEST:
                raise ValueError(f"{where}: weight={weight!r} must be a positive number.")
            for name in set(source) - {"weight", "data_files"}:
                optional = source[name] is None and name in ("dataset_config", "validation_split")
                if not (optional or (isinstance(source[name], str) and source[name])):
                    raise ValueError(f"{where}: {name}={source[name]!r} must be a string that is not empty.")
        if names := [name for name in self.model_overrides if not isinstance(name, str)]:
            raise ValueError(f"model_overrides has the keys {names}, which must be names of fields.")
        if self.mixture == []:
            raise ValueError("mixture=[] has no source: add at least one.")

    @property
    def sources(self) -> list["Source"]:
        """The sources of text: those of `mixture`, or the one that the recipe's own fields describe."""
        own = {field.name: getattr(self, field.name, 1.0) for field in dataclasses.fields(Source)}
        return [Source(**(own | source)) for source in self.mixture or [{}]]

    def steps(self, name: str) -> int:
        """Returns `warmup_steps` or `decay_steps` as a number of steps."""
        value = getattr(self, name)
        return round(value * self.max_steps) if 0 < value < 1 else int(value)


@dataclasses.dataclass
class Source:
    """One source of text. The fields have the same meaning as in [`Recipe`]."""

    dataset: str
    dataset_config: str | None
    data_files: str | list | dict | None
    text_column: str
    train_split: str
    validation_split: str | None
    weight: float


# Fields that have no influence on what is trained. A run may be resumed with different values.
OPERATIONAL_FIELDS = {
    "resume", "output_dir", "max_steps", "eval_every", "log_every", "routing_every", "checkpoint_every", "keep_last",
    "keep_every", "max_bad_steps", "max_bad_rows", "tracker", "engine", "ep_size", "micro_batch_size", "cache_dir",
    "accept_changed_inputs",
}  # fmt: skip

# Fields that influence what is trained, but may still differ on resume. The log and the model card record the change.
REQUIRED = {
    field.name for field in dataclasses.fields(Recipe) if field.default is field.default_factory is dataclasses.MISSING
}
CHANGEABLE_ON_RESUME = OPERATIONAL_FIELDS | {
    "learning_rate", "router_learning_rate_scale", "weight_decay", "muon_momentum", "beta1", "beta2", "epsilon",
    "max_grad_norm", "schedule", "warmup_steps", "decay_steps", "min_lr_ratio", "precision", "gradient_checkpointing",
    "compile", "attn_implementation", "experts_implementation",
}  # fmt: skip


def list_changes(before: dict, now: dict, allowed: Set[str] = frozenset(CHANGEABLE_ON_RESUME)) -> list[str]:
    """Lists the fields outside `allowed` that differ between two recipes, each as `name: before → now`.

    If `before` lacks a field because an older version wrote it, the field counts as the default.
    """
    defaults = {"model_overrides": {}} | {
        field.name: field.default for field in dataclasses.fields(Recipe) if field.name != "model_overrides"
    }
    before = defaults | before
    changed = [name for name in now if name not in allowed and before[name] != now[name]]
    return [f"{name}: {before[name]!r} → {now[name]!r}" for name in changed]


def read_recipe(file: Path) -> dict | None:
    """Reads a recipe that a run has written. Returns `None` if the file does not exist.

    Raises:
        RecipeError: If the file is damaged.
    """
    if not file.is_file():
        return None
    values = read_yaml(file, str(file))
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} is damaged: it must hold 'field: value' lines. Restore the file, or use a new output_dir."
        )
    if lacking := REQUIRED - set(values):
        raise RecipeError(f"{file} lacks {', '.join(sorted(lacking))}: restore the file, or use a new output_dir.")
    return values


def published(value):
    """Returns a recipe that can be published: without folders of this machine, access tokens and passwords."""
    if isinstance(value, dict):
        return {key: published(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [published(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if "://" in value:
        scheme, _, rest = value.partition("://")
        rest = re.split("[?#]", rest)[0]
        value = f"{scheme}://{rest.rpartition('@')[2] if '@' in rest.split('/')[0] else rest}"
    elif Path(value).is_absolute():
        value = Path(value).name
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_…", value)


def parse_recipe(args: list[str]) -> Recipe:
    """Parses `--config RECIPE.yaml` and the fields that follow.

    Raises:
        RecipeError: If the file or a field is missing, unknown or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if "--help" in args or "-h" in args:
        print(f"{__doc__}\n{Recipe.__doc__}")
        sys.exit(0)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    given = {}
    for name, value in zip(args[::2], args[1::2]):
        if not name.startswith("--"):
            raise RecipeError(f"expected --field value, got {name!r}.")
        if value.startswith("--"):
            raise RecipeError(f"{name} has no value: {value} follows it. Write --field value.")
        if value.startswith(("{", "[")) and sum(map(value.count, "{[")) > sum(map(value.count, "}]")):
            raise RecipeError(f"{name} {value} lacks a closing bracket: write the whole value in quotes.")
        name = name[2:].replace("-", "_")
        if name in given:
            raise RecipeError(f"--{name} is given twice.")
        given[name] = value
    if len(args) % 2 and not args[-1].startswith("--"):
        raise RecipeError(f"{args[-1]!r} has no --field before it: write --field value, such as --config RECIPE.yaml.")
    if len(args) % 2:
        raise RecipeError(f"{args[-1]!r} has no value: write --field value (and true or false for a switch).")
    values, config = {}, given.pop("config", None)
    if config is not None:
        file = presets.find(presets.expand(config, "train"))
        if not file.is_file():
            problem = "is a folder" if file.is_dir() else "does not exist"
            raise RecipeError(f"--config {config} {problem}: pass a YAML file or the name of a shipped recipe.")
        values = read_yaml(file, f"--config {config}")
        if not isinstance(values, dict):
            raise RecipeError(f"--config {config} must hold 'field: value' lines.")
    for name, value in given.items():
        text = name in fields and str in getattr(fields[name].type, "__args__", (fields[name].type,))
        values[name] = (
            value if text and value != "null" and not value.startswith(("{", "[")) else parse_yaml(value, name)
        )
    for name, value in values.items():
        if name not in fields:
            close = difflib.get_close_matches(str(name), fields, n=1)
            where = "" if name in given else f" in --config {config}"
            hint = f" Did you mean {close[0]}?" if close else ""
            if {"model_type", "hidden_size"} & set(values):
                hint = " It is the configuration of a model: give it as --model, and a recipe as --config."
            raise RecipeError(f"unknown recipe field {name}{where}.{hint}")
        if fields[name].type is float and isinstance(value, str | int) and not isinstance(value, bool):
            try:
                values[name] = float(value)  # YAML reads 1e-3 as text
            except (ValueError, OverflowError):
                raise RecipeError(f"{name}={value!r} must be a number.") from None
    if isinstance(values.get("model"), str):
        values["model"] = presets.expand(values["model"], "model")
    missing = [name for name in fields if name in REQUIRED and name not in values]
    if missing:
        raise RecipeError(f"the recipe lacks {', '.join(missing)}: add them to the YAML or pass --{missing[0]} VALUE.")
    for name, value in values.items():
        kinds = getattr(fields[name].type, "__args__", (fields[name].type,))
        if type(value) not in kinds:
            words = [TYPES[kind] for kind in kinds if not (kind is int and float in kinds)]
            raise RecipeError(f"{name}={value!r} must be {' or '.join(words)}.")
    try:
        return Recipe(**values)
    except StrictDataclassError as error:
        raise RecipeError(str(error.__cause__ or error)) from error


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys and numbers like 1:30 and 010, and reads 1e-3 as a number."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key {twice[0]}", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        value = self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            problem = f"{node.value} would be read as {value} (in base 60 or 8): write a decimal number"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


for _kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", StrictLoader.construct_number)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

MAX_NODES = 100_000  # of a YAML file after its aliases are expanded


def parse_yaml(text: str, what: str):
    """Parses YAML.

    Args:
        text (`str`): The YAML.
        what (`str`): The name of the text in error messages.

    Raises:
        RecipeError: If the YAML is not valid, repeats a key, or grows too large when its aliases are expanded.
    """
    try:
        check_size(yaml.compose(text, StrictLoader), {})
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise RecipeError(f"{what} is not valid YAML: {error}") from error


def check_size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """Counts the nodes under a YAML node with expanded aliases. An alias inside its own anchor counts as infinite."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [child for entry in children for child in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(check_size(child, sizes) for child in flat)
    if sizes[id(node)] > MAX_NODES:
        raise ValueError("the expanded aliases are too large")
    return sizes[id(node)]


def read_yaml(file: Path, what: str):
    """Reads a YAML file with [`parse_yaml`]."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} cannot be read as UTF-8 text: {error}") from error
    return parse_yaml(text, what)
