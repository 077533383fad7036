# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Checks that the text, tokenizer and model configuration of a resumed run have not changed."""

import glob
import hashlib
import json
from pathlib import Path

from pathmoe.train.output import list_inputs
from pathmoe.train.recipe import Recipe, RecipeError


PIECE, PIECES = 1 << 20, 16  # of larger files, only this many pieces are hashed, at equal distances
OWN = "output_dir/"  # prefix of files that the run wrote itself, independent of where its output folder is


def find_inputs(recipe: Recipe) -> dict[str, Path]:
    """Returns the files that a run reads. The keys are their names in the recipe or in the output folder."""
    found, output = {}, Path(recipe.output_dir)
    for field, value in list_inputs(recipe):
        path = Path(value)
        if path.is_dir():
            # The weights of `model` do not matter on resume, because the run's own checkpoint replaces them.
            patterns = ("config.json", "tokenizer*.json") if field in ("model", "tokenizer") else ("**/*",)
            files = [file for pattern in patterns for file in path.glob(pattern)]
        else:
            files = [path] if path.is_file() else [Path(name) for name in glob.glob(value, recursive=True)]
        found |= {str(file): file for file in files if file.is_file()}
    for file in (*output.glob("validation-*.npy"), *output.glob("tokenizer/tokenizer*.json")):
        found[OWN + str(file.relative_to(output))] = file
    return found


def fingerprint(file: Path) -> str:
    """Returns a hash of a file's size and content. Only `PIECES` pieces of a large file are hashed."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with file.open("rb") as stream:
        for number in range(PIECES):
            if size > PIECE * PIECES:
                stream.seek(number * (size - PIECE) // (PIECES - 1))
            digest.update(stream.read(PIECE))
    return digest.hexdigest()


def fingerprint_inputs(recipe: Recipe) -> dict[str, str]:
    """Returns the [`fingerprint`] of each file that a run reads.

    Raises:
        RecipeError: If a file cannot be read.
    """
    try:
        return {name: fingerprint(file) for name, file in sorted(find_inputs(recipe).items())}
    except OSError as error:
        raise RecipeError(f"{error.filename} cannot be read: {error.strerror}.") from error


def find_changed_inputs(recipe: Recipe, checkpoint: Path) -> list[dict]:
    """Lists the files that have changed since a checkpoint was written.

    Returns:
        `list[dict]`: For each file `field` (its name), and its fingerprints `before` and `after` (`None` if missing).

    Raises:
        RecipeError: If files have changed and the recipe does not accept this, or if files were added to or removed
            from a stream.
    """
    now = fingerprint_inputs(recipe)
    before = json.loads((checkpoint / "state.json").read_text()).get("inputs", now)  # unknown to older versions
    changed = [
        {"field": name, "before": before.get(name), "after": now.get(name)}
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and not (name.startswith(OWN) and name not in now)  # will be made again
    ]
    # The position in a stream refers to the list of its files.
    fixed = recipe.streaming and any(None in change.values() for change in changed)
    if changed and (fixed or not recipe.accept_changed_inputs):
        name, was, is_now = changed[0].values()
        what = "was added" if was is None else "was removed" if is_now is None else "has changed"
        more = f", and {len(changed) - 1} more files differ" if len(changed) > 1 else ""
        go_on = "" if fixed else ", or continue with the new files by --accept_changed_inputs true"
        raise RecipeError(
            f"{name} {what} since {checkpoint} was written{more}: restore the previous state, start again in another "
            f"output_dir{go_on}."
        )
    return changed
