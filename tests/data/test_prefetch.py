"""Batches prepared on another stream: the same batches, and none starts before it is requested."""

from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import torchrelay as tr
from torchrelay.data import batches as module
from torchrelay.data.augment import Flip, PaddedCrop, Pipeline
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.data.prefetch import SideStream, _tensors, gather, prefetch, side_stream
from torchrelay.data.sources import arrays, dataset
from torchrelay.device.device import DeviceSettings, set_up

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
CPU = set_up(DeviceSettings(name="cpu"), exact=False)


class Written:
    """Stands in for a stream and records what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self) -> None:
        self.log.append("begin")

    @contextmanager
    def preparing(self):
        self.log.append("(")
        try:
            yield
        finally:
            self.log.append(")")

    def hand_over(self, batch: Batch) -> None:
        self.log.append(f"{len(batch.targets)} handed over")


class Stream:
    """Stands in for a CUDA stream and records the calls."""

    log: list[str]

    def __init__(self, name: object, priority: int = 0) -> None:
        self.name = "side" if priority else name

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self, event: "Event") -> "Event":
        self.log.append(f"{self.name} marks {event.number}")
        return event


class Event:
    made = 0

    def __init__(self, blocking: bool) -> None:
        Event.made += 1
        self.number = Event.made

    def synchronize(self) -> None:
        Stream.log.append(f"host waits for {self.number}")


def photographs(samples: int = 50):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (samples, 3, 8, 8), dtype=torch.uint8, generator=random)
    return arrays(images, np.arange(samples) % 5, [str(i) for i in range(5)])


def content(found) -> list[tuple[bytes, bytes, list[int]]]:
    return [
        (batch.inputs.cpu().numpy().tobytes(), batch.targets.cpu().numpy().tobytes(), batch.indices.tolist())
        for batch in found
    ]


PIPELINE = Pipeline((Flip(), PaddedCrop(padding=1)), mean=(0.5,) * 3, std=(0.2,) * 3)


# ------------------------------------------------------------------------------------------------ the order of things


def test_on_the_cpu_batches_are_prepared_in_the_loop():
    assert side_stream(torch.device("cpu")) is None
    assert Batches(photographs(), 8, CPU, PIPELINE)._stream is None


def test_the_next_batch_is_prepared_on_request_and_then_handed_over(monkeypatch):
    written = Written()
    monkeypatch.setattr(module, "side_stream", lambda device: written)
    found = Batches(photographs(), 20, CPU, PIPELINE)
    batches = found.epoch(0)
    assert not written.log
    next(batches)
    assert written.log == ["begin", "(", ")", "20 handed over"]
    assert [len(batch.targets) for batch in batches] == [20, 10]
    assert written.log[4:] == ["(", ")", "20 handed over", "(", ")", "10 handed over", "(", ")"]


def test_streams_synchronize_and_the_host_waits_for_the_step_before_last(monkeypatch):
    Stream.log, Event.made, loop = [], 0, Stream("loop")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: loop)

    @contextmanager
    def switched(stream):
        Stream.log.append(f"to {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "stream", switched)
    where = side_stream(torch.device("cuda"))
    batches = prefetch(Batches(photographs(), 8, CPU, PIPELINE).epoch(0), where)
    for _ in range(3):
        next(batches)
    each = [["loop marks {}", "to side", "loop waits for side"], ["host waits for 1"]]
    first, second, third = ([line.format(n) for line in each[0]] for n in (1, 2, 3))
    assert Stream.log == ["side waits for loop", *first, *second, third[0], *each[1], *third[1:]]


@pytest.mark.parametrize("start", [0, 3])
def test_prefetched_batches_are_the_same(monkeypatch, start):
    plain = content(Batches(photographs(), 8, CPU, PIPELINE, seed=2).epoch(1, start))
    monkeypatch.setattr(module, "side_stream", lambda device: Written())
    assert content(Batches(photographs(), 8, CPU, PIPELINE, seed=2).epoch(1, start)) == plain


@pytest.mark.parametrize("where", [None, Written()])
def test_an_error_is_raised_at_its_batch_and_the_source_is_closed(where):
    closed = []

    def source():
        try:
            yield from islice(Batches(photographs(), 8, CPU, PIPELINE).epoch(0), 2)
            raise ValueError("broken")
        finally:
            closed.append(True)

    found = prefetch(source(), where)
    assert len(next(found).targets) == len(next(found).targets) == 8
    with pytest.raises(ValueError, match="broken"):
        next(found)
    assert closed == [True]
    assert where is None or where.log[-2:] == ["(", ")"]
    given_up = prefetch(source(), where)
    next(given_up)
    given_up.close()
    assert closed == [True, True]


class Own(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int):
        return torch.full((3, 4, 4), float(index)), index % 2


def own_transform(images, draw):
    return images


@pytest.mark.parametrize(
    ("source", "pipeline", "workers", "is_beside"),
    [
        (photographs(), PIPELINE, 0, True),
        (photographs(), Pipeline((Flip(), own_transform)), 0, False),
        (dataset(Own()), Pipeline(), 0, False),
        (dataset(Own()), Pipeline(), 1, True),
    ],
)
def test_user_code_runs_on_the_stream_of_the_loop(monkeypatch, source, pipeline, workers, is_beside):
    monkeypatch.setattr(module, "side_stream", lambda device: Written())
    found = Batches(source, 8, CPU, pipeline, workers=workers)
    assert (found._stream is not None) == is_beside


def test_all_tensors_of_a_batch_are_found():
    a, b, c = torch.zeros(3).unbind()
    assert list(_tensors(({"x": a, "y": [b, "text"]}, c))) == [a, b, c]
    assert list(_tensors(None)) == []


def test_pinned_memory_is_requested_and_holds_the_same_data(monkeypatch):
    asked, empty = [], torch.empty

    def without_a_gpu(*shape, pin_memory, **how):
        asked.append(pin_memory)
        return empty(*shape, **how)

    values, index = torch.randn(7, 2, 3).permute(0, 2, 1), torch.tensor([5, 0, 5])
    plain = gather(values, index, pin=False)
    monkeypatch.setattr(torch, "empty", without_a_gpu)
    pinned = gather(values, index, pin=True)
    assert asked == [True]
    assert torch.equal(pinned, plain)
    assert pinned.stride() == plain.stride()


# ------------------------------------------------------------------------------------------------ on a GPU


def on_gpu(source, **how) -> Batches:
    return Batches(source, 8, set_up(DeviceSettings(name="cuda"), exact=True), how.pop("pipeline", PIPELINE), **how)


@gpu
@needs_cuda
@pytest.mark.parametrize("resident", [True, False])
def test_batches_prepared_on_another_stream_have_the_same_bits(monkeypatch, resident):
    """The device is kept busy, so a missing synchronization or reused memory would change a batch."""
    if not resident:
        monkeypatch.setattr(module, "_ON_DEVICE", 0)
    source = photographs(2_000)
    found, on_one_stream = on_gpu(source, seed=1), on_gpu(source, seed=1)
    on_one_stream._stream = None
    wanted = content(on_one_stream.epoch(2))
    assert isinstance(found._stream, SideStream)
    assert found._inputs.is_cuda == resident
    busy, seen = torch.randn(1024, 1024, device="cuda"), []
    for batch in found.epoch(2):
        for _ in range(20):
            busy = (busy @ busy).clamp_(-1, 1)
        seen.append((batch.inputs.clone(), batch.targets.clone(), batch.indices))
        del batch
    mine = [(x.cpu().numpy().tobytes(), y.cpu().numpy().tobytes(), indices.tolist()) for x, y, indices in seen]
    assert mine == wanted


@gpu
@needs_cuda
def test_a_dataset_read_by_workers_has_the_same_bits():
    source = dataset(Own())
    wanted = content(Batches(source, 8, CPU, Pipeline(), seed=1).epoch(2))
    found = on_gpu(source, seed=1, pipeline=Pipeline(), workers=2)
    assert isinstance(found._stream, SideStream)
    assert content(found.epoch(2)) == wanted
    found.close()


@gpu
@needs_cuda
def test_the_host_does_not_run_far_ahead():
    """Memory for a few batches is enough even with long steps."""
    images = torch.zeros(4_000, 3, 32, 32, dtype=torch.uint8)
    device = set_up(DeviceSettings(name="cuda"), exact=True)
    found = Batches(arrays(images, np.zeros(4_000)), 100, device, PIPELINE)
    busy, size = torch.randn(2048, 2048, device="cuda"), 0
    out = busy @ busy
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["active_bytes.all.current"]
    for batch in found.epoch(0):
        size = batch.inputs.nbytes
        for _ in range(100):
            torch.mm(busy, busy, out=out)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["active_bytes.all.peak"] - before < 12 * size  # of 40


@gpu
@needs_cuda
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("resident", [True, False])
def test_prefetching_does_not_change_the_bytes_of_a_run(monkeypatch, digits, quiet, graph, resident):
    if not resident:
        monkeypatch.setattr(module, "_ON_DEVICE", 0)

    def weights() -> list[bytes]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(576, 10))
        made = tr.Trainer(
            model,
            *digits,
            optimizer=tr.optim.SGD(lr=0.05),
            augment=[PaddedCrop(padding=1)],
            epochs=2,
            batch_size=100,
            device=DeviceSettings(name="cuda", graph=graph),
            terminal=quiet,
        )
        made.fit()
        assert made.last_evaluation is not None
        found = [value.cpu().numpy().tobytes() for value in made.model.state_dict().values()]
        return [*found, repr(made.last_evaluation.values).encode()]

    with_it = weights()
    monkeypatch.setattr(module, "side_stream", lambda device: None)
    assert weights() == with_it
