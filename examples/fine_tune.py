"""Fine-tuning: load the weights of an earlier training, replace the head, and continue training.

The weights are a safetensors file, here of an earlier run; `pretrained=True` loads torchvision's weights.
"""

from pathlib import Path

import torch

import torchrelay as tr


def pretrain(run: Path) -> Path:
    """Train on the digits 0 to 4, and return the file of the best weights."""
    parts = [
        tr.data.arrays(p.inputs[p.targets < 5], p.targets[p.targets < 5], classes=tuple("01234"))
        for p in tr.data.digits()
    ]
    torch.manual_seed(0)
    model = tr.models.build(tr.ModelSettings(name="small-cnn"), classes=5, channels=1, image_size=8, log=print)
    trainer = tr.Trainer(model, *parts, optimizer=tr.optim.AdamW(lr=3e-3), epochs=5, batch_size=64, run=run)
    trainer.fit()
    return trainer.load("best") / "model.safetensors"


def main(run: str = "runs/fine-tune", epochs: int = 5) -> float:
    weights = pretrain(Path(run) / "before")
    train, test = tr.data.digits()
    settings = tr.ModelSettings(name="small-cnn", pretrained=str(weights), new_head=True)
    torch.manual_seed(0)
    trainer = tr.Trainer(
        tr.models.build(settings, classes=10, channels=1, image_size=8, log=print),
        train,
        test,
        optimizer=tr.optim.AdamW(lr=3e-3),
        schedule=tr.optim.Cosine(warmup="5%"),
        epochs=epochs,
        batch_size=64,
        run=Path(run) / "after",
    )
    return trainer.fit()["accuracy"]


if __name__ == "__main__":
    main()
