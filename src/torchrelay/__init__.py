"""torchrelay: a PyTorch training framework: a loop that you can read, exact resume, fast by default.

Names are imported when they are first used, so that `torchrelay --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torchrelay import data, models, optim, tasks
    from torchrelay.checkpoint.checkpointer import CheckpointSettings
    from torchrelay.data import augment
    from torchrelay.data.settings import DataSettings
    from torchrelay.device.device import DeviceSettings
    from torchrelay.distributed.replicas import ParallelSettings
    from torchrelay.errors import RelayError
    from torchrelay.models.factory import ModelSettings
    from torchrelay.recipe.recipe import Recipe
    from torchrelay.recipe.trained import load
    from torchrelay.run.settings import RunSettings
    from torchrelay.tasks.classification import Classification
    from torchrelay.tasks.multilabel import MultiLabel
    from torchrelay.tasks.next_token import NextToken
    from torchrelay.tasks.regression import Regression
    from torchrelay.tasks.task import LossSettings, Task
    from torchrelay.train.callbacks import Callback, EarlyStopping
    from torchrelay.train.record import log
    from torchrelay.train.trainer import Trainer

__all__ = [
    "Callback",
    "CheckpointSettings",
    "Classification",
    "DataSettings",
    "DeviceSettings",
    "EarlyStopping",
    "LossSettings",
    "ModelSettings",
    "MultiLabel",
    "NextToken",
    "ParallelSettings",
    "Recipe",
    "Regression",
    "RelayError",
    "RunSettings",
    "Task",
    "Trainer",
    "__version__",
    "augment",
    "data",
    "load",
    "log",
    "models",
    "optim",
    "tasks",
]
_MODULES = {"augment": "data.augment", "data": "data", "models": "models", "optim": "optim", "tasks": "tasks"}
_MODULE_OF = {
    "Callback": "train.callbacks",
    "CheckpointSettings": "checkpoint.checkpointer",
    "Classification": "tasks.classification",
    "DataSettings": "data.settings",
    "DeviceSettings": "device.device",
    "EarlyStopping": "train.callbacks",
    "LossSettings": "tasks.task",
    "ModelSettings": "models.factory",
    "MultiLabel": "tasks.multilabel",
    "NextToken": "tasks.next_token",
    "ParallelSettings": "distributed.replicas",
    "Recipe": "recipe.recipe",
    "Regression": "tasks.regression",
    "RelayError": "errors",
    "RunSettings": "run.settings",
    "Task": "tasks.task",
    "Trainer": "train.trainer",
    "load": "recipe.trained",
    "log": "train.record",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"torchrelay.{_MODULES[name]}")
    if name in _MODULE_OF:
        return getattr(import_module(f"torchrelay.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'torchrelay' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
