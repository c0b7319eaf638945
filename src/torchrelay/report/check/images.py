"""Images that are unlike the others: their size or mode, from the files' headers, and their brightness."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from torchrelay.report.check.findings import SHOWN, Example, Finding, Indices, Pool, of_samples
from torchrelay.report.check.thumbnails import Thumbnails

_RARE = 0.05  # share of the files with a mode that the others don't have
_TIMES = 4  # by which a side is larger or smaller than the median
_LONG = 4  # longer side by shorter side
_DARK, _BRIGHT = 40, 215  # of 255: all but 2% of a very dark image's pixels are below, of a very bright one's above
_FLAT = 2  # between the darkest and the brightest pixel of a constant image


def unreadable(files: tuple[str, ...]) -> list[Finding]:
    """Report the files that can't be decoded."""
    examples = tuple(Example((), "/".join(Path(file).parts[-3:])) for file in files[:SHOWN])
    advice = "repair or remove them, or set data.on_error=skip"
    return [Finding("image files can't be decoded", len(files), examples, advice, serious=True)] if files else []


def odd_files(pool: Pool) -> list[Finding]:
    """Find files of a rare mode or a size far from the median; where there are no files, nothing."""
    heads = [_head(path) for source in pool.parts.values() for path in (source.files.paths if source.files else ())]
    if not heads:
        return []
    samples, modes = _with_files(pool), Counter(mode for mode, _, _ in heads)
    rare = np.array([modes[mode] <= _RARE * len(heads) for mode, _, _ in heads])
    sides = np.array([(width, height) for _, width, height in heads], dtype=np.float64)
    factor = sides / np.median(sides, axis=0)
    odd = ((factor > _TIMES) | (factor < 1 / _TIMES)).any(1) | (sides.max(1) / sides.min(1) > _LONG)
    usual = " x ".join(f"{side:g}" for side in np.median(sides, axis=0))
    most = modes.most_common(1)[0][0]
    chosen, sized = np.flatnonzero(rare), np.flatnonzero(odd)
    findings = [
        Finding(
            f"images have a rare mode, while most are {most}",
            len(chosen),
            of_samples(samples[chosen], [heads[i][0] for i in chosen[:SHOWN]]),
            "look whether they come from another source: a network can tell sources apart instead of classes",
        ),
        Finding(
            f"images have an odd size; the median is {usual}",
            len(sized),
            of_samples(samples[sized], [f"{heads[i][1]} x {heads[i][2]}" for i in sized[:SHOWN]]),
            "look whether anything is left of them at the size of the training; remove or crop them",
        ),
    ]
    return [finding for finding in findings if finding.count]


def _with_files(pool: Pool) -> Indices:
    has = [np.full(len(source), source.files is not None) for source in pool.parts.values()]
    return np.flatnonzero(np.concatenate(has))


def _head(path: str) -> tuple[str, int, int]:
    """Return an image's mode, width and height; the pixels stay unread."""
    with Image.open(path) as picture:
        return picture.mode, *picture.size


def brightness(copies: Thumbnails) -> list[Finding]:
    """Find images that are constant, very dark or very bright."""
    pixels = copies.reshape(len(copies), -1)
    low, high = pixels.min(1), pixels.max(1)
    constant = high.astype(np.int64) - low <= _FLAT
    most = max(pixels.shape[1] * 2 // 100, 1)  # pixels that may be otherwise
    ordered = np.partition(pixels, (most, -1 - most), axis=1)
    dark, bright = (ordered[:, -1 - most] < _DARK) & ~constant, (ordered[:, most] > _BRIGHT) & ~constant
    findings = [
        ("are of one color", constant, "remove them: there is nothing to see"),
        ("are very dark", dark, "look whether anything can be seen; remove or brighten them"),
        ("are very bright", bright, "look whether anything can be seen; remove or darken them"),
    ]
    return [
        Finding(f"images {what}", int(chosen.sum()), of_samples(np.flatnonzero(chosen)), advice)
        for what, chosen, advice in findings
        if chosen.any()
    ]
