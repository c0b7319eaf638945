"""A step captured as a CUDA graph and replayed: the same step, and what can't be captured is refused."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchrelay as tr
from torchrelay import checkpoint, rng
from torchrelay.cli import main
from torchrelay.data.batch import Batch
from torchrelay.device.device import Device, DeviceSettings
from torchrelay.errors import UsageError
from torchrelay.optim.groups import set_learning_rate
from torchrelay.optim.muon import MuonOptimizer
from torchrelay.optim.update import Update
from torchrelay.train.callbacks import Callback
from torchrelay.train.cuda_graph import CudaGraph, check_recordable, move_rates_to_device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
OPTIMIZERS = {
    "sgd": tr.optim.SGD(lr=0.05, clip_norm=1.0),
    "fused": tr.optim.SGD(lr=0.05, fused=True),
    "adamw": tr.optim.AdamW(lr=2e-3),
    "muon": tr.optim.Muon(lr=0.02, other="sgd", other_lr=0.05),
}


class Net(nn.Sequential):
    """A network with running statistics, randomness and a matrix to orthogonalize."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10),
        )  # fmt: skip


def trainer(digits, quiet, optimizer="sgd", run=None, **device) -> tr.Trainer:
    torch.manual_seed(0)
    return tr.Trainer(
        Net(),
        *digits,
        optimizer=OPTIMIZERS[optimizer],
        schedule=tr.optim.OneCycle(),
        epochs=2,
        batch_size=100,
        ema=0.9,
        device=DeviceSettings(**device),
        run=run,
        settings=tr.RunSettings(log_every=5),
        terminal=quiet,
    )


def weights(made: tr.Trainer) -> dict[str, bytes]:
    return {name: value.cpu().numpy().tobytes() for name, value in made.model.state_dict().items()}


# ------------------------------------------------------------------------------------------------ what is recorded


@pytest.mark.parametrize("optimizer", ["sgd", "fused", "muon"])  # AdamW has its rates on the device on a GPU alone
def test_the_captured_step_equals_the_eager_step(digits, quiet, optimizer):
    plain, other = (trainer(digits, quiet, optimizer, name="cpu") for _ in "12")
    move_rates_to_device(other.optimizer, torch.device("cpu"))
    for made in (plain, other):
        made.model.train()
    for step, (batch, _) in enumerate(zip(plain.batches.epoch(0), range(4), strict=False)):
        for group in other.optimizer.param_groups:
            set_learning_rate(group, other.train_step.schedule.at(step, group["initial_lr"]))
        torch.default_generator.manual_seed(rng.step_seed(0, "model", step, 0))
        recorded = other.train_step._take(batch)
        taken = plain.train_step.step(batch, step)
        torch.testing.assert_close(recorded.loss, taken.loss)
        assert recorded.measures == taken.measures
    for name, value in other.model.state_dict().items():
        torch.testing.assert_close(value, plain.model.state_dict()[name], rtol=1e-4, atol=1e-6)


class NothingIsRead(TorchDispatchMode):
    """Fails when a tensor's value is read: that would synchronize with the GPU, and can't be captured."""

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read"
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("optimizer", ["sgd", "fused", "muon"])
def test_the_captured_step_does_not_read_tensor_values(digits, quiet, optimizer):
    made = trainer(digits, quiet, optimizer, name="cpu")
    batch = next(made.batches.epoch(0))
    for taken in range(2):  # the first one makes the optimizer's state
        if taken:
            move_rates_to_device(made.optimizer, torch.device("cpu"))
        with NothingIsRead():
            made.train_step._take(batch)
    with pytest.raises(AssertionError, match="a value is read"), NothingIsRead():
        torch.zeros(1).add_(torch.ones(1), alpha=torch.ones(()))


def test_a_learning_rate_on_the_device_is_updated_in_place():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    move_rates_to_device(optimizer, torch.device("cpu"))
    rate = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer.param_groups[0], 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.25
    plain = {"lr": 0.1}
    set_learning_rate(plain, 0.25)
    assert plain == {"lr": 0.25}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("device", "settings", "optimizer", "replicas", "says"),
    [
        ("cpu", {}, "sgd", 1, "this device is cpu"),
        ("cuda", {"precision": "fp16"}, "sgd", 1, "device.precision=bf16"),
        ("cuda", {"compile": True}, "sgd", 1, "device.compile"),
        ("cuda", {}, "sgd", 2, "set parallel.replicas=1"),
        ("cuda", {}, "muon-adamw", 1, "set optimizer.other=sgd"),
    ],
)
def test_steps_that_cannot_be_captured_are_refused(device, settings, optimizer, replicas, says):
    made = (OPTIMIZERS | {"muon-adamw": tr.optim.Muon()})[optimizer](Net())
    assert isinstance(made, MuonOptimizer) == optimizer.startswith("muon")
    with pytest.raises(UsageError, match=says):
        check_recordable(
            Device(torch.device(device), DeviceSettings(graph=True, **settings)), [Update("main", made)], replicas
        )


def test_no_graph_is_captured_by_default(digits, quiet):
    assert trainer(digits, quiet, name="cpu").train_step._graph is None


def test_the_command_line_refuses_a_graph_in_one_line(capsys, tmp_path):
    settings = ("--set", "device.graph=true", "--set", "device.name=cpu", "--run", str(tmp_path / "run"))
    assert main(["train", "digits", *settings]) == 2
    said = capsys.readouterr().err
    assert "device.graph records CUDA graphs, and this device is cpu: set device.graph=false" in said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_replayed_steps_give_the_bytes_of_eager_steps(digits, quiet, optimizer, precision, monkeypatch):
    settings = {"name": "cuda", "graph": True, "precision": precision}
    replayed = trainer(digits, quiet, optimizer, **settings)
    replayed.fit()
    assert replayed.train_step._graph is not None
    assert replayed.train_step._graph._graph is not None  # or nothing was recorded
    monkeypatch.setattr(CudaGraph, "__call__", CudaGraph._call)
    one_by_one = trainer(digits, quiet, optimizer, **settings)
    one_by_one.fit()
    assert one_by_one.train_step._graph is not None
    assert one_by_one.train_step._graph._graph is None
    assert weights(replayed) == weights(one_by_one)
    assert replayed.last_evaluation == one_by_one.last_evaluation


class StopAt(Callback):
    """Ends a run after a step, with a checkpoint."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, trainer: tr.Trainer, batch: Batch, loss: torch.Tensor) -> None:
        if trainer.step == self.at:
            trainer.save()
            raise KeyboardInterrupt


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("in_place", [False, True])
def test_a_replayed_run_resumes_to_the_same_bytes(digits, quiet, tmp_path, in_place):
    settings = {"name": "cuda", "graph": True}
    through = trainer(digits, quiet, run=tmp_path / "through", **settings)
    through.fit()
    stopped = trainer(digits, quiet, run=tmp_path / "stopped", **settings)
    stopped.callbacks.append(StopAt(11))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = stopped if in_place else trainer(digits, quiet, run=tmp_path / "stopped", **settings)
    resumed.callbacks[:] = [callback for callback in resumed.callbacks if not isinstance(callback, StopAt)]
    resumed.resume()
    last = [checkpoint.find(tmp_path / name / "checkpoints", "last") for name in ("through", "stopped")]
    for file in ("model.safetensors", "ema.safetensors"):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file
