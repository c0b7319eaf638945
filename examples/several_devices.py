"""A loop of your own on several devices: the same weights, bit for bit, from one process, two or four.

    python examples/several_devices.py
    torchrun --nproc-per-node 2 examples/several_devices.py

The global batch is divided into four replicas, whatever runs it; each process computes its share of them, one after
another. Their gradients are added in one fixed tree, between processes while the backward pass still runs.
"""

from pathlib import Path

import torch
from torch import nn

import torchrelay as tr
from torchrelay.train import (
    Batches,
    Checkpointer,
    CheckpointSettings,
    Contents,
    DeviceSettings,
    Pipeline,
    Progress,
    TrainStep,
    build_strategy,
    init_process_group,
    set_up,
)

REPLICAS = 4


def main(run: str = "runs/several-devices", epochs: int = 2) -> None:
    # 2. Data   4. Device, and the other processes
    device = set_up(DeviceSettings(threads=1), exact=True)
    group = init_process_group(device.device)
    train, _ = tr.data.digits()
    batches = Batches(train, 100, device, Pipeline(), replicas=REPLICAS, rank=group.rank, world_size=group.size)

    # 3. Model   5. Optimizer   6. Loss
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    strategy = build_strategy(model, "ddp", group, device, exact=True)
    strategy.broadcast_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step = TrainStep(
        strategy, tr.Classification(), optimizer, device, replicas=REPLICAS, dummy_batch=batches.dummy_batch
    )

    # 7. Train
    progress = Progress(epochs, len(batches))
    saving = Checkpointer(
        Path(run) / "checkpoints",
        CheckpointSettings(),
        steps_per_epoch=len(batches),
        total_steps=progress.total_steps,
    )
    with saving:
        while progress.continues:
            for batch in batches.epoch(progress.epochs_done):
                result = train_step.step(batch, progress.step)
                progress.record(result, batch.size)
            progress.end_epoch()
            if group.main:
                print(f"epoch {progress.epochs_done}: loss {result.loss.item():.4f}")
                saving.save(Contents(progress.step, model.state_dict(), {}))
    group.barrier("the last checkpoint")


if __name__ == "__main__":
    main()
