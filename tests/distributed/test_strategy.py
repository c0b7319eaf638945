"""A strategy on its own, without a trainer: one step has the gradients, the loss and the buffers of plain autograd."""

import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrelay.device.device import DeviceSettings, set_up
from torchrelay.distributed.build import build_strategy
from torchrelay.distributed.process_group import ProcessGroup, init_process_group
from torchrelay.distributed.replicas import GradientTree, give_gradients, take_gradients

CPU = torch.device("cpu")
REPLICAS = 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def parts() -> list[torch.Tensor]:
    return list(torch.randn(REPLICAS, 5, 6, generator=torch.Generator().manual_seed(1)))


def one_step(group: ProcessGroup, kind: str = "ddp") -> dict[str, torch.Tensor]:
    """The results of one step by the strategy."""
    model = net()
    strategy = build_strategy(model, kind, group, set_up(DeviceSettings(name="cpu"), exact=True), exact=True)
    strategy.broadcast_weights()
    share = REPLICAS // group.size
    losses = []
    for number, part in reversed(list(enumerate(parts()[group.rank * share :][:share]))):
        with strategy.replica(last=number == 0):
            loss = strategy(part).square().sum()
            loss.backward()
        losses.append(loss.detach())
    return results(model, strategy.reduce(losses))


def by_autograd() -> dict[str, torch.Tensor]:
    """The same with plain autograd and the tree."""
    model, gradients, losses = net(), GradientTree(), GradientTree()
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for part in reversed(parts()):
        for name, buffer in model.named_buffers():
            buffer.copy_(start[name])
        loss = model(part).square().sum()
        loss.backward()
        gradients.add(take_gradients(list(model.parameters())))
        losses.add([loss.detach()])
    give_gradients(list(model.parameters()), gradients.total())
    (total,) = losses.total()
    assert total is not None
    return results(model, total)


def results(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    gradients = {f"{name}.grad": parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss, **gradients, **dict(model.named_buffers())}  # type: ignore[dict-item]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_step_in_one_process_has_the_bits_of_autograd():
    assert_same(one_step(ProcessGroup(0, 1, CPU), "none"), by_autograd())


def test_a_step_of_one_replica_uses_autograds_gradients_in_place():
    model = net()
    strategy = build_strategy(
        model, "none", ProcessGroup(0, 1, CPU), set_up(DeviceSettings(name="cpu"), exact=True), exact=True
    )
    with strategy.replica(last=True):
        loss = strategy(parts()[0]).square().sum()
        loss.backward()
        before = [parameter.grad for parameter in model.parameters()]
    assert strategy.reduce([loss.detach()]) == loss
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient


def test_an_error_in_a_replica_does_not_affect_the_next_step():
    model = net()
    strategy = build_strategy(
        model, "none", ProcessGroup(0, 1, CPU), set_up(DeviceSettings(name="cpu"), exact=True), exact=True
    )
    with strategy.replica(last=False):
        strategy(parts()[0]).sum().backward()
    with pytest.raises(ZeroDivisionError), strategy.replica(last=False):
        raise ZeroDivisionError
    model.zero_grad()
    with strategy.replica(last=True):
        strategy(parts()[1]).sum().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(parts()[1]).sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(gradient, parameter.grad)


def test_a_step_in_two_processes_has_the_bits_of_autograd(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    own = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    for process in [start(tmp_path, script=Path(__file__), environment=each) for each in own]:
        done = process.done()
        assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert_same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), by_autograd())


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = init_process_group(CPU)
    torch.save(one_step(group), Path(sys.argv[1]) / f"{group.rank}.pt")
