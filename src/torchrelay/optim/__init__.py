"""Step 5: the optimizer and the learning rate's schedule.

Any other class of torch.optim is here by its name: `optim.Adam(lr=0.01)` is `optim.Other(name="Adam", lr=0.01)`.
"""

from functools import partial
from typing import Any

from torchrelay.optim.groups import Group
from torchrelay.optim.muon import MuonOptimizer
from torchrelay.optim.optimizers import OTHERS, SGD, AdamW, Muon, OptimizerSettings, Other
from torchrelay.optim.schedules import (
    Constant,
    Cosine,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    Schedule,
    ScheduleSettings,
    Step,
)

__all__ = [
    "SGD",
    "AdamW",
    "Constant",
    "Cosine",
    "Group",
    "Linear",
    "MultiStep",
    "Muon",
    "MuonOptimizer",
    "OneCycle",
    "OptimizerSettings",
    "Other",
    "Plateau",
    "Schedule",
    "ScheduleSettings",
    "Step",
]


def __getattr__(name: str) -> Any:
    found = OTHERS.get(name.lower())
    if found is None or found.__name__ != name:
        raise AttributeError(f"module 'torchrelay.optim' has no attribute '{name}'")
    return partial(Other, name=name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(found.__name__ for found in OTHERS.values())])
