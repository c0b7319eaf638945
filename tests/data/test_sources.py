"""Map-style sources: arrays and torch Datasets, their checks, fingerprints, splits and statistics."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from torchrelay.data.accept import as_source
from torchrelay.data.files import Files
from torchrelay.data.sources import (
    ArraySource,
    DatasetSource,
    arrays,
    channel_statistics,
    dataset,
    split,
)
from torchrelay.data.stream import StreamSource
from torchrelay.errors import RelayError, UsageError


def labelled(*counts: int) -> ArraySource:
    """Samples with `counts` per class; each sample's input is its index."""
    targets = np.repeat(np.arange(len(counts)), counts)
    return arrays(np.arange(len(targets))[:, None], targets, [f"class {i}" for i in range(len(counts))])


# ------------------------------------------------------------------------------------------------ what arrays become


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("uint8", torch.uint8),
        ("bool", torch.float32),
        ("int32", torch.int64),
        ("float16", torch.float32),
        ("float64", torch.float32),
    ],
)
def test_inputs_are_converted_to_one_of_three_dtypes(given, becomes):
    assert arrays(np.ones((4, 3), dtype=given), np.zeros(4)).inputs.dtype == becomes


@pytest.mark.parametrize(
    ("given", "becomes"),
    [("uint8", torch.int64), ("int32", torch.int64), ("bool", torch.float32), ("f8", torch.float32)],
)
def test_targets_become_indices_or_floats(given, becomes):
    assert arrays(np.ones((4, 3)), np.ones(4, dtype=given)).targets.dtype == becomes


def test_channels_last_images_are_permuted():
    images = np.random.default_rng(0).integers(0, 256, (5, 7, 6, 3), dtype=np.uint8)
    inputs = arrays(images, np.zeros(5, dtype=int)).inputs
    assert inputs.shape == (5, 3, 7, 6)
    assert inputs.is_contiguous()
    assert torch.equal(inputs[2, 1], torch.from_numpy(images[2, :, :, 1]))


def test_channels_first_images_are_unchanged():
    images = torch.zeros(5, 3, 8, 3, dtype=torch.uint8)
    assert arrays(images, torch.zeros(5)).inputs is not None
    assert arrays(images, torch.zeros(5)).inputs.shape == (5, 3, 8, 3)


@pytest.mark.parametrize("turned", [np.s_[:, ::-1], np.s_[..., ::-1], np.s_[:1, :1, ::-1]])
def test_permuted_arrays_are_read_by_their_shape(turned):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[turned]
    assert np.array_equal(arrays(values, np.zeros(len(values))).inputs, values)


def test_arrays_of_another_byte_order_are_accepted():
    assert arrays(np.array([[1.5], [2.5]], dtype=">f4"), np.array([3, 4], dtype=">i4")).inputs.tolist() == [
        [1.5],
        [2.5],
    ]


def test_inputs_are_detached():
    assert not arrays(torch.ones(3, 2, requires_grad=True), torch.zeros(3)).inputs.requires_grad


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("label", "shown"), [(7, "label 7"), (-1, "label -1")])
def test_a_label_out_of_range_is_reported_with_its_sample_and_file(label, shown):
    targets = torch.tensor([0, 1, 2, label, 0])
    files = Files("d", tuple(f"{i}.png" for i in range(5)), ("",) * 5)
    with pytest.raises(RelayError, match=rf"sample 3 \(d/3.png\) has {shown}, but the 3 classes are 0 to 2"):
        ArraySource(torch.zeros(5, 1), targets, ("a", "b", "c"), files=files)


def test_labels_up_to_the_last_class_are_accepted():
    assert len(arrays(np.zeros((3, 1)), [0, 1, 2], ["a", "b", "c"])) == 3


def test_inputs_and_targets_of_different_length_are_refused():
    with pytest.raises(RelayError, match="5 inputs but 4 targets"):
        arrays(np.zeros((5, 2)), np.zeros(4))


def test_empty_arrays_are_refused():
    with pytest.raises(RelayError, match="no samples"):
        arrays(np.zeros((0, 2)), np.zeros(0))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (np.array(["cat", "dog"]), r"targets of <U3 can't be converted to a tensor: give numbers"),
        (["cat", "dog"], "targets of list can't be converted to a tensor: give numbers"),
        ([[1, 2], [3, 4], [5]], "as sample 2 has 1 entries and sample 0 has 2 entries"),
        ([0, 1, "2"], "as sample 2 has str and sample 0 has int"),
        ([torch.zeros(2), torch.zeros(3)], r"as sample 1 has shape \(3,\) and sample 0 has shape \(2,\)"),
    ],
    ids=["strings", "a list of strings", "rows of several lengths", "a string", "tensors of several shapes"],
)
def test_data_that_is_not_a_tensor_is_refused_with_the_odd_sample(values, text):
    with pytest.raises(UsageError, match=text) as found:
        arrays(np.zeros((3, 1)), values)
    assert "\n" not in str(found.value)


def test_a_source_of_other_objects_names_the_remedy():
    with pytest.raises(UsageError, match=r"must be tensors.*data\.arrays\(\)"):
        ArraySource(np.zeros((3, 1)), torch.zeros(3))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_labels_that_are_not_int64_are_refused(kind):
    with pytest.raises(RelayError, match=f"the labels are {kind}: give int64"):
        ArraySource(torch.zeros(2, 1), torch.tensor([0, 1], dtype=kind), ("a", "b"))


def test_numbers_without_a_sample_dimension_are_refused():
    with pytest.raises(RelayError, match="first dimension"):
        arrays(np.float32(3), np.float32(4))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(1), 0)])


class NoLength(Dataset):
    def __getitem__(self, index):
        return torch.zeros(1), 0


def test_an_iterable_dataset_is_refused_as_a_map_style_dataset():
    assert isinstance(as_source(Stream()), StreamSource)
    with pytest.raises(UsageError, match=r"Stream can only be read in its own order: give tr.data.stream.*__getitem__"):
        dataset(Stream())


def test_a_dataset_without_a_length_is_refused():
    with pytest.raises(UsageError, match="NoLength has no number of samples"):
        as_source(NoLength())


def test_an_empty_dataset_is_refused():
    with pytest.raises(RelayError, match="no samples"):
        as_source(TensorDataset(torch.zeros(0, 1)))


def test_other_objects_are_refused_as_data():
    with pytest.raises(UsageError, match="str can't be used as data"):
        as_source("digits")


def test_sources_datasets_and_pairs_become_sources():
    source = arrays(np.zeros((3, 1)), np.zeros(3))
    assert as_source(source) is source
    assert isinstance(as_source((np.zeros((3, 1)), np.zeros(3))), ArraySource)
    assert isinstance(as_source(TensorDataset(torch.zeros(3, 1), torch.zeros(3))), DatasetSource)


def test_the_classes_of_a_dataset_are_kept():
    data = TensorDataset(torch.zeros(3, 1), torch.zeros(3))
    data.classes = ["cat", "dog"]
    assert dataset(data).classes == ("cat", "dog")
    assert dataset(data, ["a", "b"]).classes == ("a", "b")


# ------------------------------------------------------------------------------------------------ fingerprints


def test_a_fingerprint_changes_with_every_part_of_the_content():
    inputs, targets = torch.arange(12.0).view(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    other_inputs, other_targets = inputs.clone(), targets.clone()
    other_inputs[5, 1] += 1e-6 * 11
    other_targets[0] = 1
    prints = {
        arrays(inputs, targets).fingerprint(),
        arrays(other_inputs, targets).fingerprint(),
        arrays(inputs, other_targets).fingerprint(),
        arrays(inputs.view(6, 1, 2), targets).fingerprint(),
        arrays(inputs.long(), targets).fingerprint(),
        arrays(inputs.flip(0), targets.flip(0)).fingerprint(),
    }
    assert len(prints) == 6
    assert arrays(inputs.clone(), targets.clone()).fingerprint() in prints


def test_the_fingerprint_does_not_depend_on_the_memory_layout():
    inputs, targets = torch.randn(4, 6), torch.zeros(4)
    turned = inputs.t().contiguous().t()
    assert not turned.is_contiguous()
    assert arrays(turned, targets).fingerprint() == arrays(inputs, targets).fingerprint()


@pytest.mark.parametrize("shape", [(3,), (3, 0), (3, 0, 2), (3, 1, 1, 1)])
def test_tensors_of_every_shape_have_a_fingerprint(shape):
    assert len(arrays(torch.zeros(shape), torch.zeros(3)).fingerprint()) == 32


@pytest.mark.parametrize("stamp", [None, "stamped"])
def test_a_part_has_another_fingerprint_than_the_whole(stamp):
    whole = ArraySource(torch.arange(4.0), torch.zeros(4), stamp=stamp)
    parts = [whole.take(torch.tensor(chosen)).fingerprint() for chosen in ([0, 1], [1, 0], [2, 3])]
    assert len({whole.fingerprint(), *parts}) == 4
    assert whole.take(torch.tensor([0, 1])).fingerprint() == parts[0]


def test_a_dataset_may_define_its_fingerprint():
    data = TensorDataset(torch.zeros(3, 1))
    assert dataset(data).fingerprint() == "TensorDataset of 3"
    data.fingerprint = lambda: "version 7"
    assert dataset(data).fingerprint() == "version 7"


# ------------------------------------------------------------------------------------------------ parts


def test_a_split_is_disjoint_complete_and_keeps_inputs_with_their_targets():
    whole = labelled(50, 30, 20)
    rest, part = split(whole, 0.2, seed=3)
    numbers = torch.cat([rest.inputs, part.inputs])[:, 0]
    assert sorted(numbers.tolist()) == list(range(100))
    for source in (rest, part):
        assert torch.equal(source.targets, whole.targets[source.inputs[:, 0]])


def test_a_split_takes_its_share_of_every_class():
    rest, part = split(labelled(50, 30, 20, 5), 0.2, seed=3)
    assert torch.bincount(part.targets).tolist() == [10, 6, 4, 1]
    assert torch.bincount(rest.targets).tolist() == [40, 24, 16, 4]


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_class_of_two_samples_is_in_both_parts(share):
    rest, part = split(labelled(2, 2, 100), share, seed=0)
    assert set(part.targets.tolist()) == set(rest.targets.tolist()) == {0, 1, 2}


def test_a_class_of_one_sample_stays_with_the_rest():
    _, part = split(labelled(1, 10), 0.5, seed=0)
    assert part.targets.tolist() == [1] * 5


def test_a_split_depends_only_on_its_seed():
    whole = labelled(50, 50)
    chosen = [split(whole, 0.3, seed)[1].inputs[:, 0].tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_float_targets_are_split_without_stratification():
    rest, part = split(arrays(np.arange(20)[:, None], np.random.default_rng(0).random(20)), 0.25, seed=0)
    assert (len(rest), len(part)) == (15, 5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 2.0])
def test_a_share_that_leaves_one_part_empty_is_refused(share):
    with pytest.raises(UsageError, match="leaves one part empty"):
        split(labelled(10), share, seed=0)


def test_single_samples_cannot_be_split():
    with pytest.raises(UsageError, match="no class has two samples"):
        split(labelled(1, 1, 1), 0.5, seed=0)


def test_splitting_a_dataset_is_refused():
    with pytest.raises(UsageError, match="can't be split"):
        split(dataset(TensorDataset(torch.zeros(3, 1))), 0.5, seed=0)


# ------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_channel_statistics_equal_numpys(kind):
    images = np.random.default_rng(0).integers(0, 256, (70, 3, 17, 13), dtype=np.uint8)
    images[:, 1] //= 3
    exact = images / 255.0
    given = torch.from_numpy(images if kind == "uint8" else exact.astype(np.float32))
    mean, std = channel_statistics(given)
    assert mean == pytest.approx(exact.mean(axis=(0, 2, 3)), abs=1e-12 if kind == "uint8" else 1e-7)
    assert std == pytest.approx(exact.std(axis=(0, 2, 3)), abs=1e-12 if kind == "uint8" else 1e-7)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_channel_statistics_are_the_same_bits_with_two_threads(kind):
    images = torch.randint(0, 256, (2000, 3, 32, 32), dtype=torch.uint8).to(kind) / (
        255 if kind.is_floating_point else 1
    )
    images = images.to(kind)
    one = channel_statistics(images)
    torch.set_num_threads(2)
    assert channel_statistics(images) == one


def test_a_constant_channel_has_a_nonzero_deviation():
    assert channel_statistics(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)) == ((1.0,), (1e-6,))
