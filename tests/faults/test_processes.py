"""Several processes of which one is stopped, killed or fails, started by torchrelay, by torchrun or by neither."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from processes import clean_environment
from torchrelay import checkpoint

SLOW = pytest.mark.slow  # as well, where it may be
RUN = ("device.name=cpu", "parallel.replicas=2", "run.epochs=4", 'checkpoint.every="3 steps"')
SETTINGS = (*RUN, "model.options.widths=[4,8]")  # the recipe's network, but narrow

# A network that fails in one of the processes.
CODE = """
import os

from torchrelay.models.small import small_cnn


def tired(rank, calls, classes=10, channels=1, image_size=8):
    model = small_cnn(classes, channels, widths=(4, 8))

    def count(module, inputs):
        nonlocal calls
        calls -= module.training
        if calls == 0 and os.environ.get("RANK") == str(rank):
            raise ValueError("this network\\nis tired")

    model.register_forward_pre_hook(count)
    return model
"""


def steps(run: Path) -> list[int]:
    """The steps that have a complete checkpoint."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint.complete(run / "checkpoints")]


def ranks(launcher) -> list[int]:
    """The ids of the processes that a launcher has started, in the order of their rank; each leads a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid, words = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
            if int(words[1]) == launcher.pid and int(words[3]) == pid:
                found.append((int(words[19]), pid))  # since when, in hundredths of a second
    return [pid for _, pid in sorted(found)]


def ended(pids) -> bool:
    """Whether all of these processes have ended, even if just now."""
    end = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture(scope="module")
def undisturbed(_server, tmp_path_factory) -> Path:
    """An uninterrupted run of those settings in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = _server.start("train", "digits", "--run", folder / "run", folder=folder, sets=SETTINGS).done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def launch(start, run) -> Callable:
    """Train with `--devices 2` until there are a few checkpoints; return the launcher and its processes."""

    def launched(*arguments, **options):
        launcher = start("train", "digits", "--devices=2", "--run", run, *arguments, sets=SETTINGS, **options)
        launcher.until(lambda: max(steps(run), default=0) >= 6)
        found = ranks(launcher)
        assert len(found) == 2
        return launcher, found

    return launched


@pytest.fixture
def pair(start, run) -> Callable:
    """Train in two processes without a launcher, as `srun` may start them; return them."""

    def started(*arguments, sets=SETTINGS, port: int = 0):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = port or free.getsockname()[1]
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [start("train", "digits", "--run", run, *arguments, sets=sets, environment=each) for each in own]

    return started


@pytest.fixture
def goes_on(cli, run, undisturbed, same_runs) -> Callable[[], None]:
    """Resume in one process, and compare with an uninterrupted run."""

    def check() -> None:
        done = cli("resume", run)
        assert done.returncode == 0, done.stderr
        same_runs(run, undisturbed)

    return check


# ------------------------------------------------------------------------------------------------ 11: signals

STOPPED = r"stopped by (?:SIGTERM|SIGINT|a signal) after step (\d+), saved; resume with: torchrelay resume {}\n"


def check_stopped(done, run: Path, code: int = 75) -> None:
    """Assert that it ended as a run stopped by a signal, with one line."""
    assert done.returncode == code, done.stderr
    found = re.fullmatch(STOPPED.format(run), done.stderr)
    assert found, done.stderr
    assert steps(run)[-1] == int(found[1])


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(pair, run, goes_on, signalled):
    both = pair()
    both[0].until(lambda: max(steps(run), default=0) >= 6)
    asked = time.monotonic()
    both[signalled].send(signal.SIGTERM)
    first, second = (process.done() for process in both)
    assert time.monotonic() - asked < 10
    check_stopped(first, run)
    assert (second.returncode, second.stdout, second.stderr) == (75, "", "")  # only one prints
    goes_on()


def test_a_signal_to_the_launcher_or_to_one_of_its_processes_stops_all(launch, cli, run, undisturbed, same_runs):
    launcher, found = launch()
    asked = time.monotonic()
    os.kill(found[1], signal.SIGTERM)
    check_stopped(launcher.done(), run)
    assert time.monotonic() - asked < 10
    assert ended(found)
    done = cli("resume", run, "--devices=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    same_runs(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_signal_to_the_launcher_stops_all(launch, run, goes_on, number):
    launcher, found = launch()
    asked = time.monotonic()
    launcher.send(number)
    check_stopped(launcher.done(), run)
    assert time.monotonic() - asked < 10
    assert ended(found)
    goes_on()


def test_a_second_signal_to_the_launcher_ends_all_at_once(launch, run, goes_on):
    launcher, found = launch()
    os.kill(found[1], signal.SIGSTOP)  # so that the first signal takes long
    launcher.send(signal.SIGTERM)
    time.sleep(1)
    assert launcher.runs()
    launcher.send(signal.SIGTERM)
    done = launcher.done(10)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")
    assert ended(found)
    goes_on()


def test_ctrl_c_in_a_terminal_stops_all_processes(launch, run, terminal):
    """Only the launcher has the terminal; it shows rank 0's bar, and one line after all have ended."""
    person, device = terminal
    os.set_blocking(person, False)
    launcher, found = launch(terminal=device)
    os.write(person, b"\x03")
    shown, ended_by = b"", time.monotonic() + 30
    while launcher.runs() and time.monotonic() < ended_by:
        with suppress(BlockingIOError):
            shown += os.read(person, 65536)
        time.sleep(0.01)
    with suppress(BlockingIOError):
        shown += os.read(person, 65536)
    assert launcher.done().returncode == 75
    assert ended(found)
    assert re.findall(r"stopped by SIGINT after step (\d+), saved; resume with: torchrelay resume", shown.decode()) == [
        str(steps(run)[-1])
    ]
    assert b"epoch 1/4" in shown  # the bar
    assert b"rror" not in shown


# ------------------------------------------------------------------------------------------------ 14: a dead process


@pytest.mark.parametrize("killed", [pytest.param(0, marks=SLOW), 1])
def test_with_restarts_a_run_resumes_after_one_process_is_killed(launch, run, undisturbed, same_runs, killed):
    launcher, found = launch("--restarts=1")
    os.kill(found[killed], signal.SIGKILL)
    done = launcher.done()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("resuming after step") == 1
    same_runs(run, undisturbed)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=SLOW), 1])
def test_without_restarts_a_killed_process_is_an_error(launch, one_line, run, goes_on, killed):
    launcher, found = launch()
    os.kill(found[killed], signal.SIGKILL)
    asked = time.monotonic()
    one_line(launcher.done(), f"process {killed} was killed by SIGKILL", "torchrelay resume continues")
    assert time.monotonic() - asked < 20
    assert ended(found)
    goes_on()


def test_no_process_outlives_a_killed_launcher(launch, goes_on):
    launcher, found = launch()
    launcher.send(signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    assert ended(found)
    goes_on()


@pytest.mark.parametrize("killed", [pytest.param(0, marks=SLOW), 1])
def test_a_process_whose_peer_is_killed_reports_it(pair, run, goes_on, one_line, killed):
    """Without a launcher."""
    both = pair()
    both[0].until(lambda: max(steps(run), default=0) >= 6)
    both[killed].send(signal.SIGKILL)
    asked = time.monotonic()
    one_line(both[1 - killed].done(), f"process {1 - killed} of 2 lost another process while it ")
    assert time.monotonic() - asked < 20
    goes_on()


# ------------------------------------------------------------------------------------------------ 11, 14: torchrun


@pytest.fixture
def torchrun(run) -> Iterator[Callable]:
    """Train with torchrun until there are a few checkpoints; return it and its processes."""
    agents = []

    def started(*options: str) -> tuple[subprocess.Popen, list[int]]:
        what = ["-m", "--", "torchrelay", "train", "digits", "--run", run, *(f"--set={each}" for each in SETTINGS)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options, *what]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        agents.append(subprocess.Popen(command, cwd=run.parent, env=clean_environment(run.parent), **pipes))
        while max(steps(run), default=0) < 6:
            assert agents[-1].poll() is None, agents[-1].communicate()
            time.sleep(0.002)
        return agents[-1], ranks(agents[-1])

    yield started
    for agent in agents:
        agent.kill()
        agent.communicate()


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_processes(torchrun, run, goes_on):
    agent, found = torchrun()
    agent.send_signal(signal.SIGTERM)
    _, errors = agent.communicate(timeout=30)
    assert agent.returncode == 1  # torchrun's
    assert len(re.findall(r"^stopped by SIGTERM after step \d+, saved", errors, re.MULTILINE)) == 1
    assert ended(found)
    goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_restarts_all_processes_and_the_run_resumes(torchrun, run, undisturbed, same_runs, killed):
    agent, found = torchrun("--max-restarts=1")
    os.kill(found[killed], signal.SIGKILL)
    output, errors = agent.communicate(timeout=120)
    assert agent.returncode == 0, errors
    assert output.count("resuming after step") == 1
    same_runs(run, undisturbed)


# ------------------------------------------------------------------------------------------------ 16: an error in one


def failing(tmp_path: Path, rank: int) -> tuple[list[str], tuple[str, ...]]:
    """Arguments and settings of a run that fails in one process."""
    (tmp_path / "own.py").write_text(CODE)
    options = f"model.options={{rank={rank},calls=30}}"
    return ["--code", str(tmp_path / "own.py")], (*RUN, "model.name=tired", options)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_ends_all_ranks_with_that_cause(cli, one_line, tmp_path, run, rank):
    arguments, settings = failing(tmp_path, rank)
    done = cli("train", "digits", "--devices=2", "--run", run, *arguments, sets=settings)
    line = one_line(done, r"ValueError: this network\nis tired")
    assert line.count("error") == 1
    assert steps(run)[-1] == 27


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_launcher_the_rank_with_the_exception_reports_its_cause(pair, one_line, tmp_path, rank):
    arguments, settings = failing(tmp_path, rank)
    both = [process.done(20) for process in pair(*arguments, sets=settings)]
    one_line(both[rank], r"ValueError: this network\nis tired")
    one_line(both[1 - rank], f"process {1 - rank} of 2 lost another process while it ", "look for the first error")


# ------------------------------------------------------------------------------------------------ 17: the port


def test_a_rendezvous_port_that_is_taken_is_named(cli, start, one_line, tmp_path, run):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli("train", "digits", "--devices=2", f"--port={port}", "--run", run, sets=SETTINGS)
        one_line(done, f"port {port} can't be used", "choose another by --port, or leave it out")
        assert not run.exists()
        meeting = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = cli("train", "digits", "--run", run, sets=SETTINGS, environment=meeting)
        one_line(done, f"process 0 of 2 can't meet the others at 127.0.0.1:{port}", "choose another port")


def test_two_simultaneous_launches_use_different_ports(start, tmp_path):
    short = (*SETTINGS, "run.max_steps=3")
    both = [start("train", "digits", "--devices=2", "--run", name, sets=short) for name in ("one", "other")]
    for process, name in zip(both, ("one", "other"), strict=True):
        done = process.done()
        assert (done.returncode, done.stderr) == (0, "")
        assert steps(tmp_path / name)[-1] == 3
