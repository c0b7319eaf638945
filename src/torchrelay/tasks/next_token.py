"""Step 6: next-token prediction."""

from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.labels import out_of_range, wrong_label
from torchrelay.errors import RelayError
from torchrelay.tasks.targets import REFUSALS, refused_classes
from torchrelay.tasks.task import Task


class NextToken(Task):
    """Sequences: the cross entropy of each next token.

    Args:
        label_smoothing: as in `Classification`.
        ignore: the target of positions that don't count, such as padding.
    """

    headline = "loss"

    def __init__(self, label_smoothing: float = 0.0, ignore: int = -100) -> None:
        self.label_smoothing = label_smoothing
        self.ignore = ignore
        self._highest, self._where = -1, ""  # the highest token in `check`, and its sample

    def check(self, targets: Tensor, name: str) -> None:
        """Refuse negative tokens, except ignored ones."""
        label = wrong_label(targets, None, self.ignore)
        if label is not None:
            raise out_of_range(label, None)
        if (highest := int(targets.max())) > self._highest:
            self._highest = highest
            self._where = f"sample {int((targets == highest).nonzero()[0, 0])} of {name}"

    def weight(self, targets: Tensor) -> Tensor:
        """Return the number of tokens that count."""
        return (targets != self.ignore).sum().float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy of (batch, length, vocabulary) logits and (batch, length) tokens."""
        if outputs.shape[-1] <= self._highest:  # a GPU would stop without saying why
            raise RelayError(
                f"the model gives {outputs.shape[-1]} outputs, but {self._where} has token {self._highest}: "
                f"build it with {self._highest + 1}"
            )
        logits, tokens, smoothing = outputs.flatten(0, 1), targets.flatten(), self.label_smoothing
        try:
            return F.cross_entropy(logits, tokens, ignore_index=self.ignore, reduction="sum", label_smoothing=smoothing)
        except REFUSALS as error:
            if (fault := refused_classes(logits, tokens, self.ignore)) is None:
                raise
            raise fault from error

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the number of correct tokens."""
        return {"accuracy": ((outputs.argmax(-1) == targets) & (targets != self.ignore)).sum()}

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of tokens that count, without waiting for the device."""
        return (targets != self.ignore).sum()

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sequence's mean loss; NaN where no token counts."""
        logits, tokens, smoothing = outputs.flatten(0, 1).float(), targets.flatten(), self.label_smoothing
        each = F.cross_entropy(logits, tokens, ignore_index=self.ignore, reduction="none", label_smoothing=smoothing)
        return {"loss": each.view_as(targets).sum(1) / (targets != self.ignore).sum(1)}

    def predict(self, outputs: Tensor) -> Tensor:
        """Return (batch, length, vocabulary) probabilities."""
        return outputs.float().softmax(-1)
