# Copyright 2026 The PathMoE authors. Licensed under the Apache License, Version 2.0.
"""Runs commands: a mistake of the user ends in one clear line, and a bug in a traceback."""

import argparse
import errno
import os
import re
import signal
import sys
from collections.abc import Callable


# Errors of a disk that is full, over quota, read-only or broken.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}

# Signals that ask a process to end. SIGHUP is sent when the terminal is closed; `nohup` makes it ignored.
STOPPING = {signal.SIGINT, signal.SIGTERM}
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    STOPPING.add(signal.SIGHUP)


_handlers: set[tuple[int, Callable]] = set()  # all that were ever set, since an earlier one may be restored


def handle_signal(number: int, handler: Callable) -> Callable | int | None:
    """Sets the handler of a signal in this process, but not in those that it forks, and returns the previous one.

    `multiprocessing.Pool`, which lm-eval and datasets use, ends its processes by a single SIGTERM. If it arrives just
    before such a process waits for a lock, a handler written in Python never runs, and the pool waits forever.
    """
    if not _handlers:
        os.register_at_fork(after_in_child=_forget_handlers)
    _handlers.add((number, handler))
    return signal.signal(number, handler)


def _forget_handlers():
    for number, handler in _handlers:
        if signal.getsignal(number) == handler:
            # Ctrl-C reaches all processes of the terminal: the one that has set the handler decides what happens.
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line that names the field or file, the value and the fix."""


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line on stderr, without the usage."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        if "" in args:  # as a path it would stand for the working directory
            place = args.index("")
            options = [i for i in range(place) if args[i].startswith("-")]
            before = " ".join(args[options[-1] if options else 0 : place]) or "the first argument"
            what = before if place == 0 or place - 1 in options else f"the value after {before}"
            self.error(f"{what} must not be empty: give a value.")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}\n")


def run_command(main: Callable[[], object], interrupted: int = 130):
    """Runs `main` and exits with its status. A `UserError` is printed as one line on stderr, and the status is then 2.

    Args:
        main (`Callable`): The command. If it returns an integer, that is the exit status; otherwise the status is 0.
        interrupted (`int`, defaults to 130): The exit status after Ctrl-C.
    """
    # These signals raise an exception too, so that temporary files are removed.
    for number in STOPPING - {signal.SIGINT}:
        handle_signal(number, lambda number, _: sys.exit(128 + number))
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename} cannot be read or written: " if error.filename else ""
        print(f"error: {where}{error.strerror}. Check the disk, or choose another place.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(interrupted)


def one_line(error: BaseException | str) -> str:
    """Returns the message of an error on one line, without what `strict` puts before those of a configuration."""
    prefix = r"(Class validation error for validator|Validation error for field) '\w+': \w+: "
    return re.sub(prefix, "", " ".join(str(error).split()))


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without the trace that torch and others add; or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
