"""Where people read along: lines of text, and on a terminal a bar that costs the training nothing.

The bar's own thread reads counters five times a second; the loop never tells it anything and never waits for it. Where
the output is no terminal (a file, a pipe, a batch system), there are plain lines only.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

_REFRESHES = 5  # a second
_RATE_WINDOW = 5.0  # seconds over which the rate is a mean
_ONE_LINE = 110  # columns from which the bar and its facts stand in one line
_SHORTEST_BAR = 10  # columns
_GAP = "   "


@dataclass(frozen=True)
class Counters:
    """Where a training stands: numbers that the host knows without asking the device."""

    epoch: int  # the running one, counted from 1
    epochs: int
    step: int  # optimizer steps done, of the whole run
    steps: int  # of the whole run
    samples: int = 0  # trained on by this process
    loss: float | None = None  # the last one logged
    phase: str = ""  # what is going on if not training, such as "evaluating"


class Terminal:
    """Writes to people.

    Args:
        quiet: say nothing but errors.
        stream: where lines go; standard output if not given.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream)
        self.live = self._stream.isatty() and not self._console.is_dumb_terminal

    def say(self, text: str) -> None:
        """Write a line; on a terminal, above the bar."""
        if self.quiet:
            return
        try:
            if self.live:
                _write(Text(folded(text, self._console.width)), self._stream, self._console)
            else:
                _write(Text(text), self._stream, None)
        except OSError:
            self.quiet = True  # a closed pipe or a lost connection is no reason to end a training
            _point_nowhere(self._stream)

    def error(self, text: str) -> None:
        """Write ``error: …`` to standard error, quiet or not."""
        line = Text.assemble(("error:", "bold red"), " ", text)
        try:
            _write(line, sys.stderr, Console(stderr=True) if sys.stderr.isatty() else None)
        except OSError:
            _point_nowhere(sys.stderr)

    @contextmanager
    def progress(self, read: Callable[[], Counters], unit: str = "images") -> Iterator[None]:
        """Show a bar while the context lasts, if this is a terminal.

        Args:
            read: returns the counters; the bar's thread calls it, so it must not ask the device for anything.
            unit: what the samples are.
        """
        if self.quiet or not self.live:
            yield
            return
        bar = Progress(read, unit)
        with Live(bar, console=self._console, refresh_per_second=_REFRESHES, transient=True):
            self._console.show_cursor(True)  # a hidden one would stay hidden if the process is killed
            yield


def _write(line: Text, stream: TextIO, console: Console | None) -> None:
    """Write a line as it stands, without line breaks of ours; where there is no console, without colours too."""
    if console is not None:
        console.print(line, soft_wrap=True)
    else:
        encoding = stream.encoding or "utf-8"
        print(line.plain.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def folded(text: str, width: int) -> str:
    """Return a line of facts that stand apart, such as an epoch's, broken between facts where it is too long.

    Any other line stays whole: the terminal wraps it, and a path in it can still be copied.
    """
    head, *facts = text.split(_GAP)
    lines, indent = [head], " " * (head.find(": ") + 2)
    for fact in facts:
        if len(lines[-1]) + len(_GAP) + len(fact) <= width:
            lines[-1] += _GAP + fact
        else:
            lines.append(indent + fact)
    return "\n".join(lines)


def _point_nowhere(stream: TextIO) -> None:
    """Lead a stream without a reader to /dev/null; otherwise Python fails at exit, where it flushes what is unread."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _leave_bar() -> None:
    """Give a forked loader worker its plain streams: the bar's lock may be taken there, by a thread that is not."""
    if isinstance(sys.stdout, FileProxy):
        sys.stdout = sys.stdout.rich_proxied_file
    if isinstance(sys.stderr, FileProxy):
        sys.stderr = sys.stderr.rich_proxied_file


os.register_at_fork(after_in_child=_leave_bar)


# ---------------------------------------------------------------------------------------------------------- the bar


class Progress:
    """The bar, drawn from the counters whenever its thread asks.

    Args:
        read: returns the counters.
        unit: what the samples are.
        clock: returns seconds.
    """

    def __init__(
        self, read: Callable[[], Counters], unit: str = "images", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.read = read
        self.unit = unit
        self._pace = Pace(clock(), read())
        self._clock = clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the bar as wide as the terminal is."""
        yield from self.lines(options.max_width, ascii_only=options.ascii_only)

    def lines(self, width: int, ascii_only: bool = False) -> list[Text]:
        """Return the bar and its facts: one line on a wide terminal, two on others.

        Args:
            width: columns there are.
            ascii_only: whether the terminal knows no other characters.
        """
        counters, now = self.read(), self._clock()
        self._pace.update(now, counters)
        share = counters.step / counters.steps if counters.steps else 0.0
        head = f"epoch {counters.epoch:>{len(str(counters.epochs))}}/{counters.epochs} "
        tail = f" {math.floor(100 * share):>3}%"
        facts = self._facts(counters, now)
        beside = _GAP + _GAP.join(fact.long for fact in facts)
        room = width - len(head) - len(tail)
        if width >= _ONE_LINE and room - len(beside) >= _SHORTEST_BAR:
            bar = _bar(share, room - len(beside), ascii_only)
            return [Text.assemble(head, *bar, tail, beside, no_wrap=True)]
        first = Text.assemble(head, *_bar(share, room, ascii_only), tail, no_wrap=True, overflow="crop")
        return [first, Text(_fitting(facts, width), no_wrap=True, overflow="crop")]

    def _facts(self, counters: Counters, now: float) -> list["_Fact"]:
        """Return what stands beside or below the bar, in its order."""
        total = f"{counters.steps:,}"
        step = f"{counters.step:>{len(total)},}/{total}"
        facts = [_Fact(f"step {step}", step, worth=2)]
        if counters.phase:
            facts.append(_Fact(counters.phase, counters.phase, worth=4))
        elif self._pace.rate is not None:
            facts.append(_Fact(f"{self._pace.rate:,.0f} {self.unit}/s", f"{self._pace.rate:,.0f}/s", worth=3))
        if counters.loss is not None:
            facts.append(_Fact(f"loss {number(counters.loss)}", f"loss {number(counters.loss)}", worth=1))
        elapsed = clock_time(now - self._pace.start)
        facts.append(_Fact(f"{elapsed} elapsed", elapsed, worth=0))
        if (left := self._pace.left(now, counters)) is not None:
            facts.append(_Fact(f"{clock_time(left)} left", f"{clock_time(left)} left", worth=5))
        return facts


@dataclass(frozen=True)
class _Fact:
    """Something beside the bar: with its words, without them, and how long it stays where room is short."""

    long: str
    short: str
    worth: int


def _fitting(facts: list[_Fact], width: int) -> str:
    """Return the facts in a line that fits: first without words, then without those of least worth."""
    line = _GAP.join(fact.long for fact in facts)
    while len(line) > width and facts:
        line = _GAP.join(fact.short for fact in facts)
        least = min(facts, key=lambda fact: fact.worth)
        facts = [fact for fact in facts if fact is not least]
    return line


def _bar(share: float, room: int, ascii_only: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the done and the open part of a bar of `room` columns, with their styles."""
    done = math.floor(share * max(room, 0))
    full, open_ = ("#", "-") if ascii_only else ("━", "─")
    return (full * done, "cyan"), (open_ * (room - done), "bright_black")


class Pace:
    """How fast a training goes, from looking at its counters now and then.

    Args:
        start: when the training started, in seconds.
        counters: where it stood then.
    """

    def __init__(self, start: float, counters: Counters) -> None:
        self.start = start
        self.rate: float | None = None  # samples a second over the last seconds of training
        self._last = counters
        self._first: tuple[float, int] | None = None  # when a step was first seen to be done, and how many were
        self._seen: deque[tuple[float, int]] = deque()  # (time, samples) where they had changed, training only

    def update(self, now: float, counters: Counters) -> None:
        """Look at the counters."""
        if counters.phase or self._last.phase:
            self._seen.clear()  # what an evaluation takes doesn't belong to the rate
        if counters.step != self._last.step:
            # Time counts from the end of the first step, which may have compiled the model.
            self._first = self._first or (now, counters.step)
            self._seen.append((now, counters.samples))
        while len(self._seen) > 2 and self._seen[1][0] < now - _RATE_WINDOW:
            self._seen.popleft()
        if len(self._seen) > 1:
            (then, before), (last, samples) = self._seen[0], self._seen[-1]
            self.rate = (samples - before) / (last - then)
        self._last = counters

    def left(self, now: float, counters: Counters) -> float | None:
        """Return the seconds left, by the mean time of a step so far, evaluations included."""
        if self._first is None or counters.step == self._first[1]:
            return None
        then, first = self._first
        return (counters.steps - counters.step) * (now - then) / (counters.step - first)


# --------------------------------------------------------------------------------------------- how numbers are written


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
) -> str:
    """Return the line that sums up an epoch, such as ``epoch  1: train accuracy 42.42%   test accuracy 51.48%   …``.

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
    parts = [
        f"{split} {headline.replace('_', ' ')} {metric(values[headline], percent)}"
        for split, values in splits.items()
        if headline in values
    ]
    losses = [number(values["loss"]) for values in splits.values() if "loss" in values]
    if losses and headline != "loss":
        parts.append(f"loss {' / '.join(losses)}")
    if rate is not None:
        parts.append(f"{rate:,.0f} {unit}/s")
    if seconds is not None:
        parts.append(duration(seconds))
    return f"epoch {epoch:>{len(str(epochs))}}: {_GAP.join(parts)}"


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
