"""Train on your own data: any torch Dataset, with random transforms per sample, read by worker processes.

The transforms draw from PyTorch's global generator. torchrelay seeds it for each sample, so the result is the same,
bit for bit, for any number of workers.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

import torchrelay as tr

EIGHT_BITS = 255 / 16  # scikit-learn's digits have 17 gray levels


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's digits: the odd rows, slightly shifted and rotated, for training; the even rows for testing."""

    def __init__(self, train: bool) -> None:
        data = load_digits()
        self.images = torch.tensor(data.images * EIGHT_BITS, dtype=torch.uint8)[:, None]  # (samples, 1, 8, 8)
        self.labels = data.target.tolist()
        self.rows = range(int(train), len(self.images), 2)
        steps = [v2.RandomAffine(degrees=8, translate=(0.1, 0.1))] if train else []
        self.transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.3], [0.37])])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(self.images[row]), self.labels[row]


def main(run: str = "runs/own-data", epochs: int = 8, workers: int = 2) -> float:
    classes = tuple("0123456789")
    torch.manual_seed(0)
    trainer = tr.Trainer(
        tr.models.build(tr.ModelSettings(name="small-cnn"), classes=10, channels=1, image_size=8, log=print),
        tr.data.dataset(Digits(train=True), classes=classes),
        tr.data.dataset(Digits(train=False), classes=classes),
        optimizer=tr.optim.AdamW(lr=3e-3),
        schedule=tr.optim.Cosine(),
        epochs=epochs,
        batch_size=64,
        workers=workers,
        run=run,
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main()
