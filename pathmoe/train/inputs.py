# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Whether a resumed run reads what it read before: text, tokenizer and model configuration."""

import glob
import hashlib
import json
from pathlib import Path

from pathmoe.train.output import list_inputs
from pathmoe.train.recipe import Recipe, RecipeError


PIECE, PIECES = 1 << 20, 16  # of a larger file, this many pieces are hashed, spread evenly
OWN = "output_dir/"  # what the run has made itself, wherever its output folder lies


def find_inputs(recipe: Recipe) -> dict[str, Path]:
    """The files that a run reads, by the names that its recipe or its output folder has for them."""
    found, output = {}, Path(recipe.output_dir)
    for field, value in list_inputs(recipe):
        path = Path(value)
        if path.is_dir():
            # Of a checkpoint to go on from, the weights are those of the run's own checkpoint by now.
            patterns = ("config.json", "tokenizer*.json") if field in ("model", "tokenizer") else ("**/*",)
            files = [file for pattern in patterns for file in path.glob(pattern)]
        else:
            files = [path] if path.is_file() else [Path(name) for name in glob.glob(value, recursive=True)]
        found |= {str(file): file for file in files if file.is_file()}
    for file in (*output.glob("validation-*.npy"), *output.glob("tokenizer/tokenizer*.json")):
        found[OWN + str(file.relative_to(output))] = file
    return found


def fingerprint(file: Path) -> str:
    """A hash of a file's size and content; of a large file, of pieces of it."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with file.open("rb") as stream:
        for number in range(PIECES):
            if size > PIECE * PIECES:
                stream.seek(number * (size - PIECE) // (PIECES - 1))
            digest.update(stream.read(PIECE))
    return digest.hexdigest()


def fingerprint_inputs(recipe: Recipe) -> dict[str, str]:
    """The [`fingerprint`] of each file that a run reads.

    Raises:
        RecipeError: If a file cannot be read.
    """
    try:
        return {name: fingerprint(file) for name, file in sorted(find_inputs(recipe).items())}
    except OSError as error:
        raise RecipeError(f"{error.filename} cannot be read: {error.strerror}.") from error


def find_changed_inputs(recipe: Recipe, checkpoint: Path) -> list[dict]:
    """The files that have changed since a checkpoint was written: `field`, its fingerprint `before` and `after`.

    Raises:
        RecipeError: If there are such files and the recipe does not accept them.
    """
    now = fingerprint_inputs(recipe)
    before = json.loads((checkpoint / "state.json").read_text()).get("inputs", now)  # unknown to older versions
    changed = [
        {"field": name, "before": before.get(name), "after": now.get(name)}
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and not (name.startswith(OWN) and name not in now)  # made again
    ]
    # The place in a stream is one in its list of files.
    fixed = recipe.streaming and any(None in change.values() for change in changed)
    if changed and (fixed or not recipe.accept_changed_inputs):
        name, was, is_now = changed[0].values()
        what = "is new" if was is None else "is gone" if is_now is None else "has another content"
        more = f", and {len(changed) - 1} more files differ" if len(changed) > 1 else ""
        go_on = "" if fixed else ", or go on with what is there now by --accept_changed_inputs true"
        raise RecipeError(
            f"{name} {what} since {checkpoint} was written{more}: put it back as it was, start anew in another "
            f"output_dir{go_on}."
        )
    return changed
