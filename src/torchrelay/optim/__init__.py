"""Step 5: the optimizer and the learning rate's schedule."""

from torchrelay.optim.groups import Group
from torchrelay.optim.muon import MuonOptimizer
from torchrelay.optim.optimizers import SGD, AdamW, Muon, OptimizerSettings, Other
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
