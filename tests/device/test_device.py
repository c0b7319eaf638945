"""Choosing and configuring the device; each setting trains."""

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torchrelay as tr
from torchrelay import checkpoint
from torchrelay.device.device import DeviceSettings, identity_of, set_up
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.distributed.strategy import Strategy
from torchrelay.errors import Interrupted, UsageError

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


class Net(nn.Sequential):
    """A small convolutional network for 8x8 gray images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip


def train(digits, quiet, run=None, epochs=3, **settings) -> tr.Trainer:
    torch.manual_seed(0)
    trainer = tr.Trainer(
        Net(),
        *digits,
        optimizer=tr.optim.SGD(lr=0.05, momentum=0.9),
        epochs=epochs,
        batch_size=100,
        device=DeviceSettings(**settings),
        run=run,
        terminal=quiet,
    )
    trainer.fit()
    return trainer


def test_auto_chooses_an_available_device():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert set_up(DeviceSettings(), exact=True).device == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cudda", "device.name 'cudda' is unknown: use auto, cpu, cuda, cuda:1 or mps"),
        ("CPU", "'CPU' is unknown"),
        ("cuda:x", "'cuda:x' is unknown"),
        ("cuda:-1", "'cuda:-1' is unknown"),
        ("cuda:", "'cuda:' is unknown"),
        ("meta", "'meta' is unknown"),
        ("", "'' is unknown"),
        ("cuda:99", "device.name is 'cuda:99', but PyTorch sees"),
        ("cpu:1", "'cpu:1' is unknown"),
    ],
)
def test_an_unavailable_device_is_refused(name, says):
    with pytest.raises(UsageError) as caught:
        set_up(DeviceSettings(name=name), exact=True)
    assert says in str(caught.value)


def test_fp16_is_refused_on_the_cpu():
    with pytest.raises(UsageError, match="'fp16' isn't for the CPU: use 'bf16' or 'float32'"):
        set_up(DeviceSettings(name="cpu", precision="fp16"), exact=True)


def test_cudnn_benchmarking_is_refused_in_an_exact_run():
    with pytest.raises(UsageError, match=r"device\.benchmark gives other bits each time"):
        set_up(DeviceSettings(benchmark=True), exact=True)
    assert set_up(DeviceSettings(benchmark=True), exact=False)
    assert torch.backends.cudnn.benchmark
    set_up(DeviceSettings(), exact=True)
    assert not torch.backends.cudnn.benchmark


def test_exactness_switches_deterministic_kernels_on_and_off():
    for exact in (False, True):
        set_up(DeviceSettings(), exact=exact)
        assert torch.are_deterministic_algorithms_enabled() is exact


def test_the_number_of_threads_is_set_and_logged(digits, quiet, tmp_path):
    trainer = train(digits, quiet, tmp_path / "run", epochs=1, name="cpu", threads=2)
    assert torch.get_num_threads() == 2
    assert trainer.state.identity()["threads"] == 2
    assert "cpu, float32, 2 threads" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux tells here what a CPU has")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this PyTorch doesn't tell what a CPU has")
def test_the_identity_distinguishes_cpus_by_the_instruction_sets_of_their_kernels():
    facts = Path("/proc/cpuinfo").read_text()
    told = identity_of(torch.device("cpu"))
    for unit in ("avx512_bf16", "amx_bf16"):  # PyTorch's own word is AVX512 for CPUs with and without them
        assert (unit in str(told["instructions"])) == (unit in facts)


def test_bf16_trains_on_the_cpu_with_float32_weights(digits, quiet):
    dtypes = []
    trainer = train(digits, quiet, name="cpu", precision="bf16")
    trainer.model[5].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    found = trainer.evaluate()
    assert set(dtypes) == {torch.bfloat16}
    assert found.values["accuracy"] > 0.85
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_channels_last_reaches_weights_and_batches_and_changes_little(digits, quiet):
    plain = train(digits, quiet, name="cpu")
    trainer = train(digits, quiet, name="cpu", channels_last=True)
    batch = next(trainer.batches.epoch(0))
    assert trainer.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert trainer.device.arrange(torch.zeros(2, 3, 4, 4)).is_contiguous(memory_format=torch.channels_last)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert abs(trainer.evaluate().values["accuracy"] - plain.evaluate().values["accuracy"]) < 0.02


def test_channels_last_leaves_other_tensors_alone():
    device = set_up(DeviceSettings(name="cpu", channels_last=True), exact=True)
    features = torch.zeros(2, 3)
    assert device.arrange(features) is features
    assert device.arrange([features]) == [features]


def test_moving_keeps_the_structure():
    device = set_up(DeviceSettings(name="cpu"), exact=True)
    given = {"a": torch.ones(2), "b": [torch.zeros(1), (torch.ones(1), "text")]}
    moved = device.move(given)
    assert moved["b"][1][1] == "text"
    assert torch.equal(moved["a"], given["a"])
    assert isinstance(moved["b"][1], tuple)


@pytest.mark.slow
def test_a_compiled_model_trains_and_saves_a_plain_checkpoint(digits, quiet, tmp_path):
    plain = train(digits, quiet, tmp_path / "plain", epochs=1, name="cpu")
    compiled = train(digits, quiet, tmp_path / "compiled", epochs=1, name="cpu", compile=True)
    weights = load_file(checkpoint.find(tmp_path / "compiled" / "checkpoints", "last") / "model.safetensors")
    assert set(weights) == set(Net().state_dict())
    Net().load_state_dict(weights)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, atol=1e-3, rtol=1e-3)
    assert "compiled" in compiled.device.describe()
    log = (tmp_path / "compiled" / "log.txt").read_text()
    assert "compiled" in log


class Endless(nn.Module):
    """A module without parts to count, and one whose truth can't be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Net()

    def __bool__(self) -> bool:
        raise TypeError("it has no truth")

    def forward(self, images):
        return self.layers(images)


def test_a_model_is_never_asked_for_its_length_or_truth(digits, quiet):
    trainer = tr.Trainer(Endless(), *digits, epochs=1, batch_size=600, terminal=quiet, device="cpu")
    assert trainer.fit()["accuracy"] > 0
    # dynamo compiles nothing here, but wraps the module as it would for any compiler
    forward = torch.compile(nn.Identity(), backend="eager")
    assert (
        Strategy(nn.Identity(), ProcessGroup(0, 1, torch.device("cpu")), exact=True, forward=forward).module is forward
    )


@pytest.mark.slow
def test_a_compiled_module_without_a_length_resumes_to_the_same_bytes(digits, quiet, tmp_path, same_runs):
    def build(run, **options) -> tr.Trainer:
        torch.manual_seed(0)
        device = DeviceSettings(name="cpu", compile=True)
        options |= {"checkpoint": tr.CheckpointSettings(every="2 steps", keep=9), "terminal": quiet}
        return tr.Trainer(Endless(), *digits, epochs=2, batch_size=300, device=device, run=tmp_path / run, **options)

    build("whole", callbacks=[StopAfter(0)]).fit()
    stopped = build("parted", callbacks=[StopAfter(5)])
    with pytest.raises(Interrupted):
        stopped.fit()
    build("parted", callbacks=[StopAfter(0)]).resume()
    same_runs(tmp_path / "whole", tmp_path / "parted")


class StopAfter(tr.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_compiling_without_a_compiler_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"device\.compile needs a C\+\+ compiler"):
        set_up(DeviceSettings(name="cpu", compile=True), exact=False)


def listening() -> set[str]:
    """The sockets of this process on which it listens, by inode."""
    own = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself
            own.add(str(link.readlink()))
    tables = [Path(f"/proc/self/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table]
    return {row[9] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def test_an_open_listening_socket_is_detected():
    with socket.create_server(("127.0.0.1", 0)):
        assert len(listening()) == 1
    assert listening() == set()


def test_a_run_on_one_device_opens_no_listening_socket(digits, quiet, tmp_path):
    found = []

    class Look(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            found.append(listening())

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    tr.Trainer(model, *digits, epochs=2, run=tmp_path / "run", callbacks=[Look()], terminal=quiet).fit()
    assert found == [set()] * 12


# ------------------------------------------------------------------------------------------------ with a GPU


@pytest.mark.gpu
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_two_trainings_on_a_gpu_give_the_same_bytes(digits, quiet, tmp_path, same_runs, precision, channels_last):
    for name in "ab":
        trainer = train(digits, quiet, tmp_path / name, name="cuda", precision=precision, channels_last=channels_last)
        assert trainer.evaluate().values["accuracy"] > 0.85
    same_runs(tmp_path / "a", tmp_path / "b")


@pytest.mark.gpu
@pytest.mark.gpu
@needs_cuda
def test_a_gpu_learns_what_the_cpu_learns(digits, quiet):
    on_gpu = train(digits, quiet, name="cuda").evaluate().values["accuracy"]
    on_cpu = train(digits, quiet, name="cpu").evaluate().values["accuracy"]
    assert abs(on_gpu - on_cpu) < 0.03


@pytest.mark.gpu
@pytest.mark.gpu
@needs_cuda
def test_the_log_names_the_gpu_and_tf32_is_applied(digits, quiet, tmp_path):
    train(digits, quiet, tmp_path / "run", epochs=1, name="cuda:0", tf32=True)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.cuda.get_device_name(0) in (tmp_path / "run" / "log.txt").read_text()
    set_up(DeviceSettings(name="cuda"), exact=True)
    assert not torch.backends.cuda.matmul.allow_tf32
