# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: every writer of the project writes aside and renames."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .command import UserError


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`, which replaces `path` when the block ends and is removed if it fails.

    The file has the permissions that the umask gives, whatever the writer sets (safetensors creates files that only
    their owner can read).

    Args:
        path (`str` or `Path`): The file to write. Its folder is created.

    Raises:
        OSError: If the folder cannot be created or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}.", suffix=".partial", dir=path.parent))
    try:
        partial = folder / path.name
        yield partial
        if partial.is_file():
            partial.chmod(0o666 & ~current_umask())
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        for folder in reversed(path.parents):
            if not folder.exists():
                folder.mkdir()
                created.append(folder)
        # A file of this name in a new folder, as `write_aside` makes it.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            (Path(folder) / path.name).touch()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}. Choose another place.") from error
    finally:
        for folder in reversed(created):
            with suppress(OSError):  # another process may have put a file there
                folder.rmdir()


def holds(path: Path, mark: str) -> bool:
    """Whether a file that is not empty holds a text."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark.encode()) >= 0


def current_umask() -> int:
    """The umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
