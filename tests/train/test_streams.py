"""Streams train exactly on 1 and 2 processes, and across a resume; as a script, this file is one of the processes."""

import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import torchrelay as tr
from torchrelay.errors import Interrupted, RelayError, UsageError
from torchrelay.run.terminal import Terminal
from torchrelay.train.logs import Pictures

SAMPLES, BATCH = 44, 16  # three batches; the last one has fewer samples


def sample(number: int) -> tuple[Tensor, int]:
    """Return a sample that also draws from each global generator, like a transform."""
    torch_noise, python_noise = torch.rand(4), random.random()
    return torch.arange(4.0) * number / SAMPLES + torch_noise + python_noise, number % 3


class Plain(IterableDataset):
    """A stream without state, shuffled by a random number drawn at its start."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.read: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.samples).tolist()
        return map(self.get, order)

    def get(self, number: int) -> Any:
        self.read.append(number)
        return sample(number)


class Sized(Plain):
    def __len__(self) -> int:
        return self.samples


class Stateful(Plain):
    """A stream with torchdata's protocol; without its state, its order would differ."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.samples:
            self.at += 1
            yield self.get(7 * self.at % self.samples)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "tensor": torch.tensor([self.at])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert int(state["tensor"]) == state["at"]
        self.at = state["at"]


class SizedStateful(Stateful):
    def __len__(self) -> int:
        return self.samples


class StatefulIterator(Plain):
    """A stream whose iterator has the state."""

    def __iter__(self) -> Iterator[Any]:
        return _Iterator(self)


class _Iterator:
    def __init__(self, data: Plain) -> None:
        self.data, self.at = data, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.at == self.data.samples:
            raise StopIteration
        self.at += 1
        return self.data.get(self.at)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Unending(Stateful):
    def __iter__(self) -> Iterator[Any]:
        while True:
            self.at += 1
            yield self.get(self.at)


def ragged(samples: list[Any]) -> tuple[Tensor, Tensor]:
    inputs, labels = zip(*samples, strict=True)
    return torch.stack(inputs), torch.tensor(labels)


# Each with how long it trains: 6 steps, which are two epochs where the length is known.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sized": (Sized, {"epochs": 2}),
    "declared": (lambda: tr.data.stream(Plain(), length=SAMPLES, collate=ragged), {"epochs": 2}),
    "repeated": (Plain, {"steps": 6}),
    "stateful": (SizedStateful, {"epochs": 2}),
    "stateful_repeated": (Stateful, {"steps": 6}),
    "stateful_iterator": (StatefulIterator, {"steps": 6}),
    "unending": (Unending, {"steps": 6}),
}


def build(name: str, run: Path | None = None, data: Any = None, **changes: Any) -> tr.Trainer:
    torch.manual_seed(0)
    made, length = CASES[name]
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
    arguments = {"optimizer": tr.optim.SGD(lr=0.05), "batch_size": BATCH, "device": "cpu", "run": run} | length
    arguments |= {"parallel": tr.ParallelSettings(replicas=4), "terminal": Terminal(quiet=True)}
    arguments |= {"settings": tr.RunSettings(log_every=2), "test": Sized(20)}
    arguments |= {"checkpoint": tr.CheckpointSettings(keep=9)}
    trainer = tr.Trainer(model, made() if data is None else data, **arguments | changes)
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Pictures)]
    return trainer


class Stop(tr.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Kill(tr.Callback):
    def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def often(name: str, run: Path, **changes: Any) -> tr.Trainer:
    """Save every other step, also inside epochs."""
    return build(name, run, checkpoint=tr.CheckpointSettings(every="2 steps", keep=9), **changes)


def stop_and_resume(name: str, run: Path, step: int) -> None:
    """Stop a run after a step, and resume it with a fresh dataset."""
    trainer = build(name, run)
    trainer.callbacks.append(Stop(step))
    with pytest.raises(Interrupted):
        trainer.fit()
    build(name, run).resume()


def main(folder: Path) -> None:
    from forked import fork

    for name in CASES:
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            trainer = often(name, folder / "killed" / name)
            trainer.callbacks.append(Kill())
            trainer.fit()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        for name in CASES:
            build(name, folder / "two" / name).fit()
            build(name, folder / "resumed" / name).resume()  # what one process has begun

    fork(2, run)


@pytest.fixture(scope="module")
def runs(_server, tmp_path_factory) -> Path:
    """A folder with each case's run by one process, by two, and begun by one and resumed by two."""
    folder = tmp_path_factory.mktemp("streams")
    torch.set_num_threads(1)
    for name in CASES:
        build(name, folder / "one" / name).fit()
        trainer = build(name, folder / "resumed" / name)
        trainer.callbacks.append(Stop(2))
        with pytest.raises(Interrupted):
            trainer.fit()
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    done = _server.start(folder, folder=folder, script=Path(__file__), environment=loopback).done(280)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_write_the_same_files_as_one(runs, same_runs, name):
    same_runs(runs / "two" / name, runs / "one" / name)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_go_on_with_what_one_began(runs, same_runs, name):
    same_runs(runs / "resumed" / name, runs / "one" / name)


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_resumes_to_the_same_bytes(runs, same_runs, name, step, tmp_path):
    stop_and_resume(name, tmp_path / "run", step)
    same_runs(tmp_path / "run", runs / "one" / name)


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(runs, same_runs, name, tmp_path):
    often(name, tmp_path / "whole").fit()
    killed = often(name, runs / "killed" / name)
    killed.resume()
    assert killed.progress.step == 6
    same_runs(runs / "killed" / name, tmp_path / "whole")


@pytest.mark.parametrize("name", ["unending", "repeated"])
def test_a_batch_that_breaks_the_loss_is_skipped(name, tmp_path):
    made, _ = CASES[name]

    class Broken(made):  # type: ignore[misc, valid-type]
        def get(self, number: int) -> Any:
            inputs, label = super().get(number)
            return (inputs * float("nan") if len(self.read) == 3 * BATCH else inputs), label

    settings = tr.RunSettings(log_every=1, on_spike="rollback")
    trainer = often(name, tmp_path / "run", data=Broken(), settings=settings)
    trainer.fit()
    assert trainer.progress.step == 6
    assert list(trainer.progress.skipped) == [3]
    assert all(torch.isfinite(each).all() for each in trainer.model.parameters())


def test_a_stream_with_a_state_is_not_read_again(tmp_path):
    trainer = build("unending", tmp_path / "run")
    trainer.callbacks.append(Stop(4))
    with pytest.raises(Interrupted):
        trainer.fit()
    data = Unending()
    build("unending", tmp_path / "run", data).resume()
    assert data.read == list(range(4 * BATCH + 1, 6 * BATCH + 1))


def test_a_stream_without_a_state_is_read_again_from_its_last_beginning(tmp_path):
    trainer = build("repeated", tmp_path / "run")
    trainer.callbacks.append(Stop(4))
    with pytest.raises(Interrupted):
        trainer.fit()
    data = Plain()
    build("repeated", tmp_path / "run", data).resume()
    assert len(data.read) == 6 * BATCH - SAMPLES


def test_each_epoch_of_a_stream_draws_other_random_numbers():
    data = Sized()
    trainer = build("sized", data=data)
    first, second = ([batch.inputs for batch in trainer.batches.epoch(epoch)] for epoch in (0, 1))
    assert not torch.equal(first[0], second[0])
    assert sorted(data.read[:SAMPLES]) == sorted(data.read[SAMPLES:]) == list(range(SAMPLES))
    assert data.read[:SAMPLES] != data.read[SAMPLES:]
    again = [batch.inputs for batch in trainer.batches.epoch(0)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_stream_is_told_the_epoch():
    class Told(Sized):
        def set_epoch(self, epoch: int) -> None:
            self.epochs = [*getattr(self, "epochs", []), epoch]

    data = Told()
    build("sized", data=data).fit()
    assert data.epochs == [0, 1]


def test_more_steps_of_an_unending_stream_go_on_where_the_run_ended(tmp_path):
    build("unending", tmp_path / "run").fit()
    data = Unending()
    trainer = build("unending", tmp_path / "run", data, steps=8)
    trainer.resume()
    assert trainer.progress.step == 8
    assert data.read == list(range(6 * BATCH + 1, 8 * BATCH + 1))


def test_a_data_loader_of_a_stream_says_its_batch_size_and_collate():
    loader = DataLoader(Sized(), batch_size=11, collate_fn=ragged, drop_last=True)
    torch.manual_seed(0)
    trainer = tr.Trainer(nn.Linear(4, 3), loader, epochs=1, device="cpu", terminal=Terminal(quiet=True))
    assert (trainer.batches.batch_size, len(trainer.batches), trainer.batches.source.collate) == (11, 4, ragged)
    trainer.fit()


def test_the_log_says_how_a_stream_is_read_and_resumed(tmp_path):
    for name, says in (
        ("sized", "Sized is read in its own order, by the training's process; a resume reads it again up to there"),
        ("unending", "a resume goes on from its state; where it ends, it begins again"),
    ):
        torch.manual_seed(0)
        made, length = CASES[name]
        options = {"batch_size": BATCH, "device": "cpu", "run": tmp_path / name, "terminal": Terminal(quiet=True)}
        tr.Trainer(nn.Linear(4, 3), made(), **options | length).fit()
        assert says in (tmp_path / name / "log.txt").read_text()


# ------------------------------------------------------------------------------------------------ refusals


def test_a_stream_without_a_length_needs_steps():
    with pytest.raises(UsageError, match=r"Plain has no __len__, so nothing says where its training ends: give steps="):
        build("sized", data=Plain())
    with pytest.raises(UsageError, match="where its evaluation ends: give evaluate_batches in RunSettings, or"):
        build("sized", test=Plain())
    build("sized", test=Plain(), settings=tr.RunSettings(evaluate_batches=2, epochs=1)).evaluate()


def test_a_stream_that_ends_too_early_says_so():
    with pytest.raises(RelayError, match=r"Plain ended after 44 samples, and its length is 50: give the number"):
        build("sized", data=tr.data.stream(Plain(), length=50)).fit()
    with pytest.raises(RelayError, match="Plain yields no samples when it is read from the start"):
        build("repeated", data=Plain(0)).fit()


def test_one_object_with_a_state_is_not_read_by_training_and_evaluation():
    data = SizedStateful()
    with pytest.raises(UsageError, match="SizedStateful is training and evaluation data at once"):
        build("stateful", data=data, test=data)
    build("stateful", data=data, test=SizedStateful(20)).fit()


def test_a_stream_is_not_balanced():
    with pytest.raises(UsageError, match="Sized is read in its own order: leave sampling out"):
        build("sized", sampling="balanced")


def test_something_that_is_no_stream_is_refused():
    with pytest.raises(UsageError, match="int is no stream, as it has no __iter__"):
        tr.data.stream(3)
    with pytest.raises(UsageError, match="Plain: the length is 0: it must be 1 or more"):
        tr.data.stream(Plain(), length=0)


def test_an_iterator_that_can_be_read_once_is_refused():
    with pytest.raises(UsageError, match="a generator can be read only once"):
        tr.data.stream(number for number in range(3))


def test_a_state_that_a_checkpoint_cannot_hold_is_named(tmp_path):
    class Odd(SizedStateful):
        def state_dict(self) -> dict[str, Any]:
            return {"at": {1, 2}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    with pytest.raises(RelayError, match=r"Odd.state_dict\(\): a checkpoint can't hold set at 'dataset.at'"):
        build("sized", tmp_path / "run", Odd()).fit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
