# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""How a command of this project ends: with one clear line for a mistake of the user, and a traceback for ours."""

import argparse
import errno
import signal
import sys
from collections.abc import Callable


# What a disk refuses: full, over quota, read-only, broken.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: the field or file, its value and the fix."""


class ArgumentParser(argparse.ArgumentParser):
    """A command line whose mistakes end the process with one line on stderr, as argparse does, without the usage."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        if "" in args:  # as a path it would stand for the working directory
            place = args.index("")
            self.error(f"{args[place - 1] if place else 'the first argument'} is followed by nothing: give a value.")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}\n")


def run_command(main: Callable[[], object], interrupted: int = 130):
    """Runs `main` and exits with its status; an expected error becomes `error: …`, one line on stderr, and status 2.

    Args:
        main (`Callable`): The command. If it returns an integer, that is the exit status; otherwise the status is 0.
        interrupted (`int`, defaults to 130): The exit status after Ctrl-C.
    """
    # Being terminated is an exception too, so that nothing half-written stays.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main()
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename} cannot be read or written: " if error.filename else ""
        print(f"error: {where}{error.strerror}. See to the disk, or choose another place.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(interrupted)


def one_line(error: BaseException | str) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())
