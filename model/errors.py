"""Mistakes of the user, told as a sentence: what, where, the value, the remedy."""

import errno
import sys
from collections.abc import Callable

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """The user's input is wrong; the message names it and says how to mend it."""


def cli(main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code: 2 with a message for a `UserError`, 130 for Ctrl-C.

    A full disk, wherever it is met, is a sentence too.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}\n  make room and run the same command again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
