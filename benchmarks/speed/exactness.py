"""The cost of exactness: a training step with and without it, and how long training waits for a checkpoint.

    python -m benchmarks.speed.exactness [--quick] [--out FILE]

Steps: `run.exact` on and off, all else equal (on the CPU, and on a GPU if there is one). Checkpoints: the time that
training waits for one, compared with a plain memcpy of as many bytes.
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
from benchmarks.page import NOT_MEASURED, Goal, Spread, Table
from torchrelay.data.augment import Flip, PaddedCrop
from torchrelay.data.batch import Batch
from torchrelay.device.device import DeviceSettings
from torchrelay.models.small import resnet18_small
from torchrelay.run.terminal import Terminal

TITLE = "The cost of exactness"
STEPS = 4  # per epoch, which is one round


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
    """Return a row: the exact step and the one that isn't exact."""

    def case(exact: bool) -> Callable[[], object]:
        made = trainer(resnet18_small(10), device, exact, precision)

        def run() -> None:
            torch.use_deterministic_algorithms(exact)
            torch.backends.cudnn.deterministic = exact
            for step, batch in enumerate(made.batches.epoch(0)):
                made.train_step.step(batch, step)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    times = side_by_side({"exact": case(True), "not": case(False)}, rounds)
    exact, without = (Spread(tuple(t / STEPS * 1e3 for t in times[name]), 2) for name in ("exact", "not"))
    return f"{device}, {precision}", exact, without, f"{exact.median / without.median - 1:+.1%}"


class Pauses(tr.Callback):
    """Saves after every other step, and times how long training waits, and a memcpy."""

    def __init__(self) -> None:
        self.save: list[float] = []
        self.copy: list[float] = []
        self.step: dict[bool, list[float]] = {True: [], False: []}  # keyed by whether a save came before
        self.bytes = 0
        self.memory: tuple[np.ndarray, np.ndarray] | None = (
            None  # evicted from the caches by the time the next step ends
        )
        self._saved = False
        self._left = 0.0

    def on_start(self, trainer: Any) -> None:
        """Include the time that the optimizer's step waits for the copy."""
        checkpointer = trainer.session.checkpoints
        settle = checkpointer.settle

        def timed(*, trained: bool = False) -> None:
            began = time.perf_counter()
            settle(trained=trained)
            if self._saved:
                self.save[-1] += time.perf_counter() - began

        checkpointer.settle = timed

    def on_step(self, trainer: Any, batch: Batch, loss: Tensor) -> None:  # noqa: ARG002
        if trainer.step > 2:
            self.step[self._saved].append(time.perf_counter() - self._left)
        self._saved = not self._saved
        if self._saved:
            self._save(trainer)
        self._left = time.perf_counter()

    def _save(self, trainer: Any) -> None:
        state = trainer.optimizer.state_dict()["state"].values()
        tensors = [*trainer.model.state_dict().values(), *(entry["momentum_buffer"] for entry in state)]
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        self.memory = self.memory or (np.ones(self.bytes, np.uint8), np.ones(self.bytes, np.uint8))
        target, source = self.memory
        trainer.session.checkpoints.wait()  # let the earlier save finish: at this rate the disk falls behind
        began = time.perf_counter()
        ctypes.memmove(target.ctypes.data, source.ctypes.data, self.bytes)
        copied = time.perf_counter()
        trainer.save(training_continues=True)
        self.save.append(time.perf_counter() - copied)
        self.copy.append(copied - began)


def pause(name: str, saves: int) -> tuple[Sequence[str | Spread], Goal]:
    """Return a row and a goal: saving a network's whole state, compared with copying as many bytes."""
    pauses = Pauses()
    with tempfile.TemporaryDirectory() as folder:
        model = getattr(torchvision.models, name)(num_classes=10)
        trainer(model, "cpu", True, run=Path(folder) / "run", callbacks=[pauses], steps=2 * saves, batch_size=16).fit()
    # The first save and copy allocate the memory.
    save, copy = (Spread(tuple(1e3 * t for t in times[1:]), 2) for times in (pauses.save, pauses.copy))
    after, others = (Spread(tuple(1e3 * t for t in pauses.step[saved])) for saved in (True, False))
    ratio = save.median / copy.median
    row = name, f"{pauses.bytes / 1e6:,.0f} MB", save, copy, f"{ratio:.2f}", after, others
    return row, Goal(f"{name}, relative to a memcpy", ratio, 1.2, 1.05, "{:.2f} times")


def tables(quick: bool = False) -> list[Table]:
    """Return the tables of steps and of checkpoints."""
    torch.backends.cudnn.benchmark = False
    rounds, saves = (1, 3) if quick else (5, 10)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    # Without units for bf16 its convolutions are emulated, and a step takes minutes.
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    cases = [(device, precision) for device in devices for precision in ("float32", "bf16")]
    rows: list[Sequence[str | Spread]] = [
        steps(*case, rounds) for case in cases if not (emulated and case == ("cpu", "bf16"))
    ]
    if emulated:
        rows.append(("cpu, bf16 (emulated here)", NOT_MEASURED, "", ""))
    if "cuda" not in devices:
        rows.append(("cuda", NOT_MEASURED, "", ""))
    pauses = [pause(name, saves) for name in (("resnet18",) if quick else ("resnet18", "resnet50"))]
    what = "`resnet18-small`, batches of 32 images of 32x32, flipped and cropped; ms, medians of"
    return [
        Table("A training step, `run.exact` on and off", ("", "exact", "not exact", "cost"), rows, f"{what} {rounds}."),
        Table(
            "How long training waits for a checkpoint",
            ("network and optimizer", "state", "waiting", "memcpy", "ratio", "the step after", "other steps"),
            [row for row, _ in pauses],
            f"ms, medians of {saves - 1}. Training waits in the save, and again before the optimizer changes tensors "
            "that are still being copied. The copy continues in the background and takes time on the cores, so the "
            "step after a save is shown beside the other steps.",
            [goal for _, goal in pauses],
        ),
    ]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
