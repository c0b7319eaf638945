"""What exactness costs: a training step with it and without, and how long a checkpoint holds training up.

    python -m benchmarks.exactness [--quick] [--out FILE]

Steps: `run.exact` on and off, otherwise alike (on the CPU, and on a GPU where there is one). Checkpoints: the time that
`Trainer.save` takes, beside a plain memcpy of as many bytes.
"""

import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import torchrelay as tr
from benchmarks import page
from benchmarks.measure import side_by_side
from benchmarks.page import NOT_MEASURED, Spread, Table
from torchrelay.data.augment import Flip, PaddedCrop
from torchrelay.data.batches import Batch
from torchrelay.device import DeviceSettings
from torchrelay.models.small import resnet18_small
from torchrelay.terminal import Terminal

TITLE = "What exactness costs"
STEPS = 4  # of an epoch, which is a round


def trainer(model: nn.Module, device: str, exact: bool, precision: str = "float32", **changes: Any) -> tr.Trainer:
    """Return a trainer on random images."""
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    placing = {"name": device, "precision": precision, "channels_last": True}
    settings = tr.RunSettings(exact=exact, max_steps=changes.pop("steps", None))
    usual: dict[str, Any] = {"batch_size": 32, "epochs": 100, "settings": settings, "terminal": Terminal(quiet=True)}
    return tr.Trainer(
        model,
        (images, torch.arange(128) % 10),
        augment=[Flip(), PaddedCrop(padding=4)],
        device=DeviceSettings.model_validate(placing),
        optimizer=tr.optim.SGD(lr=0.1, momentum=0.9),
        **usual | changes,
    )


def steps(device: str, precision: str, rounds: int) -> Sequence[str | Spread]:
    """Return a row: the step with exactness and without."""

    def case(exact: bool) -> Callable[[], object]:
        made = trainer(resnet18_small(10), device, exact, precision)

        def run() -> None:
            torch.use_deterministic_algorithms(exact)
            torch.backends.cudnn.deterministic = exact
            for batch in made.batches.epoch(0):  # of four
                made.train_step(batch)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    times = side_by_side({"exact": case(True), "not": case(False)}, rounds)
    exact, without = (Spread(tuple(t / STEPS * 1e3 for t in times[name]), 2) for name in ("exact", "not"))
    return f"{device}, {precision}", exact, without, f"{exact.median / without.median - 1:+.1%}"


class Pauses(tr.Callback):
    """After each step, takes the time of a save, and of a memcpy of as many bytes."""

    def __init__(self) -> None:
        self.save: list[float] = []
        self.copy: list[float] = []
        self.bytes = 0
        self.memory: tuple[np.ndarray, np.ndarray] | None = None  # in no cache any more when the next step is done

    def on_step(self, trainer: tr.Trainer, batch: Batch, loss: Tensor) -> None:  # noqa: ARG002
        state = trainer.optimizer.state_dict()["state"].values()
        tensors = [*trainer.model.state_dict().values(), *(entry["momentum_buffer"] for entry in state)]
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        self.memory = self.memory or (np.ones(self.bytes, np.uint8), np.ones(self.bytes, np.uint8))
        target, source = self.memory
        assert trainer.run is not None  # noqa: S101
        trainer.run.wait()  # whoever saves so often that the disk can't follow waits for the disk
        began = time.perf_counter()
        ctypes.memmove(target.ctypes.data, source.ctypes.data, self.bytes)
        copied = time.perf_counter()
        trainer.save()
        self.save.append(time.perf_counter() - copied)
        self.copy.append(copied - began)


def pause(name: str, saves: int) -> Sequence[str | Spread]:
    """Return a row: saving a network's whole state, beside copying as many bytes."""
    pauses = Pauses()
    with tempfile.TemporaryDirectory() as folder:
        model = getattr(torchvision.models, name)(num_classes=10)
        trainer(model, "cpu", True, run=Path(folder) / "run", callbacks=[pauses], steps=saves, batch_size=4).fit()
    # The first ones take the memory.
    save, copy = (Spread(tuple(1e3 * t for t in times[1:]), 2) for times in (pauses.save, pauses.copy))
    return name, f"{pauses.bytes / 1e6:,.0f} MB", save, copy, f"{save.median / copy.median:.2f}"


def tables(quick: bool = False) -> list[Table]:
    """Return what a step and what a checkpoint costs."""
    torch.backends.cudnn.benchmark = False
    rounds, saves = (1, 3) if quick else (5, 10)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows = [steps(device, precision, rounds) for device in devices for precision in ("float32", "bf16")]
    if "cuda" not in devices:
        rows.append(("cuda", NOT_MEASURED, "", ""))
    what = "`resnet18-small`, batches of 32 images of 32x32, flipped and cropped; ms, medians of"
    names = ("resnet18",) if quick else ("resnet18", "resnet50")
    return [
        Table("A training step, `run.exact` on and off", ("", "exact", "not", "cost"), rows, f"{what} {rounds}."),
        Table(
            "How long a checkpoint holds training up",
            ("network and optimizer", "state", "save", "memcpy", "ratio"),
            [pause(name, saves) for name in names],
            f"ms, medians of {saves - 1}.",
        ),
    ]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
