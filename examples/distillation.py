"""Distillation (Hinton et al., 2015): a small network learns the class probabilities of a larger one."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr


class Distillation(tr.Classification):
    """Cross entropy plus the divergence from the teacher. The task holds the teacher, neither trained nor saved."""

    def __init__(self, teacher: nn.Module, temperature: float = 3.0) -> None:
        super().__init__()
        self.teacher, self.temperature = teacher, temperature

    def compute(self, model: Any, batch: Any, update: str) -> tuple[dict[str, Tensor], Tensor]:
        outputs, t = model(batch.inputs), self.temperature
        wanted = (self.teacher(batch.inputs) / t).log_softmax(1)
        divergence = F.kl_div((outputs / t).log_softmax(1), wanted, reduction="sum", log_target=True) * t**2
        return {"classes": self.loss(outputs, batch.targets), "teacher": divergence}, outputs


def network(*widths: int) -> nn.Module:
    settings = tr.ModelSettings(name="small-cnn", options={"widths": widths})
    return tr.models.build(settings, classes=10, channels=1, image_size=8, log=print)


def fit(model: nn.Module, task: tr.Task, run: str, epochs: int) -> float:
    optimizer, schedule = tr.optim.AdamW(lr=1e-2), tr.optim.Cosine()
    trainer = tr.Trainer(
        model,
        *tr.data.digits(),
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        epochs=epochs,
        batch_size=64,
        run=run,
    )
    return trainer.fit()["accuracy"]


def main(run: str = "runs/distillation", epochs: int = 6) -> float:
    torch.manual_seed(0)
    teacher, student = network(32, 64), network(16, 16)
    fit(teacher, tr.Classification(), f"{run}/teacher", epochs)
    return fit(student, Distillation(teacher), f"{run}/student", epochs)


if __name__ == "__main__":
    main()
