# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The recipe of a training run: its fields, their defaults and what is refused.

    pathmoe train --config quickstart --output_dir runs/mine --learning_rate 1e-3

`--config` is a YAML file or the name of a shipped recipe, and any field can be given on the command line.
"""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Set
from pathlib import Path

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from pathmoe import presets
from pathmoe.command import UserError


MAX_COUNT = 10**9  # of steps, tokens, sequences and whatever else a recipe counts
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # what float32 holds in full precision


class RecipeError(UserError, ValueError):
    """The recipe cannot be run as asked. The message names the field, the value and the fix."""


@strict
@dataclasses.dataclass
class Recipe:
    """One training run. Paths are relative to the working directory.

    Args:
        model (`str`): A model configuration (JSON file, or the name of a shipped one), or a checkpoint (folder or Hub
            name) to go on from.
        output_dir (`str`): Where everything goes.
        max_steps (`int`): Optimizer steps.
        sequence_length (`int`): Tokens in a sequence. Documents are packed, nothing is padded.
        batch_size (`int`): Sequences in an optimizer step, over all processes and micro-batches.
        micro_batch_size (`int`): Sequences that a process runs at once; the rest of the batch is accumulated.
        model_overrides (`dict`): Configuration fields that differ from `model`.
        tokenizer (`str`, *optional*): A tokenizer (folder or Hub name). When unset, that of the checkpoint to go on
            from; for a new model, a byte-level BPE trained on the text.
        dataset (`str`, *optional*): A text file, a folder written by `save_to_disk`, or what `datasets.load_dataset`
            takes. Either this or `mixture`.
        dataset_config, data_files, text_column, train_split, streaming: As for `datasets.load_dataset`.
        validation_split (`str`, *optional*): When unset, one in `holdout_every` documents is held out, chosen by
            its text.
        max_bad_rows (`int`): How many rows of a source that hold no readable text are skipped; one more stops the run.
        mixture (`list` of `dict`, *optional*): Several sources. Each has a `weight`, its share of the sequences in any
            stretch of training, and the data fields above; those that it leaves out are the recipe's own.
        document_mask (`bool`): Whether attention stays within a document. When off, a token sees all that precedes it
            in its sequence, and the first token of a document is predicted from the one before.
        shuffle_window (`int`): How many consecutive documents of a stream are shuffled among themselves. A resumed run
            reads one window again. (Text that is not streamed is shuffled as a whole, by sequences.)
        cache_dir (`str`, *optional*): Where token ids are kept and found by other runs on the same text; when unset,
            `pathmoe` in the cache folder of `datasets`.
        eval_sequences (`int`): How many validation sequences an evaluation reads at most.
        learning_rate, weight_decay, beta1, beta2, epsilon, max_grad_norm: AdamW and gradient clipping. Matrices decay,
            norms and biases do not.
        router_learning_rate_scale (`float`): What the learning rate is multiplied by for the routers.
        unigram_start (`bool`): Whether a new model starts from the token frequencies of the training text and from
            embeddings of standard deviation 1, which do not decay, and neither does the head. It needs a head that is
            not tied to the embeddings. Together with `zero_init_projections` it keeps the routing from collapsing in
            the first steps; see `pathmoe/train/start.py`.
        zero_init_projections (`bool`): Whether `o_proj` and `down_proj` of a new model are zero, so that no layer
            changes the hidden state before the first step.
        schedule (`str`): `"cosine"`, or `"wsd"` (constant, then falling in the last `decay_steps`).
        warmup_steps, decay_steps (`int` or `float`): Steps over which the learning rate rises linearly and, with
            `"wsd"`, falls; below 1, a share of `max_steps`.
        min_lr_ratio (`float`): What is left of the learning rate at the end.
        precision (`str`): `"fp32"`, or `"bf16"` (autocast over float32 weights).
        engine (`str`): `"auto"`, or one that must be in force: `"cpu"`, `"gpu"`, `"ddp"`, `"fsdp"`,
            `"fsdp_ep"`.
        ep_size (`int`): How many ranks share one copy of the experts. Above 1, transformers' own FSDP2 with expert
            parallelism takes the place of Accelerate's engine (launch with the DDP file).
        gradient_checkpointing, compile (`bool`): Memory against time; `torch.compile`.
        attn_implementation, experts_implementation (`str`, *optional*): As in transformers.
        eval_every, log_every, checkpoint_every (`int`): In steps; 0 means never, but the end is evaluated, logged and
            saved.
        routing_every (`int`): Every how many steps the routing is measured; 0 means never.
        keep_last, keep_every (`int`): The last so many checkpoints are kept, and those of steps divisible by
            `keep_every` (0: none).
        max_bad_steps (`int`): After how many steps in a row with a loss or a gradient that is not finite the run
            stops. Such steps are skipped and counted.
        initialize_missing (`bool`): Whether tensors that the checkpoint `model` lacks are drawn from the seed. When
            off, such a checkpoint is refused.
        tracker (`str`, *optional*): `"tensorboard"`, `"wandb"` or another of Accelerate's trackers.
        seed (`int`): Seed of the weights and of the data order.
        resume (`str`, *optional*): `"auto"`, or a checkpoint folder of this run.
        accept_changed_inputs (`bool`): Whether a resumed run may go on although files of its text, its tokenizer or
            its model have changed since the checkpoint was written. The log and the model card record it.
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
    learning_rate: float = 1e-3
    router_learning_rate_scale: float = 1.0
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
                raise ValueError(f"{field.name}={value} must not be a switch.")
            if isinstance(value, int) and value > MAX_COUNT and field.name != "seed":
                raise ValueError(f"{field.name}={value} must be at most {MAX_COUNT:,}.")
            if value == "" or (isinstance(value, str) and "\0" in value):
                raise ValueError(f"{field.name}={value!r} is empty or has a zero byte: give a value, or leave it out.")

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
                    f"{name}={getattr(self, name)} must be positive, and from {SMALLEST:.1e} to {LARGEST:.1e}, which "
                    "float32 can hold."
                )
        for name in (
            "eval_every", "log_every", "routing_every", "checkpoint_every", "keep_every", "warmup_steps",
            "decay_steps", "weight_decay", "max_bad_rows",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio} must be from 0 to 1.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to below 1.")
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) >= 1 and getattr(self, name) % 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a whole number of steps, or a share below 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be from 0 to {2**32 - 1}.")
        if self.epsilon > 1:
            raise ValueError(f"epsilon={self.epsilon} must be at most 1, or it outweighs the gradients.")
        if self.learning_rate > 1e3:
            raise ValueError(f"learning_rate={self.learning_rate} is too large to train with: lower it.")
        for name, what, most in (
            ("router_learning_rate_scale", "the routers' learning rate", 1e3),
            ("weight_decay", "the share by which weights shrink in a step", 1.0),
        ):
            product = self.learning_rate * getattr(self, name)
            if product > most:
                raise ValueError(
                    f"{name}={getattr(self, name)} times learning_rate={self.learning_rate} makes {what} "
                    f"{product:.3g}, but it must be at most {most:g}: lower one of them."
                )
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
                raise ValueError(f"{where} has {sorted(unknown)}, no fields of a source: it knows {sorted(fields)}.")
            weight = source["weight"]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not SMALLEST <= weight <= LARGEST:
                raise ValueError(f"{where} has weight={weight!r}, which must be a positive number.")
            for name in set(source) - {"weight", "data_files"}:
                optional = source[name] is None and name in ("dataset_config", "validation_split")
                if not (optional or (isinstance(source[name], str) and source[name])):
                    raise ValueError(f"{where} has {name}={source[name]!r}, which must be text.")
        if names := [name for name in self.model_overrides if not isinstance(name, str)]:
            raise ValueError(f"model_overrides has {names}, which are not names of fields.")
        if self.mixture == []:
            raise ValueError("mixture=[] has no source: name at least one.")

    @property
    def sources(self) -> list["Source"]:
        """The sources of text, one unless there is a mixture."""
        own = {field.name: getattr(self, field.name, 1.0) for field in dataclasses.fields(Source)}
        return [Source(**(own | source)) for source in self.mixture or [{}]]

    def steps(self, name: str) -> int:
        """The number of steps that `warmup_steps` or `decay_steps` stands for."""
        value = getattr(self, name)
        return round(value * self.max_steps) if 0 < value < 1 else int(value)


@dataclasses.dataclass
class Source:
    """One source of text, with fields as in [`Recipe`]."""

    dataset: str
    dataset_config: str | None
    data_files: str | list | dict | None
    text_column: str
    train_split: str
    validation_split: str | None
    weight: float


# Fields that do not change what is trained; a run may be resumed with another value of these.
FREE_TO_CHANGE = {
    "resume", "output_dir", "max_steps", "eval_every", "log_every", "routing_every", "checkpoint_every", "keep_last",
    "keep_every", "max_bad_steps", "max_bad_rows", "tracker", "engine", "ep_size", "micro_batch_size", "cache_dir",
    "accept_changed_inputs",
}  # fmt: skip

# Fields that do, and that may change on resume nevertheless: the log and the model card record it.
CHANGEABLE_ON_RESUME = FREE_TO_CHANGE | {
    "learning_rate", "router_learning_rate_scale", "weight_decay", "beta1", "beta2", "epsilon", "max_grad_norm",
    "schedule", "warmup_steps", "decay_steps", "min_lr_ratio", "precision", "gradient_checkpointing", "compile",
    "attn_implementation", "experts_implementation",
}  # fmt: skip


def list_changes(before: dict, now: dict, allowed: Set[str] = frozenset(CHANGEABLE_ON_RESUME)) -> list[str]:
    """The fields of two recipes that differ and may not, each as `name: before → now`. A field that an older version
    did not know counts as its default."""
    defaults = {"model_overrides": {}} | {
        field.name: field.default for field in dataclasses.fields(Recipe) if field.name != "model_overrides"
    }
    before = defaults | before
    changed = [name for name in now if name not in allowed and before[name] != now[name]]
    return [f"{name}: {before[name]!r} → {now[name]!r}" for name in changed]


def read_recipe(file: Path) -> dict | None:
    """The recipe that a run has written; `None` if there is none.

    Raises:
        RecipeError: If the file is damaged.
    """
    if not file.is_file():
        return None
    values = read_yaml(file, str(file))
    if not isinstance(values, dict):
        raise RecipeError(
            f"{file} is damaged: it must hold 'field: value' lines. Restore it, or use a new output_dir."
        )
    return values


def published(value):
    """A recipe without what must not be published: the folders of this machine, and tokens and passwords."""
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
    """Reads `--config RECIPE.yaml` and the overrides after it.

    Raises:
        RecipeError: If the file or a field is missing, unknown or of the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    if "--help" in args or "-h" in args:
        print(f"{__doc__}\n{Recipe.__doc__}")
        sys.exit(0)
    given = {}
    for name, value in zip(args[::2], args[1::2]):
        if not name.startswith("--"):
            raise RecipeError(f"expected --field value, got {name!r}.")
        if value.startswith("--"):
            raise RecipeError(f"{name} has no value: {value} follows it. Write --field value.")
        name = name[2:].replace("-", "_")
        if name in given:
            raise RecipeError(f"--{name} is given twice.")
        given[name] = value
    if len(args) % 2:
        raise RecipeError(f"{args[-1]!r} has no value: write --field value (and true or false for a switch).")
    values, config = {}, given.pop("config", None)
    if config is not None:
        file = presets.find(presets.expand(config, "train"))
        if not file.is_file():
            raise RecipeError(f"--config {config}: there is no such file.")
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
            raise RecipeError(f"{name} is no field of a recipe." + (f" Did you mean {close[0]}?" if close else ""))
        if fields[name].type is float and isinstance(value, str | int) and not isinstance(value, bool):
            try:
                values[name] = float(value)  # YAML reads 1e-3 as text
            except (ValueError, OverflowError):
                raise RecipeError(f"{name}={value!r} must be a number.") from None
    if isinstance(values.get("model"), str):
        values["model"] = presets.expand(values["model"], "model")
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


class StrictLoader(yaml.SafeLoader):
    """YAML without its traps: a key that stands twice is an error, 1e-3 is a number, and 1:30 and 010 are not."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        value = self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
            problem = f"{node.value} would be read as {value} (to the base of 60 or 8): write that"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value


for _kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", StrictLoader.construct_number)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

MAX_NODES = 100_000  # of a YAML file whose aliases are written out


def parse_yaml(text: str, what: str):
    """Reads YAML.

    Raises:
        RecipeError: If it is not valid, names a key twice, or grows beyond measure by its aliases.
    """
    try:
        check_size(yaml.compose(text, StrictLoader), {})
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise RecipeError(f"{what} is not valid YAML: {error}") from error


def check_size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """The number of nodes under a YAML node, aliases written out. An alias within its own anchor is endless."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [child for entry in children for child in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(check_size(child, sizes) for child in flat)
    if sizes[id(node)] > MAX_NODES:
        raise ValueError("its aliases make it too large")
    return sizes[id(node)]


def read_yaml(file: Path, what: str):
    """Reads a YAML file, as [`parse_yaml`]."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{what} cannot be read as UTF-8 text: {error}") from error
    return parse_yaml(text, what)
