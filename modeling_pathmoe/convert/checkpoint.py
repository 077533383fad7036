# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints on disk: read one tensor at a time, described before it is read, written aside shard by shard."""

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ..configuration_pathmoe import PathMoEConfig
from ..modeling_pathmoe import PathMoEForCausalLM


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CARRIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
# Early Llama checkpoints hold this constant; it is computed from the configuration.
CONSTANTS = re.compile(r"\.rotary_emb\.inv_freq$")
VERIFY_BATCH, VERIFY_LENGTH = 2, 64
# Two implementations of one function in float32, relative to the largest logit.
EXACT = 1e-4


@dataclass(frozen=True)
class Piece:
    """A tensor of the target, before it is read.

    Attributes:
        shape (`tuple[int, ...]`): Its shape.
        dtype (`torch.dtype`): Its dtype.
        sources (`tuple[str, ...]`): What it is made of, for the manifest.
        read (`Callable[[], torch.Tensor]`): Makes it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[str, ...]
    read: Callable[[], torch.Tensor]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor], note: str) -> "Piece":
        """The piece after `function`, which keeps shape and dtype."""
        return Piece(self.shape, self.dtype, (*self.sources, note), lambda: function(self.read()))


class Checkpoint:
    """A folder of safetensors whose tensors are read one at a time.

    Args:
        folder (`str` or `Path`): The folder of a saved causal language model.

    Raises:
        FileNotFoundError: If the configuration or a shard is missing.
        ValueError: If a file is damaged, or the weights are quantised or no causal language model's.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no config.json: give the folder of a saved model (`hf download` fetches one)."
            )
        raw = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if raw.get("quantization_config"):
            raise ValueError(f"{folder} is quantised: convert the checkpoint that it was made from.")
        architectures = raw.get("architectures") or []
        if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
            raise ValueError(f"{folder} holds a {architectures[0]}; only causal language models can be converted.")
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.used: set[str] = set()
        self._open: tuple[str, safe_open] | None = None
        self._tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        for file in self._shards():
            handle = self._handle(file)
            for name in handle.keys():
                part = handle.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{name} in {file} is {part.get_dtype()}: only floating-point weights are converted."
                    )
                if not CONSTANTS.search(name):
                    self._tensors[name] = file, tuple(part.get_shape()), DTYPES[part.get_dtype()]
        if self.config.tie_word_embeddings and "lm_head.weight" in self:
            if not torch.equal(self.read("lm_head.weight"), self.read("model.embed_tokens.weight")):
                raise ValueError(
                    f"{folder}: tie_word_embeddings is true but lm_head.weight differs from the embedding: correct "
                    "config.json."
                )
            del self._tensors["lm_head.weight"]
        self.used.clear()

    def _shards(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return ["model.safetensors"]

    def _handle(self, file: str) -> safe_open:
        # One file is mapped at a time, so that the memory in use stays that of one shard.
        if self._open is None or self._open[0] != file:
            self._open = None
            path = self.folder / file
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing. Only safetensors are read: save other formats with save_pretrained first."
                )
            try:
                self._open = file, safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or incomplete ({error}): fetch it again.") from error
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
        """A tensor, or the part of it at `index`.

        Raises:
            ValueError: If there is no such tensor.
        """
        if name not in self._tensors:
            raise ValueError(f"{self.folder} lacks the tensor {name}, which its config.json asks for.")
        self.used.add(name)
        file, shape, dtype = self._tensors[name]
        if not index:
            # A copy: what safetensors gives lies in the mapped file, and one router goes into several layers.
            return Piece(shape, dtype, (name,), lambda: self._handle(file).get_tensor(name).clone())
        shape = tuple(torch.empty(shape, device="meta")[index].shape)
        label = ", ".join(f"{i.start or 0}:{i.stop or ''}" if isinstance(i, slice) else str(i) for i in index)
        return Piece(shape, dtype, (f"{name}[{label}]",), lambda: self._handle(file).get_slice(name)[index])

    def close(self):
        """Unmaps the file that is open; reading opens it again."""
        self._open = None

    def read(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self.piece(name).read()

    def unchanged(self) -> dict[str, Piece]:
        """The tensors outside of feed-forward layers, experts and routers: all architectures here name them alike."""
        return {name: self.piece(name) for name in self if not re.search(r"\.(mlp|block_sparse_moe|routers)\.", name)}

    def tokenizer(self):
        """Its tokenizer, or `None` where there is none."""
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            return None
        return AutoTokenizer.from_pretrained(self.folder)


def expected_shapes(config: PathMoEConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a PathMoE checkpoint with this configuration holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _meta_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return shapes


def check_tensors(what: str, actual: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]):
    """Compares names and shapes.

    Raises:
        ValueError: If they differ; names what is missing, extra and misshapen.
    """
    wrong = {
        "missing": sorted(expected.keys() - actual.keys()),
        "extra": sorted(actual.keys() - expected.keys()),
        "misshapen": [
            f"{name} {actual[name]} instead of {expected[name]}"
            for name in sorted(actual.keys() & expected.keys())
            if actual[name] != expected[name]
        ],
    }
    if any(wrong.values()):
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:4])}{', …' * (len(names) > 4)})"
            for kind, names in wrong.items()
            if names
        ]
        raise ValueError(f"{what} does not fit its configuration. Tensors: {'; '.join(parts)}.")


def _meta_model(config: PathMoEConfig) -> PathMoEForCausalLM:
    with torch.device("meta"):
        return PathMoEForCausalLM._from_config(config, experts_implementation="eager")


def sample_tokens(config: PreTrainedConfig) -> torch.Tensor:
    """Random token ids `(batch, length)`, always the same, on which source and target are compared."""
    length = min(VERIFY_LENGTH, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (VERIFY_BATCH, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of a model, `(batch, length, vocab)`."""
    return model(tokens, use_cache=False).logits


def load(folder: str | Path) -> torch.nn.Module:
    """The model of a folder in float32, in evaluation mode.

    Raises:
        ValueError: If the folder's tensors are not exactly those of its model.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    extra = [name for name in info["unexpected_keys"] if not CONSTANTS.search(name)]
    if info["missing_keys"] or extra or info["mismatched_keys"]:
        raise ValueError(
            f"{folder} does not hold exactly the tensors of its model: missing {sorted(info['missing_keys'])}, extra "
            f"{sorted(extra)}, misshapen {sorted(info['mismatched_keys'])}."
        )
    return model.eval()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> dict:
    """How far logits are apart, for the manifest and the terminal."""
    return {
        "tokens": actual.shape[0] * actual.shape[1],
        "largest_logit": expected.abs().max().item(),
        "largest_logit_difference": (actual - expected).abs().max().item(),
    }


@contextmanager
def written_aside(dst: str | Path) -> Iterator[Path]:
    """A folder `DST.partial` that becomes DST when the block ends, and is removed when it fails.

    Raises:
        FileExistsError: If DST exists, or another conversion's partial folder.
    """
    dst = Path(dst)
    partial = dst.with_name(dst.name + ".partial")
    if dst.exists():
        raise FileExistsError(f"{dst} exists already and is never overwritten: choose another name, or remove it.")
    if partial.exists():
        raise FileExistsError(
            f"{partial} exists: another conversion is writing it, or was killed. If none is running, remove it."
        )
    try:
        partial.mkdir(parents=True)  # in here: a signal may come as soon as the folder is there
        yield partial
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
        source (`Checkpoint`): Where tokenizer, generation configuration and licence come from, and the logits that
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
        **report: Entries of the manifest.

    Returns:
        `dict`: The manifest, as written to `conversion.json`.

    Raises:
        ValueError: If tensors are left over or do not fit the configuration, the tokenizer does not fit, or the
            logits differ where they must not.
        OSError: If the disk is too small or writing fails; nothing is left behind.
    """
    if left_over := sorted(set(source) - source.used):
        raise ValueError(
            f"{source.folder} holds {len(left_over)} tensors that {operation} has no place for, such as "
            f"{', '.join(left_over[:4])}: is this the architecture that its config.json names?"
        )
    if isinstance(config, PathMoEConfig):
        check_tensors(str(source.folder), {name: piece.shape for name, piece in plan.items()}, expected_shapes(config))
    tokenizer = source.tokenizer()
    if tokenizer is not None and (largest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise ValueError(
            f"The tokenizer in {source.folder} has the token id {largest}, but vocab_size is {config.vocab_size}: it "
            "belongs to another model."
        )
    needed = sum(torch.Size(piece.shape).numel() * piece.dtype.itemsize for piece in plan.values())
    existing = next(parent for parent in Path(dst).absolute().parents if parent.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        raise OSError(f"{dst} needs {needed / 1e9:.1f} GB, but {existing} has only {free / 1e9:.1f} GB free.")

    with written_aside(dst) as partial:
        tokens = sample_tokens(config)
        if verify and reference is None:
            reference = logits_of(load(source.folder), tokens)
        _write_config(partial, config, next(iter(plan.values())).dtype)
        for name in CARRIED_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, partial / name)
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
            if exact and not measured["largest_logit_difference"] <= EXACT * max(1.0, measured["largest_logit"]):
                raise ValueError(
                    f"{operation} must preserve the function, but logits of up to {measured['largest_logit']:.4g} "
                    f"differ by up to {measured['largest_logit_difference']:.4g}. Nothing was written."
                )
            manifest["verified"] = {**measured, "must_be_equal": exact}
            manifest |= measure(model) if measure else {}
        manifest["tensors"] = {name: list(piece.sources) for name, piece in plan.items()}
        (partial / "conversion.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _write_config(folder: Path, config: PreTrainedConfig, dtype: torch.dtype):
    """Writes the configuration; for a PathMoE also the code with which it loads where this package is not."""
    config.dtype = config.dtype or dtype
    if isinstance(config, PathMoEConfig):
        model = _meta_model(config)
        model.to(config.dtype).save_pretrained(folder, state_dict={})
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
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} could not be written ({error}). Nothing was kept.") from error
        del tensors  # or they would stay until the next shard is complete
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(split.filename_to_tensors)
