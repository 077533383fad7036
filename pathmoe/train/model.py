# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Builds the model of a recipe. The configuration is checked before anything is built."""

import copy
import difflib
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.output_capturing import install_all_output_capturing_hooks

from pathmoe import presets
from pathmoe.command import UserError, one_line
from pathmoe.files import read_json
from pathmoe.loading import load_model
from pathmoe.train.checkpoints import list_checkpoints
from pathmoe.train.output import set_aside
from pathmoe.train.recipe import Recipe, RecipeError
from pathmoe.train.start import apply_start


FIXED = {"dtype", "torch_dtype", "model_type", "architectures", "auto_map", "transformers_version"}


MAX_LAYERS = 10_000


def read_fields(file: Path) -> dict:
    """Reads the fields of a model configuration file and checks its architecture."""
    fields = read_json(file)
    if not fields:
        raise ValueError("it has no fields: give at least the sizes of the model.")
    if (kind := fields.get("model_type", "pathmoe")) not in list(CONFIG_MAPPING):
        raise ValueError(f"model_type={kind!r} is not known to transformers.")
    return fields


def check_fields(fields: dict):
    """Refuses more layers than any machine can build."""
    layers = fields.get("num_hidden_layers", 1)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers={layers} must be at most {MAX_LAYERS}.")


def check_model(recipe: Recipe, config: PreTrainedConfig):
    """Checks that the model can be built, before the text is read.

    Raises:
        RecipeError: If an implementation is unknown or the weights do not fit into the memory of the machine.
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
        listed = ", ".join(f"{name}={getattr(config, name)}" for name in sizes if hasattr(config, name))
        raise RecipeError(
            f"model={recipe.model!r}: the weights take {size / 1e9:,.0f} GB in float32 and this machine has "
            f"{memory / 1e9:,.0f} GB of memory ({listed}): use a smaller model, or run `plan` for this one."
        )


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """Reads the model configuration of a recipe and applies `model_overrides`.

    Raises:
        RecipeError: If the configuration is missing or not valid.
    """
    if recipe.model.endswith(".json") and not presets.find(recipe.model).is_file():
        raise RecipeError(f"model={recipe.model!r} does not exist: name a configuration file or a checkpoint.")
    elif Path(recipe.model).is_file() and not recipe.model.endswith(".json"):
        raise RecipeError(f"model={recipe.model!r} is a file: name the folder of a checkpoint, or a .json file.")
    try:
        if recipe.model.endswith(".json"):
            fields = read_fields(presets.find(recipe.model)) | recipe.model_overrides
            fields.pop("auto_map", None)  # `save_pretrained` writes it; the code is this package's
            check_fields(fields)
            config = AutoConfig.for_model(fields.pop("model_type", "pathmoe"), **fields)
        else:
            check_fields(recipe.model_overrides)
            if Path(recipe.model).is_dir():
                read_json(Path(recipe.model) / "config.json")
            config = AutoConfig.from_pretrained(recipe.model, **recipe.model_overrides)
    except (UserError, StrictDataclassError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        known = [name.removeprefix("model/") for name in presets.names() if name.startswith("model/")]
        close = [] if Path(recipe.model).exists() else difflib.get_close_matches(recipe.model, known, n=1)
        hint = f" Did you mean the shipped {close[0]}?" if close else ""
        here = "" if presets.find(recipe.model).exists() else "it is neither a folder here nor a preset. "
        raise RecipeError(f"model={recipe.model!r}: {here}{one_line(error)}{hint}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise RecipeError(f"model={recipe.model!r}: model_type={config.model_type!r} is not a causal language model.")
    known = set(type(config)().to_dict()) | set(type(config).attribute_map) | {"model_type", "architectures"}
    if fixed := FIXED & set(recipe.model_overrides):
        raise RecipeError(f"model_overrides has {sorted(fixed)}, which cannot be overridden: see precision and model.")
    if unknown := set(recipe.model_overrides) - known:
        raise RecipeError(f"model_overrides has {sorted(unknown)}, unknown to {config.model_type}: remove them.")
    if recipe.model.endswith(".json") and (unknown := set(fields) - known):
        raise RecipeError(
            f"model={recipe.model!r} has the fields {sorted(unknown)}, unknown to {config.model_type}: remove them."
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
    """Builds a new model from the seed, or loads the checkpoint `model` of the recipe.

    With expert parallelism, each rank loads only its own shards, which requires a checkpoint. The main process
    therefore builds a new model in its own memory first, and writes it to OUTPUT_DIR/initial.

    Args:
        recipe (`Recipe`): The recipe.
        config (`PreTrainedConfig`): The model's configuration. Its special tokens are set to the tokenizer's.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        accelerator (`Accelerator`): The engine.
        frequencies (`np.ndarray`, *optional*): Passed to [`~pathmoe.train.start.apply_start`] for a new model.
    """
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    kwargs: dict = {"dtype": torch.float32}
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
                    accelerator.print(f"{source} existed before this run and is kept as {set_aside(source)}.")
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
            install_all_output_capturing_hooks(model.base_model)  # a compiled forward cannot install them
        model.compile()
    return model


@torch.no_grad()
def find_experts_dtype(model, accelerator: Accelerator) -> str:
    """Returns the dtype in which the experts compute, or `"none"` for a model without experts.

    The dtype is observed in a forward of a few tokens, because a kernel may ignore autocast and silently run the
    float32 weights in float32, which is slow.
    """
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
