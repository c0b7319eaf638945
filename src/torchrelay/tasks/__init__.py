"""Step 6: what a batch means: its loss, and how good the model's outputs are."""

from torchrelay.data.labels import TargetError
from torchrelay.tasks.binary import Binary
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.detection import Detection
from torchrelay.tasks.metrics import Count
from torchrelay.tasks.multilabel import MultiLabel
from torchrelay.tasks.next_token import NextToken
from torchrelay.tasks.regression import Regression
from torchrelay.tasks.segmentation import Segmentation
from torchrelay.tasks.task import LossSettings, Task

__all__ = [
    "Binary",
    "Classification",
    "Count",
    "Detection",
    "LossSettings",
    "MultiLabel",
    "NextToken",
    "Regression",
    "Segmentation",
    "TargetError",
    "Task",
]
