"""What a run prints: lines of text, and on a terminal a progress bar that costs the training nothing.

The bar's own thread reads counters five times a second; the loop never updates it and never waits for it. Where the
output isn't a terminal (a file, a pipe, a batch system), there are plain lines only.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from torchrelay.run import notebook

_REFRESHES = 5  # a second
_RATE_WINDOW = 5.0  # seconds over which the rate is a mean
_SHORTEST_BAR = 4  # columns
_NOTEBOOK = 90  # characters beside a notebook's bar
_GAP = "  "


@dataclass(frozen=True)
class Counters:
    """How far a training is: numbers that the host knows without asking the device."""

    epoch: int  # the current one, counted from 1
    epochs: int
    step: int  # optimizer steps done, of the whole run
    steps: int  # of the whole run
    samples: int = 0  # trained on by this process
    loss: float | None = None  # the last one logged
    phase: str = ""  # what the run does instead of training, such as "evaluating"


class Terminal:
    """Prints lines, errors and a progress bar.

    Args:
        quiet: print only errors.
        stream: where lines go; standard output if not given.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream)
        self.live = self._stream.isatty() and not self._console.is_dumb_terminal
        self._in_notebook = self._console.is_jupyter and stream in (None, sys.stdout)

    def say(self, text: str) -> None:
        """Print a line; on a terminal, above the bar."""
        if self.quiet:
            return
        try:
            if self.live:
                shown = text.within(self._console.width) if isinstance(text, Facts) else text
                _write(Text(shown), self._stream, self._console)
            else:
                _write(Text(text), self._stream, None)
        except OSError:
            # A closed pipe or a lost connection is no reason to end a training.
            self.quiet = True
            _point_nowhere(self._stream)

    def error(self, text: str) -> None:
        """Print ``error: …`` to standard error, even if quiet."""
        line = Text.assemble(("error:", "bold red"), " ", text)
        try:
            _write(line, sys.stderr, Console(stderr=True) if sys.stderr.isatty() else None)
        except OSError:
            _point_nowhere(sys.stderr)

    @contextmanager
    def progress(self, read: Callable[[], Counters], unit: str = "images") -> Iterator[None]:
        """Show a progress bar in this context, if this is a terminal or a notebook.

        Args:
            read: returns the counters. The bar's thread calls it, so it must not ask the device for anything.
            unit: what the samples are.
        """
        if self.quiet or not (self.live or self._in_notebook):
            yield
            return
        bar = Bar(read, unit)
        if not self.live:
            with notebook.shown_meanwhile(bar.in_notebook):
                yield
            return
        with Live(bar, console=self._console, refresh_per_second=_REFRESHES, transient=True):
            # A hidden cursor would stay hidden if the process is killed.
            self._console.show_cursor(True)
            yield


def _write(line: Text, stream: TextIO, console: Console | None) -> None:
    """Write a line without breaking it; where there is no console, without colors too."""
    if console is not None:
        console.print(line, soft_wrap=True)
    else:
        encoding = stream.encoding or "utf-8"
        print(line.plain.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def _point_nowhere(stream: TextIO) -> None:
    """Point a stream without a reader at /dev/null; Python would fail when it flushes the stream at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _leave_bar() -> None:
    """Give a forked loader worker the plain streams: a thread that it doesn't have may hold the bar's lock."""
    if isinstance(sys.stdout, FileProxy):
        sys.stdout = sys.stdout.rich_proxied_file
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_leave_bar)


# ---------------------------------------------------------------------------------------------------------- the bar


class Bar:
    """The progress bar, drawn from the counters whenever rich's thread asks.

    Args:
        read: returns the counters.
        unit: what the samples are.
        clock: returns seconds.
    """

    def __init__(
        self, read: Callable[[], Counters], unit: str = "images", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read, self._unit, self._clock = read, unit, clock
        self._last, self._began = read(), clock()
        # When the first step was seen to be done: time counts from there, since that step may have compiled the model.
        self._first: tuple[float, int] | None = None  # (time, step)
        self._seen: deque[tuple[float, int]] = deque()  # (time, samples) of the last seconds of training

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the bar in one line, as wide as the terminal."""
        counters, now = self._read(), self._clock()
        self._take_note(counters, now)
        epoch = f"epoch {counters.epoch:>{len(str(counters.epochs))}}/{counters.epochs} "
        facts = self._facts(counters, now, options.max_width - len(epoch) - _SHORTEST_BAR - 1)
        width = max(options.max_width - len(epoch) - len(facts) - 1, 0)
        total = max(counters.steps, 1)
        bar = ProgressBar(total, counters.step, width, style="bright_black", complete_style="cyan")
        yield Text(epoch, end="")
        # Without colors rich draws only the done part, so that the rest must be padded.
        yield from Segment.adjust_line_length([*console.render(bar, options)], width)
        yield Text(f" {facts}", end="")

    def in_notebook(self) -> tuple[str, str]:
        """Return the bar as HTML and as text."""
        counters, now = self._read(), self._clock()
        self._take_note(counters, now)
        facts = self._facts(counters, now, _NOTEBOOK)
        return notebook.bar(counters.step, counters.steps, f"epoch {counters.epoch}/{counters.epochs}", facts)

    def _take_note(self, counters: Counters, now: float) -> None:
        """Remember what the rate and the time left are computed from."""
        if counters.phase or self._last.phase:
            self._seen.clear()  # the time of an evaluation doesn't belong to the rate
        if counters.step != self._last.step:
            self._first = self._first or (now, counters.step)
            self._seen.append((now, counters.samples))
        while len(self._seen) > 2 and self._seen[1][0] < now - _RATE_WINDOW:
            self._seen.popleft()
        self._last = counters

    def _facts(self, counters: Counters, now: float, room: int) -> str:
        """Return what stands beside the bar; where room is short, what matters least is left out."""
        facts = {
            "share": f"{100 * counters.step // max(counters.steps, 1):>3}%",
            "step": f"{counters.step:>{len(f'{counters.steps:,}')},}/{counters.steps:,}",
        }
        if counters.phase:
            facts["rate"] = counters.phase
        elif len(self._seen) > 1:
            (start, before), (end, samples) = self._seen[0], self._seen[-1]
            facts["rate"] = f"{(samples - before) / (end - start):,.0f} {self._unit}/s"
        if counters.loss is not None:
            facts["loss"] = f"loss {number(counters.loss)}"
        facts["time"] = clock_time(now - self._began)
        if self._first is not None and counters.step > self._first[1]:
            # By the mean time of a step so far, evaluations included.
            since, first = self._first
            left = (counters.steps - counters.step) * (now - since) / (counters.step - first)
            facts["time"] += f"<{clock_time(left)}"
        for name in ("share", "loss", "step", "rate"):
            if len("  ".join(facts.values())) > room:
                facts.pop(name, None)
        return "  ".join(facts.values())


# --------------------------------------------------------------------------------------------- how numbers are written


class Facts(str):
    """A line of facts, of which a narrow terminal shows those that fit; a log has them all.

    Args:
        head: what they are of.
        facts: the first ones matter most.
    """

    facts: tuple[str, ...]

    def __new__(cls, head: str, facts: Sequence[str]) -> "Facts":
        """Join the facts."""
        line = super().__new__(cls, f"{head}: {_GAP.join(facts)}")
        line.facts = tuple(facts)
        return line

    def within(self, columns: int) -> str:
        """Return the line without the facts that don't fit in a terminal's columns; the first one always stays."""
        shown = self.removesuffix("".join(_GAP + fact for fact in self.facts[1:]))
        for fact in self.facts[1:]:
            if len(shown) + len(_GAP) + len(fact) <= columns:
                shown += _GAP + fact
        return shown


def epoch_line(
    epoch: int,
    epochs: int,
    splits: Mapping[str, Mapping[str, float]],
    *,
    headline: str = "accuracy",
    percent: bool = True,
    rate: float | None = None,
    seconds: float | None = None,
    unit: str = "images",
) -> Facts:
    """Return the line that sums up an epoch, such as ``epoch  1: train accuracy 42.42%, test 51.48%  loss 1.5921 / …``.

    Args:
        epoch: counted from 1.
        epochs: of the whole run; it sets the width of the epoch's number.
        splits: the metrics of each split by name ("train", "test"), in the order to show.
        headline: the metric that stands first; a split without it is left out.
        percent: whether that is a share, written as a percentage.
        rate: samples a second.
        seconds: how long the epoch took.
        unit: what the samples are.
    """
    parts = _metrics(splits, headline, percent)
    if seconds is not None:
        parts.append(duration(seconds))
    if rate is not None:  # the bar shows it too
        parts.append(f"{rate:,.0f} {unit}/s")
    return Facts(f"epoch {epoch:>{len(str(epochs))}}", parts)


def step_line(
    step: int, splits: Mapping[str, Mapping[str, float]], *, headline: str = "accuracy", percent: bool = True
) -> Facts:
    """Return the line that sums up an evaluation within an epoch, such as ``step 400: test accuracy 51.48%  …``."""
    return Facts(f"step {step:,}", _metrics(splits, headline, percent))


def _metrics(splits: Mapping[str, Mapping[str, float]], headline: str, percent: bool) -> list[str]:
    """Return the headline metric of each split, named once, and their losses."""
    values = {split: metric(found[headline], percent) for split, found in splits.items() if headline in found}
    name = f" {headline.replace('_', ' ')}"
    parts = [f"{split}{name * (place == 0)} {value}" for place, (split, value) in enumerate(values.items())]
    losses = [number(found["loss"]) for found in splits.values() if "loss" in found]
    shown = [", ".join(parts)] if parts else []
    return shown + ([f"loss {' / '.join(losses)}"] if losses and headline != "loss" else [])


def metric(value: float, percent: bool) -> str:
    """Return a metric as people read it: ``42.42%``, or ``0.4242`` if it is no share."""
    return f"{100 * value:5.2f}%" if percent else number(value)


def number(value: float) -> str:
    """Return a number with four digits behind the point, or with four that count if it is very large or small."""
    if value == 0 or 1e-3 <= abs(value) < 1e4 or not math.isfinite(value):
        return f"{value:.4f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return ``44.3 s``, ``12 min 05 s`` or ``11 h 50 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def clock_time(seconds: float) -> str:
    """Return ``2:14``, ``1:02:14`` or ``3 d 04:05``, which changes its width seldom."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours < 24 else f"{hours // 24} d {hours % 24:02}:{minutes:02}"
