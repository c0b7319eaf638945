"""From a trained run to the folder: its forms, the proof, golden samples, the card."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor

from torchrelay import __version__
from torchrelay.data.augment.geometry import Resize
from torchrelay.data.sources import Parts, Source
from torchrelay.data.stream import StreamSource
from torchrelay.device.device import processor_name
from torchrelay.errors import RelayError
from torchrelay.recipe.trained import Trained
from torchrelay.report.export import calibration, formats
from torchrelay.report.export.card import example, model_card, recipe_text
from torchrelay.report.export.folder import new_folder, write_facts, write_sums
from torchrelay.report.export.formats import INT8, ONNX, PROGRAM, Run
from torchrelay.report.export.inference import Inference, kind_of
from torchrelay.report.export.proof import Proof, batches, measure, prove
from torchrelay.report.export.verify import GOLDEN, answer_golden
from torchrelay.tasks.task import Task

WEIGHTS = "model.safetensors"
_GOLDEN, _CALIBRATING = 16, 256  # samples
_BATCH = 256
# How far golden answers may be from the run's, absolute or relative to values above 1: kernels of another processor add
# in another order; where bytes are resized, some are rounded the other way; integers saturate differently.
_ROUNDING, _RESIZED, _INTEGERS = 1e-4, 0.01, 0.05


@dataclass(frozen=True)
class Asked:
    """What somebody wants of an export.

    Args:
        int8: whether to write 8-bit integers as well.
        force: whether to replace an export.
    """

    int8: bool = True
    force: bool = False


class Exporter:
    """Writes the export of a trained run.

    Args:
        trained: the run's model.
        parts: the run's data.
        name: the run's name.
        record: the run's recipe as a table.
        asked: what to write.
        say: called with a line for each file.

    Attributes:
        facts: what `export.json` will say.
    """

    def __init__(
        self,
        trained: Trained,
        parts: Parts,
        name: str,
        record: Mapping[str, Mapping[str, Any]],
        asked: Asked,
        say: Callable[[str], None] = print,
    ) -> None:
        self._trained, self._parts, self._record, self._asked, self._say = trained, parts, record, asked, say
        self._failure: RelayError | None = None
        self._part = next(part for part in ("test", "validation", "train") if getattr(parts, part) is not None)
        self._source: Source = getattr(parts, self._part)
        self._kind = kind_of(trained.task)
        resizes = any(isinstance(each, Resize) for each in trained.pipeline.prepare)
        task, environment = type(trained.task).__name__, record.get("environment", {})
        self.facts: dict[str, Any] = {
            "name": name,
            "torchrelay": __version__,
            "torch": torch.__version__,
            "trained_with": str(environment.get("torch", torch.__version__)),
            "step": trained.step,
            "model": record.get("model", {}).get("name", type(trained.model).__name__),
            "parameters": sum(each.numel() for each in trained.model.parameters()),
            "task": task,
            "kind": self._kind,
            "headline": trained.task.headline,
            "classes": list(trained.classes),
            "input": None,
            "outputs": [],
            "temperature": 1.0,
            "calibration": None,
            "metrics": {},
            "data": self._data(),
            "proof": [],
            "limits": {PROGRAM: _ROUNDING, ONNX: _RESIZED if resizes else _ROUNDING, INT8: _INTEGERS},
            "calibrated_on": 0,
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "problems": [],
        }

    def write(self, target: Path) -> None:
        """Write the folder, which appears as a whole.

        Raises:
            UsageError: there is something at the target already.
            RelayError: the model can't be traced, and the folder has only what needs no tracing; or a file doesn't
                answer as the run does, and there is no folder.
        """
        with new_folder(target, self._asked.force) as folder:
            save_model(self._trained.model, str(folder / WEIGHTS), {"classes": json.dumps(self.facts["classes"])})
            try:
                self._write_forms(folder)
            except RelayError as error:
                self._fail(error)
            card = model_card(self.facts, recipe_text(self._record))
            (folder / "README.md").write_text(card, encoding="utf-8")
            if any(row["file"] == ONNX for row in self.facts["proof"]):
                (folder / "example.py").write_text(example(self.facts), encoding="utf-8")
            write_facts(folder, self.facts)
            if (folder / GOLDEN).exists():
                answer_golden(folder, self.facts)
            write_sums(folder)
            written = ", ".join(sorted(path.name for path in folder.iterdir()))
        if self._failure is not None:
            raise RelayError(f"{self._failure}: {target} has only {written}") from self._failure

    def _fail(self, error: RelayError) -> None:
        """Go on without what can't be exported, and say so in the card and at the end."""
        self._failure = error
        self.facts["problems"].append(f"{error}.")

    def _data(self) -> dict[str, Any]:
        sizes = {name: _length(getattr(self._parts, name)) for name in ("train", "validation")}
        return {"name": self._parts.train.name, **sizes, "proof": self._part, "samples": _length(self._source)}

    def _write_forms(self, folder: Path) -> None:
        """Write what answers, prove it, and keep golden samples."""
        task = self._trained.task
        if type(task).forward is not Task.forward or type(task).predict_batch is not Task.predict_batch:
            raise RelayError(f"{type(task).__name__} calls the model itself, which can't be traced")
        inputs, targets = _first(self._source, _BATCH)
        outputs = self._trained.outputs(self._source)
        if not isinstance(outputs, Tensor):
            raise RelayError(f"{type(self._trained.model).__name__} returns a {type(outputs).__name__}, not a tensor")
        targets = _targets(self._source)
        self._calibrate(outputs, targets)
        inference = Inference(self._trained, inputs[0], self.facts["temperature"])
        self.facts["outputs"] = [*inference.output_names]
        self.facts["input"] = {
            "name": inference.input_name,
            "dtype": str(inputs.dtype).removeprefix("torch."),
            "shape": list(inputs.shape[1:]),
        }
        if targets is not None:
            self.facts["metrics"] = {name: asdict(each) for name, each in measure(task, outputs, targets).items()}
        predictions = outputs
        if len(inference.output_names) > 1:
            scaled = outputs if self.facts["temperature"] == 1 else outputs.float() / self.facts["temperature"]
            predictions = task.predict(scaled)
        runs = self._write_files(folder, inference, inputs)
        for form, file, run in runs:
            size = (folder / file).stat().st_size
            proof = prove(
                form, file, size, run, self._source, (predictions, outputs), targets, task, self._kind, _BATCH
            )
            self.facts["proof"].append(asdict(proof))
            self._say(_line(proof, task.headline, _length(self._source), self._part))
        self._keep_golden(folder, inference, runs)

    def _write_files(self, folder: Path, inference: Inference, inputs: Tensor) -> list[tuple[str, str, Run]]:
        """Write the files; return the name of each form, its file and what answers by it."""
        runs = [("the run", WEIGHTS, formats.run_module(inference))]
        program = formats.write_program(inference, inputs[:2], folder / PROGRAM)
        runs.append(("torch.export", PROGRAM, formats.run_module(program.module())))
        facts = {key: self.facts[key] for key in ("name", "task", "kind", "classes", "input", "temperature")}
        try:
            formats.write_onnx(inference, program, facts, folder / ONNX)
        except RelayError as error:
            self._fail(error)
            return runs
        runs.append(("ONNX", ONNX, formats.run_onnx(folder / ONNX)))
        if self._asked.int8:
            runs += self._write_int8(folder, inference.input_name)
        return runs

    def _write_int8(self, folder: Path, name: str) -> list[tuple[str, str, Run]]:
        """Write the integers, which not every model allows."""
        try:
            given = _spread(self._parts.train, _CALIBRATING)
            formats.write_int8(folder / ONNX, torch.split(given, 32), name, folder / INT8)
        except RelayError as error:
            (folder / INT8).unlink(missing_ok=True)
            self.facts["problems"].append(f"{INT8} is left out: {error}.")
            self._say(f"left out: {INT8}, since {error}")
            return []
        self.facts["calibrated_on"] = len(given)
        return [("ONNX int8", INT8, formats.run_onnx(folder / INT8))]

    def _calibrate(self, outputs: Tensor, targets: Any) -> None:
        """Fit the temperature to validation data, and say what it does on the data of the proof."""
        validation = self._parts.validation
        if self._kind == "values" or validation is None or targets is None or self._part == "validation":
            return
        wanted = _targets(validation)
        fitted = calibration.flat(self._trained.outputs(validation), wanted, self._kind)
        temperature = calibration.fit_temperature(*fitted)
        flat = calibration.flat(outputs, targets, self._kind)
        self.facts["temperature"] = temperature
        self.facts["calibration"] = {"samples": _length(validation)} | {
            when: {
                "loss": calibration.negative_log_likelihood(*flat, t),
                "error": calibration.calibration_error(*flat, t),
            }
            for when, t in (("before", 1.0), ("after", temperature))
        }

    def _keep_golden(self, folder: Path, inference: Inference, runs: list[tuple[str, str, Run]]) -> None:
        """Keep some samples with the run's answers, and with those of the integers, which differ by design."""
        inputs = _spread(self._source, _GOLDEN)
        kept = {"inputs": inputs, "predictions": formats.run_module(inference)(inputs)[0]}
        for _, file, run in runs:
            if file == INT8:
                kept["int8"] = run(inputs)[0]
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, folder / GOLDEN)


def _line(proof: Proof, headline: str, samples: int, part: str) -> str:
    flipped = "" if proof.flipped is None else f", {proof.flipped:,} flipped answers"
    value = "" if proof.headline is None else f", {headline.replace('_', ' ')} {proof.headline:.4f}"
    return (
        f"{proof.form}: {samples:,} {part} samples, largest difference {proof.largest_difference:.1e}{flipped}{value}, "
        f"p50 {proof.p50 * 1000:.2f} ms, p95 {proof.p95 * 1000:.2f} ms, {proof.size / 1000:,.0f} kB"
    )


def _length(source: Source | None) -> int:
    """Return the number of samples; 0 if it is unknown."""
    return (source.length or 0) if isinstance(source, StreamSource) else 0 if source is None else len(source)


def _first(source: Source, size: int) -> tuple[Tensor, Any]:
    return next(batches(source, size))


def _targets(source: Source) -> Any:
    """Return all targets as a tensor; None if there are none."""
    found = [targets for _, targets in batches(source, _BATCH)]
    return torch.cat(found) if all(isinstance(each, Tensor) for each in found) else None


def _spread(source: Source, count: int) -> Tensor:
    """Return the inputs of some samples at equal distances."""
    length = _length(source)
    chosen = torch.linspace(0, length - 1, min(count, length)).long().tolist()
    found, start = list[Tensor](), 0
    for inputs, _ in batches(source, _BATCH):
        found += [inputs[i - start] for i in chosen if start <= i < start + len(inputs)]
        start += len(inputs)
    return torch.stack(found)
