"""The command line: it parses, and runs a command of `commands/`.

Importing torch takes seconds, so a command imports it only when it runs.
"""

import argparse
import errno
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any, NoReturn

from torchrelay import __version__
from torchrelay.commands.options import set_pins
from torchrelay.distributed import process
from torchrelay.distributed.failures import LaunchError, report
from torchrelay.errors import STOPPED, NoFontWarning, RelayError, RenamedWarning, UsageError, nearest

COMMANDS = (
    "new",
    "train",
    "resume",
    "evaluate",
    "predict",
    "export",
    "serve",
    "report",
    "recipes",
    "recipe",
    "check",
    "doctor",
    "profile",
    "tune",
    "find-lr",
    "sweep",
    "audit",
    "bisect",
    "runs",
    "compare",
    "ask",
    "watch",
)
_FAILED = 1
_LONGEST = 4_000  # characters of a message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage, 75 stopped by a signal and saved."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a bar that an encoding lacks is no reason to lose what was measured
    options = _parse(arguments)
    try:
        process.attach()
        set_pins(options)
        # PyTorch's profiler reads it once, when torch is imported, and otherwise logs to standard error.
        os.environ.setdefault("KINETO_LOG_LEVEL", "7")
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            options.execute(options)
    except LaunchError as error:
        # A process that we started failed; with --debug it has shown its traceback itself.
        _print_error(str(error), stopped=error.exit_code >= STOPPED)
        return error.exit_code
    except RelayError as error:
        return _fail(error, str(error), error.exit_code, options.debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone, as with `| head`.
        sys.stderr.close()
        return _FAILED
    except Exception as error:  # noqa: BLE001 - each is reported, here or by the launcher
        return _fail(error, _describe(error), _FAILED, options.debug)
    return 0


def _show_warning(show: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Print a warning of ours in one line; show any other as Python does."""
    if isinstance(message, RenamedWarning | NoFontWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        show(message, category, *place)


def _fail(error: Exception, text: str, exit_code: int, debug: bool) -> int:
    """Print why the command ends, unless the launcher of several processes prints it for the first one to fail."""
    reported = report(error, text, exit_code)
    if debug:
        raise error
    stopped = exit_code == STOPPED
    # A signal stops all processes alike, and rank 0 speaks for them.
    if not reported and not (stopped and process.rank() > 0):
        _print_error(text, stopped)
    return exit_code


def _describe(error: Exception) -> str:
    """Return a line for an error that isn't a `RelayError`."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = f"can't write {error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}: make room, then resume the run"
    kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
    return f"{kind}{str(error).strip()}; --debug shows the traceback"


def _print_error(text: str, stopped: bool = False) -> None:
    """Print an error in one line; a run that a signal stopped and that is saved isn't one."""
    line = one_line(text)
    print(line if stopped else f"error: {line}", file=sys.stderr)


def one_line(text: str) -> str:
    """Return a message as one line that a terminal shows as it is, whatever a file or an argument put into it."""
    if len(text) > _LONGEST:  # the cause stands at the start, the remedy at the end
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
    # A path may contain a line break; in a command to paste, the shell must understand it.
    line = re.sub(r"(?<!\w)'[^']*\n[^']*'", lambda match: "$" + match[0].replace("\\", r"\\"), text)
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, with the nearest valid name."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        suggestion = ""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            known = [name.strip(" '") for name in choice[2].split(",")]
            message, suggestion = f"there is no command '{choice[1]}'", nearest(choice[1], known)
        elif unknown := re.match(r"unrecognized arguments: (-*)([^\s=]+)(?:[= ](.*))?", message):
            option = unknown[1] + unknown[2]
            if unknown[1]:
                message, suggestion = f"there is no option '{option}'", nearest(option, self._option_string_actions)
            if "--set" in self._option_string_actions and (unknown[1] or unknown[3]):
                suggestion = _meant(unknown[2], unknown[3] or "VALUE") or suggestion
        suggestion = suggestion or f"; see '{self.prog} --help'"
        self.exit(UsageError.exit_code, f"error: {message}{suggestion}\n")


def _meant(name: str, value: str) -> str:
    """Return what does the same as an option that there isn't; "" if nothing is known."""
    instead = {
        "resume": "torchrelay resume FOLDER",
        "gpus": f"--devices {value}",
        "gpu": f"CUDA_VISIBLE_DEVICES={value} before the command",
    }
    if name in instead:
        return f"; write {instead[name]}"
    from torchrelay.recipe import recipe

    return f"; {meant}" if (meant := recipe.meant(name, value)) else ""


@cache
def _parsers() -> tuple[_Parser, Mapping[str, _Parser]]:
    """Return the program's parser, and each command's."""
    parser = _Parser(
        prog="torchrelay",
        description="Train networks with PyTorch: a loop that you can read, exact resume, fast by default.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong usage; 75 stopped by a signal with a checkpoint saved.",
    )
    # torch.distributed.launch adds it; the processes know their ranks from the environment.
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"torchrelay {__version__}")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"torchrelay.commands.{name.replace('-', '_')}")
        command = commands.add_parser(
            name, help=module.HELP, description=module.HELP, parents=[common], allow_abbrev=False
        )
        module.add_options(command)
        command.set_defaults(execute=module.run)
    return parser, commands.choices


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser, commands = _parsers()
    options, rest = parser.parse_known_args(arguments)
    # The processes of `--devices` run the same command line.
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if rest:  # argparse would name the whole program, which doesn't know a command's options
        first, given = rest[0], options.arguments[options.arguments.index(rest[0]) + 1 :]
        # Its value may have been taken for the recipe.
        value = [given[0]] if "=" not in first and first.startswith("-") and given and given[0][:1] != "-" else []
        commands[options.command].error(f"unrecognized arguments: {' '.join([first, *value])}")
    return options


if __name__ == "__main__":
    sys.exit(main())
