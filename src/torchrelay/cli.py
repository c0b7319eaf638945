"""The command line. It only parses, and calls what a user can call from Python.

torch takes seconds to import, so nothing that needs it is imported before it is known that a command does.
"""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from torchrelay import __version__
from torchrelay.distributed import launched
from torchrelay.distributed.failures import LaunchError, report
from torchrelay.errors import RelayError, UsageError, nearest

_FAILED, _STOPPED = 1, 75


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and saved."""
    options = _parse(arguments)
    try:
        launched.attach()
        # PyTorch's profiler reads it once, as torch is imported, and tells of itself otherwise.
        os.environ.setdefault("KINETO_LOG_LEVEL", "7")
        from torchrelay.commands.commands import COMMANDS

        COMMANDS[options.command](options)
    except LaunchError as error:  # of a process that we started, which has shown its traceback if it shall
        _print_error(str(error), stopped=error.exit_code >= _STOPPED)
        return error.exit_code
    except RelayError as error:
        return _fail(error, str(error), error.exit_code, options.debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone, as with `| head`
        return _FAILED
    except Exception as error:  # noqa: BLE001 - each is told of, here or by the launcher
        return _fail(error, _in_words(error), _FAILED, options.debug)
    return 0


def _fail(error: Exception, text: str, exit_code: int, debug: bool) -> int:
    """Print why the command ends, unless the launcher of several processes does it for the first of them to fail."""
    told = report(error, text, exit_code)
    if debug:
        raise error
    stopped = exit_code == _STOPPED
    if not told and not (stopped and launched.rank() > 0):  # all stop alike, and one speaks for them
        _print_error(text, stopped)
    return exit_code


def _in_words(error: Exception) -> str:
    """Say what nobody has put into words yet."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"can't write {error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}: make room, then resume the run"
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip()}; --debug shows where"


def _print_error(text: str, stopped: bool = False) -> None:
    """Print a line; a run that a signal has stopped and that is saved made no error."""
    # A path may have a line break in it; in a command to be pasted, a shell must understand it.
    line = re.sub(r"(?<!\w)'[^']*\n[^']*'", lambda found: "$" + found[0].replace("\\", r"\\"), text)
    line = line.replace("\n", r"\n")
    print(line if stopped else f"error: {line}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest right name."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        near = ""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = [name.strip(" '") for name in choice[2].split(",")]
            message, near = f"there is no command '{choice[1]}'", nearest(choice[1], known)
        elif message.startswith("unrecognized arguments: -"):
            option = message.split()[2].partition("=")[0]
            message, near = f"there is no option '{option}'", nearest(option, self._option_string_actions)
        help_ = f"; '{self.prog} --help' shows what there is"
        self.exit(UsageError.exit_code, f"error: {message}{near or help_}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)  # for processes to be started
    if rest:  # argparse would blame the whole program, which knows nothing of a command's options
        commands.choices[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _parser() -> "tuple[_Parser, argparse._SubParsersAction[_Parser]]":
    parser = _Parser(
        prog="torchrelay",
        description="Train networks: a loop you can read, runs that go on exactly, fast by default.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong usage; 75 stopped by a signal with a checkpoint saved.",
    )
    parser.add_argument("--version", action="version", version=f"torchrelay {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> _Parser:
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    train = command("train", "train by a recipe")
    train.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a TOML file")
    train.add_argument("--run", type=Path, metavar="FOLDER", help="the run's folder (runs/<recipe> if not given)")
    _options(train)
    _processes(train)

    resume = command("resume", "go on with a run from its newest checkpoint")
    resume.add_argument("folder", type=Path, metavar="FOLDER")
    resume.add_argument("--accept-changes", action="store_true", help="go on though the data or the recipe changed")
    _options(resume)
    _processes(resume)

    evaluate = command("evaluate", "test a run's best network")
    evaluate.add_argument("folder", type=Path, metavar="FOLDER")
    _options(evaluate)
    _processes(evaluate)
    _checkpoint(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    predict = command("predict", "say what a run's network sees in images")
    predict.add_argument("folder", type=Path, metavar="FOLDER")
    predict.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="images, or folders of images")
    predict.add_argument("--top", type=int, default=3, metavar="N", help="how many classes to show (3)")
    predict.add_argument("--json", action="store_true", help="print JSON")
    _options(predict)
    _checkpoint(predict)

    recipe = command("recipe", "print a recipe, resolved, with the meaning of each key")
    recipe.add_argument("recipe", metavar="NAME", nargs="?", help="a shipped recipe's name, or a TOML file")
    recipe.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    recipe.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")

    _speed(command)
    command("recipes", "list the shipped recipes")
    command("doctor", "show what this machine has and what would be used")
    return parser, commands


def _speed(command: Callable[[str, str], _Parser]) -> None:
    profile = command("profile", "show where a training step's time goes")
    profile.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a TOML file")
    profile.add_argument("--steps", type=_count, default=20, metavar="N", help="how many steps to time (20)")
    profile.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where the picture and the trace go (profiles/<recipe>)"
    )
    _options(profile)

    tune = command("tune", "find which device settings are fastest for a recipe on this machine")
    tune.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a TOML file")
    tune.add_argument("--seconds", type=_count, default=60, metavar="N", help="how long to try (60)")
    _options(tune)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="change a key of the recipe, such as optimizer.lr=0.02; may be given again",
    )
    parser.add_argument("--code", type=Path, metavar="FILE", help="a Python file whose names the recipe may use")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def _processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--devices", type=_count, default=1, metavar="N", help="how many devices of this machine, a process each (1)"
    )
    parser.add_argument(
        "--restarts", type=_whole, default=0, metavar="N", help="how often to go on after a failure (0)"
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a signal waits for the processes' checkpoint (600)",
    )
    parser.add_argument("--port", type=int, metavar="PORT", help="where the processes meet (a free port)")


def _whole(text: str, least: int = 0) -> int:
    """Read a whole number."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from {least} on")
    return int(text)


def _count(text: str) -> int:
    return _whole(text, 1)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step's number"
    )


if __name__ == "__main__":
    sys.exit(main())
