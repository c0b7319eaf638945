"""Temperature scaling, and how far probabilities are from what happens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from torchrelay.report.export.inference import Kind

_LEAST, _MOST = -5.0, 5.0  # log temperatures
_BINS = 15


def flat(outputs: Tensor, targets: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return (n, classes) logits with (n,) classes; of labels, (n,) logits with (n,) zeros and ones. Both float64."""
    if kind == "labels":
        return outputs.double().flatten(), targets.double().flatten()
    logits = outputs.double().flatten(0, -2)
    if targets.is_floating_point():
        return logits, targets.argmax(1)
    counted = targets.flatten() >= 0  # ignored tokens are negative
    return logits[counted], targets.flatten()[counted]


def negative_log_likelihood(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> float:
    """Return the mean cross entropy of what `flat` returned."""
    scaled = logits / temperature
    entropy = F.cross_entropy if logits.ndim == 2 else F.binary_cross_entropy_with_logits
    return float(entropy(scaled, targets))


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature with the smallest cross entropy, between e**-5 and e**5.

    One number divides all logits, so the order of the classes, and with it the accuracy, stays. Guo et al., "On
    Calibration of Modern Neural Networks" (ICML 2017). The cross entropy is convex in the temperature's inverse, so a
    bisection of its derivative finds the minimum.

    Args:
        logits: as `flat` returns them, of data that the weights weren't trained on.
        targets: likewise.
    """

    def slope(inverse: float) -> float:
        scaled = logits * inverse
        if logits.ndim == 1:
            return float(((scaled.sigmoid() - targets) * logits).sum())
        expected = (scaled.softmax(1) * logits).sum(1)
        return float((expected - logits.gather(1, targets[:, None])[:, 0]).sum())

    low, high = _LEAST, _MOST  # logarithms of the inverse
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if slope(float(torch.tensor(middle, dtype=torch.float64).exp())) > 0 else (middle, high)
        )
    return float(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp())


def calibration_error(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy in 15 equal bins.

    Guo et al. (ICML 2017), section 2. Of labels, the confidence is that of the more probable answer.

    Args:
        logits: as `flat` returns them.
        targets: likewise.
        temperature: by which the logits are divided.
    """
    if logits.ndim == 2:
        confidence, predicted = (logits / temperature).softmax(1).max(1)
        correct = predicted == targets
    else:
        probability = (logits / temperature).sigmoid()
        confidence = torch.maximum(probability, 1 - probability)
        correct = (probability > 0.5) == (targets > 0.5)
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    distance = (correct.double() - confidence).new_zeros(_BINS).index_add(0, bins, correct.double() - confidence)
    return float(distance.abs().sum() / len(targets))
