"""Write your own loop on several devices: one, two or four processes give the same weights, bit for bit.

    python examples/several_devices.py
    torchrun --nproc-per-node 2 examples/several_devices.py

The global batch is always divided into four replicas; each process computes its share of them, one after another. Their
gradients are added in one fixed tree, between processes during the backward pass.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import torchrelay as tr
from torchrelay import checkpoint, rng
from torchrelay.data.augment import Pipeline
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.device.device import set_up
from torchrelay.distributed.build import build_strategy
from torchrelay.distributed.process_group import init_process_group

SEED, REPLICAS = 0, 4


def main(run: str = "runs/several-devices", epochs: int = 2) -> None:
    # 2. Data   4. Device, and the other processes
    device = set_up(tr.DeviceSettings(threads=1), exact=True)
    group = init_process_group(device.device)
    train, _ = tr.data.digits()
    # Each process reads its part of a batch.
    batches = Batches(
        train, 100, device, Pipeline(), seed=SEED, replicas=REPLICAS, rank=group.rank, world_size=group.size
    )

    # 3. Model   5. Optimizer
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    strategy = build_strategy(model, "ddp", group, device, exact=True)
    strategy.broadcast_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    # 6. Loss   7. Train
    def train_step(step: int, batch: Batch) -> torch.Tensor:
        losses = []
        for replica, (inputs, targets) in reversed(list(enumerate(batch.replicas(), batch.first_replica))):
            with strategy.replica(last=replica == batch.first_replica):
                loss = torch.zeros((), device=device.device)
                if len(targets):  # the last replicas of a small batch may be empty
                    rng.reseed(rng.seed_for(SEED, "model", step, replica), device.device)
                    loss = F.cross_entropy(strategy(inputs), targets, reduction="sum") / batch.size
                    loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        total = strategy.reduce(losses)  # now the gradients are those of the global batch
        optimizer.step()
        optimizer.zero_grad()
        return total

    step = 0
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            loss = train_step(step, batch)
            step += 1
        if group.main:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
            checkpoint.write(Path(run) / "checkpoints", checkpoint.Contents(step, model.state_dict(), {}))
    group.barrier("the last checkpoint")


if __name__ == "__main__":
    main()
