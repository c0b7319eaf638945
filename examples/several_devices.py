"""A loop of your own on several devices: the same weights, bit for bit, from one process, two or four.

    python examples/several_devices.py
    torchrun --nproc-per-node 2 examples/several_devices.py

Four replicas share each global batch; their gradients are added in one fixed tree, however many processes compute them.
"""

from pathlib import Path

import torch
from torch import nn

import torchrelay as tr
from torchrelay import train as parts
from torchrelay.checkpoint import write


def main(run: str = "runs/several-devices", epochs: int = 2) -> None:
    # 2. Data   4. Device, and the other processes
    device = parts.set_up(parts.DeviceSettings(threads=1), exact=True)
    group = parts.init_process_group(device.device)
    train, _ = tr.data.digits()
    pipeline = parts.Pipeline()
    batches = parts.Batches(train, 100, device, pipeline, replicas=4, rank=group.rank, world_size=group.size)

    # 3. Model   5. Optimizer   6. Loss
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    strategy = parts.build_strategy(model, "ddp", group, device, exact=True)
    strategy.broadcast_weights()
    sgd, task = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), tr.Classification()
    train_step = parts.TrainStep(strategy, task, sgd, device, replicas=4, dummy_batch=batches.dummy_batch)

    # 7. Train
    progress = parts.Progress(epochs, len(batches))
    while progress.continues:
        for batch in batches.epoch(progress.epochs_done):
            result = train_step.step(batch, progress.step)
            progress.record(result, batch.size)
        progress.end_epoch()
        if group.main:
            print(f"epoch {progress.epochs_done}: loss {result.loss.item():.4f}")
            write(Path(run) / "checkpoints", parts.Contents(progress.step, model.state_dict(), {}))
    group.barrier("the last checkpoint")


if __name__ == "__main__":
    main()
