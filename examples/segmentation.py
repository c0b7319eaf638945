"""Semantic segmentation: a small U-Net finds disks and squares in noise, pixel by pixel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr

CLASSES = ("background", "disk", "square")


class UNet(nn.Module):
    """Map images (batch, 1, height, width) to logits (batch, classes, height, width)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._block(1, width), self._block(width, 2 * width)])
        self.bottom = self._block(2 * width, 2 * width)
        self.up = nn.ModuleList([self._block(4 * width, width), self._block(2 * width, width)])
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.bottom(x)
        for block in self.up:
            wider = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = block(torch.cat([wider, kept.pop()], 1))
        return self.head(x)  # type: ignore[no-any-return]


def shapes(samples: int, seed: int, size: int = 32) -> tr.data.ArraySource:
    """Return noisy images with a disk and a square in each; the loss ignores the border."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = torch.zeros(samples, size, size, dtype=torch.int64)
    for mask in masks:
        for kind in (1, 2):
            y, x = torch.randint(6, size - 6, (2,), generator=draw)
            apart = torch.stack([(rows - y).abs(), (columns - x).abs()]).float()
            mask[(apart.norm(dim=0) if kind == 1 else apart.amax(0)) <= 5] = kind
    images = (masks > 0).float() + 0.3 * torch.randn(masks.shape, generator=draw)
    masks[:, [0, -1]] = 255
    return tr.data.arrays(images[:, None], masks, CLASSES, "shapes")


def main(run: str = "runs/segmentation", epochs: int = 6) -> float:
    torch.manual_seed(0)
    trainer = tr.Trainer(
        UNet(),
        shapes(256, seed=0),
        shapes(64, seed=1),
        task=tr.tasks.Segmentation(),
        optimizer=tr.optim.AdamW(lr=5e-3),
        schedule=tr.optim.Cosine(),
        epochs=epochs,
        batch_size=16,
        run=run,
    )
    return trainer.fit()["mean_iou"]


if __name__ == "__main__":
    main()
