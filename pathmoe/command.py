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
    owner = os.getpid()

    def stop(number, _):
        # A forked worker inherits this handler. If the exception were lost in it, its pool would wait for it forever.
        if os.getpid() != owner:
            os._exit(128 + number)
        sys.exit(128 + number)

    # These signals raise an exception too, so that temporary files are removed.
    for number in STOPPING - {signal.SIGINT}:
        signal.signal(number, stop)
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
