"""Write your own loop from the parts: batches, device, checkpoints.

The parts of the trainer serve any loop; this one trains a small GAN with two optimizers that take turns. Kill it and
start it again: it resumes exactly.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import torchrelay as tr
from torchrelay import checkpoint, rng
from torchrelay.data.augment import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.device.device import set_up

SEED, NOISE = 0, 16


def main(run: str = "runs/own-loop", epochs: int = 3) -> int:
    # 1. Prepare   2. Data   4. Device
    folder = Path(run) / "checkpoints"
    device = set_up(tr.DeviceSettings(), exact=True)
    train, _ = tr.data.digits()
    batches = Batches(train, 64, device, Pipeline(mean=(0.5,), std=(0.5,)), seed=SEED)

    # 3. Models   5. Optimizers, one each
    torch.manual_seed(SEED)
    generator = device.place(nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()))
    discriminator = device.place(nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)))
    models = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=2e-3) for name, model in models.items()}
    step = 0

    # Resume from the newest intact checkpoint
    if (saved := checkpoint.newest(folder, warn=print)) is not None:
        step = saved.step
        models.load_state_dict(saved.model)
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved.state[name])

    # 6. Loss   7. Train
    while step < epochs * len(batches):
        epoch, position = divmod(step, len(batches))
        for batch in batches.epoch(epoch, start=position):
            # Randomness depends on the seed and the step alone, so there is no state of it to save.
            rng.reseed(rng.seed_for(SEED, "noise", step), device.device)
            real = batch.inputs.flatten(1)
            fake = generator(torch.randn(len(real), NOISE, device=device.device))

            logits = discriminator(torch.cat([real, fake.detach()]))
            targets = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(device.device)
            update(optimizers["discriminator"], F.binary_cross_entropy_with_logits(logits, targets))
            logits = discriminator(fake)
            update(optimizers["generator"], F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)))
            step += 1
        state = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        checkpoint.write(folder, checkpoint.Contents(step, models.state_dict(), state))
    return step


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


if __name__ == "__main__":
    main()
