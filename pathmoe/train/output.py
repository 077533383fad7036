# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The output folder of a run, and the protection of files that the run did not write."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from pathmoe.files import write_text
from pathmoe.train.recipe import OPERATIONAL_FIELDS, Recipe, RecipeError, list_changes, published, read_recipe


# Files and folders that every run may write. `tokenizer` is not listed: only runs that train a tokenizer write it.
WRITTEN = ("final", "initial", "checkpoints", "recipe.yaml", "metrics.jsonl", "run.lock")


@contextlib.contextmanager
def lock_output_dir(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Creates the output folder and keeps other runs from writing to it. The lock is released when the process ends.

    Raises:
        RecipeError: If the folder cannot be written, or if another run writes to it.
    """
    if not accelerator.is_main_process:
        yield
        return
    output = Path(recipe.output_dir)
    try:
        created, locked_first = not output.exists(), not (output / "run.lock").exists()
        recipe_before = (output / "recipe.yaml").exists()
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / "run.lock", timeout=0).acquire()
    except Timeout:
        raise RecipeError(
            f"output_dir={recipe.output_dir!r} is being written by another run: stop that one (a launcher that is "
            "killed can leave its processes behind), or choose another folder."
        ) from None
    except OSError as error:
        raise RecipeError(
            f"output_dir={recipe.output_dir!r} cannot be written: {error.strerror}. Choose another folder."
        ) from error
    with lock:
        try:
            yield
        except BaseException:
            # A run that has not taken a step leaves nothing behind: its metrics are the first file that it keeps.
            metrics = output / "metrics.jsonl"
            begun = (output / "checkpoints").exists() or (metrics.is_file() and metrics.stat().st_size)
            if locked_first and (recipe_before or not (output / "recipe.yaml").exists() or created and not begun):
                (output / "run.lock").unlink()
            made = {path.name for path in output.glob("validation-*.npy")}
            made |= {"tokenizer"} if begun else {"tokenizer", "recipe.yaml", "metrics.jsonl"}
            if created and {path.name for path in output.iterdir()} <= made:
                shutil.rmtree(output)
            raise


def check_inputs(recipe: Recipe):
    """Refuses a run that would overwrite one of its inputs. Links are followed.

    Raises:
        RecipeError: If an input lies in a file or folder that the run writes, or if the run would write a file where
            the output folder has something else, such as a folder.
    """
    output = Path(recipe.output_dir)
    for name in ("recipe.yaml", "metrics.jsonl"):
        if (output / name).exists() and not (output / name).is_file():
            raise RecipeError(f"{output / name} is not a file: move it away, or choose another output_dir.")
    written = {Path(os.path.realpath(output / name)): output / name for name in WRITTEN}
    for field, value in list_inputs(recipe):
        for file in [value, *glob.glob(value, recursive=True)]:
            path = Path(os.path.realpath(file))  # `resolve` fails at cyclic links
            for target, name in written.items():
                if path == target or target in path.parents:
                    raise RecipeError(
                        f"{field}={value!r} lies in {name}, which this run would overwrite: choose another output_dir."
                    )


def list_inputs(recipe: Recipe) -> list[tuple[str, str]]:
    """Lists the inputs of a recipe that may be files, as pairs of field and value."""
    inputs = [("model", recipe.model), ("tokenizer", recipe.tokenizer)]
    for source in recipe.sources:
        files = source.data_files
        for entry in files.values() if isinstance(files, dict) else [files]:
            inputs += [("data_files", file) for file in (entry if isinstance(entry, list) else [entry])]
        inputs.append(("dataset", source.dataset))
    return [(field, value) for field, value in inputs if isinstance(value, str) and "://" not in value]


def is_finished(recipe: Recipe, checkpoint: Path | None, steps: int) -> bool:
    """Returns whether `final` already is the result of this recipe, so that there is nothing left to do.

    Args:
        recipe (`Recipe`): The recipe.
        checkpoint (`Path`, *optional*): The checkpoint to resume from.
        steps (`int`): The number of steps after which the checkpoint was written.

    Raises:
        RecipeError: If `final` exists and this run must not replace it.
    """
    final = Path(recipe.output_dir) / "final"
    if not os.path.lexists(final):
        return False
    if final.is_symlink() or not final.is_dir():
        raise RecipeError(f"{final} is not a folder that this run wrote: move it away, or choose another output_dir.")
    if not any(final.iterdir()):
        return False
    made_with = read_recipe(final / "recipe.yaml")
    now = published(vars(recipe))
    changed = None if made_with is None else list_changes(made_with, now, OPERATIONAL_FIELDS - {"max_steps"})
    weights = [*final.glob("*.safetensors")]
    if (
        changed == []
        and (final / "config.json").is_file()
        and weights
        and all(map(is_whole, weights))
        and (checkpoint is None or steps >= recipe.max_steps)
    ):
        return True
    if checkpoint is None:
        reason = "it has no recipe.yaml" if changed is None else ", ".join(changed) or "it is incomplete"
        raise RecipeError(
            f"{final} is not the result of this recipe ({reason}) and there is no checkpoint to resume from: choose "
            "another output_dir, or move that folder away."
        )
    if changed is None or list_changes(made_with, now):
        raise RecipeError(f"{final} was not made by this run: move it away, or choose another output_dir.")
    if changed and steps >= recipe.max_steps:
        raise RecipeError(
            f"{final} was made with a different recipe ({', '.join(changed)}): raise max_steps to continue the run, "
            "or choose another output_dir."
        )
    return False


def is_whole(weights: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(weights, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def write_recipe(recipe: Recipe):
    """Writes `recipe.yaml`. If the user has written or edited the existing one, it is renamed and kept."""
    file = Path(recipe.output_dir) / "recipe.yaml"
    if (before := read_recipe(file)) is not None and file.read_text(encoding="utf-8") != to_yaml(before):
        print(f"{file} was not written by this run and is kept as {set_aside(file)}.")
    write_text(file, to_yaml(vars(recipe)))


def to_yaml(fields: dict) -> str:
    return yaml.safe_dump(fields, sort_keys=False)


def set_aside(path: Path) -> Path:
    """Renames a file or folder to make room for a new one. Returns the new path."""
    number = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.set-aside-{number}")):
        number += 1
    return path.rename(target)
