"""torchrelay: a PyTorch training framework. The seven steps stand in the modules that this page names.

Names are imported when they are first used, so that `torchrelay --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Trainer": "torchrelay.train.trainer",
    "RunSettings": "torchrelay.run.settings",
    "Recipe": "torchrelay.recipe.recipe",
    "Task": "torchrelay.tasks.task",
    "Classification": "torchrelay.tasks.classification",
    "MultiLabel": "torchrelay.tasks.multilabel",
    "Regression": "torchrelay.tasks.regression",
    "NextToken": "torchrelay.tasks.next_token",
    "Callback": "torchrelay.train.callbacks",
    "EarlyStopping": "torchrelay.train.callbacks",
    "RelayError": "torchrelay.errors",
}
_MODULES = ("augment", "data", "models", "optim", "tasks")
__all__ = [
    "Callback",
    "Classification",
    "EarlyStopping",
    "MultiLabel",
    "NextToken",
    "Recipe",
    "Regression",
    "RelayError",
    "RunSettings",
    "Task",
    "Trainer",
    "__version__",
    "augment",
    "data",
    "models",
    "optim",
]

if TYPE_CHECKING:
    from torchrelay import data, models, optim
    from torchrelay import tasks as tasks
    from torchrelay.data import augment
    from torchrelay.errors import RelayError
    from torchrelay.recipe.recipe import Recipe
    from torchrelay.run.settings import RunSettings
    from torchrelay.tasks.classification import Classification
    from torchrelay.tasks.multilabel import MultiLabel
    from torchrelay.tasks.next_token import NextToken
    from torchrelay.tasks.regression import Regression
    from torchrelay.tasks.task import Task
    from torchrelay.train.callbacks import Callback, EarlyStopping
    from torchrelay.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "augment":
        return import_module("torchrelay.data.augment")
    if name in _MODULES:
        return import_module(f"torchrelay.{name}")
    raise AttributeError(f"module 'torchrelay' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
