# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Reads checkpoints one tensor at a time, and writes them shard by shard to a folder that is renamed at the end."""

import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_pathmoe.configuration_pathmoe import PathMoEConfig

from ..command import UserError, one_line
from ..files import check_new_folder, read_json, write_folder_aside
from ..loading import CONSTANTS, LARGEST, describe, load_config, load_model
from .shapes import check_tensors, meta_model


HASHES = re.compile(r"model\.routers\.\d+\.coefficients")  # of hash routers: whole numbers that are never trained
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
# Fields that refer to code, which users who trust the target would run. Saving a PathMoE adds its own code.
FOREIGN_CODE = ("auto_map", "custom_generate", "custom_pipelines")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_SIZE = re.compile(r"\d{1,12}(\.\d{1,9})?\s*[KMGT]B", re.IGNORECASE)
VERIFY_BATCH, VERIFY_LENGTH = 2, 64
# The largest difference between two implementations of one function in float32, relative to the largest logit.
EXACT = 1e-4


@dataclass(frozen=True)
class Piece:
    """A tensor of the target, before it is read.

    Attributes:
        shape (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype`): Its dtype.
        sources (`tuple[str, ...]`): The tensors and steps that it is made of, for the manifest.
        read (`Callable[[], torch.Tensor]`): Reads or computes the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    read: Callable[[], torch.Tensor]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], note: str) -> "Piece":
        """Returns this piece with `function` applied, which must keep shape and dtype."""
        return Piece(self.shape, self.dtype, (*self.sources, note), lambda: function(self.read()))


class Checkpoint:
    """A folder of safetensors whose tensors are read one at a time.

    Args:
        folder (`str` or `Path`): The folder of a saved causal language model.

    Raises:
        UserError: If a file is missing, damaged, or a link that leads out of the folder, or if the weights are
            quantised, not those of a causal language model, or not in the files that the index lists.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config_file = self.folder / "config.json"
        if not str(folder) or not os.path.isfile(self.config_file):
            raise UserError(
                f"SRC {str(folder)!r} is not a folder with a config.json: pass the folder of a saved model "
                "(`hf download` fetches one)."
            )
        check_links(self.folder)
        self._check_kind()
        self.config: PreTrainedConfig = load_config(self.folder)
        self._open: tuple[str, safe_open] | None = None
        self._tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self._scan()
        if self.config.tie_word_embeddings and "lm_head.weight" in self:
            self._drop_tied_head()

    def _check_kind(self):
        fields = read_json(self.config_file)
        if (self.folder / "adapter_config.json").exists():
            raise UserError(
                f"{self.folder} holds an adapter (adapter_config.json): merge it into its model and convert the model."
            )
        if fields.get("transformers_weights"):
            raise UserError(
                f"{self.config_file}: transformers_weights={fields['transformers_weights']!r} is not {SINGLE}: rename "
                "that file, and remove the field."
            )
        if fields.get("quantization_config"):
            raise UserError(
                f"{self.folder} is quantised (quantization_config in config.json): convert the checkpoint that it was "
                "made from."
            )
        architectures = fields.get("architectures") or []
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            raise UserError(f"{self.config_file}: architectures={architectures!r} must be a list of names.")
        if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
            raise UserError(f"{self.folder} holds a {architectures[0]}; only causal language models can be converted.")

    def _scan(self):
        """Reads the names, shapes and dtypes of all tensors, and compares them with the index."""
        index, weight_map = self.folder / INDEX, self._weight_map()
        for file in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
            handle = self._handle(file)
            for name in handle.keys():
                if weight_map is not None and (said := weight_map.pop(name, None)) != file:
                    raise UserError(f"{index}: {name} is in {file}, but the index says {said}: fetch both again.")
                part = handle.get_slice(name)
                dtype = DTYPES.get(part.get_dtype())
                if part.get_dtype() == "I64" and HASHES.fullmatch(name):
                    dtype = torch.int64
                if dtype is None:
                    raise UserError(
                        f"{name} in {self.folder / file} is {part.get_dtype()}: only {', '.join(DTYPES)} can be "
                        "converted."
                    )
                if not CONSTANTS.search(name):
                    self._tensors[name] = file, tuple(part.get_shape()), dtype
        for name, file in (weight_map or {}).items():
            raise UserError(f"{index} says that {name} is in {file}, which does not hold it: fetch both again.")

    def _weight_map(self) -> dict[str, str] | None:
        index = self.folder / INDEX
        if not index.is_file():
            return None
        if (self.folder / SINGLE).is_file():
            raise UserError(
                f"{self.folder} holds both {SINGLE} and {INDEX}, which may be different models: remove one of them."
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map, or one without tensors: fetch it again.")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(
                    f"{index}: {name} is listed in {file!r}, which is not a .safetensors file of this folder."
                )
        return weight_map

    def _drop_tied_head(self):
        if "model.embed_tokens.weight" in self and not torch.equal(
            self.read("lm_head.weight"), self.read("model.embed_tokens.weight")
        ):
            raise UserError(
                f"{self.config_file}: tie_word_embeddings is true, but lm_head.weight differs from the embedding: "
                "correct the field."
            )
        del self._tensors["lm_head.weight"]

    def _handle(self, file: str) -> safe_open:
        # Only one file is mapped at a time, so that the memory in use is that of one shard.
        if self._open is None or self._open[0] != file:
            self._open = None
            path = self.folder / file
            if not path.is_file():
                raise UserError(
                    f"{path} is missing. Only safetensors are read: save other formats with save_pretrained first."
                )
            try:
                self._open = file, safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or incomplete ({error}): fetch it again.") from error
        return self._open[1]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: shape for name, (_, shape, _) in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor."""
        return {name: dtype for name, (_, _, dtype) in self._tensors.items()}

    def piece(self, name: str, *index: int | slice) -> Piece:
        """Returns the piece of a tensor, or of the part of it at `index`."""
        file, shape, dtype = self._tensors[name]
        label = name
        if index:
            shape = tuple(torch.empty(shape, device="meta")[index].shape)
            parts = (f"{i.start or 0}:{i.stop or ''}" if isinstance(i, slice) else str(i) for i in index)
            label = f"{name}[{', '.join(parts)}]"

        def read():
            # Copied, because safetensors returns memory of the mapped file, and one router goes into several layers.
            handle = self._handle(file)
            tensor = handle.get_slice(name)[index] if index else handle.get_tensor(name).clone()
            if not tensor.isfinite().all():
                raise UserError(
                    f"{self.folder / file}: {name} holds values that are not finite: the checkpoint is damaged, or "
                    "its training diverged."
                )
            if tensor.numel() and max(-tensor.min().item(), tensor.max().item()) > LARGEST:
                raise UserError(
                    f"{self.folder / file}: {name} holds values above {LARGEST:.0e}, whose squares overflow: it is "
                    "damaged."
                )
            return tensor

        return Piece(shape, dtype, (label,), read)

    def close(self):
        """Unmaps the file that is open; reading opens it again."""
        self._open = None

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor."""
        return self.piece(name).read()

    def unchanged(self) -> dict[str, Piece]:
        """Returns the tensors other than experts and routers. Architectures name them alike."""
        changed = re.compile(r"\.(mlp\.experts|mlp\.gate|block_sparse_moe|routers)\.")
        return {name: self.piece(name) for name in self if not changed.search(name)}

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the checkpoint, or `None` if it has none.

        Raises:
            UserError: If it cannot be loaded, or has ids beyond the vocabulary.
        """
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
            largest = max(tokenizer.get_vocab().values(), default=-1)
        except Exception as error:  # damaged or foreign files can make transformers and tokenizers raise anything
            code = "trust_remote_code" in str(error)
            reason = "it needs custom code, which is not run" if code else one_line(error) or type(error).__name__
            raise UserError(
                f"{self.folder}: its tokenizer cannot be loaded: {reason:.200}. Replace or remove its files."
            ) from error
        if largest >= self.config.vocab_size:
            raise UserError(
                f"The tokenizer in {self.folder} has the token id {largest}, but vocab_size is "
                f"{self.config.vocab_size}: it belongs to a different model."
            )
        return tokenizer

    def check_fit(self):
        """Refuses tensors that do not match the configuration.

        Raises:
            UserError: If they do not; lists the tensors.
        """
        try:
            check_tensors(self.config_file, self.config, self.shapes)
        except UserError:
            raise
        except Exception as error:  # odd fields can make transformers raise anything when it builds the model
            raise UserError(f"{self.config_file} cannot be used: {one_line(describe(error))}") from error

    def check_to_convert(self):
        """Refuses a checkpoint whose tensors do not match its configuration, or whose other files are damaged.

        Raises:
            UserError: If so; names the file or the tensors.
        """
        self.check_fit()
        for name in CARRIED_FILES:
            if (self.folder / name).exists() and not (self.folder / name).is_file():
                raise UserError(f"{self.folder / name} is not a file, and would be left out: move it away.")
        for file in self.carried():
            if file.suffix == ".json":
                read_json(file)
        _ = self.tokenizer

    def carried(self) -> list[Path]:
        """Returns the files that are copied to the target, unchanged except for references to code."""
        return [self.folder / name for name in CARRIED_FILES if (self.folder / name).is_file()]


def check_links(folder: Path):
    """Refuses links to files outside of a checkpoint, which would be read, or copied into the target.

    Links from a snapshot in the Hub's cache to the blobs of its repository are accepted.

    Raises:
        UserError: If there is such a link; names it.
    """
    root = Path(os.path.realpath(folder))  # resolve() fails on a link to itself
    allowed = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    for file in filter(Path.is_symlink, folder.iterdir()):
        parents = Path(os.path.realpath(file)).parents
        if not file.exists() or not any(place in parents for place in allowed):
            raise UserError(
                f"{file} is a link to {file.readlink()}, which does not exist or is outside of the checkpoint: put a "
                "copy in its place, or remove it."
            )


def check_request(dst: str | Path, sources: list[str | Path], max_shard_size: int | str):
    """Refuses a target that cannot be written, before the conversion starts.

    Raises:
        UserError: If the target or the size is not valid.
    """
    size = max_shard_size
    if not (size > 0 if isinstance(size, int) else SHARD_SIZE.fullmatch(size) and float(size[:-2]) * 1000 >= 1):
        raise UserError(f"--max-shard-size {size!r} must be a size such as 500MB or 1GB.")
    check_new_folder(dst, "DST", sources)


def sample_tokens(config: PreTrainedConfig) -> torch.Tensor:
    """Returns random token ids `(batch, length)`, always the same, on which source and target are compared."""
    length = min(VERIFY_LENGTH, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (VERIFY_BATCH, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the logits of a model, `(batch, length, vocab)`."""
    return model(tokens, use_cache=False).logits


def load(folder: str | Path) -> PreTrainedModel:
    """Loads the model of a folder in float32, in evaluation mode.

    Raises:
        UserError: If the folder's tensors are not exactly those of its model, or not finite.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager", "trust_remote_code": False}
    return load_model(folder, what=str(folder), switch=None, **options)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> dict:
    """Measures how much logits differ, for the manifest and the terminal."""
    return {
        "tokens": actual.shape[0] * actual.shape[1],
        "largest_logit": expected.abs().max().item(),
        "largest_logit_difference": (actual - expected).abs().max().item(),
    }


@contextmanager
def written_aside(dst: str | Path) -> Iterator[Path]:
    """Yields a folder that becomes DST when the block ends, and is removed if it fails.

    Raises:
        UserError: If the folder cannot be written.
    """
    try:
        with write_folder_aside(dst) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{dst} could not be written ({error}). Nothing was kept.") from error


def convert(
    operation: str,
    source: Checkpoint,
    dst: str | Path,
    config: PreTrainedConfig,
    plan: dict[str, Piece],
    *,
    verify: bool,
    exact: bool,
    max_shard_size: int | str,
    reference: torch.Tensor | None = None,
    measure: Callable[[torch.nn.Module], dict] | None = None,
    **report,
) -> dict:
    """Writes a checkpoint from its plan, shard by shard, and compares it with its source.

    Args:
        operation (`str`): The name of the conversion.
        source (`Checkpoint`): The source of tokenizer, generation configuration and licence, and of the logits that
            the target is compared with.
        dst (`str` or `Path`): The target folder, which must not exist.
        config (`PreTrainedConfig`): The target's configuration.
        plan (`dict[str, Piece]`): The target's tensors.
        verify (`bool`): Whether to compare the logits of source and target in float32; needs the memory of the larger
            of the two.
        exact (`bool`): Whether a difference beyond rounding is an error.
        max_shard_size (`int` or `str`): Largest size of a shard, as `"1GB"`.
        reference (`torch.Tensor`, *optional*): The logits to compare with, instead of the source's.
        measure (`Callable`, *optional*): Given the target in memory, returns further entries of the manifest.
        **report: Further entries of the manifest.

    Returns:
        `dict`: The manifest, as written to `conversion.json`.

    Raises:
        UserError: If the disk is too small or writing fails, a tensor is not finite, or the logits differ where they
            must not; nothing is left behind.
    """
    check_tensors(Path(dst) / "config.json", config, {name: piece.shape for name, piece in plan.items()})
    needed = sum(torch.Size(piece.shape).numel() * piece.dtype.itemsize for piece in plan.values())
    existing = next(parent for parent in Path(dst).absolute().parents if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise UserError(f"{dst} needs {needed / 1e9:.1f} GB, but {existing} has only {free / 1e9:.1f} GB free.")
    with written_aside(dst) as partial:
        tokens = sample_tokens(config)
        if verify and reference is None:
            reference = logits_of(load(source.folder), tokens)
        _write_config(partial, config, next(iter(plan.values())).dtype)
        for file in source.carried():
            copy_without_code(file, partial / file.name)
        shards = _write_shards(partial, plan, max_shard_size)
        manifest = {
            "operation": operation,
            "source": {"name": source.folder.name, "model_type": source.config.model_type},
            "target": {"model_type": config.model_type, "bytes": needed, "shards": shards},
            "versions": {
                package: importlib.metadata.version(package) for package in ("torch", "transformers", "safetensors")
            },
            **report,
            "verified": False,
        }
        if verify:
            model = load(partial)
            measured = difference(logits_of(model, tokens), reference)
            if not math.isfinite(measured["largest_logit_difference"]):
                raise UserError(
                    f"{operation}: the logits of {source.folder} or of the target are not finite, though their "
                    "weights are: look for weights that are far too large. Nothing was written."
                )
            if exact and not measured["largest_logit_difference"] <= EXACT * max(1.0, measured["largest_logit"]):
                raise UserError(
                    f"{operation} must preserve the function, but logits of up to {measured['largest_logit']:.4g} "
                    f"differ by up to {measured['largest_logit_difference']:.4g}. Nothing was written."
                )
            manifest["verified"] = {**measured, "must_be_equal": exact}
            manifest |= measure(model) if measure else {}
        manifest["tensors"] = {name: list(piece.sources) for name, piece in plan.items()}
        (partial / "conversion.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def copy_without_code(file: Path, target: Path):
    """Copies a file, dropping the fields of a JSON file that refer to code."""
    fields = read_json(file) if file.suffix == ".json" else {}
    if not any(name in fields for name in FOREIGN_CODE):
        shutil.copyfile(file, target)
        return
    fields = {name: value for name, value in fields.items() if name not in FOREIGN_CODE}
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, config: PreTrainedConfig, dtype: torch.dtype):
    """Writes the configuration, and for a PathMoE also the code that loads it without this package."""
    config.dtype = config.dtype or dtype
    for name in FOREIGN_CODE:
        config.__dict__.pop(name, None)
    if isinstance(config, PathMoEConfig):
        model = meta_model(config).to(config.dtype)  # type: ignore[arg-type]  # transformers wraps `to` untyped
        model.save_pretrained(folder, state_dict={})
        return
    config.save_pretrained(folder)
    # Servers read the names that published checkpoints use; transformers 5 writes newer ones.
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["num_experts"] = written["num_local_experts"] = config.num_local_experts
    rope = dict(config.rope_parameters)
    written["rope_theta"] = rope.pop("rope_theta")
    written["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    written["torch_dtype"] = written["dtype"]
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(folder: Path, plan: dict[str, Piece], max_shard_size: int | str) -> int:
    described = {name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for name, piece in plan.items()}
    split = split_torch_state_dict_into_shards(described, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: plan[name].read().contiguous() for name in names}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{name} of the target would hold values that are not finite in {tensor.dtype}: choose smaller "
                    "weights or less noise. Nothing was written."
                )
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        del tensors  # otherwise they would stay in memory until the next shard is complete
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(split.filename_to_tensors)
