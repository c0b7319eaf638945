"""Several processes with GPUs: tests for one GPU, and for more if there are more."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_fsdp import ADAMW, Case, alone, compare, train
from torch import nn

import torchrelay as tr
from torchrelay.device.device import DeviceSettings, set_up
from torchrelay.distributed.build import build_strategy
from torchrelay.distributed.process_group import DistributedGroup
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.run.settings import RunSettings

DEVICE, BACKEND = "cuda", "nccl"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def world(tmp_path) -> Iterator[DistributedGroup]:
    """A process group of one process, initialized as if there were more."""
    dist.init_process_group(BACKEND, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield DistributedGroup(0, 1, torch.device(DEVICE), 60)
    dist.destroy_process_group()


def trained(kind: str, run: Path | None = None, **changes) -> tr.Trainer:
    torch.manual_seed(0)
    train_part, test_part = tr.data.digits()
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    arguments = {
        "optimizer": tr.optim.AdamW(lr=0.01, clip_norm=1.0),
        "epochs": 1,
        "device": DEVICE,
        "ema": 0.9,
        "parallel": ParallelSettings(kind=kind, replicas=2),
    }
    trainer = tr.Trainer(net, train_part, test_part, run=run, **(arguments | changes))
    trainer.fit()
    return trainer


def test_collectives_deliver_their_messages(group):
    values = torch.arange(3.0, device=DEVICE)
    assert torch.equal(group.gather(values), values[None])
    group.broadcast([values, torch.ones(2)])
    assert group.broadcast_bytes(b"text") == b"text"
    assert [group.agree(flags) for flags in (1, 2, 0)] == [0, 1, 2]
    group.barrier("the test")


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_are_added(group, exact):
    model, inputs = nn.Linear(3, 2), torch.randn(2, 5, 3, device=DEVICE)
    device = set_up(DeviceSettings(name=DEVICE), exact)

    def dummy_loss() -> torch.Tensor:
        return strategy(inputs[0]).sum()

    strategy = build_strategy(model, "ddp", group, device, exact=exact, dummy_loss=dummy_loss)
    losses = []
    for number, part in enumerate(inputs):
        with strategy.replica(last=number == 1):
            losses.append(strategy(part).sum())
            losses[-1].backward()
    assert torch.equal(strategy.reduce([loss.detach() for loss in losses]), losses[0] + losses[1])
    assert torch.allclose(model.weight.grad, inputs.sum((0, 1)).expand(2, 3), atol=1e-5)


@pytest.mark.parametrize("case", [Case("odd", ADAMW), Case("odd"), Case("convolutions")])
def test_a_sharded_model_has_the_bytes_of_a_whole_one(group, case):
    case = Case(case.net, case.optimizer, replicas=1, device=DEVICE)  # PyTorch adds nothing up for one process
    compare(train(case, group), alone(case))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sharded_model_that_is_not_exact_is_close(group, precision):
    case = Case("odd", exact=False, precision=precision, device=DEVICE)
    compare(train(case, group), alone(case), 1e-4 if precision == "float32" else 0.05)


def test_dp_trains_on_all_gpus(tmp_path):
    inexact = RunSettings(exact=False, epochs=1)
    found = trained("dp", tmp_path / "run", settings=inexact)
    several = torch.cuda.device_count() > 1
    assert isinstance(found.strategy._forward, nn.DataParallel) == several
    assert ("has no effect with one device" in (tmp_path / "run" / "log.txt").read_text()) != several
    wanted = trained("none", settings=inexact)
    for mine, theirs in zip(found.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=0.05)


def test_fsdp_on_one_gpu_does_not_shard(tmp_path, same_runs):
    trained("fsdp", tmp_path / "fsdp")
    trained("none", tmp_path / "none")
    same_runs(tmp_path / "fsdp", tmp_path / "none")


@two_gpus
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_write_the_files_of_one(tmp_path, same_runs, kind):
    for name, devices in (("none", 1), (kind, 2)):
        settings = ("run.epochs=2", "parallel.replicas=2", f"parallel.kind={name}", "device.name=cuda")
        arguments = [argument for setting in settings for argument in ("--set", setting)]
        command = [sys.executable, "-m", "torchrelay", "train", "digits", "--run", tmp_path / name, *arguments]
        subprocess.run([*command, "--devices", str(devices)], check=True, timeout=200)
    same_runs(tmp_path / kind, tmp_path / "none")
