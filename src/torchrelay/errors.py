"""Errors and warnings for users: one line that names the cause, the place and the remedy.

Any error that the user can fix is a `RelayError`. The command line prints its message after `error:` and exits with its
code; it shows a traceback only with `--debug`. From Python it is an ordinary exception; a script that a signal stopped
ends with the command's exit code.
"""

import difflib
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

# What readers raise where a content has another form than they expect.
_DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zlib.error)
STOPPED = 75  # exit code (EX_TEMPFAIL of sysexits.h): a signal stopped the run, and it can be resumed


class RelayError(Exception):
    """An error that the user can fix; the message is one line with the cause, the place and the remedy."""

    exit_code = 1


class UsageError(RelayError):
    """The command line, a recipe or an argument is wrong; nothing has started."""

    exit_code = 2


class Interrupted(RelayError):  # noqa: N818 - it isn't an error: the user asked for it
    """A signal stopped the run after it had saved a checkpoint; a resume continues exactly."""

    exit_code = STOPPED


class InterruptedExit(Interrupted, SystemExit):
    """Likewise in a script: where nobody catches it, the process ends with the exit code and without a traceback."""

    @property
    def code(self) -> int:  # type: ignore[override]
        """The exit code, which Python asks for."""
        return self.exit_code


def interrupted(text: str, *, saved: bool) -> Interrupted:
    """Return the error of a run that a signal stopped; in an interactive session, one that doesn't end it.

    Args:
        text: says how to resume.
        saved: whether there is a checkpoint; without one, the process has failed.
    """
    error = (Interrupted if hasattr(sys, "ps1") else InterruptedExit)(text)
    error.exit_code = STOPPED if saved else RelayError.exit_code
    return error


@contextmanager
def explained(doing: str, remedy: str = "make room or repair the disk, then resume the run") -> Iterator[None]:
    """Say what was being done where the operating system refuses something.

    Args:
        doing: such as "write runs/a/recipe.toml".
        remedy: what the user can do.

    Raises:
        RelayError: an `OSError` occurred.
    """
    try:
        yield
    except OSError as error:
        raise RelayError(f"can't {doing}: {error.strerror or error}; {remedy}") from error


@contextmanager
def intact(what: object, remedy: str) -> Iterator[None]:
    """Say what is damaged where its content isn't what we write: whatever a reader stumbles over in it.

    Args:
        what: such as the file.
        remedy: what the user can do.

    Raises:
        RelayError: the content has another form or other types.
    """
    try:
        yield
    except _DAMAGE as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise RelayError(f"{what} is damaged or isn't ours ({cause[:200]}): {remedy}") from error


class NoFontWarning(UserWarning):
    """No font of the system has a letter of a plot."""


class RenamedWarning(FutureWarning):
    """Something public has a new name. The old one is accepted for one release."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to `name`, or an empty string if none is similar."""
    lower = {each.lower(): each for each in known}
    match = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return f"; did you mean '{lower[match[0]]}'?" if match else ""


def warn_renamed(old: str, new: str, stacklevel: int = 2) -> None:
    """Warn that something public has a new name. The old one is accepted for one release.

    Args:
        old: the name that was used, such as "data.normalise".
        new: the name to use from now on.
        stacklevel: as in `warnings.warn`, counted from the caller.
    """
    message = f"{old} has been renamed to {new}; the old name will be removed in the next release"
    warnings.warn(message, RenamedWarning, stacklevel=stacklevel + 1)


def renamed(module: str, new_names: dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module in which public names have changed.

    In the module: `__getattr__ = renamed(__name__, {"summarise": "summarize"})`.

    Args:
        module: its `__name__`.
        new_names: the new name of each old one.
    """

    def get(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        warn_renamed(f"{module}.{name}", f"{module}.{new_names[name]}")
        return getattr(sys.modules[module], new_names[name])

    return get
