"""Samples that are there twice: exact copies of anything, near copies of images, and copies of two classes."""

import hashlib

import numpy as np

from torchrelay.report.check.findings import Finding, Indices, Pairs, Pool, of_pairs
from torchrelay.report.check.near import near_pairs
from torchrelay.report.check.thumbnails import Thumbnails


def first_copies(pool: Pool) -> Indices:
    """Return for each sample the first one with the same bytes: itself, if it is no copy."""
    digests = []
    for source in pool.parts.values():
        rows = source.inputs.detach().contiguous().numpy()
        digests += [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    marks = np.frombuffer(b"".join(digests), dtype=np.uint64)
    _, first, group = np.unique(marks, return_index=True, return_inverse=True)
    return np.asarray(first[group], dtype=np.int64)


def duplicates(pool: Pool, copies: Thumbnails | None) -> list[Finding]:
    """Find copies within the training data, and between it and the other parts; and copies of two classes.

    Args:
        pool: the samples.
        copies: the images' small copies; None: the samples aren't images.
    """
    first = first_copies(pool)
    again = np.flatnonzero(first != np.arange(len(first)))
    exact = np.stack([first[again], again], 1)
    near = np.empty((0, 2), np.int64) if copies is None else near_pairs(copies, np.unique(first))[0]
    findings = [*_within(pool, exact, near), *_across(pool, exact, near), *_contradictory(pool, exact, near)]
    return [finding for finding in findings if finding.count]


def _within(pool: Pool, exact: Pairs, near: Pairs) -> list[Finding]:
    inside = [pairs[(pool.part[pairs] == 0).all(1)] for pairs in (exact, near)]
    advice = "keep one of each: copies count twice in training, and a validation part split off would share them"
    return [
        Finding(f"training {pool.unit} are exact copies of others", len(inside[0]), of_pairs(inside[0]), advice),
        Finding("pairs of training images are nearly the same", len(inside[1]), of_pairs(inside[1]), advice),
    ]


def _across(pool: Pool, exact: Pairs, near: Pairs) -> list[Finding]:
    findings = []
    for number, name in enumerate(pool.parts):
        for pairs, how in (
            (exact, "are in the training data as well"),
            (near, "are nearly the same as training images"),
        ):
            chosen = pairs[(pool.part[pairs[:, 0]] == 0) & (pool.part[pairs[:, 1]] == number)] if number else pairs[:0]
            _, one_each = np.unique(chosen[:, 1], return_index=True)
            chosen = chosen[np.sort(one_each)]
            advice = f"remove them from one of the parts: the {name} result is too good, since the model has seen them"
            findings.append(Finding(f"{name} {pool.unit} {how}", len(chosen), of_pairs(chosen), advice, serious=True))
    return findings


def _contradictory(pool: Pool, exact: Pairs, near: Pairs) -> list[Finding]:
    if pool.labels is None:
        return []
    findings = []
    for pairs, how in ((exact, "equal"), (near, "nearly equal")):
        differing = pairs[pool.labels[pairs[:, 0]] != pool.labels[pairs[:, 1]]]
        notes = [" or ".join(pool.class_of(sample) for sample in pair) + "?" for pair in differing[:100].tolist()]
        advice = "find out which class is right: no network can learn both"
        title = f"pairs of {how} {pool.unit} have two classes"
        findings.append(Finding(title, len(differing), of_pairs(differing, notes), advice, serious=how == "equal"))
    return findings
