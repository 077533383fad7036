# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Training checkpoints. They are written atomically, contain no pickle, and load on any number of ranks.

step-00000100/
  shard-*.safetensors   weights and moments of the optimizer; each rank writes its own shards
  rank-N.json           random state and data position of rank N
  state.json            step, schedule, counters
  manifest.json         size and CRC-32 of the other files
"""

import json
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from pathmoe.command import UserError
from pathmoe.files import follow_umask
from pathmoe.text.reader import DataError
from pathmoe.train.muon import moment_names
from pathmoe.train.output import set_aside
from pathmoe.train.recipe import (
    CHANGEABLE_ON_RESUME,
    OPERATIONAL_FIELDS,
    Recipe,
    RecipeError,
    list_changes,
    read_recipe,
)
from pathmoe.train.state import TrainState


# torch warns in every run with one process, where this is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


NAME = re.compile(r"step-\d{8,}")
UNFINISHED = re.compile(r"step-\d{8,}(\.stale)?\.partial")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read. The message names the file and the fix."""


def list_checkpoints(recipe: Recipe) -> list[Path]:
    """Lists the checkpoints of a run, oldest first. Folders with other names, such as copies, are left out.

    Raises:
        RecipeError: If `checkpoints` exists and is not a folder.
    """
    folder = Path(recipe.output_dir) / "checkpoints"
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not a folder: move it away, or choose another output_dir.")
    found = [
        path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def summarise(files: list[Path]) -> dict[str, list[int]]:
    """Returns the size and CRC-32 of each file."""
    found = {}
    for file in files:
        checksum, size = 0, 0
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        found[file.name] = [size, checksum]
    return found


def read_manifest(folder: Path) -> dict[str, list[int]] | None:
    """Reads the size and CRC-32 of each file of a checkpoint. Returns `None` if the manifest is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        whole = {"state.json", "rank-0.json"} <= set(manifest) and any(name.startswith("shard-") for name in manifest)
        return {name: [int(size), int(crc)] for name, (size, crc) in manifest.items()} if whole else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def find_fault(folder: Path, accelerator: Accelerator) -> str | None:
    """Describes the first fault of a checkpoint. Returns `None` if the checkpoint is intact."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return f"{manifest} is missing"
    expected = read_manifest(folder)
    if expected is None:
        return f"{manifest} is damaged"
    files = [folder / name for name in sorted(expected) if (folder / name).is_file()]
    own = files[accelerator.process_index :: accelerator.num_processes]
    try:
        outcome = list(summarise(own).items()), None
    except OSError as error:
        outcome = [], f"{error.filename} cannot be read: {error.strerror}"
    outcomes = gather_object([outcome])
    if unreadable := [fault for _, fault in outcomes if fault]:
        return unreadable[0]
    found = dict(entry for entries, _ in outcomes for entry in entries)
    for name, (size, checksum) in expected.items():
        if name not in found:
            return f"{folder / name} is missing"
        if found[name][0] < size:
            return f"{folder / name} is truncated: {found[name][0]:,} of {size:,} bytes"
        if found[name] != [size, checksum]:
            return f"{folder / name} is damaged: its checksum is wrong"
    if (step := json.loads((folder / "state.json").read_text())["step"]) != step_of(folder):
        return f"{folder} holds the checkpoint of step {step}: someone has renamed it"
    return None


def find_checkpoint(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """Finds the checkpoint to resume from: the newest one that is intact. Returns `None` to start a new run.

    Raises:
        RecipeError: If the folder holds a run and `resume` is not set, if the checkpoint is missing, or if the run was
            started from a different recipe.
        CheckpointError: If the requested checkpoint is damaged or, with `"auto"`, all of them are.
    """
    output, checkpoints = Path(recipe.output_dir), list_checkpoints(recipe)
    before = read_recipe(output / "recipe.yaml")
    if recipe.resume is None:
        if (output / "metrics.jsonl").exists() or before is not None or checkpoints:
            raise RecipeError(f"output_dir={recipe.output_dir!r} holds a run: pass --resume auto, or another folder.")
        return None
    if recipe.resume != "auto":
        checkpoints = [path for path in checkpoints if os.path.realpath(path) == os.path.realpath(recipe.resume)]
        if not checkpoints:
            raise RecipeError(f"resume={recipe.resume!r} is not a checkpoint in {output / 'checkpoints'}: use 'auto'.")
    if before is not None:
        if changed := list_changes(before, vars(recipe)):
            raise RecipeError(
                f"{output} has a run of a different recipe ({', '.join(changed)}): use a new output_dir."
            )
    elif (output / "metrics.jsonl").exists() and not checkpoints:
        raise RecipeError(
            f"{output / 'metrics.jsonl'} does not belong to this run: move it away, or choose another output_dir."
        )
    faults = []
    for checkpoint in reversed(checkpoints):
        if (fault := find_fault(checkpoint, accelerator)) is None:
            return checkpoint
        faults.append(fault)
        accelerator.print(f"WARNING: {fault}; looking for an older checkpoint.")
    if faults:
        if recipe.resume != "auto":
            raise CheckpointError(f"resume={recipe.resume!r}: {faults[0]}. Resume from another checkpoint or 'auto'.")
        raise CheckpointError(f"no checkpoint is intact ({'; '.join(faults)}): start again in another output_dir.")
    return None


class Checkpoints:
    """Writes and loads the checkpoints of one run.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        state (`TrainState`): The state that `save` writes and `load` restores.
        inputs (`dict[str, str]`): Fingerprints of the files that the run reads.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, state: TrainState, inputs: dict[str, str]):
        self.recipe, self.accelerator, self.state, self.inputs = recipe, accelerator, state, inputs
        self.model = accelerator.unwrap_model(state.model)
        self.optimizer = getattr(state.optimizer, "optimizer", state.optimizer)
        if accelerator.is_main_process:
            for unfinished in (Path(recipe.output_dir) / "checkpoints").glob("*.partial"):
                if UNFINISHED.fullmatch(unfinished.name) and unfinished.is_dir() and not unfinished.is_symlink():
                    shutil.rmtree(unfinished)
        accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, torch.Tensor]:
        # A tied weight is saved once, under its first name.
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items() if name in own}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items() if key != "step"}
        return tensors

    def save(self, step: int, batches: dict | None = None):
        """Writes a checkpoint to a temporary folder, and renames the folder when all files are on the disk.

        Old checkpoints are removed afterwards if `counters["healthy"]` is true.

        Args:
            step (`int`): The number of steps done.
            batches (`dict`, *optional*): The place in the data, unless it is where the batches stand now.

        Raises:
            CheckpointError: If the checkpoint could not be written. Earlier checkpoints are unchanged.
        """
        folder = Path(self.recipe.output_dir) / "checkpoints" / f"step-{step:08d}"
        partial = folder.with_name(folder.name + ".partial")
        faults, _ = self._attempt(lambda: partial.mkdir(parents=True, exist_ok=True))
        if not faults:
            faults, written = self._attempt(lambda: self._write(partial, step, batches))
        if not faults:
            manifest = {name: entry for sizes in written for name, entry in sizes.items()}
            faults, _ = self._attempt(lambda: self._seal(partial, folder, manifest))
        if faults:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{folder} could not be written ({faults[0]}). Earlier checkpoints are intact: check the disk, then "
                "pass --resume auto to continue from the newest one."
            )

    def draw_step(self, step: int, accumulation: int) -> list[torch.Tensor]:
        """Draws the micro-batches of a step. If the stream of any rank breaks, a checkpoint is saved first.

        Raises:
            DataError: On all ranks, if the text cannot be read. The message names the place in the text and the
                checkpoint.
        """
        rows = self.recipe.micro_batch_size
        if not self.recipe.streaming:
            return [self.state.batches.next_batch(rows) for _ in range(accumulation)]
        before, drawn, fault = self.state.batches.state_dict(), [], None
        try:
            drawn = [self.state.batches.next_batch(rows) for _ in range(accumulation)]
        except DataError as error:
            fault = str(error)
        if not self._on_any_rank(fault is not None):
            return drawn
        fault = next(filter(None, gather_object([fault])))
        if step == 1:
            raise DataError(fault)
        folder = Path(self.recipe.output_dir) / "checkpoints" / f"step-{step - 1:08d}"
        if not folder.exists():
            self.save(step - 1, before)
        raise DataError(f"{fault} {folder} holds the run up to there: fix the text, then pass --resume auto.")

    def _on_any_rank(self, value: bool) -> bool:
        """Whether a value is true on any rank, which would otherwise be waited for in the middle of a step."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(torch.tensor(float(value), device=self.accelerator.device)).item() > 0

    def _attempt(self, write) -> tuple[list[str], list]:
        """Runs `write` on all ranks. Returns the faults of the ranks that failed, and the results of all ranks."""
        fault = result = None
        try:
            result = write()
        except (OSError, CheckpointException) as error:  # also a full disk
            causes = [str(wrapped[0]) for wrapped in getattr(error, "failures", {}).values()]
            fault = "; ".join(causes) or str(error)
        outcomes = gather_object([(fault, result)])
        return [fault for fault, _ in outcomes if fault], [result for _, result in outcomes]

    def _write(self, partial: Path, step: int, batches: dict | None) -> dict[str, list[int]]:
        accelerator, index = self.accelerator, self.accelerator.process_index
        dcp.save(
            self._tensors(),
            storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True),
            no_dist=accelerator.num_processes == 1,
        )
        batches = batches or self.state.batches.state_dict()
        rank = {"batches": batches, "random": torch.get_rng_state().numpy().tobytes().hex()}
        if accelerator.device.type == "cuda":
            rank["device_random"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
        (partial / f"rank-{index}.json").write_text(json.dumps(rank))
        own = [*partial.glob(f"shard-{index + 1:05d}-*"), partial / f"rank-{index}.json"]
        if accelerator.is_main_process:
            steps = {
                name: self.optimizer.state[parameter]["step"].item()
                for name, parameter in self.model.named_parameters()
                if parameter in self.optimizer.state
            }
            state = {
                "step": step,
                "world_size": accelerator.num_processes,
                "scheduler": self.state.scheduler.last_epoch,
                "learning_rate": self.state.scheduler.get_last_lr()[0],
                "optimizer_steps": steps,
                "counters": self.state.counters,
                "inputs": self.inputs,
                "recipe": {name: value for name, value in vars(self.recipe).items() if name not in OPERATIONAL_FIELDS},
            }
            (partial / "state.json").write_text(json.dumps(state))
            own.append(partial / "state.json")
        follow_umask(own)
        for file in own:
            sync(file)
        return summarise(own)

    def _seal(self, partial: Path, folder: Path, manifest: dict):
        if not self.accelerator.is_main_process:
            return
        (partial / "manifest.json").write_text(json.dumps(manifest))
        sync(partial / "manifest.json")
        sync(partial)
        if os.path.lexists(folder):
            set_aside(folder)
        partial.rename(folder)
        sync(folder.parent)
        whole = [path for path in list_checkpoints(self.recipe) if read_manifest(path) is not None]
        for old in whole[: -self.recipe.keep_last] if self.state.counters["healthy"] else []:
            if {path.name for path in old.iterdir()} - {"manifest.json", *read_manifest(old)}:
                continue  # the user keeps files in this folder
            if not (self.recipe.keep_every and step_of(old) % self.recipe.keep_every == 0):
                # Rename it first: a run that is killed here must not leave half a checkpoint under this name.
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))

    def _set_newer_aside(self, folder: Path):
        """Renames the checkpoints that are newer than `folder`. The resumed run does not continue from them."""
        for path in list_checkpoints(self.recipe) if self.accelerator.is_main_process else []:
            if step_of(path) > step_of(folder) and (path / "manifest.json").is_file():
                self.accelerator.print(f"{path} is newer than {folder.name} and is kept as {set_aside(path)}.")
        self.accelerator.wait_for_everyone()

    def _note_changes(self, before: dict, step: int):
        """Records for the log and the model card which recipe fields have changed since the checkpoint was written."""
        now = vars(self.recipe)
        if before and (changed := list_changes(before, now)):
            raise RecipeError(f"the checkpoint has a different recipe ({', '.join(changed)}): use a new output_dir.")
        self.state.counters["changes"] = self.state.counters["changes"] + [
            {"step": step, "field": name, "before": before[name], "after": now[name]}
            for name in sorted(CHANGEABLE_ON_RESUME - OPERATIONAL_FIELDS)
            if name in before and before[name] != now[name]
        ]

    def load(self, folder: Path) -> int:
        """Restores the state of the run from a checkpoint. Returns the number of completed steps."""
        saved = json.loads((folder / "state.json").read_text())
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        same_world = saved["world_size"] == world_size
        if self.recipe.streaming and not same_world:
            raise RecipeError(
                f"{folder} was written by {saved['world_size']} processes, each of which read a part of the stream: "
                f"resume with {saved['world_size']} processes, not {world_size}."
            )
        for name, parameter in self.model.named_parameters():
            if name in saved["optimizer_steps"]:
                step = torch.tensor(saved["optimizer_steps"][name], dtype=torch.float32)
                fused = any(group["fused"] for group in self.optimizer.param_groups)
                self.optimizer.state[parameter] = {
                    "step": step.to(parameter.device) if fused else step,
                    **{key: torch.zeros_like(parameter) for key in moment_names(self.optimizer, parameter)},
                }
        dcp.load(self._tensors(), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=world_size == 1)
        self.state.scheduler.last_epoch = saved["scheduler"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.state.scheduler.base_lrs, self.state.scheduler.lr_lambdas
        ):
            group["lr"] = base * factor(saved["scheduler"])
        self.state.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if (rate := self.state.scheduler.get_last_lr()[0]) != saved["learning_rate"]:
            self.accelerator.print(
                f"WARNING: with this recipe (max_steps={self.recipe.max_steps}) the learning rate continues at "
                f"{rate:.3e}, but the checkpoint recorded {saved['learning_rate']:.3e}."
            )
        self.state.counters |= saved["counters"]
        self._note_changes(saved.get("recipe", {}), saved["step"])
        own = json.loads((folder / f"rank-{rank if same_world else 0}.json").read_text())
        self.state.batches.load_state_dict(own["batches"])
        if same_world:
            torch.set_rng_state(torch.frombuffer(bytearray.fromhex(own["random"]), dtype=torch.uint8))
            if "device_random" in own and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(own["device_random"]), dtype=torch.uint8))
        else:
            torch.manual_seed(self.recipe.seed + saved["step"] * world_size + rank)
            self.accelerator.print(
                f"{folder} was written by {saved['world_size']} processes and continues with {world_size}: random "
                "numbers (dropout) and the order of sums are different from now on."
            )
        self._set_newer_aside(folder)
        return saved["step"]


def sync(path: Path):
    """Waits until a file or folder has been written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
