"""Segmentation: equal to PyTorch's loss and torchmetrics, and it learns."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

import torchrelay as tr
from torchrelay.errors import RelayError
from torchrelay.recipe.build import build_task
from torchrelay.tasks import Segmentation, TargetError

IGNORED = 255


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, 4, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks() -> torch.Tensor:
    masks = torch.randint(3, (6, 5, 7), generator=torch.Generator().manual_seed(1))  # class 3 occurs in no mask
    masks[0] = masks[3, 2:] = IGNORED
    return masks


def test_the_loss_is_the_mean_over_pixels_that_are_not_ignored(logits, masks):
    task = Segmentation(4)
    parts = [task.loss(*part) for part in zip(logits.split(4), masks.split(4), strict=True)]
    expected = F.cross_entropy(logits, masks, ignore_index=IGNORED)
    torch.testing.assert_close(torch.stack(parts).sum() / task.weight(masks), expected)


def test_masks_may_be_uint8(logits, masks):
    assert torch.equal(Segmentation(4).loss(logits, masks.byte()), Segmentation(4).loss(logits, masks))


def test_each_output_of_a_dict_has_a_loss_and_the_first_is_predicted(logits, masks):
    task = Segmentation(4, aux_weight=0.25)
    found = task.loss({"out": logits, "aux": -logits}, masks)
    assert torch.equal(found["out"], task.loss(logits, masks))
    assert torch.equal(found["aux"], 0.25 * task.loss(-logits, masks))
    assert torch.equal(task.predict({"out": logits, "aux": -logits}), logits.argmax(1))


def test_pixel_accuracy_skips_ignored_pixels(logits, masks):
    task = Segmentation(4)
    right = sum(int(p == t) for p, t in zip(logits.argmax(1).flatten(), masks.flatten(), strict=True) if t != IGNORED)
    assert task.measure(logits, masks) == {"pixel_accuracy": right}
    assert task.count(masks) == (masks != IGNORED).sum()


def test_iou_agrees_with_torchmetrics(logits, masks):
    logits[:, 3] = -9.0  # neither present nor predicted
    metrics, beside = Segmentation(4).metrics(), MulticlassJaccardIndex(4, average="none", ignore_index=IGNORED)
    for part in zip(logits.argmax(1).split(4), masks.split(4), strict=True):
        for metric in metrics.values():
            metric.update(*part)
        beside.update(*part)
    by_class = metrics["iou_by_class"].compute()
    torch.testing.assert_close(by_class[:3], beside.compute()[:3], check_dtype=False)
    assert by_class[3].isnan()
    torch.testing.assert_close(metrics["mean_iou"].compute(), by_class[:3].mean())
    assert metrics["confusion_matrix"].compute().sum() == (masks != IGNORED).sum()


def test_a_class_out_of_range_is_reported_before_the_first_step(quiet):
    masks = torch.zeros(4, 8, 8, dtype=torch.int64)
    masks[2, 1, 1] = 7
    with pytest.raises(RelayError, match=r"sample 2 has label 7: the 3 classes are 0 to 2"):
        tr.Trainer(nn.Conv2d(1, 3, 1), (torch.zeros(4, 1, 8, 8), masks), task=Segmentation(3), terminal=quiet)


def test_outputs_of_another_size_are_refused(logits, masks):
    with pytest.raises(TargetError, match="it must give"):
        Segmentation(4).loss(logits[..., :3], masks)


def test_a_recipe_selects_segmentation_with_the_classes_of_the_data():
    data = tr.data.arrays(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4).long(), ("sky", "sea"))
    task = build_task(tr.LossSettings(name="segmentation"), data)
    assert isinstance(task, Segmentation)
    assert task.classes == 2


def test_a_convolution_learns_to_separate_bright_from_dark_pixels(quiet):
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = tr.data.arrays(images, (images[:, 0] > 0.5).long(), ("dark", "bright"))
    torch.manual_seed(0)
    optimizer = tr.optim.AdamW(lr=0.3)
    trainer = tr.Trainer(
        nn.Conv2d(1, 2, 1), data, data, task=Segmentation(), optimizer=optimizer, epochs=12, batch_size=4,
        terminal=quiet,
    )  # fmt: skip
    values = trainer.fit()
    assert values["mean_iou"] > 0.9
    assert values["pixel_accuracy"] > 0.9
    assert set(trainer.last_evaluation.tables) == {"iou_by_class"}
    assert trainer.predict(images).shape == (16, 8, 8)
