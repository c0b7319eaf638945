"""Object detection: bright rectangles in images of different sizes, found by torchvision's Faster R-CNN, made small.

`pip install 'torchrelay[detection]'` adds mean average precision; without it, the run reports the losses.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import torchrelay as tr

Target = dict[str, Tensor]


class Rectangles(Dataset[tuple[Tensor, Target]]):
    """Red, green and blue rectangles, one in each image; class 0 is torchvision's background."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        draw = torch.Generator().manual_seed(self.seed + index)
        image = 0.2 * torch.rand(3, 48 + 8 * (index % 3), 64, generator=draw)
        x, y, width, height = torch.randint(12, 24, (4,), generator=draw).tolist()
        image[index % 3, y : y + height, x : x + width] = 1.0
        box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
        return image, {"boxes": box, "labels": torch.tensor([1 + index % 3])}


def detector(width: int = 32) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, width), (width, width)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = width  # type: ignore[assignment]
    model: nn.Module = FasterRCNN(
        backbone,
        num_classes=4,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(sizes=((12, 18, 24),), aspect_ratios=((0.7, 1.0, 1.4),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=30,
        box_batch_size_per_image=32,
    )
    return model


def main(run: str = "runs/detection", epochs: int = 8, samples: int = 96) -> dict[str, float]:
    collate = tr.tasks.Detection.collate
    torch.manual_seed(0)
    trainer = tr.Trainer(
        detector(),
        tr.data.dataset(Rectangles(samples, seed=0), collate=collate),
        tr.data.dataset(Rectangles(samples // 4, seed=10_000), collate=collate),
        task=tr.tasks.Detection(),
        optimizer=tr.optim.AdamW(lr=2e-3),
        schedule=tr.optim.Cosine(warmup="10%"),
        epochs=epochs,
        batch_size=8,
        run=run,
    )
    return trainer.fit()


if __name__ == "__main__":
    main()
