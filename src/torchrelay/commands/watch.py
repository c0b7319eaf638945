"""`torchrelay watch RUN…`: the curves of runs in the terminal, while they go on."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

HELP = "watch runs in the terminal: curves, rates and how long they take, from their files alone"
_SECONDS = 1.0  # between two frames
_ONCE = 14  # lines of a run in a frame that is printed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--once", action="store_true", help="print one frame, as where there is no terminal")


def run(options: argparse.Namespace) -> None:
    """Show the runs until somebody presses q."""
    from rich.console import Console

    from torchrelay.report.watch.chart import SOFT
    from torchrelay.report.watch.follow import Followed
    from torchrelay.report.watch.screen import frame

    runs = [Followed(folder) for folder in options.runs]
    console = Console(highlight=False)
    plain = not console.encoding.startswith("utf")
    if options.once or not console.is_terminal or console.is_dumb_terminal:
        console.print(frame(runs, (console.width, _ONCE * len(runs)), plain=plain), no_wrap=True)
        return

    def draw() -> "Text":
        for each in runs:
            each.refresh()
        shown = frame(runs, (console.width, console.height - 1), plain=plain)
        return shown.append(f"\n{'q: quit':>{console.width}}", style=SOFT)

    _show(draw, console)


def _show(draw: "Callable[[], Text]", console: "Console") -> None:
    """Draw a frame each second on a screen of its own, until q or Ctrl-C."""
    from rich.live import Live

    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(draw(), refresh=True)
                if pressed(_SECONDS) in ("q", "Q", "\x03"):
                    return
        except KeyboardInterrupt:
            return


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give a function that waits so many seconds for a key, and returns it or ""."""
    if sys.platform == "win32":
        import msvcrt

        def pressed(seconds: float) -> str:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if msvcrt.kbhit():
                    return msvcrt.getwch()
                time.sleep(0.05)
            return ""

        yield pressed
    elif not sys.stdin.isatty():
        yield lambda seconds: time.sleep(seconds) or ""  # type: ignore[func-returns-value]
    else:
        import select
        import termios
        import tty

        before = termios.tcgetattr(sys.stdin)
        try:
            tty.setcbreak(sys.stdin)
            yield lambda seconds: sys.stdin.read(1) if select.select([sys.stdin], [], [], seconds)[0] else ""
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
