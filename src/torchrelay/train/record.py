"""Step 7: `tr.log`: values of a task's or a callback's own, which nothing waits for.

What a task logs while it computes a replica is added up like its measures, on the device, so it doesn't depend on how
many processes share a step. The rest is rank 0's: what callbacks log, and images, texts and histograms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchrelay.errors import UsageError

# Values by name: their sum, and what it is divided by.
Logged = dict[str, tuple[Tensor | float, Tensor | float]]


class Record:
    """What was logged since the last line of metrics.

    Attributes:
        scalars: of callbacks.
        media: the last value of each image, text and histogram, by kind and name.
        losses: of the steps.
        norms: of their gradients, where they are computed.
    """

    def __init__(self) -> None:
        self.scalars: Logged = {}
        self.media: dict[tuple[str, str], Any] = {}
        self.losses: list[Tensor | float] = []
        self.norms: list[Tensor | float] = []

    def take_scalars(self) -> dict[str, float]:
        """Return the means of the scalars, and forget them."""
        means = {name: float(total) / float(count) for name, (total, count) in self.scalars.items()}
        self.scalars.clear()
        return means

    def read_losses(self) -> list[float]:
        """Return the losses; from now on they and the norms are kept as numbers."""
        losses = [float(loss) for loss in self.losses]
        self.losses[:], self.norms[:] = losses, map(float, self.norms)
        return losses

    def take_media(self) -> dict[tuple[str, str], Any]:
        """Return the last images, texts and histograms, and forget them."""
        media, self.media = self.media, {}
        return media


class Log:
    """Logs values of one's own from a task or a callback.

    Values by one name are averaged until the next line of metrics.jsonl, which `run.log_every` decides, and over the
    epoch; what a callback logs after a line was written is in the next. Images, texts and histograms go to TensorBoard,
    the last of each name with each line. In an evaluation nothing is logged.
    """

    def __init__(self) -> None:
        self._record: Record | None = None
        self._replica: Logged | None = None  # of the replica that is being computed
        self._is_first = True  # whether that is the batch's first replica
        self._is_muted = False

    def __call__(self, name: str, value: Tensor | float) -> None:
        """Log a number, or a tensor of one element: its mean reaches metrics.jsonl, TensorBoard and the plots.

        Raises:
            UsageError: the value is something else, or nothing is being trained.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise UsageError(f"tr.log('{name}') got a tensor of shape {tuple(value.shape)}: give one number")
            value = value.detach().reshape(())
        if self._is_muted:
            return
        scalars = self._replica if self._replica is not None else self._open(name).scalars
        total, count = scalars.get(name, (0.0, 0))
        scalars[name] = total + value, count + 1

    def image(self, name: str, images: Tensor) -> None:
        """Show images, floats in [0, 1] or bytes (batch, channels, height, width), in TensorBoard."""
        self._show("image", name, images)

    def text(self, name: str, text: str) -> None:
        """Show a text, as Markdown, in TensorBoard."""
        self._show("text", name, text)

    def histogram(self, name: str, values: Tensor) -> None:
        """Show how the elements of a tensor are distributed, in TensorBoard."""
        self._show("histogram", name, values)

    def _show(self, kind: str, name: str, value: Any) -> None:
        if not self._is_muted and (self._replica is None or self._is_first):
            self._open(name).media[kind, name] = value.detach().clone() if isinstance(value, Tensor) else value

    def _open(self, name: str) -> Record:
        if self._record is None:
            raise UsageError(f"tr.log('{name}') is for tasks and callbacks, and nothing is being trained")
        return self._record

    # For the trainer's parts

    @contextmanager
    def to(self, record: Record) -> Iterator[None]:
        """Log into a record meanwhile."""
        before, self._record = self._record, record
        try:
            yield
        finally:
            self._record, self._replica = before, None

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Log nothing meanwhile."""
        before, self._is_muted = self._is_muted, True
        try:
            yield
        finally:
            self._is_muted = before

    def begin(self, *, first: bool) -> None:
        """Begin to collect what a replica logs; not a context manager, which would take longer than the rest."""
        self._replica, self._is_first = {}, first

    def end(self) -> Logged:
        """Return what the replica has logged."""
        logged, self._replica = self._replica or {}, None
        return logged


log = Log()


def loss_parts(loss: Any, weight: Tensor | float, name: str, *, first: bool) -> Logged:
    """Return the sum of each part of a replica's loss, and of the whole under a name if there is one.

    What they are divided by is the weight of the global batch, so it counts for the first replica only.
    """
    parts = dict(loss) if isinstance(loss, dict) else {}
    if name:
        parts[name] = torch.stack([*loss.values()]).sum() if isinstance(loss, dict) else loss
    return {each: (part.detach(), weight if first else 0.0) for each, part in parts.items()}
