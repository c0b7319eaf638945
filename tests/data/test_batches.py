"""Global batches are a pure function of (seed, epoch, position) for every way of reading them."""

import os
import random
import signal
import threading
import time
from collections import namedtuple
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from torchrelay.checkpoint import Contents
from torchrelay.checkpoint.writer import Writer
from torchrelay.data import image_folder
from torchrelay.data.augment import Flip, PaddedCrop, Pipeline
from torchrelay.data.batch import Arguments, Batch, replica_sizes
from torchrelay.data.batches import Batches
from torchrelay.data.sources import ArraySource, arrays, dataset, statistics
from torchrelay.device.device import DeviceSettings, set_up
from torchrelay.errors import RelayError, UsageError

CPU = set_up(DeviceSettings(name="cpu"), exact=False)


def numbered(samples: int = 103, classes: int = 5) -> ArraySource:
    """Each sample's input is its own number, its target that modulo the classes."""
    numbers = np.arange(samples)
    return arrays(numbers[:, None], numbers % classes, [str(i) for i in range(classes)])


class Noisy(Dataset):
    """A dataset that draws from every global generator, computes with tensors, and counts its reads."""

    def __init__(self, samples: int = 53) -> None:
        self.samples = samples
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int):
        self.reads.append(index)
        wide = torch.rand(40_000)  # wide enough for two threads to add it up in another order
        drawn = [torch.randn(()), wide.mean(), float(np.random.rand()), random.random()]
        return torch.tensor([float(index), *map(float, drawn)]), index % 3


def batches(source, size=10, **how) -> Batches:
    return Batches(source, size, CPU, how.pop("pipeline", Pipeline()), **how)


def content(found) -> list[tuple[bytes, bytes, list[int], tuple[int, ...]]]:
    return [
        (batch.inputs.numpy().tobytes(), batch.targets.numpy().tobytes(), batch.indices.tolist(), batch.replica_sizes)
        for batch in found
    ]


def shuffled(found) -> list[int]:
    return [int(index) for batch in found for index in batch.indices]


# ------------------------------------------------------------------------------------------------ arrays


def test_an_epoch_contains_every_sample_once_with_its_target():
    found = list(batches(numbered()).epoch(0))
    assert [len(batch.targets) for batch in found] == [10] * 10 + [3]
    assert sorted(shuffled(found)) == list(range(103))
    for batch in found:
        assert batch.inputs[:, 0].tolist() == batch.indices.tolist()
        assert torch.equal(batch.targets, batch.inputs[:, 0] % 5)


def test_each_epoch_and_seed_has_its_own_order():
    orders = [shuffled(batches(numbered(), seed=seed).epoch(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == shuffled(batches(numbered(), seed=0).epoch(0))


def test_the_last_smaller_batch_can_be_dropped():
    short = batches(numbered(), drop_last=True)
    assert len(short) == 10
    assert content(short.epoch(2)) == content(batches(numbered()).epoch(2))[:10]
    assert len(batches(numbered(100), drop_last=True)) == len(batches(numbered(100))) == 10


def test_dropping_the_only_batch_is_refused():
    with pytest.raises(RelayError, match="103 samples are fewer than a batch of 104"):
        batches(numbered(), 104, drop_last=True)


@pytest.mark.parametrize(
    ("argument", "value", "text"),
    [
        ("sampling", "sequentiall", "sampling 'sequentiall' is unknown; did you mean 'sequential'?"),
        ("sampling", "weighted", "known: shuffle, balanced, sequential"),
        ("size", 0, "batch_size is 0: it must be a whole number of 1 or more"),
        ("size", 2.5, "batch_size is 2.5: it must be a whole number of 1 or more"),
        ("workers", -1, "workers is -1: it must be a whole number of 0 or more"),
        ("replicas", 0, "replicas is 0: it must be a whole number of 1 or more"),
        ("rank", 1, "rank is 1: 1 processes have ranks 0 to 0"),
        ("world_size", 2, "2 processes can't share 1 replicas"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(argument, value, text):
    with pytest.raises(UsageError) as caught:
        batches(numbered(), **{argument: value})
    assert text in str(caught.value)


def test_batches_work_without_a_trainer_and_start_inside_an_epoch():
    """Arrays and a device are enough; the second half of an epoch depends only on its position."""
    images = torch.arange(40 * 4, dtype=torch.uint8).view(40, 1, 2, 2)
    made = Batches(arrays(images, np.arange(40) % 2), np.int64(8), CPU, Pipeline(mean=(0.5,), std=(0.5,)), seed=1)
    assert len(made) == 5
    rest = list(made.epoch(epoch=3, start=3))
    assert [batch.size for batch in rest] == [8, 8]
    for number, batch in enumerate(rest, 3):
        assert batch.indices.tolist() == made.indices(3, number).tolist()
        assert torch.equal(batch.inputs, (images[batch.indices] - 127.5) * (1 / 127.5))


def test_evaluation_keeps_the_order_of_the_source_for_every_sampling():
    found = batches(numbered(), train=False, sampling="balanced").epoch()
    assert shuffled(found) == list(range(103))
    assert shuffled(batches(numbered(), sampling="sequential").epoch(3)) == list(range(103))


def test_the_batch_size_does_not_change_the_order():
    assert shuffled(batches(numbered(), 7).epoch(1)) == shuffled(batches(numbered(), 50).epoch(1))


@pytest.mark.parametrize("start", [0, 1, 17, 39, 40, 41])
def test_starting_at_a_batch_yields_the_tail_of_the_epoch_to_the_byte(start):
    images = torch.randint(0, 256, (400, 3, 8, 8), dtype=torch.uint8)
    pipeline = Pipeline((Flip(), PaddedCrop(padding=2)), mean=(0.5,) * 3, std=(0.25,) * 3)
    found = batches(arrays(images, torch.arange(400) % 10), pipeline=pipeline, replicas=4)
    assert content(found.epoch(5, start=start)) == content(found.epoch(5))[start:]


def test_starting_in_an_order_computed_in_blocks_yields_the_tail():
    found = batches(numbered(50_000), 100)
    whole = shuffled(found.epoch(1))
    assert sorted(whole) == list(range(50_000))
    for start in (163, 164, 400, 499):
        assert shuffled(found.epoch(1, start)) == whole[100 * start :]


def test_batches_do_not_share_memory_with_the_source():
    source = numbered()
    for batch in batches(source, sampling="sequential").epoch():
        batch.inputs.zero_()
    assert source.inputs[:, 0].tolist() == list(range(103))


def test_the_statistics_are_published_or_computed_from_the_data():
    images = torch.full((4, 1, 2, 2), 51, dtype=torch.uint8)
    assert statistics(arrays(images, torch.zeros(4)))["mean"] == pytest.approx((0.2,))
    assert statistics(ArraySource(images, torch.zeros(4), mean=(0.1,), std=(0.3,))) == {"mean": (0.1,), "std": (0.3,)}
    assert statistics(numbered()) == statistics(dataset(Noisy())) == {}


# ------------------------------------------------------------------------------------------------ balanced


def rare() -> ArraySource:
    """900 samples of class 0, 90 of class 2, 10 of class 3, none of class 1."""
    return arrays(np.arange(1000)[:, None], np.repeat([0, 2, 3], [900, 90, 10]), list("abcd"))


def test_balanced_sampling_draws_classes_and_their_samples_uniformly():
    found = batches(rare(), 100, sampling="balanced")
    drawn = np.array([shuffled(found.epoch(epoch)) for epoch in range(60)]).ravel()
    classes = np.bincount(rare().targets[torch.from_numpy(drawn)], minlength=4)
    assert classes[1] == 0
    assert np.abs(classes[[0, 2, 3]] / 20_000 - 1).max() < 0.03  # the deviation is 0.6 %
    of_the_rarest = np.bincount(drawn[drawn >= 990] - 990)
    assert len(of_the_rarest) == 10
    assert np.abs(of_the_rarest / 2_000 - 1).max() < 0.1  # the deviation is 2.2 %


def test_balanced_sampling_depends_on_seed_epoch_and_position():
    def drawn(seed, epoch, start=0, size=100):
        return shuffled(batches(rare(), size, sampling="balanced", seed=seed).epoch(epoch, start))

    assert drawn(0, 1) == drawn(0, 1, size=30)
    assert drawn(0, 1, start=7) == drawn(0, 1)[700:]
    assert len({tuple(drawn(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_balanced_sampling_needs_one_class_per_sample():
    for source in (arrays(np.zeros((4, 1)), np.zeros(4)), dataset(Noisy())):
        with pytest.raises(RelayError, match="needs one class per sample"):
            batches(source, sampling="balanced")


# ------------------------------------------------------------------------------------------------ replicas


@pytest.mark.parametrize(
    ("samples", "replicas", "sizes"),
    [(8, 4, (2, 2, 2, 2)), (10, 4, (3, 3, 2, 2)), (3, 4, (1, 1, 1, 0)), (5, 1, (5,))],
)
def test_replicas_are_consecutive_and_the_first_ones_are_larger(samples, replicas, sizes):
    assert replica_sizes(samples, replicas) == sizes


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_the_parts_of_the_replicas_add_up_to_the_batch(replicas):
    for batch in batches(numbered(), replicas=replicas).epoch():
        parts = list(batch.replicas())
        assert len(parts) == len(batch.replica_sizes) == replicas
        assert tuple(len(targets) for _, targets in parts) == batch.replica_sizes
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), batch.inputs)
        assert torch.equal(torch.cat([targets for _, targets in parts]), batch.targets)


Pair = namedtuple("Pair", "left right")


def test_inputs_of_several_tensors_are_split_alike():
    numbers = torch.arange(5)
    inputs = {"a": numbers, "b": [numbers, (numbers,)], "c": Pair(numbers, numbers), "d": list("vwxyz")}
    (first, _), (second, targets) = Batch(inputs, numbers, numbers.numpy(), (3, 2)).replicas()
    assert targets.tolist() == [3, 4]
    assert second["a"].tolist() == second["b"][0].tolist() == second["b"][1][0].tolist() == [3, 4]
    assert isinstance(second["c"], Pair)
    assert second["c"].right.tolist() == [3, 4]
    assert (first["d"], second["d"]) == (["v", "w", "x"], ["y", "z"])


# ------------------------------------------------------------------------------------------------ datasets


@pytest.fixture(scope="module")
def undisturbed() -> list:
    """Two epochs of a dataset with random transforms, read in this process."""
    torch.set_num_threads(1)
    found = batches(dataset(Noisy()), seed=4, replicas=2)
    return [content(found.epoch(epoch)) for epoch in (0, 1)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # more than this machine has cores
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_workers_and_generator_states_change_no_byte(workers, undisturbed):
    torch.manual_seed(9)
    random.seed(9)
    np.random.seed(9)
    found = batches(dataset(Noisy()), seed=4, replicas=2, workers=workers)
    assert content(found.epoch(1)) == undisturbed[1]
    assert content(found.epoch(0)) == undisturbed[0]
    for start in (1, 3, 5, 6):
        assert content(found.epoch(1, start)) == undisturbed[1][start:]


def test_workers_end_at_once_when_their_batches_are_not_needed():
    found = batches(dataset(Noisy()), workers=2)
    next(found.epoch(0))
    started = time.monotonic()
    del found
    assert time.monotonic() - started < 3  # a worker that isn't stopped is killed after five seconds


def test_two_threads_in_this_process_change_no_byte(undisturbed):
    torch.set_num_threads(2)
    assert content(batches(dataset(Noisy()), seed=4, replicas=2).epoch(0)) == undisturbed[0]
    assert torch.get_num_threads() == 2


def test_random_transforms_differ_between_samples_epochs_and_seeds(undisturbed):
    drawn = set()
    for seed, epoch in ((4, 0), (4, 1), (5, 0)):
        for batch in batches(dataset(Noisy()), seed=seed).epoch(epoch):
            drawn |= {tuple(row) for row in batch.inputs[:, 1:].tolist()}
    assert len(drawn) == 3 * 53


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_epoch_does_not_affect_the_next(workers, undisturbed):
    found = batches(dataset(Noisy()), seed=4, replicas=2, workers=workers)
    for stop in (1, 2, 4):
        assert content(islice(found.epoch(0), stop)) == undisturbed[0][:stop]
        assert content(found.epoch(1)) == undisturbed[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_concurrent_epochs_are_refused(workers):
    found = batches(dataset(Noisy()), workers=workers)
    first, second = found.epoch(0), found.epoch(1)
    next(first)
    next(second)
    with pytest.raises(RelayError, match="one at a time"):
        next(first)
    assert len(list(second)) == 5


def test_starting_at_batch_10_000_reads_nothing_before_it():
    data = Noisy(40_000)
    found = batches(dataset(data), 3)
    batch = next(found.epoch(2, start=10_000))
    assert data.reads == batch.indices.tolist()
    assert len(data.reads) == 3


def test_reading_a_dataset_with_workers_leaves_the_global_generator_alone():
    found = batches(dataset(Noisy()), workers=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    list(found.epoch(0))
    assert torch.equal(torch.rand(2), expected)


class Parts(Dataset):
    """Samples of several tensors."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        return {"image": torch.full((2,), index), "extra": (torch.tensor(index), "text")}, index


@pytest.mark.parametrize("workers", [0, 1])
def test_inputs_may_be_dicts_and_tuples(workers):
    batch = next(batches(dataset(Parts()), 4, workers=workers, replicas=2).epoch())
    assert batch.inputs["image"][:, 0].tolist() == batch.inputs["extra"][0].tolist() == batch.targets.tolist()
    (first, _), (second, targets) = batch.replicas()
    assert second["image"][:, 0].tolist() == targets.tolist()
    assert len(first["extra"][1]) == 2


def ragged_collate(samples):
    """Pad to the longest."""
    return torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], True), torch.tensor([y for _, y in samples])


class Ragged(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return torch.ones(2 if index != 4 else 5), index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_custom_collate_function_is_used(workers):
    source = dataset(Ragged(), collate=ragged_collate)
    (batch,) = batches(source, 6, workers=workers, sampling="sequential").epoch()
    assert batch.inputs.shape == (6, 5)
    assert batch.inputs.sum(1).tolist() == [2, 2, 2, 2, 5, 2]


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_of_another_shape_is_reported_with_its_index(workers):
    found = batches(dataset(Ragged()), 3, workers=workers, sampling="sequential").epoch()
    next(found)
    with pytest.raises(
        RelayError, match=r"sample 4 is \(float32 \(5,\), int\), but sample 3 is \(float32 \(2,\), int\)"
    ):
        next(found)


class Lone(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return torch.ones(3)


class Triple(Lone):
    def __getitem__(self, index: int):
        return torch.ones(3), 1, 2


def test_samples_may_be_single_tensors_or_triples():
    (lone,) = batches(dataset(Lone()), 6).epoch()
    assert lone.inputs.shape == (6, 3)
    assert lone.targets is None
    (triple,) = batches(dataset(Triple()), 6).epoch()
    assert isinstance(triple.inputs, Arguments)
    assert [tuple(each.shape) for each in triple.inputs] == [(6, 3), (6,)]
    assert triple.targets.tolist() == [2] * 6
    assert len(triple.data) == 3


def test_a_collate_function_that_returns_none_is_reported():
    with pytest.raises(RelayError, match="the collate function returned None: let it return the batch"):
        list(batches(dataset(Lone(), collate=lambda samples: None)).epoch())


def test_gathered_float_samples_start_at_aligned_addresses_in_every_batch():
    source = arrays(torch.randn(100, 5), torch.zeros(100))
    for start in (0, 3):
        for batch in batches(source, 10, replicas=4).epoch(0, start):
            for replica in batch.replicas():
                assert not len(replica.inputs) or replica.inputs.data_ptr() % 64 == 0


class Faulty(Noisy):
    def __getitem__(self, index: int):
        if index == 30:
            raise KeyError("a mistake of the user's")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_dataset_names_the_sample_and_the_line(workers):
    with pytest.raises(RelayError, match=r"sample \d+ can't be read: KeyError: .*a mistake of the user's.* line \d+\)"):
        list(batches(dataset(Faulty()), workers=workers).epoch())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_read_by_a_worker_is_one_line_with_its_path(workers, tmp_path):
    from torchvision.transforms import v2

    for i in range(4):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    train, _ = image_folder(tmp_path, test_share=0.5, transform=v2.ToImage())
    with pytest.raises(RelayError, match=r"[ab]/\d\.png can't be read as an image") as found:
        list(batches(train, workers=workers).epoch())
    assert "\n" not in str(found.value)


class Suicidal(Noisy):
    def __getitem__(self, index: int):
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.timeout(15)
# PyTorch's signal handler raises in the running code; Python ignores an exception in a weak reference's callback.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_killed_worker_is_named_within_15_seconds():
    with pytest.raises(RelayError, match=r"Suicidal: DataLoader worker \(pid.* \d+\).*fewer data\.workers"):
        list(batches(dataset(Suicidal()), workers=2).epoch())


def test_too_little_shared_memory_is_an_error_with_the_remedy(namespace, tmp_path):
    program = """
        import torch
        from torchrelay.data.augment import Pipeline
        from torchrelay.data.batches import Batches
        from torchrelay.data.sources import dataset
        from torchrelay.device.device import DeviceSettings, set_up
        from torchrelay.errors import RelayError

        class Large(torch.utils.data.Dataset):
            def __len__(self):
                return 100

            def __getitem__(self, index):
                return torch.ones(500_000), 0

        device = set_up(DeviceSettings(name="cpu"), exact=False)
        try:
            list(Batches(dataset(Large()), 10, device, Pipeline(), workers=1).epoch())
        except RelayError as error:
            print(error)
        """
    namespace.shell("mount -t tmpfs -o size=4m tmpfs /dev/shm")
    done = namespace.server.start(program=program, folder=tmp_path).done()
    namespace.shell("umount /dev/shm")
    assert "shm, which is full: enlarge it" in done.stdout, done.stdout + done.stderr


class WithFunction(Noisy):
    def __getitem__(self, index: int):
        return super().__getitem__(index), lambda: index


@pytest.mark.timeout(60)
def test_a_batch_that_a_worker_cannot_pickle_is_an_error_and_no_endless_wait():
    found = batches(dataset(WithFunction(), collate=list), workers=2)
    with pytest.raises(RelayError, match=r"WithFunction: a worker can't pass on a batch: .*set data\.workers to 0"):
        list(found.epoch())


def test_workers_are_not_forked_while_a_checkpoint_is_written(tmp_path):
    writing, may_end = threading.Event(), threading.Event()

    def hold_up() -> None:
        writing.set()
        assert may_end.wait(60)

    writer = Writer(tmp_path, keep=2, keep_best=1, before_write=hold_up)
    writer.save(Contents(step=1, model={"w": torch.zeros(2)}, state={}))
    assert writing.wait(60)
    found, read = batches(dataset(Noisy()), workers=1), threading.Event()
    reader = threading.Thread(target=lambda: (next(iter(found.epoch())), read.set()))
    reader.start()
    assert not read.wait(0.5), "it forked a worker beside a thread that may hold a lock of the C library"
    may_end.set()
    assert read.wait(60)
    reader.join()
    writer.close()


def test_hundreds_of_live_batches_do_not_exhaust_file_descriptors():
    found = batches(dataset(Parts()), 1, workers=2)
    kept = [batch for epoch in range(30) for batch in found.epoch(epoch)]
    assert len(kept) == 300
    assert len(list(Path("/proc/self/fd").iterdir())) < 1024
