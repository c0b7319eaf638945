"""Step 7: which of a run's settings its table in TensorBoard shows: what people vary, and what isn't as it comes."""

from collections.abc import Mapping
from typing import Any

from torchrelay.checkpoint.checkpointer import CheckpointSettings
from torchrelay.data.settings import DataSettings
from torchrelay.device.device import DeviceSettings
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.models.factory import ModelSettings
from torchrelay.run.settings import RunSettings
from torchrelay.settings import Settings
from torchrelay.tasks.task import LossSettings

_VARIED = {"run.epochs", "run.seed", "data.name", "data.batch_size", "model.name", "device.precision"}
_VARIED |= {f"optimizer.{key}" for key in ("name", "lr", "weight_decay", "momentum", "clip_norm")}
_VARIED |= {"schedule.name", "schedule.warmup", "loss.name"}
_SECTIONS: dict[str, type[Settings]] = {
    "run": RunSettings,
    "data": DataSettings,
    "model": ModelSettings,
    "device": DeviceSettings,
    "parallel": ParallelSettings,
    "loss": LossSettings,
    "checkpoint": CheckpointSettings,
}
_OF_THE_MACHINE = {"data.root", "data.cache_dir", "parallel.replicas"}


def of(record: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings to compare runs by, by dotted names.

    Args:
        record: what recipe.toml holds.
    """
    defaults = {
        f"{section}.{key}": value
        for section, settings in _SECTIONS.items()
        for key, value in settings().model_dump(mode="json").items()
    }
    every = {f"{section}.{key}": value for section, values in record.items() for key, value in values.items()}
    return {
        name: value
        for name, value in every.items()
        if name in _VARIED or (name in defaults.keys() - _OF_THE_MACHINE and value != defaults[name])
    }
