"""Runs on two and three hosts, of which one dies, is disconnected, or has a slow link."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.scale.hosts import hosts, why_not
from torchrelay import checkpoint

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

SETTINGS = (
    *("parallel.replicas=2", "parallel.timeout=4", "run.epochs=6", 'checkpoint.every="5 steps"', "checkpoint.keep=3"),
    *("device.name=cpu", "device.threads=1", "data.batch_size=250"),
)
STEPS = 36
SHORT = "run.epochs=2"


def train(run: Path, *sets: str) -> list[str]:
    return ["train", "digits", "--run", str(run), *(part for each in (*SETTINGS, *sets) for part in ("--set", each))]


@pytest.fixture(scope="module")
def undisturbed(_server, tmp_path_factory) -> Path:
    """The run of one process on one host."""
    folder = tmp_path_factory.mktemp("alone")
    done = _server.start(*train(folder / "run"), "--quiet", folder=folder).done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


def until(happened: Callable[[], object], what: str, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, f"waited {timeout} s until {what}"
        time.sleep(0.02)


def saved(run: Path, step: int) -> bool:
    """Whether the run has saved this step."""
    return any(int(path.name[5:]) >= step for path in checkpoint.complete(run / "checkpoints"))


def test_two_hosts_train_to_the_bytes_of_one_process_over_a_slow_link(tmp_path, start, same_runs):
    with hosts(2) as both:
        both[1].slow(megabits=20)
        torchruns = [
            start(
                *host.rendezvous("2", both[0].address),
                *("--nproc-per-node=1", "-m", "--", "torchrelay", *train(tmp_path / "run", SHORT)),
                module="torch.distributed.run",
                network=host.name,
                environment={"GLOO_SOCKET_IFNAME": "eth0"},
            )
            for host in both
        ]
        ends = [process.done() for process in torchruns]
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    assert start(*train(tmp_path / "alone", SHORT)).done().returncode == 0
    same_runs(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_run_resumes_on_the_remaining_host_to_the_same_bytes_after_the_other_dies(tmp_path, same_runs, undisturbed):
    """It dies as in a power cut, without closing its connections."""
    run, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    with hosts(2) as (first, second):
        left = first.torchrun(*train(run), log=logs[0], nodes="1:2", meeting=first.address)
        second.torchrun(*train(run), log=logs[1], nodes="1:2", meeting=first.address)
        until(lambda: saved(run, 10), "there was a checkpoint")
        second.cut()
        second.kill()
        assert left.wait(150) == 0, logs[0].read_text()
    same_runs(run, undisturbed)
    assert "resuming after step" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_a_disconnected_host_ends_with_a_clear_error(tmp_path):
    run, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    command = [*train(run), "--set", "run.epochs=2000"]
    with hosts(2) as (first, second):
        alone = {"WORLD_SIZE": "2", "MASTER_ADDR": first.address, "MASTER_PORT": "29500"}
        both = [
            host.start(sys.executable, "-m", "torchrelay", *command, log=log, RANK=str(rank), **alone)
            for rank, (host, log) in enumerate(zip((first, second), logs, strict=True))
        ]
        until(lambda: saved(run, 10), "there was a checkpoint")
        second.cut()
        began = time.monotonic()
        assert [process.wait(60) for process in both] == [1, 1]
        assert time.monotonic() - began < 40
    here, there = (log.read_text().splitlines()[-1] for log in logs)
    assert "process 0 of 2 " in here, here
    assert "and waited 4 s for process 1, which hangs" in here, here
    assert "process 1 of 2 " in there, there
    assert "can't reach the store of process 0 either: this host may be cut off from the network" in there, there
    assert checkpoint.complete(run / "checkpoints")


@pytest.mark.slow
def test_a_spare_host_takes_over(tmp_path, same_runs, undisturbed):
    """It needs a torchrun variable; see docs/howto/clusters.md."""
    run, logs = tmp_path / "run", [tmp_path / f"{number}.log" for number in range(3)]
    with hosts(3) as three:
        first, second, spare = three
        meeting = {"nodes": "2", "meeting": first.address, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        started = [
            host.torchrun(*train(run), log=log, **meeting) for host, log in zip((first, second), logs, strict=False)
        ]
        until(lambda: saved(run, 5), "there was a checkpoint")
        last = spare.torchrun(*train(run), log=logs[2], **meeting)
        second.kill()
        assert [started[0].wait(200), last.wait(60)] == [0, 0], [log.read_text() for log in logs]
    same_runs(run, undisturbed)
