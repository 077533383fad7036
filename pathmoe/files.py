# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: every writer of the project writes aside and renames."""

import json
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .command import UserError, one_line


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which replaces `path` when the block ends and is removed if it fails.

    The file has the permissions that the umask gives, whatever the writer sets.

    Args:
        path (`str` or `Path`): The file to write. Its folder is created.

    Raises:
        OSError: If the folder cannot be created or written; it names `path`.
    """
    path, created, folder = Path(path), [], None
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
            # The user has never heard of the temporary file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        remove_empty(created)


@contextmanager
def write_folder_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which becomes `path` when the block ends and is removed if it fails.

    Its files have the permissions that the umask gives, as with [`write_aside`].

    Args:
        path (`str` or `Path`): The folder to write, which must not exist. Its parents are created.

    Raises:
        OSError: If the folder cannot be created, or another process has written a folder of this name.
    """
    path, created = Path(path), []
    outer = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.partial"
    try:
        make_parents(path, created)
        partial = outer / path.name
        partial.mkdir(parents=True)  # in here: a signal may come as soon as the folder is there
        yield partial
        follow_umask([file for file in partial.rglob("*") if file.is_file()])
        partial.rename(path)
        created.clear()
    finally:
        shutil.rmtree(outer, ignore_errors=True)
        remove_empty(created)


def make_parents(path: Path, created: list[Path]):
    """Creates the parents of `path` and appends those that were not there to `created`."""
    for folder in reversed(path.parents):
        if not folder.exists():
            folder.mkdir(exist_ok=True)  # another process may be as fast
            created.append(folder)


def remove_empty(folders: list[Path]):
    """Removes folders, given from the outermost to the innermost, unless another process has used them."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def write_text(path: str | Path, text: str):
    """Writes `text` to `path` as UTF-8, through [`write_aside`]."""
    with write_aside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: str | Path, option: str, mark: str | None = None):
    """Refuses an output file that cannot be written, before any work is done for it. Leaves nothing behind.

    Args:
        path (`str` or `Path`): The file that will be written later.
        option (`str`): What the user called it, such as `--output`.
        mark (`str`, *optional*): Text that every result of this kind holds. Such a result may be replaced; any other
            file may not, unless it is empty.

    Raises:
        UserError: If `path` is a folder or the file of someone else, or if its folder cannot be created or written;
            the message names `option`.
    """
    path, created = Path(path), []
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: name a file.")
        if mark is not None and path.is_file() and path.stat().st_size and not holds(path, mark):
            raise UserError(
                f"{option}: {path} is there and is not an earlier result, so it is not overwritten: choose another "
                "place, or move it away."
            )
        make_parents(path, created)
        # A file of this name in a new folder, as `write_aside` makes it.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / path.name).touch()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}. Choose another place.") from error
    finally:
        remove_empty(created)


def check_new_folder(path: str | Path, option: str, inputs: list[str | Path]):
    """Refuses an output folder that exists, lies in an input, or cannot be written. Leaves nothing behind.

    Args:
        path (`str` or `Path`): The folder that will be written later.
        option (`str`): What the user called it.
        inputs (`list[str | Path]`): Folders that are read.

    Raises:
        UserError: With `option` and the path.
    """
    if not str(path).strip() or "\0" in str(path):
        raise UserError(f"{option} {str(path)!r} is not the name of a folder: choose one.")
    if os.path.lexists(path):
        raise UserError(f"{option} {path} exists already and is never overwritten: choose another name, or remove it.")
    for folder in inputs:
        if Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents:
            raise UserError(f"{option} {path} lies in {folder}, which is read: choose another place.")
    check_writable(path, option)


def read_json(file: str | Path, what: str | None = None) -> dict:
    """Reads a JSON object.

    Args:
        file (`str` or `Path`): The file.
        what (`str`, *optional*): What the user called it, such as `--model`, to begin the messages with.

    Raises:
        UserError: If the file is missing, empty, not UTF-8, not JSON or not an object, or has a key twice; the message
            names it.
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
            raise ValueError(f"{name!r} stands in it twice")
        content[name] = value
    return content


def holds(path: Path, mark: str) -> bool:
    """Whether a file that is not empty holds a text."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark.encode()) >= 0


def follow_umask(files: list[Path]):
    """Gives files the permissions that the umask asks for; safetensors makes them readable by their owner alone."""
    mode = 0o666 & ~current_umask()
    for file in files:
        file.chmod(mode)


def current_umask() -> int:
    """The umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
