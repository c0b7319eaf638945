"""Tabular data with numbers and categories: a sample is a dict, and the model takes its entries by name."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import torchrelay as tr

CELLARS = 3


class Wines(Dataset[dict[str, Tensor]]):
    """scikit-learn's wines: their measurements, an invented cellar, and their kind as the target."""

    def __init__(self, part: tr.data.ArraySource) -> None:
        self.numbers, self.kinds = part.inputs, part.targets
        self.cellars = torch.arange(len(part)) % CELLARS
        self.classes = part.classes

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"numbers": self.numbers[index], "cellar": self.cellars[index], "target": self.kinds[index]}


class Net(nn.Module):
    """Embeds the category and concatenates it with the numbers."""

    def __init__(self, numbers: int, classes: int) -> None:
        super().__init__()
        self.cellar = nn.Embedding(CELLARS, 4)
        self.layers = nn.Sequential(nn.Linear(numbers + 4, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, classes))

    def forward(self, numbers: Tensor, cellar: Tensor) -> Tensor:
        return self.layers(torch.cat([numbers, self.cellar(cellar)], 1))  # type: ignore[no-any-return]


def main(run: str = "runs/tables", epochs: int = 10) -> float:
    train, test = tr.data.wine()
    torch.manual_seed(0)
    trainer = tr.Trainer(
        Net(train.inputs.shape[1], len(train.classes)),
        Wines(train),
        Wines(test),
        optimizer=tr.optim.AdamW(lr=1e-2),
        epochs=epochs,
        batch_size=16,
        run=run,
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main()
