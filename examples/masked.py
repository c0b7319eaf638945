"""Masked training (BERT, masked autoencoders): a transformer predicts hidden patches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr

PATCHES, PIXELS = 16, 4


class Masked(nn.Module):
    """Map the patches (batch, 16, 4) of digits, some of them hidden, to all patches."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch, self.head = nn.Linear(PIXELS, width), nn.Linear(width, PIXELS)
        self.hidden = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(0.02 * torch.randn(PATCHES, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, patches: Tensor, is_hidden: Tensor) -> Tensor:
        shown = torch.where(is_hidden[..., None], self.hidden, self.patch(patches))
        return self.head(self.encoder(shown + self.place))  # type: ignore[no-any-return]


class FillIn(tr.Task):
    """The mean squared error of the hidden patches: a random quarter, drawn again in each step."""

    def compute(self, model: Any, batch: Any, update: str) -> Tensor:
        patches = batch.inputs
        ranks = torch.rand(patches.shape[:2], device=patches.device).argsort(1)
        is_hidden = ranks < PATCHES // 4
        errors = F.mse_loss(model(patches, is_hidden), patches, reduction="none").mean(2)
        return (errors * is_hidden).sum() / (PATCHES // 4)


def patches(part: tr.data.ArraySource) -> Tensor:
    """Return 8x8 images as (samples, 16, 4): patches of 2x2 pixels."""
    return F.unfold(part.inputs / 255, 2, stride=2).mT.contiguous()


def main(run: str = "runs/masked", epochs: int = 12) -> float:
    train, test = (patches(part) for part in tr.data.digits())
    torch.manual_seed(0)
    trainer = tr.Trainer(
        Masked(),
        train,
        test,
        task=FillIn(),
        optimizer=tr.optim.AdamW(lr=3e-3),
        schedule=tr.optim.Cosine(warmup="5%"),
        epochs=epochs,
        batch_size=64,
        run=run,
    )
    return trainer.fit()["loss"]


if __name__ == "__main__":
    main()
