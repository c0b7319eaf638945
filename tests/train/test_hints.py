"""A run with a visible problem gets one hint."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import torchrelay as tr
from torchrelay.models.small import small_cnn
from torchrelay.train.hints import at_start, of_loss


def fit(tmp_path, quiet, **changes) -> list[str]:
    """Train on forty samples of two classes; return the hints in the log."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, 4), torch.arange(40) % 2
    arguments = {"epochs": 3, "batch_size": 8, "terminal": quiet, "run": tmp_path / "run"} | changes
    source = tr.data.arrays(inputs, targets, classes=("a", "b"))
    tr.Trainer(torch.nn.Linear(4, 2), source, **arguments).fit()
    return [line[20:] for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if " hint: " in line]


def test_a_run_that_learns_gets_no_hint(tmp_path, quiet):
    assert fit(tmp_path, quiet, optimizer=tr.optim.SGD(lr=0.01)) == []


def test_a_batch_larger_than_the_data_gets_a_hint(tmp_path, quiet):
    (hint,) = fit(tmp_path, quiet, batch_size=256, optimizer=tr.optim.SGD(lr=0.01))
    assert hint.startswith("hint: a batch of 256 holds all 40 training samples, so an epoch is one step")


def test_a_loss_far_above_chance_gets_one_hint(tmp_path, quiet):
    (hint,) = fit(tmp_path, quiet, optimizer=tr.optim.SGD(lr=300.0))
    assert "is far above 0.693, that of guessing; a learning rate lower than 300 may help" in hint


@pytest.mark.parametrize(
    ("changes", "hinted"), [({}, True), ({"sampling": "balanced"}, False), ({"task": tr.Regression()}, False)]
)
def test_classes_of_unlike_size_are_said(tmp_path, quiet, changes, hinted):
    inputs, targets = torch.randn(40, 2), (torch.arange(40) % 8 == 0).long()
    source = tr.data.arrays(inputs, targets, classes=("a", "b"))
    trainer = tr.Trainer(torch.nn.Linear(2, 2), source, batch_size=8, terminal=quiet, **changes)
    said = at_start(trainer.batches, trainer.task, 100)
    assert ["a has 35 samples and b 5, so accuracy says little" in line for line in said] == [True] * hinted


def test_a_run_of_few_steps_on_files_is_said(tmp_path):
    for number in range(20):
        (tmp_path / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / "ab"[number % 2] / f"{number}.png")
    parts = tr.data.image_folder(tmp_path, cache=False, log=lambda _: None)
    for epochs, batch_size, hinted in ((5, 8, True), (50, 8, False), (5, 2, False)):
        trainer = tr.Trainer(small_cnn(2, 3), *parts, batch_size=batch_size, epochs=epochs)
        said = at_start(trainer.batches, trainer.task, trainer.progress.total_steps)
        assert ["an epoch of 16 samples is 2 steps, and the run 10" in line for line in said] == [True] * hinted


@pytest.mark.parametrize(("loss", "hinted"), [(2.9, False), (3.1, True), (math.nan, False)])
def test_a_growing_loss_gets_a_hint_for_any_task(loss, hinted):
    hint = of_loss(tr.Regression(), loss, 1.0, 0.1)
    assert (hint is not None and "has grown from 1 to 3.1" in hint) == hinted


class Pairs(tr.Task):
    """Each sample must identify itself among the slightly moved samples of its batch."""

    def compute(self, model, batch, update):
        found = model(batch.inputs) @ model(batch.inputs + 0.01 * torch.randn_like(batch.inputs)).T
        return torch.nn.functional.cross_entropy(found, torch.arange(len(found)), reduction="sum")


class Noisy(tr.Task):
    """A loss that draws random numbers, and is a sum over the samples."""

    def compute(self, model, batch, update):
        return (model(batch.inputs) + 3 * torch.randn(batch.samples, 2)).square().sum()


@pytest.mark.parametrize(("task", "replicas", "hinted"), [(Pairs, 2, True), (Pairs, 1, False), (Noisy, 2, False)])
def test_a_loss_that_compares_samples_gets_a_hint_about_replicas(tmp_path, quiet, task, replicas, hinted):
    parallel = tr.ParallelSettings(replicas=replicas)
    hints = fit(tmp_path, quiet, task=task(), epochs=1, parallel=parallel, optimizer=tr.optim.SGD(lr=0.01))
    assert [f"each of the {replicas} replicas sees its own part alone" in hint for hint in hints] == [True] * hinted


def test_a_mean_loss_is_detected_without_test_data(tmp_path, quiet):
    class Mean(tr.Task):
        def loss(self, outputs, targets):
            return torch.nn.functional.cross_entropy(outputs, targets)

    (hint,) = fit(tmp_path, quiet, task=Mean(), batch_size=40)
    assert 'as a mean is: return the sum over the samples (reduction="sum")' in hint


def test_images_that_are_normalized_already_are_left_alone_in_arrays_as_in_a_dataset(tmp_path, quiet):
    raw, targets = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    ready = (raw - 0.5) / 0.25

    def seen(data, **changes) -> tuple[torch.Tensor, str]:
        arguments = {"epochs": 1, "batch_size": 40, "sampling": "sequential", "terminal": quiet} | changes
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        trainer = tr.Trainer(model, data, run=folder, **arguments)
        trainer.fit()
        lines = [line for line in (folder / "log.txt").read_text().splitlines() if "the images are" in line]
        return next(trainer.batches.epoch(0)).inputs, lines[0]

    of_arrays, said = seen((ready, targets))
    assert "the images are taken as they are: floats with negative values are taken for normalized ones" in said
    of_dataset, said = seen(torch.utils.data.TensorDataset(ready, targets))
    assert "the images are taken as TensorDataset gives them, and not normalized" in said
    assert torch.equal(of_arrays, of_dataset)
    assert torch.equal(of_arrays, ready)
    for data in (raw, ready):
        images, said = seen((data, targets), **({"normalize": True} if data is ready else {}))
        assert "the images are normalized by their channels' means, " in said
        torch.testing.assert_close(images.std((0, 2, 3), unbiased=False), torch.ones(3))
