"""A Siamese network: do two images show the same digit? A sample is a tuple of two inputs and a target."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import torchrelay as tr


class Siamese(nn.Module):
    """One network embeds two images; a linear layer compares the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        settings = tr.ModelSettings(name="small-cnn")
        self.features = tr.models.build(settings, classes=64, channels=1, image_size=8, log=print)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # (batch, 1, 8, 8) twice -> (batch, 1)
        return self.head((self.features(left) - self.features(right)).abs())  # type: ignore[no-any-return]


def pairs(part: tr.data.ArraySource, copies: int) -> TensorDataset:
    """Pair each image with one of its class and one of another, `copies` times."""
    images, labels = part.inputs / 255, part.targets
    draw = torch.Generator().manual_seed(len(part))
    same = (labels[:, None] == labels).float()
    same.fill_diagonal_(0)
    other = (labels[:, None] != labels).float()
    partners = [torch.multinomial(each, copies, generator=draw).flatten() for each in (same, other)]
    left = images.repeat_interleave(copies, 0).repeat(2, 1, 1, 1)
    is_same = torch.tensor([1.0, 0.0]).repeat_interleave(len(left) // 2)
    return TensorDataset(left, images[torch.cat(partners)], is_same[:, None])


def main(run: str = "runs/siamese", epochs: int = 4) -> float:
    train, test = tr.data.digits()
    torch.manual_seed(0)
    trainer = tr.Trainer(
        Siamese(),
        pairs(train, copies=2),
        pairs(test, copies=1),
        task=tr.MultiLabel(labels=1),
        optimizer=tr.optim.AdamW(lr=3e-3),
        schedule=tr.optim.Cosine(),
        epochs=epochs,
        batch_size=128,
        run=run,
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main()
