"""A variational autoencoder (Kingma and Welling, 2014): a loss of two parts, and generated digits."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr


class VAE(nn.Module):
    """Map digits of 64 pixels in [0, 1] to normal distributions over `latent` numbers, and back."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        drawn = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(drawn), mean, log_variance


class Bound(tr.Task):
    """The negative evidence lower bound; both parts are logged by name."""

    def compute(self, model: Any, batch: Any, update: str) -> dict[str, Tensor]:
        logits, mean, log_variance = model(batch.inputs)
        return {
            "reconstruction": F.binary_cross_entropy_with_logits(logits, batch.inputs, reduction="sum"),
            "divergence": -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(),
        }


class Samples(tr.Callback):
    """Show new digits in TensorBoard after each epoch."""

    def on_epoch(self, trainer: Any, epoch: int, values: dict[str, float]) -> None:
        with torch.no_grad():
            noise = torch.randn(16, trainer.model.latent, device=trainer.device.device)
            tr.log.image("new digits", trainer.model.decoder(noise).sigmoid().view(16, 1, 8, 8))


def main(run: str = "runs/vae", epochs: int = 15) -> float:
    train, test = (part.inputs.flatten(1) / 255 for part in tr.data.digits())
    torch.manual_seed(0)
    optimizer = tr.optim.AdamW(lr=3e-3)
    trainer = tr.Trainer(
        VAE(),
        train,
        test,
        task=Bound(),
        optimizer=optimizer,
        epochs=epochs,
        batch_size=64,
        run=run,
        callbacks=[Samples()],
    )
    return trainer.fit()["loss"]


if __name__ == "__main__":
    main()
