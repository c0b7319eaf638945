"""Step 7: the trainer, and the parts that it is made of, from one place for a loop of one's own.

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Batch": "data.batch",
    "Batches": "data.batches",
    "Callback": "train.callbacks",
    "CheckpointSettings": "checkpoint.schedule",
    "Checkpointer": "checkpoint.checkpointer",
    "Contents": "checkpoint.format",
    "Device": "device.device",
    "DeviceSettings": "device.device",
    "EMA": "models.ema",
    "Evaluation": "train.evaluation",
    "Evaluator": "train.evaluation",
    "Interrupted": "errors",
    "ParallelSettings": "distributed.replicas",
    "Pipeline": "data.augment.pipeline",
    "ProcessGroup": "distributed.process_group",
    "Progress": "train.progress",
    "RunFolder": "run.folder",
    "RunningSums": "train.progress",
    "Spike": "train.spikes",
    "SpikeDetector": "train.spikes",
    "StepResult": "train.step",
    "StopSignal": "train.signals",
    "Strategy": "distributed.strategy",
    "TrainStep": "train.step",
    "Trainer": "train.trainer",
    "build_strategy": "distributed.build",
    "init_process_group": "distributed.process_group",
    "set_up": "device.device",
}
__all__ = [
    "EMA",
    "Batch",
    "Batches",
    "Callback",
    "CheckpointSettings",
    "Checkpointer",
    "Contents",
    "Device",
    "DeviceSettings",
    "Evaluation",
    "Evaluator",
    "Interrupted",
    "ParallelSettings",
    "Pipeline",
    "ProcessGroup",
    "Progress",
    "RunFolder",
    "RunningSums",
    "Spike",
    "SpikeDetector",
    "StepResult",
    "StopSignal",
    "Strategy",
    "TrainStep",
    "Trainer",
    "build_strategy",
    "init_process_group",
    "set_up",
]

if TYPE_CHECKING:
    from torchrelay.checkpoint.checkpointer import Checkpointer
    from torchrelay.checkpoint.format import Contents
    from torchrelay.checkpoint.schedule import CheckpointSettings
    from torchrelay.data.augment.pipeline import Pipeline
    from torchrelay.data.batch import Batch
    from torchrelay.data.batches import Batches
    from torchrelay.device.device import Device, DeviceSettings, set_up
    from torchrelay.distributed.build import build_strategy
    from torchrelay.distributed.process_group import ProcessGroup, init_process_group
    from torchrelay.distributed.replicas import ParallelSettings
    from torchrelay.distributed.strategy import Strategy
    from torchrelay.errors import Interrupted
    from torchrelay.models.ema import EMA
    from torchrelay.run.folder import RunFolder
    from torchrelay.train.callbacks import Callback
    from torchrelay.train.evaluation import Evaluation, Evaluator
    from torchrelay.train.progress import Progress, RunningSums
    from torchrelay.train.signals import StopSignal
    from torchrelay.train.spikes import Spike, SpikeDetector
    from torchrelay.train.step import StepResult, TrainStep
    from torchrelay.train.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"torchrelay.{_HOME[name]}"), name)
    raise AttributeError(f"module 'torchrelay.train' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
