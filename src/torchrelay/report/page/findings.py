"""What a page says of a run's last evaluation: intervals, classes, calibration, slices, the worst samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from torchrelay.report.export.intervals import wilson
from torchrelay.report.page.facts import Column, Facts

BINS = 15  # of the calibration
_Z = 1.959963984540054
_FEWEST = 10  # samples of a slice that is judged
_PAIRS, _CLASSES, _WORST = 10, 60, 24  # that are shown at most


@dataclass(frozen=True)
class Share:
    """How many of some samples are right."""

    name: str
    value: float
    low: float
    high: float
    samples: int


def share(name: str, right: int, samples: int) -> Share:
    """Return a share with its 95% interval."""
    return Share(name, right / samples, *wilson(right, samples), samples)


@dataclass(frozen=True)
class Answers:
    """Samples that have one class each: what it is, what the model said, how sure it was."""

    target: Column
    prediction: Column
    confidence: Column

    @property
    def right(self) -> Column:
        """Whether each is right."""
        right: Column = self.target == self.prediction
        return right


def answers(facts: Facts) -> Answers | None:
    """Return the samples' classes; None if the task has none."""
    names = ("target", "prediction", "confidence")
    if not all(name in facts.samples for name in names):
        return None
    target, prediction, confidence = (facts.samples[name] for name in names)
    is_class = prediction.ndim == 1 and prediction.dtype.kind in "iu" and len(target) > 0
    return Answers(target, prediction, confidence) if is_class else None


def intervals(facts: Facts) -> dict[str, tuple[float, float, str]]:
    """Return the 95% intervals of the last evaluation's numbers, and the method, where the samples give one."""
    found, total = dict[str, tuple[float, float, str]](), int(facts.evaluation.get("samples", 0))
    loss = facts.samples.get("loss")
    for name, value in facts.evaluation.items():
        if not isinstance(value, int | float):
            continue
        is_share = name.endswith("accuracy") and answers(facts) is not None and total
        if is_share and abs(value * total - round(value * total)) < 1e-3:
            found[name] = *wilson(round(value * total), total), "Wilson"
        elif name == "loss" and loss is not None and len(loss) > 1 and math.isclose(loss.mean(), value, rel_tol=1e-3):
            half = _Z * float(loss.std(ddof=1)) / math.sqrt(len(loss))
            found[name] = value - half, value + half, "normal"
    return found


def confused(facts: Facts) -> list[dict[str, Any]]:
    """Return the pairs of classes that are confused most often."""
    matrix = np.array(facts.evaluation.get("confusion_matrix", ()), np.int64)
    if matrix.ndim != 2 or len(matrix) < 2:
        return []
    names, totals = facts.classes or [str(i) for i in range(len(matrix))], matrix.sum(1)
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [divmod(int(place), len(matrix)) for place in order if wrong.flat[place]]
    return [
        {"true": names[i], "said": names[j], "count": int(wrong[i, j]), "share": wrong[i, j] / totals[i]}
        for i, j in pairs
    ]


def by_class(facts: Facts) -> list[Share]:
    """Return the accuracy of each class, as many as are shown, the worst of many."""
    matrix = np.array(facts.evaluation.get("confusion_matrix", ()), np.int64)
    if "accuracy_by_class" not in facts.evaluation or matrix.ndim != 2:
        return []
    rows = zip(facts.classes, matrix.diagonal().tolist(), matrix.sum(1).tolist(), strict=False)
    found = [share(name, right, total) for name, right, total in rows if total]
    return found if len(found) <= _CLASSES else sorted(found, key=lambda each: each.value)[:_CLASSES]


def calibration(found: Answers) -> dict[str, Any]:
    """Return the expected calibration error, and for each bin of confidence its samples, mean confidence, accuracy.

    Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).
    """
    bins = np.clip(np.ceil(found.confidence.astype(np.float64) * BINS).astype(np.int64) - 1, 0, BINS - 1)
    rows, error = [], 0.0
    for number in range(BINS):
        inside = bins == number
        if count := int(inside.sum()):
            confidence, accuracy = float(found.confidence[inside].mean()), float(found.right[inside].mean())
            error += count / len(bins) * abs(confidence - accuracy)
            rows.append({"bin": number, "count": count, "confidence": confidence, "accuracy": accuracy})
    return {"error": error, "bins": rows, "confidence": float(found.confidence.mean())}


def slices(facts: Facts, found: Answers, traits: Mapping[str, Column]) -> dict[str, Any]:
    """Return the slices whose interval lies below the overall accuracy, and how many were looked at.

    Args:
        facts: of the run.
        found: the samples.
        traits: numbers of each sample by which slices are made, such as its brightness.
    """
    right = found.right
    groups = [(f"class {name}", found.target == i) for i, name in enumerate(facts.classes)]
    for name, values in traits.items():
        edges = np.unique(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
        for low, high in pairwise(edges):
            inside = (values >= low) & ((values < high) | (high == edges[-1]))
            groups.append((f"{name} {low:.3g} to {high:.3g}", inside))
    judged = [share(name, int(right[each].sum()), int(each.sum())) for name, each in groups if each.sum() >= _FEWEST]
    overall = float(right.mean())
    worse = sorted((each for each in judged if each.high < overall), key=lambda each: each.value)
    return {"worse": worse, "judged": len(judged), "overall": overall, "by": [*traits]}


def worst(facts: Facts) -> list[dict[str, Any]]:
    """Return the samples with the highest loss, or the lowest mean IoU; what is true, what the model said, how sure."""
    columns, key = facts.samples, next((name for name in ("loss", "mean_iou") if name in facts.samples), None)
    if key is None:
        return []
    values = columns[key].astype(np.float64)
    order = np.argsort(-values if key == "loss" else values, kind="stable")  # NaN comes last
    cards = []
    for row in order[:_WORST].tolist():
        if math.isnan(values[row]):
            break
        card: dict[str, Any] = {"row": row, "index": int(columns["index"][row]), "key": key.replace("_", " ")}
        card["value"] = float(values[row])
        for name in ("target", "prediction"):
            if name in columns:
                card[name] = _words(columns[name][row], facts.classes)
        if "confidence" in columns and columns["confidence"].ndim == 1:
            card["confidence"] = float(columns["confidence"][row])
            card["right"] = card.get("target") == card.get("prediction")
        cards.append(card)
    return cards


def _words(value: Any, classes: list[str]) -> str:
    """Return a class's name, the labels that are there, or numbers."""
    if np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iu":
        return classes[int(value)] if 0 <= int(value) < len(classes) else str(int(value))
    if np.asarray(value).dtype.kind == "b":
        there = np.flatnonzero(value).tolist()
        return ", ".join(classes[i] if i < len(classes) else str(i) for i in there) or "none"
    numbers = [f"{number:.4g}" for number in np.ravel(value)[:4]]
    return ", ".join(numbers) + (", …" if np.size(value) > len(numbers) else "")
