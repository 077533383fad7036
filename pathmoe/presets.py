# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Lists the shipped files: recipes, model configurations, Accelerate files and lists of packages.

    pathmoe presets                              # lists the names
    pathmoe presets train/quickstart > mine.yaml
    pathmoe presets --folder                     # for accelerate launch --config_file FOLDER/accelerate/…

Recipes and models can be used by name: `pathmoe train --config quickstart --model quickstart-indep`.
"""

import argparse
from pathlib import Path

from .command import ArgumentParser, UserError


ROOM = "configuration"
SUFFIXES = {"train": ".yaml", "model": ".json", "accelerate": ".yaml", "data": ".txt"}


def folder() -> Path:
    """Returns the folder of the shipped files: in this package if it is installed, and beside it in a clone."""
    here = Path(__file__).parent
    return here / ROOM if (here / ROOM).is_dir() else here.parent / ROOM


def find(path: str | Path) -> Path:
    """Finds a file of the user, or else the shipped file of the same name.

    Args:
        path (`str` or `Path`): Any path. `configuration/train/quickstart.yaml` is found from any working directory.

    Returns:
        `Path`: The file. If `path` exists or no shipped file has that name, `path` itself.
    """
    path = Path(path)
    if not path.exists() and path.parts[:1] == (ROOM,) and folder().joinpath(*path.parts[1:]).is_file():
        return folder().joinpath(*path.parts[1:])
    return path


def expand(name: str, kind: str) -> str:
    """Expands the name of a preset to a path that [`find`] can open.

    Args:
        name (`str`): The name of a preset, or any other value.
        kind (`str`): `"train"` or `"model"`.

    Returns:
        `str`: A path such as `configuration/train/quickstart.yaml`. If `name` is the path of an existing file or not
        the name of a preset, `name` itself.
    """
    file = f"{name}{SUFFIXES[kind]}"
    if "/" not in name and not Path(name).exists() and (folder() / kind / file).is_file():
        return f"{ROOM}/{kind}/{file}"
    return name


def names() -> dict[str, Path]:
    """Returns the shipped files by name, such as `train/quickstart`."""
    files = (file for kind, suffix in SUFFIXES.items() for file in sorted((folder() / kind).glob(f"*{suffix}")))
    return {f"{file.parent.name}/{file.stem}": file for file in files}


def main(args: list[str] | None = None):
    """Lists or prints the shipped files."""
    parser = ArgumentParser(
        prog="pathmoe presets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="file to print, such as train/quickstart")
    parser.add_argument("--folder", action="store_true", help="print the folder of the shipped files")
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
