"""FSDP training: as a script this file is one process of several, whose results the tests compare byte for byte."""

import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import fork
from safetensors.torch import load_file, save_file
from torch import nn

from torchrelay import optim
from torchrelay.data.batch import replica_sizes
from torchrelay.device.device import DeviceSettings, set_up
from torchrelay.distributed import fsdp_checks as shardable
from torchrelay.distributed.fsdp import FSDP, gather, shard
from torchrelay.distributed.fsdp_checks import check_model, check_optimizer, update_in_one_call
from torchrelay.distributed.process_group import DistributedGroup, ProcessGroup
from torchrelay.distributed.replicas import Buffers, GradientTree, give_gradients, take_gradients
from torchrelay.errors import RelayError, UsageError

STEPS = 4
LARGEST_NORM = 0.2  # which every step is above


CPU = torch.device("cpu")


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Odd(nn.Module):
    """Tied weights, one unused, one frozen, one of one element, and sizes that two processes can't divide evenly."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(12, width)
        self.blocks = nn.ModuleList([Residual(width), nn.Linear(width, width), Residual(width)])
        self.blocks[1].weight = self.first_again = nn.Parameter(torch.randn(width, width))
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(width, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.first(x.flatten(1)) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.frozen(x @ self.first_again)


def convolutions() -> nn.Module:
    def block(inputs: int, outputs: int) -> nn.Module:
        layers = (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        return nn.Sequential(OrderedDict(zip("abc", layers, strict=True)))

    return nn.Sequential(block(3, 6), block(6, 6), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 5))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(12, 12)])
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        return self.last(self.blocks[0](self.blocks[0](x.flatten(1))))


class ByRank(nn.Module):
    """Another parameter on every process."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 5), nn.Linear(12, 5), nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return (self.c if dist.is_initialized() and dist.get_rank() else self.a)(x.flatten(1))


NETS = {"odd": Odd, "convolutions": convolutions, "twice": Twice, "by rank": ByRank}


@dataclass(frozen=True)
class Case:
    net: str
    optimizer: Any = field(default_factory=lambda: optim.SGD(lr=0.1))
    replicas: int = 2
    exact: bool = True
    precision: str = "float32"
    first: int = 0
    last: int = STEPS
    device: str = "cpu"


ADAMW = optim.AdamW(lr=0.01, groups=[{"match": ["*bias"], "lr_scale": 2.0}], decay_norms_and_biases=False)
OTHERS = ("Adam", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
EXACT = {
    "momentum": Case("odd"),
    "batch norm, adamw": Case("convolutions", ADAMW),
    "adamw, four replicas": Case("odd", ADAMW, replicas=4),
    "batch norm, four replicas": Case("convolutions", replicas=4),
    "a block that is used twice": Case("twice", ADAMW),
    "bf16": Case("odd", ADAMW, precision="bf16"),
    "foreach": Case("odd", lambda model: torch.optim.Adam(model.parameters(), lr=0.01, foreach=True, amsgrad=True)),
    **{name: Case("odd", optim.Other(name=name)) for name in OTHERS},
}
CLOSE = {
    "not exact": Case("odd", exact=False),
    "not exact, batch norm": Case("convolutions", replicas=4, exact=False),
}
ROUGH = {
    "not exact, bf16": Case("odd", exact=False, precision="bf16"),
    "not exact, bf16, batch norm": Case("convolutions", exact=False, precision="bf16"),
}
BY_FOUR = {
    "four processes": Case("odd", ADAMW, replicas=4),
    "four processes, eight replicas": Case("convolutions", replicas=8),
}
BY_TWO = EXACT | CLOSE | ROUGH
RESUMED = ("momentum", "batch norm, adamw")


def none() -> torch.Tensor:
    raise AssertionError("no process is without samples")


def divided(model: nn.Module, processes: ProcessGroup, exact: bool = True, **settings: Any) -> FSDP:
    device = set_up(DeviceSettings(name="cpu", **settings), exact=exact)
    return FSDP(model, processes, device, exact=exact, dummy_loss=none)


def data(step: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step; that of the last one is smaller than four replicas."""
    rows = 3 if step == STEPS - 1 else 13
    made = torch.Generator().manual_seed(100 + step)
    inputs, targets = torch.randn(rows, 3, 2, 2, generator=made), torch.randint(5, (rows,), generator=made)
    return inputs.to(device), targets.to(device)


def train(case: Case, processes: ProcessGroup, start: Any = None) -> dict[str, Any] | None:
    """Train like the trainer; on rank 0, return the results to compare."""
    torch.manual_seed(processes.rank)  # the first process's weights count
    model = NETS[case.net]()
    device = set_up(DeviceSettings(name=case.device, precision=case.precision), exact=case.exact)

    def dummy_loss() -> torch.Tensor:  # whose gradient may be anything
        return float("nan") * forward(data(0, case.device)[0][:2]).sum()

    forward = FSDP(model, processes, device, exact=case.exact, dummy_loss=dummy_loss)
    optimizer = case.optimizer(model)
    forward.check_optimizer(optimizer)
    if start is not None:
        forward.load_state(model, start[0])
        forward.load_state(optimizer, start[1])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norms = []
    for step in range(case.first, case.last):
        inputs, targets = data(step, case.device)
        sizes = replica_sizes(len(inputs), case.replicas)
        parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
        each = case.replicas // processes.size
        mine = range(processes.rank * each, (processes.rank + 1) * each)
        for replica in reversed(mine):
            with forward.replica(last=replica == mine[0]):
                torch.manual_seed(1000 * step + replica)
                if sizes[replica]:
                    with device.autocast():
                        outputs = forward(parts[replica][0])
                        loss = nn.functional.cross_entropy(outputs, parts[replica][1], reduction="sum") / len(targets)
                    loss.backward()
        norms.append(forward.clip_grad_norm(parameters, LARGEST_NORM))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), device.autocast():
        outputs = forward(data(0, case.device)[0])
    state = forward.full_state((model.state_dict(keep_vars=True), optimizer.state_dict()))
    return state and {"state": state, "norms": torch.stack(norms), "outputs": outputs}


def alone(case: Case, start: Any = None) -> dict[str, Any]:
    """The same in plain PyTorch: one process, one tree."""
    torch.manual_seed(0)
    model = NETS[case.net]()
    device = set_up(DeviceSettings(name=case.device, precision=case.precision), exact=case.exact)
    device.place(model)
    optimizer = case.optimizer(model)
    if start is not None:
        model.load_state_dict(start[0])
        optimizer.load_state_dict(start[1])
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    buffers, norms = Buffers(model), []
    for step in range(case.first, case.last):
        inputs, targets = data(step, case.device)
        sizes = replica_sizes(len(inputs), case.replicas)
        tree = GradientTree()
        buffers.keep()
        for replica in reversed(range(case.replicas)):
            buffers.restore()
            torch.manual_seed(1000 * step + replica)
            if sizes[replica]:
                x, y = inputs.split(sizes)[replica], targets.split(sizes)[replica]
                with device.autocast():
                    loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / len(targets)
                loss.backward()
            tree.add(take_gradients(parameters))
        give_gradients(parameters, tree.total())
        norms.append(nn.utils.clip_grad_norm_(parameters, LARGEST_NORM))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad(), device.autocast():
        outputs = model(data(0, case.device)[0])
    return {"state": (model.state_dict(), optimizer.state_dict()), "norms": torch.stack(norms), "outputs": outputs}


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by their paths, in order."""
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: leaf for name, node in items for key, leaf in flat(node, f"{path}/{name!r}").items()}
    return {path: tree}


def compare(found: Any, wanted: Any, tolerance: float = 0.0) -> None:
    """Same names in the same order, same types and shapes, and the same bytes where there is no tolerance."""
    found, wanted = flat(found), flat(wanted)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            assert type(found[name]) in (torch.Tensor, nn.Parameter), name
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)
            if not tolerance:  # a negative zero is not a positive one
                assert torch.equal(found[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
        else:
            assert found[name] == value, name


# ------------------------------------------------------------------------------------------------ the processes


def raised(case: Case, processes: ProcessGroup) -> str:
    try:
        train(case, processes)
    except RelayError as error:
        return str(error)
    return "nothing"


def averages(processes: ProcessGroup) -> bool:
    """Gather a moving average, shard it again, and check that this process has its shard."""
    torch.manual_seed(0)
    model = Odd()
    divided(model, processes)
    live = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch._foreach_lerp_(list(live.values()), list(model.parameters()), 0.5)
    box = [gather(live, processes)]
    dist.broadcast_object_list(box)
    back = shard(box[0], live)
    return all(torch.equal(back[name].to_local(), value.to_local()) for name, value in live.items())


def process(rank: int, size: int, folder: Path) -> None:
    """Run all cases for this number of processes, and write rank 0's results."""
    torch.set_num_threads(1)
    shardable.SMALLEST = 30
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    processes = DistributedGroup(rank, size, CPU, 60)
    results: dict[str, Any] = {}
    for name, case in (BY_TWO if size == 2 else BY_FOUR).items():
        results[name] = train(case, processes)
    if size == 2:
        for name in RESUMED:
            half = replace(BY_TWO[name], last=STEPS // 2)
            results[f"{name}, half"] = train(half, processes)
            start = torch.load(folder / f"{name}.pt", weights_only=True)
            results[f"{name}, resumed"] = train(replace(BY_TWO[name], first=STEPS // 2), processes, start)
        results["averages"] = averages(processes)
        results["error"] = raised(Case("by rank"), processes)
    if rank == 0:
        torch.save(results, folder / f"results-{size}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Run two processes, then four."""
    warnings.simplefilter("error")
    for size in (2, 4):
        fork(size, lambda rank, size=size: process(rank, size, folder))


@pytest.fixture(scope="module")
def results(_server, tmp_path_factory) -> dict[str, Any]:
    """The results of rank 0 of two and of four processes."""
    folder = tmp_path_factory.mktemp("processes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in RESUMED:
        torch.save(alone(replace(BY_TWO[name], last=STEPS // 2))["state"], folder / f"{name}.pt")
    torch.set_num_threads(threads)
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    done = _server.start(folder, folder=folder, script=Path(__file__), environment=loopback).done()
    assert done.returncode == 0, done.stderr
    return {k: v for size in (2, 4) for k, v in torch.load(folder / f"results-{size}.pt", weights_only=True).items()}


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", EXACT | BY_FOUR)
def test_two_and_four_processes_have_the_bytes_of_one(results, name):
    found = results[name]
    assert all(norm > LARGEST_NORM for norm in found["norms"])  # or clipping wasn't tested
    compare(found, alone((EXACT | BY_FOUR)[name]))


@pytest.mark.parametrize(("name", "tolerance"), [*((name, 1e-5) for name in CLOSE), *((name, 0.05) for name in ROUGH)])
def test_without_exactness_two_processes_are_close_to_one(results, name, tolerance):
    compare(results[name], alone(BY_TWO[name]), tolerance)


def test_another_order_of_addition_gives_other_bytes():
    """So that the tests above can fail: other divisions of the same batches give other bytes."""
    with pytest.raises(AssertionError):
        compare(alone(EXACT["adamw, four replicas"]), alone(replace(EXACT["adamw, four replicas"], replicas=2)))


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_run_resumes_unsharded_to_the_same_bytes(results, name, tmp_path):
    model_state, optimizer_state = results[f"{name}, half"]["state"]
    save_file({key: value.clone() for key, value in model_state.items()}, tmp_path / "model.safetensors")
    start = (load_file(tmp_path / "model.safetensors"), optimizer_state)
    wanted = alone(BY_TWO[name])
    found = alone(replace(BY_TWO[name], first=STEPS // 2), start)
    compare(found["state"], wanted["state"])


@pytest.mark.parametrize("name", RESUMED)
def test_an_unsharded_run_resumes_sharded_to_the_same_bytes(results, name):
    compare(results[f"{name}, resumed"]["state"], alone(BY_TWO[name])["state"])


def test_tied_weights_stay_tied(results):
    state, _ = results["momentum"]["state"]
    assert torch.equal(state["first_again"], state["blocks.1.weight"])
    assert state["first_again"].data_ptr() == state["blocks.1.weight"].data_ptr()


def test_moving_averages_are_gathered_and_sharded(results):
    assert results["averages"]


# ------------------------------------------------------------------------------------------------ what is refused


def test_different_parameters_on_another_rank_are_refused(results):
    assert "other parameters" in results["error"]


def test_a_scalar_parameter_is_refused():
    model = Odd()
    model.number = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UsageError, match=r"'number'.*single number"):
        divided(model, ProcessGroup(0, 2, CPU))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_refused_in_exact_runs(dtype):
    name, device = str(dtype).removeprefix("torch."), set_up(DeviceSettings(name="cpu"), exact=True)
    with pytest.raises(UsageError, match=rf"the parameter '.*' is {name}, .* 'fsdp' isn't exact: .*exact=false"):
        check_model(Odd().to(dtype), device, exact=True)
    check_model(Odd().to(dtype), device, exact=False)
    check_model(Odd(), set_up(DeviceSettings(name="cpu", precision="bf16"), exact=True), exact=True)


def test_half_precision_rounding_depends_on_the_shard_length():
    torch.manual_seed(0)
    weights, gradients = torch.rand(200, 103).bfloat16(), torch.rand(200, 103).bfloat16()
    whole = [weight.clone().add_(gradient, alpha=-0.0123) for weight, gradient in zip(weights, gradients, strict=True)]
    shards = [
        torch.cat([weight[part].clone().add_(gradient[part], alpha=-0.0123) for part in (slice(51), slice(51, None))])
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    assert not torch.equal(torch.stack(whole), torch.stack(shards)), "then they need not be refused any more"


def test_other_memory_formats_are_refused_in_exact_runs():
    model = convolutions().to(memory_format=torch.channels_last)
    with pytest.raises(UsageError, match=r"'0\.a\.weight' isn't contiguous.*run\.exact=false"):
        divided(model, ProcessGroup(0, 2, CPU))
    with pytest.raises(UsageError, match=r"device\.channels_last .* aren't exact together: .* run\.exact=false"):
        divided(convolutions(), ProcessGroup(0, 2, CPU), channels_last=True)


@pytest.mark.parametrize("exact", [True, False])
def test_compiled_models_are_refused(exact):
    with pytest.raises(UsageError, match=r"device\.compile .* don't go together: leave one out, or use 'ddp'"):
        divided(Odd(), ProcessGroup(0, 2, CPU), exact, compile=True)


def test_a_model_that_looks_at_the_data_first_is_refused():
    class Looks(Odd):
        def init_from(self, images: torch.Tensor) -> None:
            """Never called."""

    with pytest.raises(UsageError, match=r"Looks initializes itself from the data.*use 'ddp'"):
        divided(Looks(), ProcessGroup(0, 2, CPU), exact=False)


@pytest.mark.parametrize(
    ("settings", "exact", "text"),
    [
        (optim.Muon(), False, "'muon' needs whole matrices"),
        (optim.Other(name="Adafactor"), False, "'adafactor' needs whole matrices"),
        (
            lambda model: type("Lamb", (torch.optim.SGD,), {})(model.parameters()),
            True,
            "'Lamb' isn't known to give",
        ),
        (lambda model: torch.optim.AdamW(model.parameters(), fused=True), True, "a fused 'adamw' gives other bits"),
        (lambda model: torch.optim.SGD(model.parameters(), fused=True), False, "a fused 'sgd' does not work"),
    ],
)
def test_optimizers_that_need_whole_tensors_are_refused(settings, exact, text):
    with pytest.raises(UsageError, match=text):
        check_optimizer(settings(Odd()), exact)


def test_one_call_updates_all_shards_and_keeps_the_saved_groups():
    model = Odd()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.first.parameters()], lr=0.1)
    optimizer.param_groups[1]["foreach"] = False
    saved = optimizer.state_dict()["param_groups"]
    update_in_one_call(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # which makes new groups
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(group["foreach"] for group in optimizer.param_groups))
    model(data(0, "cpu")[0]).sum().backward()
    optimizer.step()
    assert seen == [True, False]
    assert optimizer.state_dict()["param_groups"] == saved


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("settings", [optim.SGD(), optim.AdamW(), optim.Other(name="NAdam")])
def test_elementwise_optimizers_are_accepted(settings, exact):
    check_optimizer(settings(Odd()), exact)


# ------------------------------------------------------------------------------------------------ blocks


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(shardable, "SMALLEST", 30)


@pytest.mark.usefixtures("_small")
def test_blocks_are_the_large_children_of_lists():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(9, 9), nn.Linear(2, 2)]), "head": nn.Linear(9, 9)})
    assert shardable.blocks(model) == [model["layers"][0]]


@pytest.mark.usefixtures("_small")
def test_a_block_with_shared_weights_is_not_sharded_separately():
    model = Odd()
    assert shardable.blocks(model) == [model.blocks[0], model.blocks[2]]
    own = nn.Sequential(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), *(nn.Linear(9, 9) for _ in range(8)))
    own[0][0].weight = own[0][1].weight
    assert shardable.blocks(own)[0] is own[0]


@pytest.mark.usefixtures("_small")
def test_nested_blocks_count_only_inside_a_dominant_block():
    def layer() -> nn.Module:
        return nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))

    deep = nn.Sequential(*(layer() for _ in range(4)))
    assert shardable.blocks(deep) == list(deep)
    wrapped = nn.Sequential(deep, nn.Linear(9, 2))
    assert shardable.blocks(wrapped) == list(deep)


@pytest.mark.usefixtures("_small")
def test_a_block_used_twice_counts_once():
    block = nn.Linear(9, 9)
    assert shardable.blocks(nn.ModuleList([block, nn.Sequential(block), nn.Linear(9, 9)])).count(block) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
