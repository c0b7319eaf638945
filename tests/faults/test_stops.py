"""Runs that are stopped: by kill -9, by signals, by Ctrl-C, by another process that holds the folder."""

import contextlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from torchrelay import checkpoint

# Images that workers read one by one, with a random transform; a step takes long enough to be interrupted.
CODE = """
import torch
from torch.utils.data import Dataset

import torchrelay as tr


class Slow(Dataset):
    def __init__(self, source):
        self.inputs, self.targets, self.classes = source.inputs, source.targets, source.classes

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        torch.rand(5_000).sort()
        return self.inputs[index] / 255 + 0.1 * torch.rand(1, 8, 8), int(self.targets[index])


def slow_digits():
    train, test = tr.data.digits()
    return Slow(train), Slow(test.take(torch.arange(64)))
"""


def lines(run: Path, name: str = "log.txt") -> list[str]:
    """The lines of a file of a run; empty if the file doesn't exist."""
    path = run / name
    return path.read_text().splitlines() if path.exists() else []


def steps(run: Path) -> list[int]:
    """The steps that have a complete checkpoint."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint.complete(run / "checkpoints")]


@pytest.fixture
def code(tmp_path) -> Path:
    """A file of the user's own with data that worker processes read."""
    file = tmp_path / "own.py"
    file.write_text(CODE)
    return file


WORKERS = ("data.name=slow_digits", "data.workers=2", "data.augment=[]", "model.name=mlp", "run.epochs=3")


NARROW = "model.options.widths=[4,8]"  # the recipe's network, with fewer channels
SETTINGS = ("run.epochs=6", 'checkpoint.every="3 steps"', NARROW)


@pytest.fixture(scope="module")
def undisturbed(_server, tmp_path_factory) -> Path:
    """An uninterrupted run of those settings."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = _server.start("train", "digits", "--run", folder / "run", folder=folder, sets=SETTINGS).done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


# ------------------------------------------------------------------------------------------------ 1: kill -9


def killed_often(start, run: Path, kills: int, settings: tuple[str, ...] = SETTINGS) -> None:
    """Kill a run at random moments and resume it each time, until its end."""
    draw = random.Random(1)
    killed = 0
    while killed < kills:
        resuming = (run / "recipe.toml").exists()
        process = start("resume", run) if resuming else start("train", "digits", "--run", run, sets=settings)
        trains = killed % 3 > 0  # let it train and save first; other kills may hit the start
        if trains:
            process.until(lambda: any("resuming after" in line for line in lines(run)[-1:]) or steps(run) == [0])
        time.sleep(draw.uniform(0, 0.05 if trains else 0.15))
        assert process.runs(), "it is too fast for this test: make it longer"
        process.end()
        killed += 1
    done = start("resume", run).done()
    assert done.returncode == 0, done.stderr


def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(start, tmp_path, undisturbed, same_runs):
    killed_often(start, tmp_path / "run", 6)
    same_runs(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_killed_at_fifty_moments_ends_in_the_same_bytes(start, cli, tmp_path, same_runs):
    settings = ("run.epochs=40", 'checkpoint.every="3 steps"')
    assert cli("train", "digits", "--run", "undisturbed", sets=settings).returncode == 0
    killed_often(start, tmp_path / "run", 50, settings)
    same_runs(tmp_path / "run", tmp_path / "undisturbed")


# ------------------------------------------------------------------------------------------------ 9, 10: signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_the_step_end_and_saves_a_checkpoint(start, cli, tmp_path, same_runs, undisturbed, number):
    run = tmp_path / "run"
    process = start("train", "digits", "--run", run, sets=SETTINGS)
    process.until(lambda: any("epoch 2" in line for line in lines(run)))
    asked = time.monotonic()
    process.send(number)
    done = process.done()
    assert time.monotonic() - asked < 10
    assert done.returncode == 75
    found = re.fullmatch(
        rf"stopped by {number.name} after step (\d+), saved; resume with: torchrelay resume {run}\n", done.stderr
    )
    assert found is not None, done.stderr
    assert steps(run)[-1] == int(found[1])
    if number == signal.SIGTERM:
        done = cli("resume", run)
        assert f"resuming after step {found[1]} of 138" in done.stdout
        same_runs(run, undisturbed)
        assert steps(run) == steps(undisturbed), "the checkpoint that the signal caused stays"


# A checkpoint of this model takes a while to write, so that a signal can come in the middle.
WIDE = ("model.name=mlp", "model.options.widths=[3000,3000]", 'checkpoint.every="4 steps"', "run.epochs=1")


def is_writing(run: Path, beyond: int = 0) -> bool:
    """Whether a checkpoint after `step` is being written."""
    return any(
        int(path.name[len(".step-") : -len(".partial")]) > beyond for path in run.glob("checkpoints/.step-*.partial")
    )


def test_a_signal_during_a_save_lets_the_save_complete(start, cli, tmp_path):
    run = tmp_path / "run"
    process = start("train", "digits", "--run", run, sets=WIDE)
    process.until(lambda: is_writing(run))
    process.send(signal.SIGTERM)
    done = process.done()
    assert done.returncode == 75
    stopped_at = int(re.search(r"after step (\d+), saved", done.stderr)[1])
    assert {4, stopped_at} <= set(steps(run))
    for path in checkpoint.complete(run / "checkpoints"):
        checkpoint.read(path)  # compares the checksums
    assert not is_writing(run)


def test_a_second_signal_exits_at_once_and_leaves_the_earlier_checkpoint_intact(start, cli, tmp_path):
    run = tmp_path / "run"
    process = start("train", "digits", "--run", run, sets=WIDE)
    process.until(lambda: is_writing(run))
    asked = time.monotonic()
    while process.runs():  # two signals within one call of PyTorch are one to Python
        process.send(signal.SIGTERM)
        time.sleep(0.03)
    done = process.done()
    assert time.monotonic() - asked < 10
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == ""
    assert is_writing(run), "it was to end in the middle"
    assert steps(run) == [0]
    done = cli("resume", run, sets=("run.max_steps=5",))
    assert done.returncode == 0, done.stderr
    assert "resuming after step 0" in done.stdout
    assert steps(run)[-1] == 5


# ------------------------------------------------------------------------------------------------ 12, 13: the lock


def test_a_second_process_on_a_run_folder_names_the_process_that_holds_it(start, cli, one_line, tmp_path):
    run = tmp_path / "run"
    first = start("train", "digits", "--run", run, sets=("run.epochs=400", NARROW))
    holder = f"{run} is in use by process {first.pid} on {socket.gethostname()}: wait for it, stop it, or choose"
    first.until(lambda: len(steps(run)) > 1)
    first.send(signal.SIGSTOP)  # it holds the folder even so
    one_line(cli("resume", run), holder)
    one_line(cli("train", "digits", "--run", run), f"{run} holds a run already", code=2)
    assert "test (359 samples)" in cli("evaluate", run).stdout  # reading disturbs nobody
    first.send(signal.SIGCONT)
    first.send(signal.SIGTERM)
    assert first.done().returncode == 75, "the first process continues"


def test_a_lock_left_by_a_killed_process_is_recovered(start, cli, code, tmp_path):
    """Its workers, which outlive it briefly, don't hold the lock either."""
    run = tmp_path / "run"
    process = start("train", "digits", "--code", code, "--run", run, sets=(*WORKERS, SETTINGS[1], "run.max_steps=30"))
    process.until(lambda: max(steps(run), default=0) >= 6)
    assert len(process.family()) == 2
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert (run / "lock").read_text().startswith(f"process {process.pid} on ")
    done = cli("resume", run, "--code", code)
    assert done.returncode == 0, done.stderr
    assert steps(run)[-1] == 30
    process.done()  # the killed one's workers have ended too


# ------------------------------------------------------------------------------------------------ 17, 37: no sockets


def listening(pid: int) -> list[str]:
    """The network sockets on which a process listens."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            inodes.add(str(link.readlink()).removeprefix("socket:[").rstrip("]"))
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        table = Path(f"/proc/{pid}/net/{kind}")
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        waiting = (
            ("0A",) if kind.startswith("tcp") else ("07",)
        )  # TCP_LISTEN; TCP_CLOSE, which UDP shows if unconnected
        found += [f"{kind} {row[1]}" for row in rows if row[9] in inodes and row[3] in waiting]
    return found


def test_an_open_listening_socket_is_detected():
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert listening(os.getpid()) == [f"tcp 0100007F:{server.getsockname()[1]:04X}"]


def test_a_run_on_one_device_opens_no_listening_socket(start, code, tmp_path):
    """Neither the process nor its workers, observed from start to end."""
    run = tmp_path / "run"
    process = start("train", "digits", "--code", code, "--run", run, sets=(*WORKERS, "run.max_steps=12"))
    looks, workers = 0, set()
    while process.runs():
        for pid in [process.pid, *process.family()]:
            try:
                assert listening(pid) == []
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
            looks += 1
            workers |= {pid} - {process.pid}
        time.sleep(0.02)
    assert process.done().returncode == 0
    assert looks > 10
    assert len(workers) >= 2


def test_a_single_process_needs_no_rendezvous(cli, tmp_path):
    """A taken port doesn't matter, not even one that the environment names."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        asked = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = cli("train", "digits", "--run", "run", sets=("run.max_steps=3", NARROW), environment=asked)
        taken.settimeout(0)
        with pytest.raises(BlockingIOError):
            taken.accept()  # nobody has asked
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path / "run")[-1] == 3


# ------------------------------------------------------------------------------------------------ 40: Ctrl-C


def command_of(text: str) -> list[str]:
    """The arguments of the printed resume command, parsed as a shell would."""
    found = re.search(r"stopped by SIGINT after step \d+, saved; resume with: torchrelay (.*)", text)
    assert found is not None, text
    return shlex.split(found[1])


def test_ctrl_c_saves_a_checkpoint_and_prints_the_command_that_resumes(start, cli, code, tmp_path, same_runs):
    """As from a terminal: the whole process group gets the signal, including workers."""
    settings = (*WORKERS, "run.max_steps=24", "checkpoint.keep=1", "checkpoint.keep_best=0")
    name = "my first run"
    command = ("train", "digits", "--code", code, "--run", name)
    process = start(*command, sets=settings, plots=True)
    process.until(lambda: len(process.family()) == 2 and len(lines(tmp_path / name)) > 1)
    time.sleep(0.2)
    asked = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    done = process.done()
    assert time.monotonic() - asked < 10
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    arguments = command_of(done.stderr)
    assert arguments == ["resume", name]
    done = cli(*arguments, "--code", code)
    assert done.returncode == 0, done.stderr
    assert cli(*command[:-1], "undisturbed", sets=settings).returncode == 0
    same_runs(tmp_path / name, tmp_path / "undisturbed")


def test_the_printed_resume_command_can_be_pasted_for_any_folder_name(start, tmp_path):
    """A line break in the name is quoted for the shell."""
    name = "it's a\nrun"
    process = start("train", "digits", "--run", name, sets=("run.epochs=400", NARROW))
    process.until(lambda: any("epoch   1" in line for line in lines(tmp_path / name)))
    process.send(signal.SIGINT)
    done = process.done()
    assert done.stderr.count("\n") == 1
    pasted = done.stderr.partition("resume with: ")[2].replace("torchrelay", "printf %s,", 1)
    shell = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True)
    assert shell.stdout == f"resume,{name},"


def test_ctrl_c_in_a_terminal_with_a_progress_bar_saves_a_checkpoint(start, tmp_path, terminal):
    """The key is written to the terminal, which sends the signal."""
    person, device = terminal
    run = tmp_path / "run"
    process = start("train", "digits", "--run", "run", sets=("run.epochs=100", NARROW), terminal=device, plots=True)
    process.until(lambda: any("epoch   2" in line for line in lines(run)))
    os.write(person, b"\x03")
    os.set_blocking(person, False)
    shown, ended = b"", False
    while not ended:
        ended = not process.runs()
        with contextlib.suppress(BlockingIOError):
            shown += os.read(person, 65536)
        time.sleep(0.01)
    assert process.done().returncode == 75
    assert command_of(shown.decode(errors="replace").replace("\r", "")) == ["resume", "run"]
    assert len(steps(run)) > 1
