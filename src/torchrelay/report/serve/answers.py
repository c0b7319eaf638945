"""Answers by an export: predictions as words and numbers, with a heat map of why."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchrelay.errors import RelayError, UsageError, intact, nearest
from torchrelay.report.export.folder import check_sums, read_facts
from torchrelay.report.export.formats import INT8, ONNX, PROGRAM, Run, run_module, run_onnx
from torchrelay.report.export.program import load_program
from torchrelay.report.export.verify import GOLDEN
from torchrelay.report.serve.heat import Box, HeatMaps
from torchrelay.report.serve.http import RefusedError
from torchrelay.report.serve.inputs import WHOLE, Batch, Inputs

_SHOWN = 8  # samples that the page offers
_CARD: tuple[str, ...] = ("name", "model", "parameters", "task", "kind", "headline", "classes", "input", "metrics")
_CARD += ("data", "step", "temperature", "calibration", "torchrelay")


class Answers:
    """Answers by an export's folder alone.

    `model.onnx` answers, by onnxruntime; `program.pt2` does where there is no ONNX, and it explains.

    Args:
        folder: the export.
        pixels: the most that a picture may have.
        int8: answer by the 8-bit integers.
        heat: explain, where that is possible.

    Attributes:
        inputs: makes batches for it.
        samples: the inputs of some test samples.
        no_heat: why there are no heat maps; "" if there are.

    Raises:
        UsageError: the folder is no export, or has nothing that answers.
        RelayError: a file has changed or is damaged, or loading it would run code.
    """

    def __init__(self, folder: Path, pixels: int, *, int8: bool = False, heat: bool = True) -> None:
        self._facts = read_facts(folder)
        check_sums(folder)
        with intact(folder / "export.json", "copy the export again"):
            self._kind, files = str(self._facts["kind"]), [row["file"] for row in self._facts["proof"]]
            self.card: dict[str, Any] = {name: self._facts[name] for name in _CARD}
            self._classes = [str(name) for name in self._facts["classes"]]
        self.engine = INT8 if int8 else ONNX if ONNX in files else PROGRAM
        if self.engine not in files:
            missing = (
                "no model.int8.onnx: leave out --int8" if int8 else f"nothing that answers; see {folder}/README.md"
            )
            raise UsageError(f"{folder} has {missing}")
        self.inputs = Inputs(self._facts, pixels)
        self._run = _engine(folder / self.engine)
        self.samples = _samples(folder / GOLDEN)
        self._heat: HeatMaps | None = None
        self.no_heat = self._explain(folder / PROGRAM, heat)

    def _explain(self, program: Path, wanted: bool) -> str:
        """Load what explains; return why it doesn't, or ""."""
        if not wanted:
            return "heat maps were switched off"
        if not self.inputs.takes_images or self._kind not in ("classes", "labels"):
            return "only answers about a picture's classes have a heat map"
        if not program.is_file():
            return f"the export has no {PROGRAM}"
        try:
            self._heat = HeatMaps(program)
        except UsageError as error:
            return str(error)
        return ""

    def answer(self, batch: Batch, top: int, about: str | None = None, heat: bool = False) -> list[dict[str, Any]]:
        """Return an answer for each sample.

        Args:
            batch: the samples.
            top: how many classes are named, the most probable first.
            about: the class that the heat map explains; None: the most probable one.
            heat: explain.

        Raises:
            RefusedError: there is no such class, or the network gives no numbers for these inputs.
        """
        try:
            predictions = self._run(batch.inputs)[0]
        except Exception as error:
            cause = str(error).strip().partition("\n")[0][:200] or type(error).__name__
            raise RefusedError(422, f"the network can't answer these inputs: {cause}") from error
        if predictions.is_floating_point() and not predictions.isfinite().all():
            raise RefusedError(422, "the network's answer to these inputs is no number")
        asked = None if about is None else self._index(about, predictions)
        found = [self._words(each, batch.at, top) for each in predictions]
        for answer, name in zip(found, batch.names, strict=True):
            if name:
                answer["name"] = name
        for answer, box in zip(found, batch.boxes, strict=False):
            if "predictions" in answer and box != WHOLE:
                answer["box"] = [round(each, 6) for each in box]
        if heat or asked is not None:
            self._add_heat(found, batch, predictions, asked)
        return found

    def _words(self, prediction: Tensor, at: int, top: int) -> dict[str, Any]:
        """Return a sample's answer."""
        if self._kind == "labels" and not prediction.ndim:  # the probability of class 1
            prediction = torch.stack([1 - prediction.double(), prediction.double()])
        if self._kind == "tokens" and prediction.ndim == 2:
            prediction = prediction[at]
        if self._kind == "values" or prediction.ndim != 1:
            return {"predictions": prediction.tolist()}
        names = self._names(len(prediction))
        ranked = prediction.sort(descending=True, stable=True)
        rows = [
            {"class": names[index], "probability": probability}
            for probability, index in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
        ]
        answer: dict[str, Any] = {**rows[0], "top": rows[:top]}
        if self._kind == "labels" and self._facts["task"] != "Binary":
            answer["present"] = [row["class"] for row in rows if row["probability"] > 0.5]
        return answer

    def _names(self, count: int) -> Sequence[str]:
        return self._classes if len(self._classes) == count else [str(i) for i in range(count)]

    def _index(self, name: str, predictions: Tensor) -> int:
        known = self._names(predictions.shape[-1] if predictions.ndim > 1 else 2)
        if name not in known:
            raise RefusedError(422, f"there is no class '{name[:80]}'{nearest(name, known)}")
        return known.index(name)

    def _add_heat(self, found: list[dict[str, Any]], batch: Batch, predictions: Tensor, asked: int | None) -> None:
        if self._heat is None:
            for answer in found:
                answer["no_heatmap"] = self.no_heat
            return
        flat = predictions.flatten(1) if predictions.ndim > 1 else predictions[:, None]
        is_single = flat.shape[1] == 1  # one logit, for class 1
        classes = [0 if is_single else asked if asked is not None else int(row.argmax()) for row in flat]
        names = self._names(2) if is_single else self._names(flat.shape[1])
        for answer, heat, box, index in zip(
            found, self._heat.of(batch.inputs, classes), batch.boxes, classes, strict=True
        ):
            answer["heatmap"] = {
                "class": names[1] if is_single else names[index],
                "box": [round(each, 6) for each in _within(heat.box, box)],
                "values": [[round(each, 4) for each in row] for row in heat.values.tolist()],
            }


def _within(inner: Box, outer: Box) -> Box:
    """Return a part of a part as a part of the whole."""
    left, top, right, bottom = outer
    across, down = right - left, bottom - top
    return left + inner[0] * across, top + inner[1] * down, left + inner[2] * across, top + inner[3] * down


def _engine(path: Path) -> Run:
    """Load what answers; whatever onnxruntime raises becomes a line."""
    try:
        return run_module(load_program(path)) if path.name == PROGRAM else run_onnx(path)
    except RelayError:
        raise
    except Exception as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RelayError(f"{path} can't be loaded ({cause[:200]}): copy the export again") from error


def _samples(path: Path) -> Tensor:
    """Return the inputs of some of the export's golden samples."""
    with intact(path, "copy the export again"):
        try:
            return load_file(path)["inputs"][:_SHOWN]
        except (OSError, SafetensorError) as error:
            raise ValueError(str(error)) from error
