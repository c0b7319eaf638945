"""Terminal output: lines, the progress bar, errors; on a real pseudo-terminal and through a real pipe."""

import fcntl
import functools
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from torchrelay.run.terminal import (
    Bar,
    Counters,
    Terminal,
    clock_time,
    duration,
    epoch_line,
    metric,
    number,
    step_line,
)

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

# A training of 0.7 s: three epochs of two steps each, with an evaluation in the second.
TRAINING = """
    import sys, time
    from torchrelay.run.terminal import Counters, Terminal

    class State:
        epoch, step, samples, loss, phase, reads = 1, 0, 0, None, "", 0
    state = State()

    def read():
        state.reads += 1
        return Counters(state.epoch, 30, state.step, 11_700, state.samples, state.loss, state.phase)

    terminal = Terminal(quiet="quiet" in sys.argv)
    terminal.say("starting [data] " + 10 * "long text ")
    with terminal.progress(read):
        for epoch in (1, 2, 3):
            state.epoch = epoch
            for _ in range(2):
                time.sleep(0.07)
                state.step, state.samples, state.loss = state.step + 195, state.samples + 512, 1.5921
            if epoch == 2:
                state.phase = "evaluating"
                time.sleep(0.25)
            state.phase = ""
            terminal.say(f"epoch {epoch}: done")
        print("printed by a user")
    terminal.say("over")
    terminal.error("no such key [model]: [bold]x[/bold]")
"""


@functools.cache
def run_in_terminal(script: str, columns: int, *arguments: str, **variables: str) -> str:
    """Run Python code on a pseudo-terminal of `columns` columns, and return its output."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in {"COLUMNS", "LINES", "NO_COLOR"}}
    environment |= {"TERM": "xterm-256color", **variables}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    with subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment) as process:
        os.close(inner)
        written = bytearray()
        try:
            while chunk := os.read(outer, 65536):
                written += chunk
        except OSError:
            pass  # Linux says so that the other end is closed
        assert process.wait(30) == 0, written.decode()
    os.close(outer)
    return written.decode()


def run_in_pipe(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=60, check=True)


# ------------------------------------------------------------------------------------------------ lines


def test_the_epoch_line_has_the_documented_format() -> None:
    splits = {"train": {"accuracy": 0.4242, "loss": 1.5921}, "test": {"accuracy": 0.5148, "loss": 1.3312}}
    assert epoch_line(1, 30, splits, rate=1128.4, seconds=44.31) == (
        "epoch  1: train accuracy 42.42%, test 51.48%  loss 1.5921 / 1.3312  44.3 s  1,128 images/s"
    )


@pytest.mark.parametrize(("epochs", "start"), [(9, "epoch 7: "), (10, "epoch  7: "), (100, "epoch   7: ")])
def test_the_epochs_number_is_as_wide_as_the_last_one(epochs: int, start: str) -> None:
    assert epoch_line(7, epochs, {"train": {"accuracy": 0.5}}).startswith(start + "train")


def test_epoch_lines_stay_in_their_columns_below_ten_percent() -> None:
    few, many = (epoch_line(1, 1, {"train": {"accuracy": a}, "test": {"accuracy": a}}) for a in (0.0981, 0.9812))
    assert few.index("test") == many.index("test")


def test_a_metric_that_is_not_a_share_is_a_plain_number() -> None:
    line = epoch_line(
        2, 5, {"train": {"mean_squared_error": 0.51, "loss": 0.51}}, headline="mean_squared_error", percent=False
    )
    assert line == "epoch 2: train mean squared error 0.5100  loss 0.5100"


def test_a_headline_loss_is_shown_once() -> None:
    line = epoch_line(
        2, 5, {"train": {"loss": 3.25}, "test": {"loss": 3.5}}, headline="loss", percent=False, unit="texts", rate=9
    )
    assert line == "epoch 2: train loss 3.2500, test 3.5000  9 texts/s"


def test_a_split_without_the_headline_metric_is_omitted() -> None:
    line = epoch_line(1, 1, {"train": {"loss": 1.0}, "validation": {"f1": 0.5, "loss": 2.0}}, headline="f1")
    assert line == "epoch 1: validation f1 50.00%  loss 1.0000 / 2.0000"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (1.5921, "1.5921"), (0.00012345, "0.0001234"), (123456.0, "1.235e+05"), (float("nan"), "nan")],
)
def test_numbers_keep_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [(44.31, "44.3 s", "0:44"), (59.96, "1 min 00 s", "1:00"), (725, "12 min 05 s", "12:05"),
     (3599.7, "1 h 00 min", "1:00:00"), (42_600, "11 h 50 min", "11:50:00"), (190_000, "52 h 46 min", "2 d 04:46")],
)  # fmt: skip
def test_durations_have_readable_units(seconds: float, long: str, short: str) -> None:
    assert (duration(seconds), clock_time(seconds)) == (long, short)


def test_a_diverged_metric_is_shown() -> None:
    assert metric(float("nan"), percent=True).strip() == "nan%"


def test_lines_through_a_pipe_are_plain_and_flushed() -> None:
    done = run_in_pipe(TRAINING)
    assert done.stdout.splitlines() == [
        "starting [data] " + 10 * "long text ",
        "epoch 1: done",
        "epoch 2: done",
        "epoch 3: done",
        "printed by a user",
        "over",
    ]
    assert done.stderr == "error: no such key [model]: [bold]x[/bold]\n"


def test_a_line_is_flushed_immediately() -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from torchrelay.run.terminal import Terminal; Terminal().say('now'); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"  # would wait for the minute's end if it stood in a buffer
        process.kill()


def test_quiet_prints_only_errors() -> None:
    done = run_in_pipe(TRAINING, "quiet")
    assert done.stdout == "printed by a user\n"
    assert done.stderr.startswith("error: ")
    shown = run_in_terminal(TRAINING, 80, "quiet")
    lines = [line.strip() for line in ANSI.sub("", shown).splitlines()]
    assert lines == ["printed by a user", "error: no such key [model]: [bold]x[/bold]"]


def test_characters_that_a_stream_cannot_encode_are_replaced() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Terminal(stream=stream).say("größe … 3")
    assert stream.buffer.getvalue() == b"gr??e ? 3\n"  # type: ignore[attr-defined]


def test_a_training_continues_after_its_output_is_closed(tmp_path: Path) -> None:
    script = f"""
        import time
        from pathlib import Path
        from torchrelay.run.terminal import Terminal
        terminal = Terminal()
        terminal.say("first")
        time.sleep(0.2)
        for _ in range(100):
            terminal.say(1000 * "more ")
        Path({str(tmp_path / "end")!r}).write_text("reached")
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert (tmp_path / "end").read_text() == "reached"


# ------------------------------------------------------------------------------------------------ the bar


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_no_frame_of_the_bar_is_wider_than_the_terminal(columns: int) -> None:
    shown = run_in_terminal(TRAINING, columns)
    frames = [ANSI.sub("", part) for part in re.split(r"[\r\n]+", shown)]
    bars = [frame for frame in frames if "━" in frame]
    assert len(bars) > 3
    assert {len(bar) for bar in bars} <= set(range(columns + 1))
    assert any(len(bar) > 0.9 * columns for bar in bars)  # and it uses the room that there is
    assert any("evaluating" in frame for frame in frames)


def test_the_bar_is_erased_and_the_lines_stay() -> None:
    shown = run_in_terminal(TRAINING, 80)
    assert shown.count("\x1b[2K") > 3  # erased between frames
    assert shown.rindex("━") < shown.index("over")
    lines = [ANSI.sub("", line).strip("\r") for line in shown.split("\n")]
    for line in ("epoch 1: done", "epoch 3: done", "printed by a user", "over"):
        assert any(said.endswith(line) for said in lines)


def test_a_killed_process_leaves_the_cursor_visible() -> None:
    shown = run_in_terminal(TRAINING, 80)
    bar = shown[: shown.rindex("━")]
    assert bar.rindex("\x1b[?25h") > bar.rindex("\x1b[?25l")


def test_errors_are_red_and_square_brackets_are_text() -> None:
    shown = run_in_terminal(TRAINING, 80)
    assert re.search(r"\x1b\[1;31merror:\x1b\[0m no such key \[model\]: \[bold\]x\[/bold\]", shown)
    assert "starting [data]" in shown


def test_no_color_disables_colors() -> None:
    shown = run_in_terminal(TRAINING, 80, NO_COLOR="1")
    assert not re.search(r"\x1b\[(\d+;)*[39]\d(;\d+)*m", shown)
    assert re.search(r"epoch  \d/30 ╸? +\d%", shown)  # the part to do is told from the part done by its shape


def test_a_dumb_terminal_gets_plain_lines() -> None:
    assert "\x1b" not in run_in_terminal(TRAINING, 80, TERM="dumb")


def test_a_worker_forked_under_the_bar_can_print() -> None:
    shown = run_in_terminal(
        """
        import os, sys, time
        from torchrelay.run.terminal import Counters, Terminal
        with Terminal().progress(lambda: Counters(1, 1, 1, 2)):
            time.sleep(0.3)
            for _ in range(20):
                if (child := os.fork()) == 0:
                    print("from a worker", flush=True)
                    os._exit(0 if type(sys.stdout).__name__ == "TextIOWrapper" else 1)
                assert os.waitpid(child, 0)[1] == 0
        """,
        80,
    )
    assert shown.count("from a worker") == 20


def test_the_bar_polls_five_times_a_second() -> None:
    script = TRAINING.replace('terminal.say("over")', 'terminal.say(f"reads: {state.reads}")')
    found = re.search(r"reads: (\d+)", run_in_terminal(script, 80))
    assert found is not None
    assert 2 <= int(found[1]) <= 30  # 0.7 s, each line said above it, and its start and end
    assert "reads: 0" in run_in_pipe(script).stdout


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def frame(bar: Bar, width: int, encoding: str = "utf-8") -> str:
    """Return what the bar draws on a terminal without colors."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, force_terminal=True, no_color=True, legacy_windows=False)
    with console.capture() as captured:
        console.print(bar, end="")
    return captured.get()


def bar_after(steps: int, seconds_a_step: float, **more: object) -> Bar:
    """Return a bar after `steps` of 3900 steps of 256 samples."""
    clock, state = Clock(), {"step": 0}
    bar = Bar(lambda: Counters(2, 10, state["step"], 3900, 256 * state["step"], **more), clock=clock)  # type: ignore[arg-type]
    for _ in range(steps):
        clock.now += seconds_a_step
        state["step"] += 1
        frame(bar, 80)
    return bar


def test_the_bar_shows_all_facts_in_one_line_of_80_columns() -> None:
    bar = bar_after(390, 0.25, loss=1.59214)
    shown = frame(bar, 80)
    assert re.fullmatch(r"epoch  2/10 ╸ +  10%    390/3,900  1,024 images/s  loss 1\.5921  1:38<14:38", shown)
    assert len(shown) == 80
    wide = frame(bar, 120)
    assert wide.split() == ["epoch", "2/10", "━━━━╸", *shown.split()[3:]]
    assert len(wide) == 120


def test_narrow_terminals_omit_the_least_important_facts() -> None:
    bar = bar_after(390, 0.25, loss=1.59214)
    assert frame(bar, 60).split()[-5:] == ["╸", "390/3,900", "1,024", "images/s", "1:38<14:38"]
    assert frame(bar, 40).split()[-1] == "1:38<14:38"
    for width in range(30, 130):
        assert len(frame(bar, width)) == width


def test_a_long_run_has_all_its_facts_in_80_columns_too() -> None:
    clock, state = Clock(), {"step": 0}
    bar = Bar(lambda: Counters(12, 90, state["step"], 11_700, 128 * state["step"], 0.0123), clock=clock)
    for _ in range(3):
        clock.now, state["step"] = clock.now + 1.2, state["step"] + 1
        shown = frame(bar, 80)
    assert len(shown) == 80
    assert "107 images/s  loss 0.0123  0:04<3:53:56" in shown


def test_the_bar_names_an_evaluation_and_keeps_the_rate() -> None:
    clock = Clock()
    state = {"step": 0, "phase": ""}
    bar = Bar(lambda: Counters(1, 1, state["step"], 100, 10 * state["step"], phase=state["phase"]), clock=clock)  # type: ignore[arg-type, operator]
    for _ in range(20):
        clock.now, state["step"] = clock.now + 1, state["step"] + 1  # type: ignore[operator]
        frame(bar, 80)
    assert "10 images/s" in frame(bar, 80)
    state["phase"] = "evaluating"
    clock.now += 50
    assert "evaluating" in frame(bar, 80)
    state["phase"] = ""
    for _ in range(3):
        clock.now, state["step"] = clock.now + 1, state["step"] + 1  # type: ignore[operator]
        frame(bar, 80)
    assert "10 images/s" in frame(bar, 80)


def test_steps_longer_than_the_window_still_have_a_rate() -> None:
    assert "26 images/s" in frame(bar_after(5, 10.0), 80)


def test_the_remaining_time_ignores_the_first_step() -> None:
    clock, state = Clock(), {"step": 0}
    bar = Bar(lambda: Counters(1, 1, state["step"], 10, 0), clock=clock)
    clock.now += 600
    state["step"] = 1
    frame(bar, 80)
    clock.now += 2
    state["step"] = 2
    assert "10:02<0:16" in frame(bar, 80)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_unicode_gets_an_ascii_bar(encoding: str) -> None:
    shown = frame(bar_after(390, 0.25), 120, encoding)
    assert "----" in shown
    assert shown.isascii()


def test_a_run_of_no_steps_has_a_bar_too() -> None:
    assert "0/0" in frame(Bar(lambda: Counters(1, 1, 0, 0)), 40)


ONE, TWO, THREE = ({split: {"accuracy": 0.0712, "loss": 1.3312} for split in names} for names in (
    ("test",), ("train", "test"), ("train", "validation", "test"))
)  # fmt: skip


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["accuracy", "mean_squared_error"])
@pytest.mark.parametrize("splits", [ONE, TWO, THREE])
def test_a_terminal_shows_an_epochs_line_and_a_steps_in_one_row(
    splits: dict[str, dict[str, float]], name: str, columns: int
) -> None:
    found = {split: {name: values["accuracy"], "loss": values["loss"]} for split, values in splits.items()}
    how: dict[str, Any] = {"headline": name, "percent": name == "accuracy"}
    epoch = epoch_line(100, 200, found, rate=123_456, seconds=725, unit="samples", **how)
    for line in (epoch, step_line(123_456, found, **how)):
        shown = line.within(columns)
        assert len(shown) <= columns
        assert all(f"{split} " in shown for split in splits)
        assert line.startswith(shown[: shown.index("  ", 20)] if "  " in shown[20:] else shown)
    assert epoch.within(200) == epoch


def test_a_terminal_leaves_out_what_matters_least() -> None:
    line = epoch_line(1, 30, TWO, rate=1128.4, seconds=44.31)
    assert line == "epoch  1: train accuracy  7.12%, test  7.12%  loss 1.3312 / 1.3312  44.3 s  1,128 images/s"
    assert line.within(89) == "epoch  1: train accuracy  7.12%, test  7.12%  loss 1.3312 / 1.3312  44.3 s"
    assert line.within(72) == "epoch  1: train accuracy  7.12%, test  7.12%  loss 1.3312 / 1.3312"
    assert line.within(60) == "epoch  1: train accuracy  7.12%, test  7.12%  44.3 s"
    assert line.within(20) == "epoch  1: train accuracy  7.12%, test  7.12%"


def test_an_epochs_line_is_whole_through_a_pipe_and_fits_a_terminal() -> None:
    script = """
        from torchrelay.run.terminal import Terminal, epoch_line
        found = {"accuracy": 0.5148, "loss": 1.3312}
        Terminal().say(epoch_line(1, 30, {"train": found, "test": found}, rate=1128.4, seconds=44.31))
    """
    line = "epoch  1: train accuracy 51.48%, test 51.48%  loss 1.3312 / 1.3312  44.3 s"
    assert run_in_pipe(script).stdout == line + "  1,128 images/s\n"
    assert ANSI.sub("", run_in_terminal(script, 80)).splitlines() == [line]
