# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Writes files atomically: all code of the project writes a temporary file first and then renames it."""

import json
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .command import UserError, one_line


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which replaces `path` when the block ends and is removed if it fails.

    The permissions of the file follow the umask, whatever the writer sets.

    Args:
        path (`str` or `Path`): The file to write. Missing parent folders are created.

    Raises:
        OSError: If the folder cannot be created or written. The error names `path`.
    """
    named, path, created, folder = path, Path(os.path.realpath(path)), [], None  # a link stays one
    try:
        make_parents(path, created)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=path.parent))
        partial = folder / path.name
        yield partial
        if partial.is_file():
            follow_umask([partial])
        os.replace(partial, path)
        created.clear()
    except OSError as error:
        if error.errno is not None and (error.filename is None or ".partial" in str(error.filename)):
            # The user does not know the temporary file.
            raise OSError(error.errno, error.strerror, str(named)) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        remove_empty(created)


@contextmanager
def write_folder_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends and is removed if it fails.

    The permissions of the files follow the umask, as in [`write_aside`].

    Args:
        path (`str` or `Path`): The folder to write, which must not exist. Missing parent folders are created.

    Raises:
        OSError: If the folder cannot be created, or another process has written a folder of this name.
    """
    path, created = Path(path), []
    outer = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.partial"
    try:
        make_parents(path, created)
        partial = outer / path.name
        partial.mkdir(parents=True)  # inside of `try`: a signal may arrive as soon as the folder exists
        yield partial
        follow_umask([file for file in partial.rglob("*") if file.is_file()])
        partial.rename(path)
        created.clear()
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        remove_empty(created)


def make_parents(path: Path, created: list[Path]):
    """Creates the missing parents of `path` and appends them to `created`."""
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir(exist_ok=True)  # another process may create it at the same time
            created.append(folder)


def remove_empty(folders: list[Path]):
    """Removes folders, given from the outermost to the innermost, unless another process has used them."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def write_text(path: str | Path, text: str):
    """Writes `text` to `path` as UTF-8, through [`write_aside`]."""
    write_texts({path: text})


def write_texts(texts: dict[str | Path, str]):
    """Writes files that belong together: if one cannot be written, none is. The last is the first to be there."""
    with ExitStack() as stack:
        for path, text in texts.items():
            stack.enter_context(write_aside(path)).write_text(text, encoding="utf-8")


def check_writable(path: str | Path, option: str, mark: str | None = None):
    """Checks before any work is done that an output file can be written. Leaves no files or folders behind.

    Args:
        path (`str` or `Path`): The file that will be written later.
        option (`str`): The option with which the user set it, such as `--output`.
        mark (`str`, *optional*): Text that every result of this kind contains. An existing file is only replaced if
            it contains this text or is empty.

    Raises:
        UserError: If `path` is a folder or a file that must not be replaced, or if its folder cannot be created or
            written. The message names `option`.
    """
    path, created = Path(path), []
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: name a file.")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{option} {path} is a link to {os.readlink(path)}, which is not there: name a file.")
        if mark is not None and path.is_file() and path.stat().st_size and not holds(path, mark):
            raise UserError(
                f"{option}: {path} exists and is not an earlier result, so it is not overwritten: choose another "
                "place, or move it away."
            )
        make_parents(path, created)
        # Try to create a file of this name in a new folder, as `write_aside` does.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / path.name).touch()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}. Choose another place.") from error
    finally:
        remove_empty(created)


def check_new_folder(path: str | Path, option: str, inputs: list[str | Path]):
    """Checks that an output folder can be written. Leaves no files or folders behind.

    Args:
        path (`str` or `Path`): The folder that will be written later.
        option (`str`): The option with which the user set it.
        inputs (`list[str | Path]`): Folders that are read.

    Raises:
        UserError: If the folder exists, lies in an input, or cannot be written. The message names `option` and `path`.
    """
    if not str(path).strip() or "\0" in str(path):
        raise UserError(f"{option} {str(path)!r} is not a valid folder name: choose another one.")
    if os.path.lexists(path):
        raise UserError(f"{option} {path} already exists and is not overwritten: choose another name, or remove it.")
    for folder in inputs:
        if Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents:
            raise UserError(f"{option} {path} lies in the input {folder}: choose another place.")
    check_writable(path, option)


def read_json(file: str | Path, what: str | None = None) -> dict:
    """Reads a JSON object.

    Args:
        file (`str` or `Path`): The file.
        what (`str`, *optional*): The option or field that names the file, such as `--model`, for the error message.

    Raises:
        UserError: If the file is missing, empty, not UTF-8, not JSON or not an object, or has duplicate keys. The
            message names the file.
    """
    named = f"{what}: {file}" if what else str(file) or repr(file)
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{named} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named} is damaged: it is not valid JSON ({one_line(error)}). Replace it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{named} must hold a JSON object, but holds {json.dumps(content)[:40]}. Replace it.")
    return content


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"duplicate key {name!r}")
        content[name] = value
    return content


def holds(path: Path, mark: str) -> bool:
    """Returns whether a file contains a text. The file must not be empty."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark.encode()) >= 0


def follow_umask(files: list[Path]):
    """Sets the permissions of files to those of the umask. safetensors makes files that only the owner can read."""
    mode = 0o666 & ~current_umask()
    for file in files:
        file.chmod(mode)


def current_umask() -> int:
    """Returns the umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
