"""Mistakes of the user, told as a sentence: what, where, the value, the remedy."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """The user's input is wrong; the message names it and says how to mend it."""


def cli(main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code: 2 with a message for a `UserError`, 130 for Ctrl-C."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
