"""A GAN of two convolutional networks (Radford et al., 2016): two updates per step, each with its own optimizer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr

NOISE = 32


class GAN(nn.Module):
    """A generator from noise (batch, 32) to images (batch, 1, 8, 8) in [-1, 1], and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Unflatten(1, (NOISE, 1, 1)),
            nn.ConvTranspose2d(NOISE, 64, 2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(256, 1),
        )  # fmt: skip


class Adversarial(tr.Task):
    """Each step runs both updates in turn; only the network that is updated requires gradients meanwhile."""

    updates = ("discriminator", "generator")

    def compute(self, model: Any, batch: Any, update: str) -> Tensor:
        fake = model.generator(torch.randn(batch.samples, NOISE, device=batch.inputs.device))
        if update == "generator":
            return -F.logsigmoid(model.discriminator(fake)).sum()
        real, faked = model.discriminator(batch.inputs), model.discriminator(fake)
        tr.log("real taken for real", (real > 0).float().mean())
        tr.log("fake taken for real", (faked > 0).float().mean())
        return -(F.logsigmoid(real) + F.logsigmoid(-faked)).sum()

    def predict_batch(self, model: Any, batch: Any) -> Tensor:
        return model.generator(batch.inputs)  # type: ignore[no-any-return]


def main(run: str = "runs/gan", epochs: int = 10) -> float:
    train, _ = tr.data.digits()
    torch.manual_seed(0)
    adam = tr.optim.AdamW(lr=1e-3, betas=(0.5, 0.999))
    optimizers = {"discriminator": adam, "generator": adam}
    data = tr.data.arrays(train.inputs / 127.5 - 1)
    trainer = tr.Trainer(
        GAN(), data, task=Adversarial(), optimizer=optimizers, epochs=epochs, batch_size=64, run=run, normalize=False
    )
    trainer.fit()
    fake = trainer.predict(torch.randn(200, NOISE, generator=torch.Generator().manual_seed(1)))
    # The distance of the mean generated image from the mean real image.
    return float((fake.mean(0) - data.inputs.mean(0)).abs().mean())


if __name__ == "__main__":
    print(f"the mean image is off by {main():.3f}")
