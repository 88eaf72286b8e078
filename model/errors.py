"""A user's mistakes, reported in a sentence: what, where, the value, the remedy."""

import errno
import os
import re
import select
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room") | dict.fromkeys(
    (errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ESTALE), "see to that disk, or to who may write there,"
)
MAKE_ROOM = "  earlier checkpoints are untouched; make room (or set training.keep_checkpoints lower) and run again"


class UserError(Exception):
    """The user's input is wrong. The message says what is wrong and how to correct it."""


def read_small_file(path: str | Path, most_bytes: int) -> bytes:
    """The content of a regular file. Raises OSError, and UserError for a device, a pipe or a file that is too large."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # a pipe may wait
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path}: is a device or a pipe; give a regular file")
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise UserError(f"{path}: is larger than {most_bytes:,} bytes, the most that is read; give the right file")
    return content


def printable(text: str) -> str:
    """Text without the characters by which a name could command a terminal or change the order of its letters.

    >>> printable("a\\x1b[2Jb\\tc\\n")
    'a\\\\x1b[2Jb\\tc\\n'
    """
    commands = "[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(commands, lambda match: repr(match[0])[1:-1], text)


def cli(main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code: 2 with a message for a `UserError`, or a full or failing disk.

    130 for Ctrl-C. 141 without a message if the reader of the output has closed it (`... | head`), as is usual.
    """
    try:
        code = main() or 0
        sys.stdout.flush()  # at exit, nobody would catch the exception for a closed output
        return code
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _redirect_closed_outputs():
            return 128 + signal.SIGPIPE
        if error.errno not in _REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        remedy = f"{_REMEDIES[error.errno]} and run the same command again"
        print(f"error: {printable(where)}{error.strerror}\n  {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _redirect_closed_outputs() -> bool:
    """Whether standard output or error was closed by its reader. A closed one is redirected to nowhere."""
    closed = False
    for stream in (sys.stdout, sys.stderr):
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        if any(event & select.POLLERR for _, event in watch.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            closed = True
    return closed
