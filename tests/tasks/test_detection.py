"""Detection: unchanged torchvision models, and their metrics."""

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator

import torchrelay as tr
from torchrelay.errors import RelayError
from torchrelay.tasks import Detection
from torchrelay.tasks.detection import MeanAveragePrecision


class Rectangles(Dataset):
    """Images of different sizes with a bright rectangle in each."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.samples:
            raise IndexError
        image = torch.zeros(3, 32 + index % 3, 32)
        image[:, 4 : 12 + index, 6:20] = 1.0
        return image, {"boxes": torch.tensor([[6.0, 4.0, 20.0, 12.0 + index]]), "labels": torch.tensor([1])}


class Mean(nn.Module):
    """A minimal detector with mode-dependent layers; its losses are means over the images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, 4)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        if self.training and targets is None:
            raise AssertionError("torchvision's models want targets in training mode")
        boxes = [self.head(self.drop(self.norm(image[None]).mean((2, 3))))[0] for image in images]
        if not self.training:
            return [{"boxes": box[None], "scores": box.new_ones(1), "labels": box.new_ones(1).long()} for box in boxes]
        errors = [(box - target["boxes"]).abs().sum() for box, target in zip(boxes, targets, strict=True)]
        return {"boxes": torch.stack(errors).mean(), "half": torch.stack(errors).mean() / 2}


def data(samples: int) -> tr.data.DatasetSource:
    return tr.data.dataset(Rectangles(samples), collate=Detection.collate)


def trainer(model: nn.Module, quiet: Any, **arguments: Any) -> tr.Trainer:
    arguments = {"optimizer": tr.optim.SGD(lr=1e-3), "epochs": 1, "batch_size": 4, "device": "cpu"} | arguments
    return tr.Trainer(model, data(6), data(5), task=Detection(), terminal=quiet, **arguments)


def test_the_losses_are_reported_by_name_as_means_over_images(quiet):
    torch.manual_seed(0)
    model = Mean()
    found = trainer(model, quiet, optimizer=tr.optim.SGD(lr=0.0)).fit()
    with torch.no_grad():
        outputs = model.eval()([image for image, _ in Rectangles(5)])
    errors = [(o["boxes"] - t["boxes"]).abs().sum() for o, (_, t) in zip(outputs, Rectangles(5), strict=True)]
    assert found["boxes"] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert found["half"] == pytest.approx(found["boxes"] / 2)
    assert found["loss"] == pytest.approx(1.5 * found["boxes"])


def test_an_evaluation_changes_neither_statistics_nor_modes(quiet):
    model = Mean()
    tested = trainer(model, quiet)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tested.evaluate()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())


def test_predictions_are_a_dict_for_each_image(quiet):
    found = trainer(Mean(), quiet).predict(data(5))
    assert [each.keys() for each in found] == [{"boxes", "scores", "labels"}] * 5


def test_a_model_that_returns_no_losses_is_refused(quiet):
    class Boxes(nn.Linear):
        def forward(self, images: Any, targets: Any = None) -> list[Tensor]:
            return [self.weight]

    with pytest.raises(RelayError, match="returns a dict of losses, and Boxes returned list"):
        trainer(Boxes(1, 1), quiet).fit()


def test_without_the_extra_the_loss_selects_the_best_checkpoint_with_a_hint(tmp_path, monkeypatch):
    present = importlib.util.find_spec
    missing = ("pycocotools", "faster_coco_eval")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else present(name))
    values = trainer(Mean(), None, run=tmp_path / "run").fit()
    assert values.keys() == {"loss", "boxes", "half"}
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("hint: only losses are measured") == 1


def test_one_found_and_one_missed_box_give_half_the_precision():
    pytest.importorskip("pycocotools")
    metric = MeanAveragePrecision()
    box, other = torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([[20.0, 20.0, 29.0, 29.0]])
    label, score = torch.tensor([1]), torch.tensor([0.9])
    metric.update([{"boxes": box, "scores": score, "labels": label}], [{"boxes": box, "labels": label}])
    metric.update([{"boxes": box, "scores": score - 0.1, "labels": label}], [{"boxes": other, "labels": label}])
    found = metric.compute()
    assert found.keys() == {"map", "map_50", "map_75"}
    assert float(found["map"]) == pytest.approx(0.5, abs=0.01)


def test_torchvisions_faster_rcnn_trains_unchanged(quiet):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    backbone.out_channels = 16
    anchors = AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
    model = FasterRCNN(
        backbone, 2, rpn_anchor_generator=anchors, min_size=32, max_size=32, rpn_pre_nms_top_n_train=20,
        rpn_post_nms_top_n_train=10, rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_test=10,
    )  # fmt: skip
    values = trainer(model, quiet).fit()
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert names <= values.keys()
    assert values["loss"] == pytest.approx(sum(values[name] for name in names))
