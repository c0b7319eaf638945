"""Step 7, the test: what an evaluation found of each sample, and its file in the run's folder.

Rank 0 computes the columns from the outputs of whole batches, which have the same shapes on any number of devices: so
the file has the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from torchrelay.data.order import Positions
from torchrelay.device.device import mapped
from torchrelay.errors import explained
from torchrelay.tasks.task import Task

NAME = "samples.safetensors"
_MOST = 64 * 2**20  # bytes of all columns
_COLUMNS = {
    "index": "the sample's index in the source; its position in a stream",
    "loss": "the sample's own mean loss, without class weights",
    "prediction": "what the model says",
    "confidence": "the probability that the model gives its prediction; of several labels, that each is there",
    "target": "what is true",
    "mean_iou": "the mean intersection over union, of the classes or of the boxes that are there",
    "boxes": "how many boxes are there",
}


@dataclass(frozen=True)
class Samples:
    """What an evaluation found of each sample, in the order of the data."""

    columns: Mapping[str, Tensor]  # (samples, …) each, on the CPU; empty if nothing was kept
    missing: str = ""  # why nothing was kept; "" where the task says nothing of a sample

    def write(self, path: Path, task: Task, split: str, step: int, epoch: int) -> None:
        """Write the columns as a safetensors file, with what they are, and of what, as JSON below "about".

        Raises:
            RelayError: the disk is full or unavailable.
        """
        headline = {"name": task.headline, "percent": task.percent, "higher_is_better": task.higher_is_better}
        about = {
            "split": split,
            "step": step,
            "epoch": epoch,
            "task": type(task).__name__,
            "headline": headline,
            "columns": {name: _COLUMNS.get(name, "the task's own") for name in self.columns},
        }
        # One entry: safetensors writes several in an order that differs from process to process.
        content = safetensors.torch.save(dict(self.columns), {"about": json.dumps(about, ensure_ascii=False)})
        with explained(f"write {path}"):
            staging = path.with_name(f".{path.name}.partial")
            staging.write_bytes(content)
            staging.replace(path)


class Collector:
    """Collects the columns batch by batch; a task that can't say them costs them, and never the evaluation.

    Args:
        task: says what is kept of a sample.
        most: bytes that are kept.
    """

    def __init__(self, task: Task, most: int = _MOST) -> None:
        self._task, self._most, self._bytes = task, most, 0
        self._indices: list[Positions] = []
        self._rows: list[dict[str, Tensor]] = []
        self._missing = ""
        self._is_open = True
        # A subclass with another loss inherits the columns, of which the loss isn't its own.
        kind, owner = type(task), next(each for each in type(task).__mro__ if "per_sample" in vars(each))
        self._has_loss = all(getattr(kind, name) is getattr(owner, name) for name in ("loss", "compute"))

    def add(self, outputs: Any, targets: Any, indices: Positions) -> None:
        """Add a batch of whole samples."""
        if not self._is_open:
            return
        try:
            # On other ranks the outputs became contiguous on their way, and bits may follow how they lie.
            row = dict(self._task.per_sample(mapped(_contiguous, outputs), targets))
        except Exception as error:  # noqa: BLE001 - any task may raise anything here, and no row is worth a run
            self._close(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return
        if not self._has_loss:
            row.pop("loss", None)
        if not row or any(len(column) != len(indices) for column in row.values()):
            self._close("" if not row else f"{type(self._task).__name__}.per_sample returns other than a row a sample")
            return
        self._bytes += indices.nbytes + sum(column.nbytes for column in row.values())
        if self._bytes > self._most:
            self._close(f"it would hold more than {self._most / 2**20:.0f} MiB")
            return
        self._rows.append(row)
        self._indices.append(indices)

    def _close(self, why: str) -> None:
        self._is_open, self._missing = False, why
        self._rows.clear()
        self._indices.clear()

    def collected(self) -> Samples:
        """Return what was collected; this waits for the device."""
        if not self._rows:
            return Samples({}, self._missing)
        index = torch.cat([torch.from_numpy(each) for each in self._indices])
        return Samples({"index": index} | {name: _joined(self._rows, name) for name in self._rows[0]})


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _joined(rows: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    return torch.cat([row[name] for row in rows]).cpu().contiguous()
