"""Step 1: where metrics go beside metrics.jsonl: TensorBoard, and whatever else has a `write` and a `close`.

A tracker gets the lines of metrics.jsonl as they are written, so that file stays the one source of every chart.
"""

import contextlib
import copy
import functools
import io
import math
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from torchrelay.run.metrics import Line
from torchrelay.run.pictures import columns, image_grid, png_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLACE = {"step", "epoch", "split", "time", "seconds"}  # where a line belongs, which is no chart
_SHARED = {"lr", "samples_per_second"}  # the same chart, whichever split tells of it
_QUEUE = 1000  # events waiting for the writer's thread; with TensorBoard's own 10 the training would wait


class Tracker(Protocol):
    """What gets a run's metrics."""

    def write(self, line: Line) -> None:
        """Take a line of metrics.jsonl."""

    def close(self) -> None:
        """Write what is left; nothing follows."""


class TensorBoard:
    """A run's tensorboard folder: charts from the lines of metrics.jsonl, pictures, the model's graph, settings.

    Charts, settings and pictures stand in event files of their own, so that a resume can write the charts anew and
    leave the pictures. Nothing is imported or opened before the first call that writes.

    Args:
        folder: where the event files are, or will be.
        say: told what could not be shown.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.folder = folder
        self._say = say
        self._lost = False  # the disk is full or gone: no chart is worth the run
        self._writers: dict[str, Any] = {}  # by suffix; PyTorch's writers have no types
        self._last_steps: dict[str, int] = {}  # by tag: a chart has one point a step

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Say once that the disk takes no more, and write nothing from then on: the charts' source is another file."""
        try:
            yield
        except OSError as error:
            if not self._lost:
                self._lost = True
                self._say(
                    f"TensorBoard's files can't be written ({error.strerror or error}): no more charts; "
                    "make room, then a resume draws them all"
                )

    # ------------------------------------------------------------------------------------------------ charts

    def write(self, line: Line) -> None:
        """Add a line of metrics.jsonl to the charts: "loss" of the split "test" is the chart "loss/test".

        A point that isn't finite (in the file: null) is drawn as TensorBoard draws such points.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        step: int = line["step"]
        points = {tag: value for tag, value in _points(line).items() if step > self._last_steps.get(tag, -1)}
        if points:
            self._last_steps.update(dict.fromkeys(points, step))
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in points.items()]
            # One event for the whole line: add_scalar would take one each, and three times as long.
            with self._tolerant():
                self._events(".scalars").add_summary(Summary(value=values), step, line.get("time"))

    def rewrite(self, lines: Iterable[Line]) -> None:
        """Write the charts anew from the lines of metrics.jsonl, as a resume needs: none doubled, none missing."""
        self._remove(".scalars")
        self._last_steps.clear()
        for line in lines:
            self.write(line)

    # ------------------------------------------------------------------------------------------------ pictures

    def images(
        self, tag: str, images: Any, mean: Iterable[float] | None, std: Iterable[float] | None, step: int
    ) -> None:
        """Show images as the network sees them, as many as fit in a grid; inputs that are no images are left out.

        Args:
            tag: the picture's name.
            images: float (batch, channels, height, width), normalized, on any device.
            mean: per channel, what was subtracted from images in [0, 1]; None if nothing was.
            std: per channel, what they were divided by after that.
            step: after how many steps.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            return
        shown = images[: columns(images) ** 2].detach().float().cpu()
        if mean is not None and std is not None:
            shown = shown * torch.tensor(tuple(std)).view(-1, 1, 1) + torch.tensor(tuple(mean)).view(-1, 1, 1)
        self._picture(tag, png_file(image_grid(shown)), step)

    def figure(self, tag: str, picture: "Path | Figure", step: int) -> None:
        """Show a PNG file or a matplotlib figure."""
        if isinstance(picture, Path):
            encoded = picture.read_bytes()
        else:
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=100)
            encoded = buffer.getvalue()
        self._picture(tag, encoded, step)

    def _picture(self, tag: str, png: bytes, step: int) -> None:
        """Show a PNG file as it is: add_image would take it apart, and some fifteen times its pixels' memory."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        shown = Summary.Value(tag=tag, image=image)
        with self._tolerant():
            self._pictures().file_writer.add_summary(Summary(value=[shown]), step)

    def graph(self, model: nn.Module, inputs: Any) -> None:
        """Show the model's graph; that a model can't be traced is said, and is no error.

        A copy of the model is traced, in evaluation mode, on one sample, and PyTorch's generators are set back: the
        training that follows can't tell.
        """
        sample = _first_sample(inputs)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        try:
            with self._tolerant(), torch.random.fork_rng(devices), _quiet_tracing():
                # add_graph takes a traced model as it is; its own tracing goes through the model twice more, to check.
                copied = copy.deepcopy(model).eval()
                traced = torch.jit.trace(copied, (sample,), check_trace=False)  # type: ignore[no-untyped-call]
                self._pictures().add_graph(traced, (sample,))
        except Exception as error:  # noqa: BLE001 - a user's model may raise anything, and its picture is worth no run
            self._say(f"TensorBoard shows no graph of the model, which can't be traced: {_first_line(error)}")

    # ------------------------------------------------------------------------------------------------ settings

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Show a run's settings beside what they led to, in TensorBoard's table of runs.

        Args:
            settings: values by flat name, such as ``"optimizer.lr"``.
            metrics: final values by tag; a tag that has a chart already counts with that chart's last point.
        """
        from torch.utils.tensorboard.summary import hparams, scalar

        self._remove(".hparams")
        # Without the "experiment" part TensorBoard joins the settings of all runs, even if they differ in their names.
        _, start, end = hparams({name: _plain(value) for name, value in settings.items()}, {})  # type: ignore[no-untyped-call]
        step = max(self._last_steps.values(), default=0)
        points = [scalar(tag, value) for tag, value in metrics.items() if tag not in self._last_steps]  # type: ignore[no-untyped-call]
        with self._tolerant():
            events = self._events(".hparams")
            events.add_summary(start)
            events.add_summary(end)
            for point in points:
                events.add_summary(point, step)
            events.flush()

    # ------------------------------------------------------------------------------------------------ event files

    def close(self) -> None:
        """Write what is left and close the event files; a later call opens new ones."""
        for writer in self._writers.values():
            with self._tolerant():
                writer.close()
        self._writers.clear()

    def _events(self, suffix: str) -> Any:
        """Return the bare writer of the event file with a suffix."""
        from torch.utils.tensorboard import FileWriter

        self._check()
        if suffix not in self._writers:
            self._writers[suffix] = FileWriter(str(self.folder), max_queue=_QUEUE, filename_suffix=suffix)
        return self._writers[suffix]

    def _pictures(self) -> Any:
        """Return the writer of pictures."""
        from torch.utils.tensorboard import SummaryWriter

        self._check()
        if ".media" not in self._writers:
            self._writers[".media"] = SummaryWriter(str(self.folder), filename_suffix=".media")
        return self._writers[".media"]

    def _check(self) -> None:
        if self._lost:
            raise OSError("it was full before")
        _hush()

    def _remove(self, suffix: str) -> None:
        """Delete the event files with a suffix."""
        with self._tolerant():
            if suffix in self._writers:
                self._writers.pop(suffix).close()
            for file in self.folder.glob(f"events.out.tfevents.*{suffix}"):
                file.unlink()


@functools.cache
def _hush() -> None:
    """Let TensorBoard's writing thread print no traceback: what it met is raised again by the next call that writes."""
    others = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            others(failure)

    threading.excepthook = hook


def _points(line: Line) -> dict[str, float]:
    """Return the numbers of a line by the tag of their chart."""
    points = {}
    for name, value in line.items():
        if name not in _PLACE and (value is None or isinstance(value, int | float)):
            tag = name if name in _SHARED else f"{name}/{line['split']}"
            points[tag] = float(value) if value is not None and math.isfinite(value) else math.nan
    return points


def _plain(value: Any) -> bool | int | float | str | None:
    """Return a setting as TensorBoard can show it; a truth value as a word, which it would show as 0 or 1."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------- the graph


def _first_sample(inputs: Any) -> Any:
    """Return inputs, a tensor or a nest of them, cut to the first sample of the batch."""
    if isinstance(inputs, Tensor):
        return inputs[:1].detach().clone()
    if isinstance(inputs, Mapping):
        return {name: _first_sample(part) for name, part in inputs.items()}
    return tuple(_first_sample(part) for part in inputs) if isinstance(inputs, list | tuple) else inputs


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Keep to itself what torch.jit.trace warns of and what add_graph prints.

    PyTorch calls the tracer deprecated, but TensorBoard's graph has no other source yet; what it warns of in a model
    concerns compiled code that nobody runs.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", message="The input to trace is already a ScriptModule")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
