# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Loads checkpoints and refuses those that do not hold what their configuration asks for."""

import logging
import re
import warnings
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_pathmoe.configuration_pathmoe import MOST

from .command import UserError, one_line
from .files import read_json


# What old checkpoints hold besides their tensors, and every model computes for itself.
CONSTANTS = re.compile(r"rotary_emb\.inv_freq$")
# Sizes that are checked before transformers builds anything of them, such as a list with an entry for each layer.
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
    "max_position_embeddings",
)  # fmt: skip
LARGEST_SIZE = 2**31 - 1
LARGEST = 1e18  # the square of a weight must be finite in float32


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Reads the configuration in the folder of a saved model. Code that the folder holds is not run.

    Raises:
        UserError: If `config.json` is missing, damaged or of an unknown architecture, or has values that cannot be;
            the message names the file, and the field where one is known to be wrong.
    """
    file = Path(folder) / "config.json"
    fields = read_json(file)
    if (model_type := fields.get("model_type")) not in list(CONFIG_MAPPING.keys()):
        raise UserError(f"{file}: model_type={model_type!r} is not an architecture that transformers knows.")
    for name in SIZES:
        value, most = fields.get(name), MOST.get(name.replace("_local", ""), LARGEST_SIZE)
        if value is None or isinstance(value, list):  # some architectures have a size for each layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(f"{file}: {name}={value!r} must be a whole number from 1 to {most}.")
    for name in ("dtype", "torch_dtype"):
        dtype = getattr(torch, str(fields.get(name) or "float32"), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"{file}: {name}={fields[name]!r} must be a floating-point dtype, such as 'bfloat16'.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever wrong fields make transformers raise
        raise UserError(f"{file} cannot be used: {one_line(describe(error))}") from error


def load_model(
    source: str | Path,
    *,
    what: str | None = None,
    allow_missing: bool = False,
    switch: str | None = "--allow_missing",
    **kwargs,
) -> PreTrainedModel:
    """Loads a causal language model and checks that its checkpoint is whole: no tensor is drawn at random.

    Args:
        source (`str` or `Path`): A folder, or a repository of the Hub.
        what (`str`, *optional*): What the user called it; `--model SOURCE` when unset.
        allow_missing (`bool`, defaults to `False`): Whether tensors that the checkpoint lacks may be initialised anew.
        switch (`str`, *optional*, defaults to `"--allow_missing"`): How the user allows that.
        **kwargs: Arguments of `from_pretrained`.

    Returns:
        `PreTrainedModel`: The model in evaluation mode.

    Raises:
        UserError: If the checkpoint cannot be read, lacks tensors, has tensors that the model does not know or of
            another shape, or holds values that are not finite.
    """
    what = what or f"--model {source}"
    check_generation_config(Path(source) / "generation_config.json", what)
    # With ignore_mismatched_sizes, tensors of another shape are in the report too, which is checked here.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except Exception as error:  # a damaged file may raise anything, from transformers, safetensors, torch or pickle
        raise UserError(f"{what}: the model could not be loaded: {describe(error)}") from error
    finally:
        logger.removeFilter(is_no_report)
    check_loading_report(info, what, allow_missing, switch)
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        warnings.warn(f"{what}: {len(missing)} missing tensors were drawn at random: {names}", stacklevel=2)
    check_finite(model, what)
    return model.eval()


def check_generation_config(file: Path, what: str):
    """Refuses a damaged generation_config.json, in whose place transformers would silently take defaults.

    Raises:
        UserError: If the file is there and does not hold a JSON object.
    """
    if file.is_file():
        read_json(file, what)


def check_loading_report(info: dict, what: str, allow_missing: bool = False, switch: str | None = None):
    """Refuses a loading report with tensors that are missing, unknown or of another shape.

    Args:
        info (`dict`): What `from_pretrained(output_loading_info=True)` reports.
        what (`str`): The checkpoint's name, for the message.
        allow_missing (`bool`, defaults to `False`): Whether missing tensors are accepted.
        switch (`str`, *optional*): How the user accepts them, for the message.

    Raises:
        UserError: If the report has such tensors.
    """
    wrong = {
        "missing": [] if allow_missing else sorted(info["missing_keys"]),
        "unknown": sorted(key for key in info["unexpected_keys"] if not CONSTANTS.search(key)),
        "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        for kind, names in wrong.items()
        if names
    ]
    if found:
        hint = f" To draw missing tensors at random, use {switch}." if wrong["missing"] and switch else ""
        raise UserError(
            f"{what}: the tensors do not fit config.json: {'; '.join(found)}. Check its fields, such as "
            f"router_block_size and router_type, and that no file of the checkpoint is missing.{hint}"
        )


def is_no_report(record: logging.LogRecord) -> bool:
    """Whether a log record is not transformers' table of tensors that do not fit, which is an error here."""
    return "LOAD REPORT" not in record.getMessage()


def describe(error: Exception) -> str:
    """The message of an error, with its type where the message alone says too little."""
    return str(error) if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {error}"


def check_finite(model: torch.nn.Module, what: str):
    """Refuses a model with weights that are not finite.

    Raises:
        UserError: If a parameter or buffer holds NaN or infinity; the message names the tensor.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        values = values.float() if tensor.element_size() == 1 else values  # isfinite does not take float8
        if not torch.isfinite(values).all():
            raise UserError(f"{what}: {name} holds values that are not finite: the checkpoint is damaged or diverged.")
        if values.numel() and max(-values.min().item(), values.max().item()) > LARGEST:
            raise UserError(f"{what}: {name} holds values above {LARGEST:.0e}, whose squares overflow: it is damaged.")
