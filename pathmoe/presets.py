# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""The shipped files: recipes, model configurations, Accelerate files and lists of packages.

    pathmoe presets                              # what there is
    pathmoe presets train/quickstart > mine.yaml
    pathmoe presets --folder                     # where they are: accelerate launch --config_file FOLDER/accelerate/…

A recipe and a model go by their bare names: `pathmoe train --config quickstart --model quickstart-indep`.
"""

import argparse
from pathlib import Path

from .command import ArgumentParser, UserError


ROOM = "configuration"
SUFFIXES = {"train": ".yaml", "model": ".json", "accelerate": ".yaml", "data": ".txt"}


def folder() -> Path:
    """The folder of the shipped files: in this package when it was installed, beside it in a clone."""
    here = Path(__file__).parent
    return here / ROOM if (here / ROOM).is_dir() else here.parent / ROOM


def find(path: str | Path) -> Path:
    """A file of the user, or else the shipped file of the same name.

    Args:
        path (`str` or `Path`): Any path; `configuration/train/quickstart.yaml` is found wherever one works.

    Returns:
        `Path`: `path` itself if it exists or nothing is shipped under that name.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == (ROOM,) and folder().joinpath(*path.parts[1:]).is_file():
        return folder().joinpath(*path.parts[1:])
    return path


def expand(name: str, kind: str) -> str:
    """The path of a preset that is given by its bare name, to be opened by [`find`].

    Args:
        name (`str`): A bare name, or anything else that a user may give in its place.
        kind (`str`): `"train"` or `"model"`.

    Returns:
        `str`: Such as `configuration/train/quickstart.yaml`; `name` itself if it is not a preset's or exists.
    """
    file = f"{name}{SUFFIXES[kind]}"
    if "/" not in name and not Path(name).exists() and (folder() / kind / file).is_file():
        return f"{ROOM}/{kind}/{file}"
    return name


def names() -> dict[str, Path]:
    """The shipped files by name, such as `train/quickstart`."""
    files = (file for kind, suffix in SUFFIXES.items() for file in sorted((folder() / kind).glob(f"*{suffix}")))
    return {f"{file.parent.name}/{file.stem}": file for file in files}


def main(args: list[str] | None = None):
    """Lists or prints the shipped files."""
    parser = ArgumentParser(
        prog="pathmoe presets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to print, such as train/quickstart")
    parser.add_argument("--folder", action="store_true", help="print the folder that holds them")
    options = parser.parse_args(args)
    if options.folder:
        print(folder())
    files = names()
    for name in options.names:
        if name not in files:
            raise UserError(f"{name} is not a preset: choose from {', '.join(files)}.")
        print(files[name].read_text(encoding="utf-8"), end="")
    if not options.folder and not options.names:
        print("\n".join(files))
