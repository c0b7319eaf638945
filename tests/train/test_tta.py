"""Test-time augmentation: the mean of a network's outputs for several views of an image."""

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.errors import UsageError
from torchrelay.run.settings import RunSettings
from torchrelay.train.tta import with_tta


class Column(nn.Module):
    """Reads only the left column, so that each view gives a different output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 10)

    def forward(self, images):
        return self.layer(images[:, 0, :, 0])


def first_pixel(images):
    return images[:, 0, :1, 0].repeat(1, 2) * torch.tensor([1.0, -1.0])


def test_two_views_average_image_and_mirror_image(digits, quiet):
    how = {"epochs": 1, "device": "cpu", "terminal": quiet, "normalize": False}
    plain, both = (tr.Trainer(Column(), *digits, settings=RunSettings(test_views=views), **how) for views in (1, 2))
    both.model.load_state_dict(plain.model.state_dict())
    images = digits[1].inputs[:50]
    one, mirrored = (plain.task.predict(plain.model(x.float() / 255)) for x in (images, images.flip(-1)))
    logits = [plain.model(x.float() / 255) for x in (images, images.flip(-1))]
    expected = plain.task.predict((logits[0] + logits[1]) / 2)
    assert torch.allclose(both.predict(images), expected, atol=1e-6)
    assert not torch.allclose(one, mirrored, atol=1e-3)
    assert plain.evaluate().values["loss"] != both.evaluate().values["loss"]


def test_six_views_are_used_only_for_unsure_images():
    torch.manual_seed(0)
    images = torch.rand(40, 1, 5, 4)
    images[::2] *= 20.0  # of these, two views are sure
    found, two = (with_tta(first_pixel, views)(images) for views in (6, 2))
    unsure = two.softmax(1).amax(1) < 0.6
    assert 0 < unsure.sum() < 40
    assert torch.equal(found[~unsure], two[~unsure])
    # Shifted up and left, the first pixel is what was at (1, 1); down and right, by the mirrored edge, it is that, too.
    here = [image[0, 0, column].item() for image in images for column in (0, -1)]
    there = [image[0, 1, column].item() for image in images for column in (1, -2)]
    means = torch.tensor([here, there]).view(2, 40, 2).mean(2).mean(0)
    torch.testing.assert_close(found[unsure][:, 0], means[unsure])


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_the_number_of_forward_passes_does_not_depend_on_the_data(scale):
    asked = []

    def forward(images):
        asked.append(len(images))
        return first_pixel(images)

    images = torch.full((6, 1, 3, 3), scale)
    found = with_tta(forward, 6)(images)
    assert torch.equal(found[:, 0], torch.full((6,), scale))
    assert len(asked) == 6  # processes that share its weights wait for each other


def test_six_views_train_and_predict(digits, quiet):
    trainer = tr.Trainer(Column(), *digits, epochs=1, device="cpu", terminal=quiet, settings=RunSettings(test_views=6))
    values = trainer.fit()
    predicted = trainer.predict(digits[1].inputs)
    assert (predicted.argmax(1) == digits[1].targets).float().mean() == pytest.approx(values["accuracy"], abs=1e-6)


@pytest.mark.parametrize("views", [2, 6])
def test_views_of_other_inputs_are_refused(quiet, views):
    data = torch.randn(20, 5), torch.arange(20) % 2
    trainer = tr.Trainer(
        nn.Linear(5, 2), data, data, settings=RunSettings(test_views=views), device="cpu", terminal=quiet
    )
    with pytest.raises(UsageError, match="mirrors images"):
        trainer.evaluate()


def test_six_views_of_a_regression_are_refused(quiet):
    data = torch.randn(20, 1, 4, 4), torch.randn(20, 2)
    with pytest.raises(UsageError, match="use 2 or 1"):
        tr.Trainer(nn.Conv2d(1, 2, 4), data, task=tr.Regression(), settings=RunSettings(test_views=6), terminal=quiet)
