"""Step 6: any number of labels per sample."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.labels import TargetError
from torchrelay.errors import RelayError
from torchrelay.tasks.metrics import F1, F1ByLabel
from torchrelay.tasks.task import Task


class MultiLabel(Task):
    """Any number of labels per sample: the mean binary cross entropy over samples and labels.

    Args:
        positive_weights: (labels,), the weight of each label's positives relative to its negatives.
        labels: their number, needed for the F1 score; the trainer sets it if the data knows it.
    """

    headline = "f1"
    higher_is_better = True
    percent = True

    def __init__(self, positive_weights: Tensor | None = None, labels: int | None = None) -> None:
        self.positive_weights = positive_weights
        self.classes = labels  # the attribute that the trainer sets

    def check(self, targets: Tensor, name: str) -> None:  # noqa: ARG002 - as in `Task`
        """Refuse targets that don't lie between 0 and 1."""
        wrong = targets[(targets < 0) | (targets > 1)]
        if len(wrong):
            raise TargetError("each label is there (1) or not (0): correct it", wrong[0].item())

    def weight(self, targets: Tensor) -> float:
        """Return the number of samples times the number of labels."""
        return float(targets.numel())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed binary cross entropy of (batch, labels) logits and 0/1 targets."""
        if outputs.shape != targets.shape:
            raise TargetError(
                f"the model gives {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: make them equal"
            )
        weights = None if self.positive_weights is None else self.positive_weights.to(outputs.device)
        return F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="sum", pos_weight=weights
        )

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of correct labels."""
        return {"accuracy": ((outputs > 0) == (targets > 0.5)).sum()}

    def count(self, targets: Tensor) -> int:
        """Return the number of labels."""
        return targets.numel()

    def metrics(self) -> Mapping[str, Any]:
        """Return the F1 score over all labels and that of each label."""
        if self.classes is None:
            raise RelayError("MultiLabel doesn't know how many labels there are: give MultiLabel(labels=...)")
        return {"f1": F1(self.classes), "f1_by_label": F1ByLabel(self.classes)}

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sample's mean loss; of each label whether it is predicted, how probable it is, and the truth."""
        weights, wanted = self.positive_weights, targets.float()
        weights = None if weights is None else weights.to(outputs.device)
        loss = F.binary_cross_entropy_with_logits(outputs.float(), wanted, reduction="none", pos_weight=weights)
        found = {"prediction": outputs > 0, "confidence": self.predict(outputs), "target": targets > 0.5}
        return {"loss": loss.mean(1), **found}

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, labels) probabilities."""
        return outputs.float().sigmoid()
