"""Processes that wait for a hanging one; as a script, this file is the two processes."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

import torchrelay as tr
from torchrelay.distributed import process_group as world
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import RelayError
from torchrelay.run.terminal import Terminal

WAITS, HANGS = 2, 60  # seconds


class Hang(tr.Callback):
    """Sleeps forever, like a process on a lost network drive."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            time.sleep(HANGS)
            os._exit(3)


def train(rank: int, step: int, folder: Path) -> None:
    """Train as one of two processes; the second hangs after a step, and the first writes down its error."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world.first_timeout = lambda _: world.timedelta(seconds=2 * WAITS)
    began = time.monotonic()
    trainer = tr.Trainer(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        *tr.data.digits(),
        epochs=5,
        batch_size=100,
        run=folder / "run",
        device="cpu",
        parallel=ParallelSettings(replicas=2, timeout=WAITS),
        callbacks=[Hang(step)] * rank,
        terminal=Terminal(quiet=True),
    )
    try:
        trainer.fit()
    except RelayError as error:
        (folder / f"rank-{rank}.txt").write_text(f"{trainer.step}\n{time.monotonic() - began}\n{error}")


def main(step: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    tr.data.digits()
    children = []
    for rank in (0, 1):
        if (child := os.fork()) == 0:
            train(rank, step, folder)
            os._exit(0)
        children.append(child)
    assert os.waitpid(children[0], 0)[1] == 0
    os.kill(children[1], 9)


@pytest.mark.parametrize(
    ("step", "patience"),
    [pytest.param(1, 2 * WAITS, id="in the first steps"), pytest.param(20, WAITS, id="later", marks=pytest.mark.slow)],
)
def test_a_hanging_rank_is_reported_with_the_waiting_collective(start, tmp_path, step, patience):
    done = start(str(step), tmp_path, script=Path(__file__), environment={"GLOO_SOCKET_IFNAME": "lo"}).done()
    assert done.returncode == 0, done.stderr
    stopped, seconds, text = (tmp_path / "rank-0.txt").read_text().split("\n")
    assert text == (
        f"process 0 of 2 added gradients and waited {patience} s for process 1, which hangs or needs longer than "
        "parallel.timeout: see its log, then resume the run"
    )
    assert int(stopped) == step
    assert patience < float(seconds) < HANGS / 2
    assert not (tmp_path / "rank-1.txt").exists()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
