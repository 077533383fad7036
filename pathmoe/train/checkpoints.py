# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are complete or not there at all, hold no pickle, and load on any number of ranks.

step-00000100/
  shard-*.safetensors   weights and AdamW moments, each rank its part
  rank-N.json           random state and place in the data of rank N
  state.json            step, schedule, counters
  manifest.json         size and CRC-32 of all of these
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
from pathmoe.train.output import set_aside
from pathmoe.train.recipe import CHANGEABLE_ON_RESUME, FREE_TO_CHANGE, Recipe, RecipeError, list_changes, read_recipe
from pathmoe.train.state import TrainState


# It is said of every run on one process, which is not mistaken.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MOMENTS = ("exp_avg", "exp_avg_sq")


NAME = re.compile(r"step-\d{8,}")
UNFINISHED = re.compile(r"step-\d{8,}(\.stale)?\.partial")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written or read. The message names the file and what to do."""


def list_checkpoints(recipe: Recipe) -> list[Path]:
    """The checkpoints of a run, oldest first. What has a name of another form, such as a copy, is not one of them.

    Raises:
        RecipeError: If `checkpoints` is there and is not a folder.
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
    """The number of optimizer steps that a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("step-"))


def summarise(files: list[Path]) -> dict[str, list[int]]:
    """Size and CRC-32 of each file."""
    found = {}
    for file in files:
        checksum, size = 0, 0
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
        found[file.name] = [size, checksum]
    return found


def read_manifest(folder: Path) -> dict[str, list[int]] | None:
    """Size and CRC-32 of each file of a checkpoint; `None` when its manifest is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        whole = {"state.json", "rank-0.json"} <= set(manifest) and any(name.startswith("shard-") for name in manifest)
        return {name: [int(size), int(crc)] for name, (size, crc) in manifest.items()} if whole else None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def find_fault(folder: Path, accelerator: Accelerator) -> str | None:
    """What is wrong with a checkpoint; `None` when it is whole."""
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
            return f"{folder / name} is damaged: its checksum is another"
    if (step := json.loads((folder / "state.json").read_text())["step"]) != step_of(folder):
        return f"{folder} holds the checkpoint of step {step}: someone has renamed it"
    return None


def find_checkpoint(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from, the newest one that is whole; `None` starts anew.

    Raises:
        RecipeError: If the folder holds a run and `resume` is not set, if the checkpoint is missing, or if the run was
            started from another recipe.
        CheckpointError: If the checkpoint that was asked for is damaged, or with `"auto"` all are.
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
            raise RecipeError(f"resume={recipe.resume!r} is no checkpoint of {output / 'checkpoints'}: use 'auto'.")
    if before is not None:
        if changed := list_changes(before, vars(recipe)):
            raise RecipeError(f"the run in {output} has another recipe ({', '.join(changed)}): use a new output_dir.")
    elif (output / "metrics.jsonl").exists() and not checkpoints:
        raise RecipeError(
            f"{output / 'metrics.jsonl'} is not of this run: move it away, or choose another output_dir."
        )
    faults = []
    for checkpoint in reversed(checkpoints):
        if (fault := find_fault(checkpoint, accelerator)) is None:
            return checkpoint
        faults.append(fault)
        accelerator.print(f"WARNING: {fault}; looking for an older checkpoint.")
    if faults:
        raise CheckpointError(f"no checkpoint is whole ({'; '.join(faults)}): start anew in another output_dir.")
    return None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        recipe (`Recipe`): The recipe.
        accelerator (`Accelerator`): The engine.
        state (`TrainState`): What is saved; `load` restores it.
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
        # A tied weight once, under the first of its names.
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items() if name in own}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{key}": state[key] for key in MOMENTS if key in state}
        return tensors

    def save(self, step: int):
        """Writes the checkpoint aside, renames it when all of it is on the disk, and removes old ones, unless
        `counters["healthy"]` says that the training does not go well.

        Raises:
            CheckpointError: If it could not be written. The checkpoints before it are as they were.
        """
        folder = Path(self.recipe.output_dir) / "checkpoints" / f"step-{step:08d}"
        partial = folder.with_name(folder.name + ".partial")
        faults, _ = self._attempt(lambda: partial.mkdir(parents=True, exist_ok=True))
        if not faults:
            faults, written = self._attempt(lambda: self._write(partial, step))
        if not faults:
            manifest = {name: entry for its in written for name, entry in its.items()}
            faults, _ = self._attempt(lambda: self._seal(partial, folder, manifest))
        if faults:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"{folder} could not be written ({faults[0]}). The checkpoints before it are whole: see to the disk, "
                "then --resume auto goes on from the newest."
            )

    def draw_step(self, step: int, accumulation: int) -> list[torch.Tensor]:
        """Draws the micro-batches of a step. If a stream breaks, the steps before are saved, on one process.

        Raises:
            DataError: If the text cannot be read on; the message names the place and the checkpoint.
        """
        rows, streaming = self.recipe.micro_batch_size, self.recipe.streaming
        before = self.state.batches.state_dict() if streaming else None
        try:
            return [self.state.batches.next_batch(rows) for _ in range(accumulation)]
        except DataError as error:
            # Other processes would wait for this one in the middle of their step.
            if not streaming or self.accelerator.num_processes > 1 or step == 1:
                raise
            self.state.batches.load_state_dict(before)
            folder = Path(self.recipe.output_dir) / "checkpoints" / f"step-{step - 1:08d}"
            if not folder.exists():
                self.save(step - 1)
            raise DataError(
                f"{error} {folder} holds the run up to there: mend the text, then --resume auto."
            ) from error

    def _attempt(self, write) -> tuple[list[str], list]:
        """Runs `write` on all ranks. Returns what went wrong on any of them, and what they returned."""
        fault = result = None
        try:
            result = write()
        except (OSError, CheckpointException) as error:  # also a full disk
            causes = [str(wrapped[0]) for wrapped in getattr(error, "failures", {}).values()]
            fault = "; ".join(causes) or str(error)
        outcomes = gather_object([(fault, result)])
        return [fault for fault, _ in outcomes if fault], [result for _, result in outcomes]

    def _write(self, partial: Path, step: int) -> dict[str, list[int]]:
        accelerator, index = self.accelerator, self.accelerator.process_index
        dcp.save(
            self._tensors(),
            storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True),
            no_dist=accelerator.num_processes == 1,
        )
        rank = {"batches": self.state.batches.state_dict(), "random": torch.get_rng_state().numpy().tobytes().hex()}
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
                "recipe": {name: value for name, value in vars(self.recipe).items() if name not in FREE_TO_CHANGE},
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
                continue  # someone keeps files of their own in it
            if not (self.recipe.keep_every and step_of(old) % self.recipe.keep_every == 0):
                # Renamed first, so that a run killed here does not leave half of it under its name.
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))

    def _set_newer_aside(self, folder: Path):
        """Renames the checkpoints after the one that the run goes on from: what they hold is not its future."""
        for path in list_checkpoints(self.recipe) if self.accelerator.is_main_process else []:
            if step_of(path) > step_of(folder) and (path / "manifest.json").is_file():
                self.accelerator.print(f"{path} is newer than the one resumed from and is kept as {set_aside(path)}.")
        self.accelerator.wait_for_everyone()

    def _note_changes(self, before: dict, step: int):
        """Notes what of the recipe is another than when the checkpoint was written, for the log and the model card."""
        now = vars(self.recipe)
        if before and (changed := list_changes(before, now)):
            raise RecipeError(f"the checkpoint has another recipe ({', '.join(changed)}): use a new output_dir.")
        self.state.counters["changes"] = self.state.counters["changes"] + [
            {"step": step, "field": name, "before": before[name], "after": now[name]}
            for name in sorted(CHANGEABLE_ON_RESUME - FREE_TO_CHANGE)
            if name in before and before[name] != now[name]
        ]

    def load(self, folder: Path) -> int:
        """Restores everything and returns the number of steps done."""
        saved = json.loads((folder / "state.json").read_text())
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        same_world = saved["world_size"] == world_size
        if self.recipe.streaming and not same_world:
            raise RecipeError(
                f"{folder} was written by {saved['world_size']} processes that each read a part of the stream: resume "
                f"with as many, not {world_size}."
            )
        for name, parameter in self.model.named_parameters():
            if name in saved["optimizer_steps"]:
                step = torch.tensor(saved["optimizer_steps"][name], dtype=torch.float32)
                fused = any(group["fused"] for group in self.optimizer.param_groups)
                self.optimizer.state[parameter] = {
                    "step": step.to(parameter.device) if fused else step,
                    **{key: torch.zeros_like(parameter) for key in MOMENTS},
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
                f"WARNING: with this recipe (max_steps={self.recipe.max_steps}) the learning rate goes on at "
                f"{rate:.3e}; the checkpoint was to go on at {saved['learning_rate']:.3e}."
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
                f"{folder} was written by {saved['world_size']} processes and goes on with {world_size}: random "
                "numbers (dropout) and the order of sums are others from here on."
            )
        self._set_newer_aside(folder)
        return saved["step"]


def sync(path: Path):
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
