"""`--verify`: is a folder what was exported, and does it still answer as it did?"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from torchrelay.errors import RelayError, explained, intact
from torchrelay.report.export.folder import FACTS, SIGNATURE, check_sums, read_facts
from torchrelay.report.export.formats import INT8, ONNX, PROGRAM, run_module, run_onnx
from torchrelay.report.export.program import load_program

GOLDEN = "golden.safetensors"


def verify(folder: Path, key: Path | None = None, say: Callable[[str], None] = print) -> None:
    """Check a folder's signature and its files, and answer its golden samples again.

    Args:
        folder: the export.
        key: the public key of whoever signed it; None: the signature isn't checked.
        say: called with a line for each check.

    Raises:
        UsageError: the folder is no export, or isn't signed though a key is given.
        RelayError: a file has changed, or an answer differs; the text names the file.
    """
    facts = read_facts(folder)
    if key is not None:
        from torchrelay.report.export.signature import check

        check(folder, key)
        say(f"signature: {SIGNATURE} is of this folder, by the owner of {key}")
    elif (folder / SIGNATURE).exists():
        say("signature: not checked; give its author's public key by --key")
    added = check_sums(folder)
    say("files: each is as it was exported" + (f"; others were added: {', '.join(added)}" if added else ""))
    if not (folder / GOLDEN).exists():
        raise RelayError(f"{folder} holds nothing that answers: {' '.join(facts['problems'])}")
    for file, difference, limit in answer_golden(folder, facts):
        say(f"{file}: answers the golden samples as it did; largest difference {difference:.1e} (limit {limit:g})")


def answer_golden(folder: Path, facts: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Answer the golden samples by each file.

    Returns:
        Each file, the largest difference, and how large it may be.

    Raises:
        RelayError: an answer differs by more, or a file is damaged.
    """
    path = folder / GOLDEN
    with explained(f"read {path}", "copy the export again"), intact(path, "copy the export again"):
        try:
            golden = load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        inputs, expected = golden["inputs"], {INT8: golden.get("int8"), PROGRAM: golden["predictions"]}
    with intact(folder / FACTS, "copy the export again"):
        limits = {file: float(facts["limits"][file]) for file in (PROGRAM, ONNX, INT8)}
        files = [row["file"] for row in facts["proof"] if row["file"] in limits]
    found = []
    for file in files:
        difference = _difference(_answer(folder / file, inputs), expected.get(file, expected[PROGRAM]))
        if not difference <= (limit := limits[file]):  # NaN is none
            raise RelayError(
                f"{folder / file} answers the golden samples differently, by {difference:.2g} where {limit:g} is "
                "rounding: don't use it on this machine"
            )
        found.append((file, difference, limit))
    return found


def _answer(path: Path, inputs: Tensor) -> Tensor:
    """Return a file's predictions; whatever onnxruntime raises becomes a line."""
    try:
        run = run_module(load_program(path)) if path.name == PROGRAM else run_onnx(path)
        return run(inputs)[0]
    except RelayError:
        raise
    except Exception as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RelayError(
            f"{path} can't answer ({cause[:200]}): copy the export again, or use the packages that wrote it"
        ) from error


def _difference(answer: Tensor, expected: Tensor | None) -> float:
    """Return the largest difference, relative to values above 1."""
    if expected is None or answer.shape != expected.shape:
        return float("inf")
    scale = expected.double().abs().clamp(min=1)
    return float(((answer.double() - expected.double()).abs() / scale).max()) if expected.numel() else 0.0
