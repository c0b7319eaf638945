"""Step 7: the trainer, and the parts that it is made of, from one place for a loop of one's own.

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Batch": "data.batch",
    "Batches": "data.batches",
    "Callback": "train.callbacks",
    "CheckpointSettings": "checkpoint.checkpointer",
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
    "Training": "train.callbacks",
    "build_strategy": "distributed.build",
    "init_process_group": "distributed.process_group",
    "set_up": "device.device",
}
__all__ = list(_HOME)

if TYPE_CHECKING:
    from torchrelay.checkpoint.checkpointer import Checkpointer as Checkpointer
    from torchrelay.checkpoint.checkpointer import CheckpointSettings as CheckpointSettings
    from torchrelay.checkpoint.format import Contents as Contents
    from torchrelay.data.augment.pipeline import Pipeline as Pipeline
    from torchrelay.data.batch import Batch as Batch
    from torchrelay.data.batches import Batches as Batches
    from torchrelay.device.device import Device as Device
    from torchrelay.device.device import DeviceSettings as DeviceSettings
    from torchrelay.device.device import set_up as set_up
    from torchrelay.distributed.build import build_strategy as build_strategy
    from torchrelay.distributed.process_group import ProcessGroup as ProcessGroup
    from torchrelay.distributed.process_group import init_process_group as init_process_group
    from torchrelay.distributed.replicas import ParallelSettings as ParallelSettings
    from torchrelay.distributed.strategy import Strategy as Strategy
    from torchrelay.errors import Interrupted as Interrupted
    from torchrelay.models.ema import EMA as EMA
    from torchrelay.run.folder import RunFolder as RunFolder
    from torchrelay.train.callbacks import Callback as Callback
    from torchrelay.train.callbacks import Training as Training
    from torchrelay.train.evaluation import Evaluation as Evaluation
    from torchrelay.train.evaluation import Evaluator as Evaluator
    from torchrelay.train.progress import Progress as Progress
    from torchrelay.train.progress import RunningSums as RunningSums
    from torchrelay.train.signals import StopSignal as StopSignal
    from torchrelay.train.spikes import Spike as Spike
    from torchrelay.train.spikes import SpikeDetector as SpikeDetector
    from torchrelay.train.step import StepResult as StepResult
    from torchrelay.train.step import TrainStep as TrainStep
    from torchrelay.train.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"torchrelay.{_HOME[name]}"), name)
    raise AttributeError(f"module 'torchrelay.train' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
