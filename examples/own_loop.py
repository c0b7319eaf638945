"""A loop of your own, from the parts: batches, device, schedule, checkpoints.

Two optimizers that take turns (a small GAN) don't fit `Trainer.fit`, and needn't: the parts serve any loop. Killed and
started again, this one goes on exactly.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import torchrelay as tr
from torchrelay import checkpoint, rng
from torchrelay.data.augment import Pipeline
from torchrelay.data.batches import Batches
from torchrelay.device import device

SEED, NOISE = 0, 16


def main(run: str = "runs/own-loop", epochs: int = 3) -> int:
    # 1. Prepare   2. Data   4. Device
    folder = Path(run) / "checkpoints"
    here = device.set_up(device.DeviceSettings(), exact=True)
    train, _ = tr.data.digits()
    batches = Batches(train, 64, here, Pipeline(mean=(0.5,), std=(0.5,)), seed=SEED)

    # 3. Models   5. Optimizers, one each
    torch.manual_seed(SEED)
    draw = here.place(nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()))
    judge = here.place(nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)))
    models = nn.ModuleDict({"draw": draw, "judge": judge})
    optimizers = {name: torch.optim.Adam(model.parameters(), lr=2e-3) for name, model in models.items()}
    step = 0

    # Go on where the newest whole checkpoint stands
    if (found := checkpoint.newest(folder, warn=print)) is not None:
        step = found.step
        models.load_state_dict(found.model)
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(found.state[name])

    # 6. Loss   7. Train
    while step < epochs * len(batches):
        epoch, place = divmod(step, len(batches))
        for batch in batches.epoch(epoch, start=place):
            rng.reseed(rng.seed_for(SEED, "noise", step), here.device)  # randomness by name: nothing of it to save
            real = batch.inputs.flatten(1)
            made = draw(torch.randn(len(real), NOISE, device=here.device))

            verdicts = judge(torch.cat([real, made.detach()]))
            truth = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)]).to(here.device)
            update(optimizers["judge"], F.binary_cross_entropy_with_logits(verdicts, truth))
            update(
                optimizers["draw"], F.binary_cross_entropy_with_logits(judge(made), torch.ones_like(truth[: len(real)]))
            )
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
