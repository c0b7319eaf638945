"""Step 6: one of two classes per sample, by a single logit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchrelay.data.labels import TargetError
from torchrelay.tasks.metrics import F1
from torchrelay.tasks.multilabel import MultiLabel


class Binary(MultiLabel):
    """One of two classes per sample, by a logit for class 1: mean binary cross entropy, accuracy, F1 score of class 1.

    Args:
        positive_weight: () or (1,), the weight of class 1 relative to class 0.
    """

    headline = "accuracy"

    def __init__(self, positive_weight: Tensor | None = None) -> None:
        super().__init__(positive_weight, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed binary cross entropy of (batch,) or (batch, 1) logits and (batch,) targets, 0 or 1."""
        return super().loss(_logits(outputs, targets), targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of correct predictions."""
        return super().measure(_logits(outputs, targets), targets)

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sample's loss, its more probable class with its probability, its class."""
        rows = super().per_sample(_logits(outputs, targets)[:, None], targets[:, None])
        found = {name: column.flatten() for name, column in rows.items()}
        classes = {name: found[name].long() for name in ("prediction", "target")}
        return found | classes | {"confidence": found["confidence"].maximum(1 - found["confidence"])}

    def metrics(self) -> Mapping[str, Any]:
        """Return the F1 score of class 1."""
        return {"f1": _F1(1)}

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch,) probabilities of class 1."""
        return outputs.float().sigmoid().flatten()


class _F1(F1):
    """Float32 scalar: the F1 score of class 1."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a batch of (batch,) predictions."""
        super().update(predictions[:, None], targets[:, None])


def _logits(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (batch,) logits."""
    if outputs.numel() != len(targets) or targets.ndim != 1:
        raise TargetError(
            f"the model gives {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: give one logit and one "
            "target a sample"
        )
    return outputs.flatten()
