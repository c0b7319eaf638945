"""Errors for people: one line that names the cause, the place and the remedy.

Whatever a person can mend is raised as a `RelayError`. The command line prints its text after `error:` and exits with
its code; it shows a traceback only on `--debug`. From Python it is an ordinary exception.
"""

import difflib
from collections.abc import Iterable


class RelayError(Exception):
    """Something a person can mend; the text is one line with the cause, the place and the remedy."""

    exit_code = 1


class UsageError(RelayError):
    """The command line, a recipe or an argument is wrong; nothing was started."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name most like `name`, or an empty string if none is like it."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
