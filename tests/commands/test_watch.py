"""`torchrelay watch`: runs in a terminal."""

import contextlib
import os
import time

import torchrelay.cli
from written_runs import write_run


def test_one_frame_is_printed(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name)) for name in ("one", "other")]
    assert torchrelay.cli.main(["watch", *runs, "--once"]) == 0
    said = capsys.readouterr().out
    assert said.count("done  epoch 2") == 2
    assert "test 75.00%" in said


def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert torchrelay.cli.main(["watch", str(write_run(tmp_path / "run")), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} isn't a run: it lacks recipe.toml or metrics.jsonl")


def test_in_a_terminal_a_run_is_drawn_until_somebody_presses_q(start, terminal, tmp_path):
    person, device = terminal
    run = write_run(tmp_path / "run")
    process = start("watch", run, terminal=device)
    os.set_blocking(person, False)
    shown = b""

    def read() -> bytes:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(person, 65536)
        return shown

    process.until(lambda: b"75.00%" in read())
    os.write(person, b"q")
    asked = time.monotonic()
    while process.runs() and time.monotonic() - asked < 30:
        read()
        time.sleep(0.01)
    assert process.done().returncode == 0
    assert b"\x1b[?1049l" in read(), "the terminal has its own screen again"
