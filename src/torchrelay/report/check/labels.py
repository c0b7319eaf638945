"""Labels that are suspicious, by cleanlab's confident learning on predictions for samples that weren't learned.

Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset labels" (JAIR 2021).
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrelay.report.check import features
from torchrelay.report.check.findings import Finding, Indices, Pool, of_samples
from torchrelay.report.check.thumbnails import resized
from torchrelay.report.export.calibration import fit_temperature

_FOLDS = 5
_MOST = 30_000  # samples that are looked at
_LEAST = 100  # samples, below which a model says nothing
_RIDGE = 1e-3  # for each sample
_IMPROBABLE = 0.05  # probability of a suspicious label


@dataclass(frozen=True)
class Suspects:
    """Training samples whose labels are suspicious.

    Args:
        samples: their positions, the likeliest first.
        answers: the classes that the model gives them.
        considered: the positions of all samples that were looked at.
        right: the share of these that the model has right.
    """

    samples: Indices
    answers: Indices
    considered: Indices
    right: float


def suspicious(pool: Pool, say: Callable[[str], None]) -> tuple[list[Finding], str]:
    """Find training labels that are suspicious.

    Args:
        pool: the samples.
        say: called with what is being done.

    Returns:
        The finding, if any, and a line that says how it was looked for, or why not.
    """
    if pool.labels is None or len(pool.classes) < 2:
        return [], "suspicious labels: not looked for, as the targets aren't classes"
    if find_spec("cleanlab") is None:
        return [], "suspicious labels: not looked for; get cleanlab by: pip install 'torchrelay[check]'"
    say("looking for suspicious labels")
    found = suspects(pool)
    if found is None:
        return [], f"suspicious labels: not looked for in fewer than {_LEAST} samples of two classes"
    finding = Finding(
        f"training {pool.unit} have a suspicious label",
        len(found.samples),
        of_samples(found.samples, [f"rather {pool.classes[label]}?" for label in found.answers.tolist()]),
        "look at them, the likeliest first, until hardly any is wrong; correct or remove those that are",
    )
    kind = "ridge regression on random patches" if pool.has_images else "ridge regression"
    return [finding] if finding.count else [], (
        f"suspicious labels: cleanlab on predictions of {kind} for {len(found.considered):,} samples in {_FOLDS} "
        f"folds, of which it has {found.right:.1%} right"
    )


def suspects(pool: Pool) -> Suspects | None:
    """Return the training samples whose labels are suspicious; None if there are too few to tell."""
    train = pool.parts["train"]
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(train), generator=generator)[:_MOST].sort().values
    given = train.targets[some].long()
    # A class needs samples in each fold and outside of it; cleanlab wants the classes to be 0, 1, ...
    present, counts = torch.unique(given, return_counts=True)
    kept = torch.isin(given, present[counts >= 2 * _FOLDS])
    some, given = some[kept], given[kept]
    classes, given = torch.unique(given, return_inverse=True)
    if len(some) < _LEAST or len(classes) < 2:
        return None
    inputs = train.inputs[some]
    rows = features.of_images(resized(inputs) / 255, generator) if pool.has_images else features.of_rows(inputs)
    logits = _out_of_fold(rows, given, len(classes), generator)
    answers, found = logits.argmax(1), _issues(logits, given)
    right = float((answers == given).float().mean())
    return Suspects(some.numpy()[found], classes[answers].numpy()[found], some.numpy(), right)


def _out_of_fold(rows: Tensor, labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """Return float64 logits for each sample, by a ridge regression on the samples of the other folds.

    The sums of products of a fold are computed once and left out of the whole, so all folds cost as much as one fit.
    """
    rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-5)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
    targets = F.one_hot(labels, classes).float() - 1 / classes
    # Each class is spread over the folds evenly.
    mixed = torch.randperm(len(rows), generator=generator)
    mixed = mixed[labels[mixed].argsort(stable=True)]
    folds = [mixed[number::_FOLDS] for number in range(_FOLDS)]
    products = [rows[fold].T @ rows[fold] for fold in folds]
    sums = [rows[fold].T @ targets[fold] for fold in folds]
    whole, total = torch.stack(products).sum(0), torch.stack(sums).sum(0)
    logits = torch.empty(len(rows), classes, dtype=torch.float64)
    for fold, product, own in zip(folds, products, sums, strict=True):
        ridge = (whole - product).double() + _RIDGE * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
        logits[fold] = rows[fold].double() @ torch.linalg.solve(ridge, (total - own).double())
    return logits / fit_temperature(logits, labels)


def _issues(logits: Tensor, labels: Tensor) -> Indices:
    """Return the positions of labels that are probably wrong, the likeliest first."""
    from cleanlab.filter import find_label_issues

    given, probabilities = labels.numpy(), logits.softmax(1).numpy()
    found: Indices = find_label_issues(
        given,
        probabilities,
        filter_by="prune_by_noise_rate",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    # A weak model's own errors pass for wrong labels, up to a fifth of all; where it is sure, fewer of them do.
    improbable: Indices = found[probabilities[found, given[found]] < _IMPROBABLE]
    return improbable
