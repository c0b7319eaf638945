"""Writing a module as torch.export's program, as ONNX and as ONNX of 8-bit integers, and running each."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from torchrelay.errors import RelayError, UsageError
from torchrelay.report.export.inference import Inference

PROGRAM, ONNX, INT8 = "program.pt2", "model.onnx", "model.int8.onnx"
Run = Callable[[Tensor], tuple[Tensor, ...]]  # from inputs (samples, …) to the outputs
# What integers compute; the preprocessing and the last probabilities stay floats.
_QUANTIZED = ["Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Concat"]


def needed(module: str, install: str = "pip install 'torchrelay[export]'") -> Any:
    """Import a package of an extra.

    Args:
        module: its name.
        install: the command that installs it.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"this needs {error.name or module}: install it by {install}") from error


def write_program(inference: Inference, inputs: Tensor, path: Path) -> torch.export.ExportedProgram:
    """Trace a module for batches of any size, and write torch.export's program.

    Args:
        inference: the module.
        inputs: a batch of two samples or more.
        path: the file.

    Raises:
        RelayError: it can't be traced.
    """
    with _quiet(), _traced(inference, "torch.export"):
        any_size = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(inference, (inputs,), dynamic_shapes=any_size)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names the folders and quotes the lines of this machine's files
        program._example_inputs = None  # it would be pickled
        torch.export.save(program, path)
    return program


def write_onnx(
    inference: Inference, program: torch.export.ExportedProgram, facts: Mapping[str, Any], path: Path
) -> None:
    """Write a traced module as ONNX.

    Args:
        inference: the module.
        program: what `write_program` returned.
        facts: what the file also says, such as the names of the classes; as JSON in its metadata.
        path: the file.

    Raises:
        RelayError: ONNX lacks an operator.
    """
    onnx = needed("onnx")
    needed("onnxscript")
    with _quiet(), _traced(inference, "torch.onnx.export"):
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[inference.input_name],
            output_names=[*inference.output_names],
        )
        model: Any = cast("torch.onnx.ONNXProgram", made).model_proto
    onnx.helper.set_model_props(model, {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()})
    onnx.save(model, path)


def write_int8(onnx: Path, inputs: Sequence[Tensor], name: str, path: Path) -> None:
    """Write an ONNX file whose weights and activations are 8-bit integers, by onnxruntime's static quantization.

    Args:
        onnx: the file in floats.
        inputs: batches of inputs from which the ranges of activations are measured.
        name: of the input.
        path: the file.

    Raises:
        RelayError: it can't be quantized.
    """
    quantization = needed("onnxruntime.quantization")
    prepare = needed("onnxruntime.quantization.shape_inference").quant_pre_process
    prepared = path.with_suffix(".prepared")
    try:
        with _quiet(), _traced(None, "onnxruntime's quantization"):
            prepare(onnx, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
                _reader(quantization, name, inputs),
                op_types_to_quantize=_QUANTIZED,
                per_channel=True,
                # Weights of 7 bits: without VNNI a processor adds pairs of products in 16 bits, which 8 would overflow.
                reduce_range=True,
                # The model's outputs stay floats, and the next layer quantizes its own inputs.
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
            )
    finally:
        prepared.unlink(missing_ok=True)


def _reader(quantization: Any, name: str, inputs: Sequence[Tensor]) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """What onnxruntime asks for one batch after another."""

        rest = iter(inputs)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()


def run_onnx(path: Path) -> Run:
    """Return what answers by an ONNX file, on the CPU, with as many threads as PyTorch uses."""
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {given.name: inputs.contiguous().numpy()})))

    return run


def run_module(module: Callable[[Tensor], Any]) -> Run:
    """Return what answers by a module: the exported one, or that of torch.export's program."""

    def run(inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = module(inputs)
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters tell their developers off the terminal."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")
    loggers = [logging.getLogger(None if name == "root" else name) for name in names]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)


@contextmanager
def _traced(inference: Inference | None, by: str) -> Iterator[None]:
    """Turn whatever an exporter raises into a line."""
    try:
        yield
    except RelayError:
        raise
    except Exception as error:
        what = "the model" if inference is None else type(inference.model).__name__
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RelayError(f"{what} can't be exported by {by} ({type(error).__name__}: {cause[:200]})") from error
