"""Runs of one process and of several, compared byte for byte; as a script, this file is the several processes."""

import os
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork
from torch import nn
from torch.utils.data import TensorDataset

import torchrelay as tr
from torchrelay.checkpoint.retention import find
from torchrelay.device.device import DeviceSettings
from torchrelay.distributed.exact_ddp import divide
from torchrelay.distributed.replicas import GradientTree, ParallelSettings
from torchrelay.errors import Interrupted, RelayError
from torchrelay.run.metrics import read_metrics
from torchrelay.run.settings import RunSettings
from torchrelay.run.terminal import Terminal
from torchrelay.tasks.classification import Classification
from torchrelay.train.logs import Pictures

SAMPLES, BATCH = 403, 80  # five batches, and one of three samples for eight replicas
STEPS = 6  # of an epoch
TESTED = 250


class Net(nn.Module):
    """Everything critical: BatchNorm, dropout, a counting buffer, tied, frozen, unused and rarely used weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.wide, self.tied = nn.Linear(96, 96, bias=False), nn.Linear(96, 96)
        self.tied.weight = self.wide.weight
        self.unused = nn.Linear(3, 3)
        self.seldom = nn.Linear(96, 96)
        self.frozen = nn.Linear(96, 96).requires_grad_(False)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(96, 10))
        self.register_buffer("usual", torch.ones(1, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        x = torch.relu(nn.functional.max_pool2d(self.norm(self.first(images)), 2)).flatten(1)
        x = x / self.usual.float()
        if self.training:
            self.steps += 1
            self.usual.lerp_(x.detach().std().double() + 1, 0.1)
        x = self.tied(torch.relu(self.frozen(self.wide(x))))
        if images[0].sum() > images[-1].sum():  # some replicas use it and others don't
            x = x + self.seldom(x)
        return self.head(x)


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


WEIGHTS = [1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.25, 1.0, 1.0, 1.5]
ADAMW = tr.optim.AdamW(lr=0.01, clip_norm=0.5)
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": ADAMW, "ema": 0.99, "task": Classification(class_weights=torch.tensor(WEIGHTS))},
    "bf16": {"device": DeviceSettings(name="cpu", precision="bf16", channels_last=True), "epochs": 1},
    "muon": {"optimizer": tr.optim.Muon(lr=0.02), "epochs": 1, "net": Plain},
    "rollback": {"settings": RunSettings(on_spike="rollback", log_every=2), "epochs": 1},
    # More replicas than samples: the second process never has any, and doesn't know what is measured.
    "few": {"net": Plain, "batch_size": 3, "settings": RunSettings(max_steps=6, log_every=2), "epochs": 1},
    "workers": {"workers": 2, "epochs": 1},
}


def build(name: str, run: Path | None = None, seed: int = 0, **changes: Any) -> tr.Trainer:
    torch.manual_seed(seed)
    train, test = (
        part.take(torch.arange(size)) for part, size in zip(tr.data.digits(), (SAMPLES, TESTED), strict=True)
    )
    arguments: dict[str, Any] = {
        "optimizer": tr.optim.SGD(lr=0.05, momentum=0.9),
        "schedule": tr.optim.OneCycle(),
        "epochs": 3,
        "batch_size": BATCH,
        "device": "cpu",
        "parallel": ParallelSettings(replicas=8),
        "terminal": Terminal(quiet=True),
        "augment": [tr.augment.PaddedCrop(padding=1)],
        "run": run,
    } | CASES[name]
    if "workers" in arguments:  # read a Dataset
        train = TensorDataset(train.inputs.float() / 255, train.targets)
        arguments["augment"] = []
    arguments |= changes
    trainer = tr.Trainer(arguments.pop("net", Net)(), train, test, **arguments)
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Pictures)]  # most of a run's time
    return trainer


class StopAt(tr.Callback):
    """Sends a real signal to the process that calls it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(trainer: tr.Trainer, step: int, by: bool = True, resume: bool = False) -> None:
    trainer.callbacks += [StopAt(step)] * by
    try:
        trainer.resume() if resume else trainer.fit()
    except Interrupted:
        return
    raise AssertionError("the signal did not stop the run")


# ------------------------------------------------------------------------------------------------ several processes


def set_environment(rank: int, size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def in_two(rank: int, folder: Path) -> None:
    for name in CASES:
        trainer = build(name, folder / "2" / name, seed=rank)  # the first process's weights count
        trainer.fit()
    predicted = trainer.predict(tr.data.digits()[1].inputs[:TESTED].float() / 255)
    if rank == 0:
        torch.save(predicted, folder / "predicted.pt")
    build("adamw", folder / "4 to 1 to 2").resume()
    build("muon", folder / "clock", settings=RunSettings(log_every="0.01 s", epochs=1)).fit()
    build("rollback", folder / "close", net=Plain, settings=RunSettings(exact=False)).fit()
    with pytest.raises(RelayError, match="was not used in a step, for which DistributedDataParallel waits"):
        build("adamw", settings=RunSettings(exact=False)).fit()


def in_four(rank: int, folder: Path) -> None:
    build("adamw", folder / "4" / "adamw").fit()
    interrupted(build("adamw", folder / "4 to 1 to 2"), STEPS + 2, by=rank == 3)
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
    hosts = build("adamw", folder / "hosts" / "adamw")
    assert [size for _, size in hosts.strategy._levels] == [2, 2]
    hosts.fit()


def in_eight(rank: int, folder: Path) -> None:
    build("adamw", folder / "8" / "adamw").fit()


def in_one(rank: int, folder: Path) -> None:
    """Between four and two."""
    torch.set_num_threads(1)
    interrupted(build("adamw", folder / "4 to 1 to 2"), STEPS + 4, resume=True)


SEVERAL = {4: in_four, 1: in_one, 8: in_eight, 2: in_two}  # in this order, each number of processes forked in turn


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    tr.data.digits()
    for size in SEVERAL:
        run_in(size, folder)


def run_in(size: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        if size > 1:
            set_environment(rank, size, port)
        SEVERAL[size](rank, folder)

    fork(size, run)


@pytest.fixture(scope="module")
def runs(_server, tmp_path_factory) -> Path:
    """A folder with runs of several processes, and the runs of one process to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    done = _server.start(folder, folder=folder, script=Path(__file__), environment=loopback).done(280)
    assert done.returncode == 0, done.stderr
    for name in CASES:
        build(name, folder / "1" / name).fit()
    build("rollback", folder / "alone", net=Plain).fit()
    torch.set_num_threads(before)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_write_the_same_files_as_one(runs, same_runs, name):
    same_runs(runs / "2" / name, runs / "1" / name)


@pytest.mark.parametrize("processes", ["4", "8", "hosts"])
def test_more_processes_and_hosts_write_the_same_files_as_one(runs, same_runs, processes):
    same_runs(runs / processes / "adamw", runs / "1" / "adamw")


def test_a_run_moves_within_an_epoch_from_four_processes_to_one_to_two(runs, same_runs):
    same_runs(runs / "4 to 1 to 2", runs / "1" / "adamw")
    log = (runs / "4 to 1 to 2" / "log.txt").read_text()
    assert f"resuming after step {STEPS + 3}" in log, "all have agreed on the step after the signal's"
    assert f"resuming after step {STEPS + 4}" in log


def test_lines_written_by_the_clock_change_no_weight(runs):
    steps = [line["step"] for line in read_metrics(runs / "clock") if line["split"] == "step"]
    assert steps
    assert len(set(steps)) == len(steps)
    folders = [find(runs / run / "checkpoints", "last") for run in ("clock", "1/muon")]
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


def test_predictions_are_those_of_one_process(runs):
    alone = build(list(CASES)[-1], runs / "1" / list(CASES)[-1])
    alone.load("last")
    found = torch.load(runs / "predicted.pt", weights_only=True)
    assert torch.equal(found, alone.predict(tr.data.digits()[1].inputs[:TESTED].float() / 255))


def test_a_run_that_is_not_exact_is_close(runs):
    def last(run: Path) -> dict[str, Any]:
        return read_metrics(run)[-1]

    assert last(runs / "close")["loss"] == pytest.approx(last(runs / "alone")["loss"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ in one process


def test_closing_a_tree_adds_its_last_leaf():
    torch.manual_seed(0)
    leaves = [[torch.randn(3), torch.randn(2), None] for _ in range(8)]
    leaves[3][2] = leaves[6][2] = torch.randn(4)
    tree, other = GradientTree(), GradientTree()
    for leaf in leaves[:-1]:
        tree.add(list(leaf))
        other.add(list(leaf))
    other.add(leaves[-1])
    for place, total in enumerate(other.total()):
        (found,) = tree.total_with([place], [leaves[-1][place]])
        assert torch.equal(found, total)


def test_buckets_hold_each_parameter_once_and_one_type_each():
    types = (torch.float32, torch.bfloat16)
    parameters = [nn.Parameter(torch.zeros(200_000, dtype=types[place % 3 == 0])) for place in range(60)]
    found = divide(parameters)
    assert sorted(place for bucket in found for place in bucket) == list(range(60))
    assert found[0][0] == 59, "the backward pass comes to the last ones first"
    for bucket in found:
        assert len({parameters[place].dtype for place in bucket}) == 1
        assert bucket == sorted(bucket, reverse=True)
    assert sum(parameters[place].nbytes for place in found[0]) < 2 * 2**20


if __name__ == "__main__":
    main(Path(sys.argv[1]))
