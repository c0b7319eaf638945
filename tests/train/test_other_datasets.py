"""Datasets of other libraries train unchanged, and resume to the same bytes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchvision import datasets as vision
from torchvision import tv_tensors
from torchvision.transforms import v2

import torchrelay as tr
from torchrelay.errors import Interrupted
from torchrelay.run.terminal import Terminal
from torchrelay.train.logs import Pictures

SAMPLES, BATCH = 20, 8


def rows() -> dict[str, list[Any]]:
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randn(SAMPLES, 4, generator=generator).tolist(),
        "text": [f"sample {number}" for number in range(SAMPLES)],
        "label": [number % 3 for number in range(SAMPLES)],
    }


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def trainer(data: Any, run: Path | None = None, model: Callable[[], nn.Module] = linear, **changes: Any) -> tr.Trainer:
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_size": BATCH, "epochs": 2, "device": "cpu", "run": run} | changes
    options |= {"terminal": Terminal(quiet=True), "optimizer": tr.optim.SGD(lr=0.01)}
    options["checkpoint"] = tr.CheckpointSettings(keep=9)
    made = tr.Trainer(model(), data, **options)
    made.callbacks = [each for each in made.callbacks if not isinstance(each, Pictures)]
    return made


class Stop(tr.Callback):
    def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def train_and_resume(data: Callable[[], Any], folder: Path, same_runs: Any, **changes: Any) -> None:
    """Train once without an interruption and once with one, and compare the files."""
    trainer(data(), folder / "whole", **changes).fit()
    stopped = trainer(data(), folder / "stopped", **changes)
    stopped.callbacks.append(Stop())
    with pytest.raises(Interrupted):
        stopped.fit()
    trainer(data(), folder / "stopped", **changes).resume()
    same_runs(folder / "stopped", folder / "whole")


# ------------------------------------------------------------------------------------------------ Hugging Face's


def test_a_hugging_face_dataset_trains(tmp_path, same_runs):
    hf = pytest.importorskip("datasets")
    train_and_resume(lambda: hf.Dataset.from_dict(rows()).with_format("torch"), tmp_path, same_runs)


@pytest.mark.parametrize("buffer", [0, 6])
def test_a_hugging_face_stream_trains(tmp_path, same_runs, buffer):
    hf = pytest.importorskip("datasets")

    def data() -> Any:
        stream = hf.Dataset.from_dict(rows()).to_iterable_dataset(num_shards=2)
        stream = stream.shuffle(seed=1, buffer_size=buffer) if buffer else stream
        return tr.data.stream(stream.map(lambda row: {"label": row["label"]}).with_format("torch"), length=SAMPLES)

    assert data().keeps_state == (not buffer), "a shuffle buffer's content isn't in the state"
    train_and_resume(data, tmp_path, same_runs)


# ------------------------------------------------------------------------------------------------ torchdata's


class Counted(IterableDataset):
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < SAMPLES:
            self.at += 1
            yield torch.full((4,), self.at / SAMPLES) + torch.rand(4), self.at % 3
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Pairs(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return torch.full((4,), index / SAMPLES) + torch.rand(4), index % 3


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(("made", "length"), [(Pairs, {"epochs": 2}), (Counted, {"epochs": 1, "steps": 5})])
def test_a_stateful_data_loader_trains(tmp_path, same_runs, made, length):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    shuffled = {"shuffle": True} if made is Pairs else {}

    def data() -> Any:
        return loaders.StatefulDataLoader(made(), batch_size=BATCH, **shuffled)

    train_and_resume(data, tmp_path, same_runs, **length)


# ------------------------------------------------------------------------------------------------ torchvision's


class Boxes(Dataset):
    """Images with boxes and masks as tv_tensors, which v2's transforms move together."""

    transform = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        left = index % 5
        image[:, 2:6, left : left + 2] = 255
        boxes = tv_tensors.BoundingBoxes([[left, 2, left + 2, 6]], format="XYXY", canvas_size=(8, 8))
        target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": tv_tensors.Mask(image[:1] // 255)}
        return self.transform(tv_tensors.Image(image), target)


class Located(tr.Task):
    """Learns the corner of the box; checks that each image has its own box and mask."""

    def forward(self, model: Any, batch: Any) -> Any:
        return model(torch.stack(list(batch.inputs)))

    def loss(self, outputs: Tensor, targets: Any) -> Tensor:
        wanted = torch.stack([target["boxes"][0, 0] for target in targets])
        for target in targets:
            assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
            assert isinstance(target["masks"], tv_tensors.Mask)
            columns = torch.nonzero(target["masks"][0].any(0))[:, 0]
            assert [int(columns[0]), int(columns[-1]) + 1] == target["boxes"][0, [0, 2]].tolist()
        return ((outputs[:, 0] - wanted) ** 2).sum()


def as_lists(samples: list[Any]) -> Any:
    return tuple(list(each) for each in zip(*samples, strict=True))


@pytest.mark.parametrize("replicas", [1, 4])
def test_boxes_and_masks_stay_tv_tensors_in_lists(tmp_path, same_runs, replicas):
    train_and_resume(
        lambda: tr.data.dataset(Boxes(), collate=as_lists),
        tmp_path,
        same_runs,
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 1)),
        task=Located(),
        parallel=tr.ParallelSettings(replicas=replicas),
    )


def test_boxes_and_masks_keep_their_values_in_default_batches():
    made = trainer(Boxes(), task=Located())
    batch = next(made.batches.epoch(0))
    assert batch.targets["boxes"].shape == (BATCH, 1, 4)
    assert batch.targets["masks"].shape == (BATCH, 1, 8, 8)
    for image, mask in zip(batch.inputs, batch.targets["masks"], strict=True):
        assert torch.equal(image[:1], mask.float())


def test_voc_segmentation_trains(tmp_path, same_runs):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"image{number}" for number in range(SAMPLES)]
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names))
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (12 * number, 0, 0)).save(root / "JPEGImages" / f"{name}.jpg")
        Image.new("L", (8, 8), number % 3).save(root / "SegmentationClass" / f"{name}.png")
    both = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True)])

    def data() -> Any:
        def transforms(image: Any, mask: Any) -> Any:
            image, mask = both(image, tv_tensors.Mask(mask))
            return image, mask[0].long()

        return vision.VOCSegmentation(str(tmp_path), image_set="train", transforms=transforms)

    train_and_resume(data, tmp_path, same_runs, model=lambda: nn.Conv2d(3, 3, 1), task=tr.tasks.Segmentation())


def test_torchvisions_fake_data_trains(tmp_path, same_runs):
    def data() -> Any:
        return vision.FakeData(SAMPLES, (3, 8, 8), 3, transform=v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32)]))

    train_and_resume(data, tmp_path, same_runs, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))
