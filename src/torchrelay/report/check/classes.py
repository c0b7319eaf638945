"""Classes that are too small, of very unlike size, or missing in a part."""

import numpy as np

from torchrelay.report.check.findings import SHOWN, Example, Finding, Pool

_FEW = 10  # samples of a class
_TIMES = 10  # by which the largest class may be larger than the smallest


def classes(pool: Pool) -> list[Finding]:
    """Compare the sizes of the classes."""
    if pool.labels is None or len(pool.classes) < 2:
        return []
    sizes = {
        name: np.bincount(pool.labels[pool.part == number], minlength=len(pool.classes))
        for number, name in enumerate(pool.parts)
    }
    findings = []
    for part, counts in sizes.items():
        missing = [pool.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
        advice = "add samples, or remove the class" if part == "train" else "add samples: its accuracy stays unknown"
        findings.append(_finding(f"classes have no {part} samples", missing, advice, serious=True))
    counts = sizes["train"]
    few = [
        f"{pool.classes[label]} {counts[label]:,}" for label in np.flatnonzero((counts > 0) & (counts < _FEW)).tolist()
    ]
    findings.append(
        _finding(f"classes have fewer than {_FEW} training samples", few, "add samples, or join classes", serious=False)
    )
    present = np.flatnonzero(counts)
    smallest, largest = (present[pick(counts[present])] for pick in (np.argmin, np.argmax))
    if counts[largest] > _TIMES * counts[smallest]:
        shown = [f"{pool.classes[label]} {counts[label]:,}" for label in (smallest, largest)]
        advice = "set data.sampling=balanced or loss.class_weights=balanced, and look at the recall of each class"
        unlike = int((counts[present] * _TIMES < counts[largest]).sum())
        title = "classes have less than a tenth of the largest one's training samples"
        findings.append(Finding(title, unlike, tuple(Example((), text) for text in shown), advice))
    return [finding for finding in findings if finding.count]


def _finding(title: str, names: list[str], advice: str, *, serious: bool) -> Finding:
    return Finding(title, len(names), tuple(Example((), name) for name in names[:SHOWN]), advice, serious)
