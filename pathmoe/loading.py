# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Loads checkpoints, and checks that the tensors match the configuration."""

import logging
import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_pathmoe.configuration_pathmoe import MOST

from .command import UserError, first_line, one_line
from .files import read_json


# Buffers that old checkpoints contain, although models compute them.
CONSTANTS = re.compile(r"rotary_emb\.inv_freq$")
# Sizes to check before transformers builds anything of such a size, like a list with one entry per layer.
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
    "max_position_embeddings",
)  # fmt: skip
LARGEST_SIZE = 2**31 - 1
LARGEST = 1e18  # larger weights have squares that overflow in float32


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Reads the configuration in the folder of a saved model. Code in the folder is not run.

    Raises:
        UserError: If `config.json` is missing, damaged or of an unknown architecture, or has invalid values. The
            message names the file and, if possible, the field.
    """
    file = Path(folder) / "config.json"
    fields = read_json(file)
    if (model_type := fields.get("model_type")) not in list(CONFIG_MAPPING.keys()):
        raise UserError(f"{file}: model_type={model_type!r} is not known to transformers.")
    for name in SIZES:
        value, most = fields.get(name), MOST.get(name.replace("_local", ""), LARGEST_SIZE)
        if value is None or isinstance(value, list):  # some architectures have one size per layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(f"{file}: {name}={value!r} must be a whole number from 1 to {most}.")
    for name in ("dtype", "torch_dtype"):
        dtype = getattr(torch, str(fields.get(name) or "float32"), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise UserError(f"{file}: {name}={fields[name]!r} must be a floating-point dtype, such as 'bfloat16'.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # wrong fields can make transformers raise any type of error
        raise UserError(f"{file} cannot be used: {one_line(describe(error))}") from error


def load_model(
    source: str | Path,
    *,
    what: str | None = None,
    allow_missing: bool = False,
    switch: str | None = "--allow_missing",
    **kwargs,
) -> PreTrainedModel:
    """Loads a causal language model and checks that its checkpoint is complete, so that no tensor is random.

    Args:
        source (`str` or `Path`): A folder, or a repository of the Hub.
        what (`str`, *optional*): The name of the model in messages. Defaults to `--model SOURCE`.
        allow_missing (`bool`, defaults to `False`): Whether missing tensors may be initialized at random.
        switch (`str`, *optional*, defaults to `"--allow_missing"`): The option with which the user allows that.
        **kwargs: Arguments of `from_pretrained`.

    Returns:
        `PreTrainedModel`: The model in evaluation mode.

    Raises:
        UserError: If the checkpoint cannot be read, if its tensors do not match the model in name or shape, or if it
            has values that are not finite.
    """
    what = what or f"--model {source}"
    check_generation_config(Path(source) / "generation_config.json", what)
    # With ignore_mismatched_sizes, tensors of a different shape do not raise but are reported, and checked below.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_no_report)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except Exception as error:  # a damaged file can raise any error of transformers, safetensors, torch or pickle
        raise UserError(f"{what}: the model could not be loaded: {find_damage(source) or describe(error)}") from error
    finally:
        logger.removeFilter(is_no_report)
    check_loading_report(info, what, allow_missing, switch)
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        warnings.warn(f"{what}: {len(missing)} missing tensors were initialized at random: {names}", stacklevel=2)
    check_dtypes(source, model, what)
    check_finite(model, what)
    return model.eval()


def find_damage(folder: str | Path) -> str | None:
    """Returns a message that names the first file of weights in a folder that cannot be read, if there is one."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:  # safetensors raises its own type, or OSError
            return f"{file} is damaged or incomplete ({one_line(error)}). Copy or download it again."
    return None


def check_dtypes(folder: str | Path, model: PreTrainedModel, what: str):
    """Refuses integers in the place of weights, which would be loaded as if they were weights.

    Raises:
        UserError: If a file of the folder has such a tensor and config.json does not say that it is quantised.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    weights = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in weights & set(tensors.keys()):
                if (dtype := tensors.get_slice(name).get_dtype())[0] in "IU":
                    raise UserError(
                        f"{what}: {name} in {file} holds integers ({dtype}), not weights: replace the file."
                    )


def check_generation_config(file: Path, what: str):
    """Checks generation_config.json. If it is damaged, transformers would silently use defaults.

    Raises:
        UserError: If the file exists and does not hold a JSON object.
    """
    if file.is_file():
        read_json(file, what)


def check_loading_report(info: dict, what: str, allow_missing: bool = False, switch: str | None = None):
    """Checks that a loading report lists no tensors that are missing, unknown or of a different shape.

    Args:
        info (`dict`): The loading info of `from_pretrained(output_loading_info=True)`.
        what (`str`): The name of the checkpoint in messages.
        allow_missing (`bool`, defaults to `False`): Whether missing tensors are accepted.
        switch (`str`, *optional*): The option with which the user accepts them.

    Raises:
        UserError: If the report has such tensors.
    """
    wrong = {
        "missing": [] if allow_missing else sorted(info["missing_keys"]),
        "unknown": sorted(key for key in info["unexpected_keys"] if not CONSTANTS.search(key)),
        "of a different shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', …' if len(names) > 4 else ''})"
        for kind, names in wrong.items()
        if names
    ]
    if found:
        hint = f" To initialize missing tensors at random, use {switch}." if wrong["missing"] and switch else ""
        raise UserError(
            f"{what}: the tensors do not match config.json: {'; '.join(found)}. Check the fields of config.json, such "
            f"as router_block_size and router_type, and that no file of the checkpoint is missing.{hint}"
        )


def is_no_report(record: logging.LogRecord) -> bool:
    """Filters out the log record with transformers' table of mismatched tensors, which raise an error here."""
    return "LOAD REPORT" not in record.getMessage()


def describe(error: Exception) -> str:
    """Returns the message of an error, with the type of the error where the message alone is unclear."""
    return str(error) if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {error}"


def check_device(device: str):
    """Checks that torch can compute on the `--device`.

    Raises:
        UserError: If it cannot.
    """
    try:
        torch.empty(1, device=device).cpu()
    except Exception as error:  # torch raises AssertionError, RuntimeError or NotImplementedError
        raise UserError(f"--device {device} cannot be used here: {first_line(error)}") from error


def check_finite(model: torch.nn.Module, what: str):
    """Checks that all weights are finite and that their squares do not overflow.

    Raises:
        UserError: If a parameter or buffer has other values. The message names the tensor.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.device.type == "meta":
            continue
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        values = values.float() if tensor.element_size() == 1 else values  # isfinite does not support float8
        if not torch.isfinite(values).all():
            raise UserError(f"{what}: {name} has values that are not finite: the checkpoint is damaged or diverged.")
        if values.numel() and max(-values.min().item(), values.max().item()) > LARGEST:
            raise UserError(
                f"{what}: {name} has values above {LARGEST:.0e}, whose squares overflow: the checkpoint is damaged."
            )
