"""Whole runs under `parallel.kind = "fsdp"` and "dp": as a script, this file is two processes that train."""

import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork
from safetensors.torch import load_file
from torch import nn

import torchrelay as tr
from torchrelay import cli
from torchrelay.device.device import DeviceSettings
from torchrelay.distributed import fsdp_checks as shardable
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import Interrupted, RelayError, UsageError
from torchrelay.run.settings import RunSettings
from torchrelay.run.terminal import Terminal
from torchrelay.train.logs import Pictures

# Two processes train for twenty seconds; `test_fsdp` compares the bytes of each part.
pytestmark = [pytest.mark.ci, pytest.mark.slow]

SAMPLES, BATCH = 402, 100  # the last batch has two samples for four replicas: none for the second process
STEPS = 5  # of an epoch
TESTED = 250  # in three batches: the second process has none of the last


class Net(nn.Module):
    """BatchNorm, dropout, tied, frozen and unused weights, and sizes that two processes can't divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.MaxPool2d(2)),
            nn.Sequential(nn.Conv2d(7, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        )
        self.wide, self.tied = nn.Linear(80, 80, bias=False), nn.Linear(80, 80)
        self.tied.weight = self.wide.weight
        self.unused = nn.Linear(3, 3)
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(80, 10))

    def forward(self, images):
        return self.head(self.tied(torch.relu(self.wide(self.blocks(images).flatten(1)))))


ADAMW = tr.optim.AdamW(lr=0.01, clip_norm=0.5, groups=[{"match": ["blocks.0.0.*"], "freeze": True}])
SGD = tr.optim.SGD(lr=0.05, nesterov=True)
KINDS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": ADAMW, "ema": 0.99},
    "sgd, bf16, rollback": {
        "optimizer": SGD,
        "device": DeviceSettings(name="cpu", precision="bf16"),
        "settings": RunSettings(on_spike="rollback", log_every=2),
        "epochs": 1,
    },
}


def build(kind: str, name: str, run: Path | None = None, seed: int = 0, **changes: Any) -> tr.Trainer:
    torch.manual_seed(seed)
    train, test = tr.data.digits()
    arguments = {
        "schedule": tr.optim.OneCycle(),
        "epochs": 3,
        "batch_size": BATCH,
        "device": "cpu",
        "parallel": ParallelSettings(kind=kind, replicas=4),
        "terminal": Terminal(quiet=True),
        "run": run,
    }
    net = changes.pop("net", Net)
    parts = train.take(torch.arange(SAMPLES)), test.take(torch.arange(TESTED))
    trainer = tr.Trainer(net(), *parts, **(arguments | KINDS[name] | changes))
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Pictures)]  # most of a run's time
    return trainer


class StopAt(tr.Callback):
    """Sends a real signal to the process that calls it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(trainer: tr.Trainer, by: bool = True) -> None:
    """Train until a signal comes, in the middle of the second epoch."""
    trainer.callbacks += [StopAt(STEPS + 2)] * by
    try:
        trainer.fit()
    except Interrupted:
        return
    raise AssertionError("the signal did not stop the run")


def message(kind: type[RelayError], call: Callable[[], Any]) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    return "nothing"


def command(name: str, kind: str, folder: Path) -> list[str]:
    settings = (
        "run.epochs=1",
        "device.threads=1",
        "parallel.replicas=2",
        "data.batch_size=250",
        f"parallel.kind={kind}",
    )
    return [name, *(["digits", "--run"] if name == "train" else []), str(folder), "--quiet"] + [
        argument for setting in settings if name == "train" for argument in ("--set", setting)
    ]


# ------------------------------------------------------------------------------------------------ two processes


def in_two(rank: int, folder: Path, port: int) -> None:
    """Run everything that needs two processes; rank 0 writes the results."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    shardable.SMALLEST = 300
    found: dict[str, Any] = {}
    for name in KINDS:
        trainer = build("fsdp", name, folder / name, seed=rank)  # the first process's weights count
        trainer.fit()
        found[name] = trainer.predict(tr.data.digits()[1].inputs[:TESTED].float() / 255)
    for kind in ("none", "ddp"):
        interrupted(build("fsdp", "adamw", folder / f"fsdp, {kind}"), by=rank == 1)
    found["weights"] = len(build("fsdp", "adamw").model.blocks[0][0].weight.to_local())
    build("ddp", "adamw", folder / "fsdp, ddp", seed=rank).resume()
    build("fsdp", "adamw", folder / "none, fsdp", seed=rank).resume()
    again = build("fsdp", "adamw", folder / "adamw")
    again.load("last")
    found["evaluated"] = again.evaluate("test").values["loss"]
    build("fsdp", "adamw", folder / "not exact", epochs=1, settings=RunSettings(exact=False)).fit()
    found["shape"] = message(RelayError, lambda: build("fsdp", "adamw", folder / "adamw", net=other).load())
    net = Net()
    adam = torch.optim.Adam(net.parameters())
    found["instance"] = message(UsageError, lambda: build("fsdp", "adamw", net=lambda: net, optimizer=adam))
    for name, changes in REFUSED.items():
        found[name] = message(UsageError, lambda changes=changes: build(**{"kind": "fsdp", "name": "adamw"} | changes))
    assert cli.main(command("train", "fsdp", folder / "recipe")) == 0
    assert cli.main([*command("resume", "fsdp", folder / "recipe"), "--set", "run.epochs=2", "--accept-changes"]) == 0
    assert cli.main(command("evaluate", "fsdp", folder / "recipe")) == 0
    if rank == 0:
        torch.save(found, folder / "found.pt")


def other() -> nn.Module:
    net = Net()
    net.head[1] = nn.Linear(80, 11)
    return net


REFUSED: dict[str, dict[str, Any]] = {
    "muon": {"optimizer": tr.optim.Muon(), "settings": RunSettings(exact=False)},
    "dp": {"kind": "dp", "settings": RunSettings(exact=False)},
}


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    tr.data.digits()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork(2, lambda rank: in_two(rank, folder, port))


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(_server, tmp_path_factory) -> Path:
    """A folder with runs of two processes, and the runs of one process to compare with."""
    folder = tmp_path_factory.mktemp("runs")
    with one_thread():
        interrupted(build("none", "adamw", folder / "none, fsdp"))
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    done = _server.start(folder, folder=folder, script=Path(__file__), environment=loopback).done(200)
    assert done.returncode == 0, done.stderr
    with one_thread():
        build("none", "adamw", folder / "fsdp, none").resume()
        for name in KINDS:
            build("none", name, folder / "alone" / name).fit()
    return folder


@pytest.fixture(scope="module")
def found(runs) -> dict[str, Any]:
    return torch.load(runs / "found.pt", weights_only=True)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_write_the_files_of_one(runs, same_runs, name):
    same_runs(runs / name, runs / "alone" / name)


@pytest.mark.parametrize("name", ["none, fsdp", "fsdp, none", "fsdp, ddp"])
def test_a_run_resumes_with_another_strategy_to_the_same_files(runs, same_runs, name):
    """A signal to one process stops it inside an epoch; from one process to two, back, and between two."""
    same_runs(runs / name, runs / "alone" / "adamw")
    before, after = name.split(", ")
    assert f"changed: parallel.kind was {before} and is {after}" in (runs / name / "log.txt").read_text()


def test_each_rank_holds_a_shard_of_the_weights(found):
    assert found["weights"] == 4  # of seven filters


def test_a_checkpoint_opens_without_torchrelay(runs):
    saved = max((runs / "adamw" / "checkpoints").iterdir())
    net = Net()
    net.load_state_dict(load_file(saved / "model.safetensors"))
    assert (saved / "ema.safetensors").exists()


@pytest.mark.parametrize("name", KINDS)
def test_predictions_are_those_of_one_process(runs, found, name):
    alone = build("none", name, runs / "alone" / name)
    alone.load("last")
    assert torch.equal(found[name], alone.predict(tr.data.digits()[1].inputs[:TESTED].float() / 255))


def test_a_loaded_checkpoint_evaluates_as_in_one_process(runs, found):
    alone = build("none", "adamw", runs / "alone" / "adamw")
    alone.load("last")
    assert found["evaluated"] == alone.evaluate("test").values["loss"]


def test_a_run_that_is_not_exact_is_close(runs):
    build("none", "adamw", runs / "alone" / "not exact", epochs=1, settings=RunSettings(exact=False)).fit()
    losses = [
        [json.loads(line)["loss"] for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("not exact", "alone/not exact")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_a_recipe_trains_resumes_and_evaluates(runs, same_runs):
    assert cli.main(command("train", "none", runs / "alone" / "recipe")) == 0
    assert (
        cli.main([*command("resume", "", runs / "alone" / "recipe"), "--set", "run.epochs=2", "--accept-changes"]) == 0
    )
    same_runs(runs / "recipe", runs / "alone" / "recipe")


def test_a_model_of_another_shape_is_reported(found):
    assert found["shape"].startswith("the checkpoint's weights don't fit Net: size mismatch for head.1.bias")


def test_impossible_settings_are_refused(found):
    assert "optimizer 'muon' needs whole matrices" in found["muon"]
    assert "parameters in the optimizer aren't the model's" in found["instance"]
    assert "parallel.kind 'fsdp' needs on several processes" in found["instance"]
    assert found["dp"] == "parallel.kind 'dp' is one process for all devices, and 2 were started: use 'ddp'"


# ------------------------------------------------------------------------------------------------ one process


def test_dp_is_refused_in_exact_runs_and_names_ddp():
    with pytest.raises(UsageError, match=r"parallel\.kind 'dp' .* exact: use 'ddp', or --set run\.exact=false"):
        build("dp", "adamw")


def test_dp_does_not_accept_a_number_of_devices(tmp_path, capsys):
    arguments = [*command("train", "dp", tmp_path / "run"), "--set", "run.exact=false", "--devices", "2"]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --devices 2: parallel.kind 'dp' uses all visible devices from one process")
    assert error.count("\n") == 1


@pytest.mark.parametrize(("kind", "where"), [("dp", "on cpu"), ("fsdp", "with one process")])
def test_a_strategy_without_effect_gives_a_hint(tmp_path, kind, where):
    trainer = build(
        kind, "sgd, bf16, rollback", tmp_path / "run", epochs=1, settings=RunSettings(exact=False, epochs=1)
    )
    trainer.fit()
    said = f"parallel.kind '{kind}' has no effect {where}: the model runs as with 'none'"
    assert said in (tmp_path / "run" / "log.txt").read_text()
    assert f'kind = "{kind}"' in (tmp_path / "run" / "recipe.toml").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
