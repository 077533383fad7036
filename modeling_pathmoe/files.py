# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Files that are whole or not there: every writer of the project writes aside and renames."""

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


def check_writable(path: str | Path, option: str):
    """Refuses an output file that cannot be written, before any work is done for it. Leaves nothing behind.

    Args:
        path (`str` or `Path`): The file that will be written later.
        option (`str`): What the user called it, such as `--output`.

    Raises:
        UserError: If `path` is a folder, or if its folder cannot be created or written; the message names `option`.
    """
    path, created = Path(path), []
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder: name a file.")
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


def current_umask() -> int:
    """The umask of this process."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
