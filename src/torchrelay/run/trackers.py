"""Step 1: where metrics go besides metrics.jsonl: TensorBoard, and anything else with a `write` and a `close`.

A tracker receives the lines of metrics.jsonl as they are written, so that file is the single source of every chart.
"""

import contextlib
import functools
import io
import math
import re
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from torchrelay.run.metrics import ASKED, Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOT_CHARTED = {"step", "epoch", "split", "time", "seconds", ASKED}
_OF_TRAINING = {"lr", "samples_per_second"}  # the same curve within epochs and at their ends
_QUEUE = 1000  # events that wait for the writer's thread; with TensorBoard's default of 10, training would wait


class Tracker(Protocol):
    """Receives a run's metrics."""

    def write(self, line: Line) -> None:
        """Receive a line of metrics.jsonl."""

    def close(self) -> None:
        """Write what is pending; no call follows."""


class TensorBoard:
    """A run's tensorboard folder: charts of metrics.jsonl, images, settings.

    The charts of each split are in a folder of its own, which TensorBoard takes for a run: so a metric of all splits is
    one card, with a curve for each. Charts, images and settings are in separate event files, so that a resume can
    rewrite the charts and leave the images. Nothing is imported or opened before the first call that writes.

    Args:
        folder: where the event files are, or will be.
        say: called with a message when the files can't be written.
        on: whether anything is written at all.

    Attributes:
        lost: whether they can't be written, or couldn't before: nothing is until `retry`.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print, *, on: bool = True) -> None:
        self.folder = folder
        self._say, self._on = say, on
        self.lost = False  # a chart is never worth stopping the run for
        self._warned = False
        self._writers: dict[tuple[str, str], Any] = {}  # by folder and suffix; PyTorch's writers are untyped
        self._last_steps: dict[tuple[str, str], int] = {}  # by folder and tag: a curve has one point per step

    # ------------------------------------------------------------------------------------------------ charts

    def write(self, line: Line) -> None:
        """Add a line of metrics.jsonl to the charts: "loss" of the split "test" is the curve "test" on the card "loss".

        What is measured within epochs is a curve of "train" on a card beside it, "loss/step". A non-finite value (null
        in the file) is written as NaN.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        step: int = line["step"]
        part = "train" if line["split"] == "step" else re.sub(r"^\.|[^\w.-]", "_", line["split"])
        points = {tag: value for tag, value in numbers_of(line).items() if step > self._last_steps.get((part, tag), -1)}
        if points:
            self._last_steps.update(dict.fromkeys(((part, tag) for tag in points), step))
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
            # One event for the whole line: add_scalar would write one per value and take three times as long.
            self._add(".scalars", Summary(value=values), step, line.get("time"), part)

    def rewrite(self, lines: Iterable[Line]) -> None:
        """Write the charts anew from the lines of metrics.jsonl, so that a resume doubles and loses no point."""
        self._remove(".scalars")
        self._last_steps.clear()
        for line in lines:
            self.write(line)

    def retry(self, lines: Iterable[Line]) -> None:
        """Write the charts anew after the disk has failed: it may have recovered."""
        self.lost = False
        self.rewrite(lines)

    def lacks(self, tag: str) -> bool:
        """Return whether there is no picture with this tag."""
        with self._tolerant():
            return self._on and not any(tag.encode() in path.read_bytes() for path in self.folder.glob("*.media"))
        return False

    # ------------------------------------------------------------------------------------------------ images

    def images(
        self, tag: str, images: Any, mean: Iterable[float] | None, std: Iterable[float] | None, step: int
    ) -> None:
        """Show images as the model sees them, as many as fit in a grid; inputs that aren't images are ignored.

        Args:
            tag: the grid's name.
            images: float (batch, channels, height, width), normalized, on any device.
            mean: per channel, what was subtracted from images in [0, 1]; None if they weren't normalized.
            std: per channel, what they were divided by after that.
            step: number of steps done.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            return
        shown = images[: columns(images) ** 2].detach().float().cpu()
        if mean is not None and std is not None:
            shown = shown * torch.tensor(tuple(std)).view(-1, 1, 1) + torch.tensor(tuple(mean)).view(-1, 1, 1)
        self._image(tag, png_file(image_grid(shown)), step)

    def show(self, kind: str, tag: str, value: Any, step: int) -> None:
        """Show what `tr.log.image`, `tr.log.text` or `tr.log.histogram` was given."""
        from torch.utils.tensorboard.summary import histogram, text

        if kind == "image":
            images = value.float() / 255 if value.dtype == torch.uint8 else value
            self.images(tag, images[None] if images.ndim == 3 else images, None, None, step)
        elif kind == "text":
            self._add(".media", text(tag, value), step)  # type: ignore[no-untyped-call]
        else:
            self._add(".media", histogram(tag, value.detach().float().cpu().numpy(), "auto"), step)  # type: ignore[no-untyped-call]

    def figure(self, tag: str, picture: "Path | Figure", step: int) -> None:
        """Show a PNG file or a matplotlib figure."""
        if isinstance(picture, Path):
            encoded = picture.read_bytes()
        else:
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=100)
            encoded = buffer.getvalue()
        self._image(tag, encoded, step)

    def _image(self, tag: str, png: bytes, step: int) -> None:
        """Show a PNG file byte for byte: add_image would decode it and take some fifteen times its pixels' memory."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(".media", Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    # ------------------------------------------------------------------------------------------------ settings

    def hyperparameters(self, settings: Mapping[str, Any]) -> None:
        """Show a run's settings in TensorBoard's table of runs, beside the last points of its charts.

        Args:
            settings: values by flat name, such as ``"optimizer.lr"``.
        """
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        self._remove(".hparams")
        # Without the "experiment" summary TensorBoard merges the settings of all runs, even if their names differ.
        _, start, end = hparams({name: _plain(value) for name, value in settings.items()}, {})  # type: ignore[no-untyped-call]
        plugin = start.value[0].metadata.plugin_data
        told = HParamsPluginData.FromString(plugin.content)
        # Otherwise the table calls it "tensorboard". The name stands first, as the column is narrow; the rest of the
        # path behind it, since the table joins runs of one name.
        run = self.folder.resolve().parent
        told.session_start_info.group_name = f"{run.name} ({run.parent})"
        plugin.content = told.SerializeToString()
        for summary in (start, end):
            self._add(".hparams", summary, None)

    # ------------------------------------------------------------------------------------------------ event files

    def flush(self) -> None:
        """Write what is pending."""
        with self._tolerant():
            for writer in self._writers.values():
                writer.flush()

    def close(self) -> None:
        """Write what is pending and close the event files; a later call opens new ones."""
        for key in [*self._writers]:
            with self._tolerant():
                self._close(key)

    def _close(self, key: tuple[str, str]) -> None:
        """Close an event file; the writer's own `close` says nothing of what its thread couldn't write."""
        if writer := self._writers.pop(key, None):
            try:
                writer.flush()
            finally:
                writer.close()

    def _add(self, suffix: str, summary: Any, step: int | None, wall_time: float | None = None, part: str = "") -> None:
        """Add an event to the event file with a suffix in a part's folder, which is opened if need be."""
        from torch.utils.tensorboard import FileWriter

        if self.lost or not self._on:
            return
        _silence_writer_threads()
        key = part, suffix
        with self._tolerant():
            if key not in self._writers:
                self._writers[key] = FileWriter(str(self.folder / part), max_queue=_QUEUE, filename_suffix=suffix)
            self._writers[key].add_summary(summary, step, wall_time)

    def _remove(self, suffix: str) -> None:
        """Delete the event files with a suffix, of all parts and of runs that had none."""
        with self._tolerant():
            for key in [key for key in self._writers if key[1] == suffix]:
                self._close(key)
            for file in self.folder.rglob(f"events.out.tfevents.*{suffix}"):
                file.unlink()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """On a write error say so once, and write nothing more until `retry`: metrics.jsonl still has every point."""
        try:
            yield
        except OSError as error:
            self.lost = True
            for key in [*self._writers]:  # one that has failed raises its error again
                with contextlib.suppress(OSError):
                    self._close(key)
            if not self._warned:
                self._warned = True
                self._say(
                    f"warning: {self.folder} can't be written ({error.strerror or error}): make room or repair the "
                    "disk; the end of the run or the next resume writes its charts anew"
                )


@functools.cache
def _silence_writer_threads() -> None:
    """Print no traceback of TensorBoard's writer thread: the next call that writes raises the same error."""
    previous = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            previous(failure)

    threading.excepthook = hook


def numbers_of(line: Line) -> dict[str, float]:
    """Return the numbers of a line by the tag of their card."""
    points = {}
    for name, value in line.items():
        if name not in _NOT_CHARTED and (value is None or isinstance(value, int | float)):
            tag = f"{name}/step" if line["split"] == "step" and name not in _OF_TRAINING else name
            points[tag] = float(value) if value is not None and math.isfinite(value) else math.nan
    return points


def _plain(value: Any) -> float | str:
    """Return a setting as a number or as text; a bool as "true" or "false", which TensorBoard would show as 1 or 0."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


# ------------------------------------------------------------------------------------------------ pictures

Picture = npt.NDArray[np.uint8]  # (height, width, 3)

_MOST_IMAGES = 64
_GRID_SIDE = 1024  # largest width in pixels; a wider grid would take seconds to write
_FRAME = 2  # white pixels around each image of a grid


def image_grid(images: Tensor) -> Picture:
    """Return images side by side, with small ones enlarged so that their pixels can be seen.

    Args:
        images: float (batch, channels, height, width) in [0, 1]; gray from the first channel unless there are three.

    Returns:
        The grid, uint8 of (height, width, 3).
    """
    count, channels, height, width = images.shape
    across = min(columns(images), count)
    scale = max(_GRID_SIDE // 8 // max(height, width), 1)
    high, wide = height * scale + 2 * _FRAME, width * scale + 2 * _FRAME  # of a framed image
    pixels = (images.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels if channels == 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    grid = np.full((math.ceil(count / across) * high, across * wide, 3), 255, np.uint8)
    for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        top, left = index // across * high + _FRAME, index % across * wide + _FRAME
        enlarged = image.repeat(scale, 0).repeat(scale, 1)
        grid[top : top + height * scale, left : left + width * scale] = enlarged
    return grid


def png_file(picture: Picture) -> bytes:
    """Return a picture as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def columns(images: Tensor) -> int:
    """Return how many images (…, height, width) fit side by side, at most eight."""
    return min(max(_GRID_SIDE // max(images.shape[-2:]), 1), math.isqrt(_MOST_IMAGES))
