"""Step 6: regression."""

from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.labels import TargetError
from torchrelay.tasks.task import Task


class Regression(Task):
    """Regression: the mean squared error over samples and outputs."""

    headline = "mean_squared_error"

    def weight(self, targets: Tensor) -> float:
        """Return the number of samples times the values per sample."""
        return float(targets.numel())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed squared error; outputs of (batch, 1) are compared with targets of (batch,)."""
        outputs = outputs.view_as(targets) if outputs.numel() == targets.numel() else outputs
        if outputs.shape != targets.shape:
            raise TargetError(
                f"the model gives {tuple(outputs.shape)} for targets of {tuple(targets.shape)}: make them equal"
            )
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum")

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the squared and the absolute error, summed."""
        error = outputs.view_as(targets).float() - targets.float()
        return {"mean_squared_error": error.square().sum(), "mean_absolute_error": error.abs().sum()}

    def per_sample(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return each sample's mean squared error, its values as they are predicted, and as they are."""
        prediction = outputs.view_as(targets).float()
        error = (prediction - targets.float()).square()
        return {"loss": error.reshape(len(targets), -1).mean(1), "prediction": prediction, "target": targets}

    def count(self, targets: Tensor) -> int:
        """Return the number of values."""
        return targets.numel()
