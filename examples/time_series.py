"""Time series: an LSTM continues sine waves, trained with L-BFGS, which evaluates the loss several times per step."""

import torch
from torch import Tensor, nn

import torchrelay as tr


class Sequence(nn.Module):
    """Map waves (batch, length) to the value that follows each of theirs, and to `future` more values."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.memory, self.head = nn.LSTM(1, width, num_layers=2, batch_first=True), nn.Linear(width, 1)

    def forward(self, waves: Tensor, future: int = 0) -> Tensor:
        found, state = self.memory(waves[..., None])
        values = [self.head(found)[..., 0]]
        for _ in range(future):
            found, state = self.memory(values[-1][:, -1:, None], state)
            values.append(self.head(found)[..., 0])
        return torch.cat(values, 1)


def waves(samples: int, length: int, seed: int) -> Tensor:
    shift = torch.rand(samples, 1, generator=torch.Generator().manual_seed(seed)) * 80
    return torch.sin((torch.arange(length) + shift) / 5)


def main(run: str = "runs/time-series", epochs: int = 6, length: int = 60) -> float:
    train, test = waves(32, length + 1, 0), waves(8, length + 1, 1)
    torch.manual_seed(0)
    model = Sequence()
    trainer = tr.Trainer(
        model,
        (train[:, :-1], train[:, 1:]),
        (test[:, :-1], test[:, 1:]),
        task=tr.Regression(),
        optimizer=lambda model: torch.optim.LBFGS(model.parameters(), lr=0.8, max_iter=10),
        epochs=epochs,
        batch_size=len(train),
        run=run,
    )
    trainer.fit()
    with torch.no_grad():
        whole = waves(8, length + 40, 1).to(trainer.device.device)
        found = model.eval()(whole[:, :length], future=39)
        return float((found[:, length - 1 :] - whole[:, length:]).square().mean())


if __name__ == "__main__":
    print(f"mean squared error of 40 values to come: {main():.4f}")
