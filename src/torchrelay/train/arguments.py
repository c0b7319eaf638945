"""Step 7: what the trainer's arguments may be, and how to say here what they are called elsewhere.

The types of the trainer's signature come from seven folders. They are gathered here, so that the imports of trainer.py
show what the loop stands on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Never, TypedDict

import torch

from torchrelay.checkpoint.checkpointer import CheckpointSettings
from torchrelay.data.augment.pipeline import AugmentLike
from torchrelay.data.sampling import Sampling
from torchrelay.device.device import Device, DeviceSettings
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import UsageError, nearest
from torchrelay.optim.accept import OptimizerLike, ScheduleLike
from torchrelay.run.settings import RunSettings
from torchrelay.run.terminal import Terminal
from torchrelay.tasks.accept import TaskLike
from torchrelay.train.callbacks import Callback

__all__ = [
    "BatchOptions",
    "CallbacksLike",
    "CheckpointSettings",
    "DeviceLike",
    "OptimizersLike",
    "ParallelSettings",
    "RunSettings",
    "ScheduleLike",
    "TaskLike",
    "Terminal",
]

CallbacksLike = Callback | type[Callback] | Sequence[Callback | type[Callback]]
DeviceLike = str | int | torch.device | DeviceSettings | Device
OptimizersLike = OptimizerLike | Mapping[str, OptimizerLike]


class BatchOptions(TypedDict, total=False):
    """How `Trainer` makes batches of the data."""

    batch_size: int
    """Samples of a global batch; 256 if not given."""
    augment: AugmentLike | Sequence[AugmentLike]
    """Batched augmentation of image arrays, such as `[augment.Flip(), augment.PaddedCrop()]`."""
    prepare: AugmentLike | Sequence[AugmentLike]
    """What training and test images alike go through first, such as `[augment.Resize(size=112)]`."""
    normalize: bool
    """Whether images in arrays are normalized by their channels' means and standard deviations. By default, all but
    floats with negative values are, which count as normalized; a Dataset's samples never are."""
    sampling: Sampling
    """"shuffle" (the default), "balanced" (every class equally often), "sequential", or a function from (seed, epoch),
    the epoch counted from 0, to the indices of the samples in their order."""
    drop_last: bool
    """Whether an epoch's last batch is left out if it is smaller; it isn't by default."""
    workers: int
    """Processes that read a Dataset; arrays need none."""
    test_batch_size: int
    """Samples of a batch in evaluations; `batch_size` if not given."""
    normalise: bool
    """The former spelling of `normalize`."""


_RATE = "the optimizer has the learning rate: optimizer=tr.optim.SGD(lr=0.1)"
_PARTS = "a batch is processed in parts by parallel=tr.ParallelSettings(replicas=4), with the same result"
_SETTINGS = "settings=tr.RunSettings({0}=...)"
_ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate", "optimizer_lr", "base_lr"), _RATE),
    **dict.fromkeys(("weight_decay", "momentum"), "the optimizer has it: optimizer=tr.optim.SGD({0}=...)"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "write schedule=, such as schedule=tr.optim.Cosine()"),
    **dict.fromkeys(("accumulate", "accumulation_steps", "accumulate_grad_batches", "grad_accum"), _PARTS),
    "gradient_accumulation_steps": _PARTS,
    "metrics": "the task has the metrics: override Task.measure or Task.metrics",
    **dict.fromkeys(("verbose", "quiet", "progress_bar"), "the terminal prints: terminal=Terminal(quiet=True)"),
    "shuffle": 'write sampling="shuffle" or sampling="sequential"',
    "sampler": "write sampling=, which may be a function from (seed, epoch) to sample indices",
    "num_workers": "write workers=",
    **dict.fromkeys(("batchsize", "bs", "train_batch_size"), "write batch_size="),
    **dict.fromkeys(("val", "valid", "validation_data", "val_data"), "write validation="),
    **dict.fromkeys(("criterion", "loss_fn", "loss_function"), "write loss="),
    **dict.fromkeys(("num_epochs", "max_epochs", "n_epochs"), "write epochs="),
    **dict.fromkeys(("precision", "amp", "fp16", "bf16"), 'write device=tr.DeviceSettings(precision="bf16")'),
    **dict.fromkeys(("output_dir", "log_dir", "logdir", "save_dir"), "write run=, the run's folder"),
    **dict.fromkeys(("grad_clip", "gradient_clip_val", "max_grad_norm"), "write clip_norm="),
}


def refuse(method: str, names: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Refuse arguments that a method of the trainer doesn't have; say where they belong.

    Args:
        method: its name, such as "Trainer.fit".
        names: the arguments.
        known: those that it has.

    Raises:
        UsageError: there are some.
    """
    for name in names:
        if name in known:
            continue
        if name in _ELSEWHERE:
            raise UsageError(f"{method} has no argument '{name}': {_ELSEWHERE[name].format(name)}")
        if name in RunSettings.model_fields:
            raise UsageError(f"{method} has no argument '{name}': write {_SETTINGS.format(name)}")
        raise UsageError(f"{method} has no argument '{name}'{nearest(name, known)}")


def check_numbers(ema: float, clip_norm: float | None) -> None:
    """Refuse numbers that a recipe couldn't have either.

    Raises:
        UsageError: one of them is out of range.
    """
    if not 0.0 <= ema < 1.0:
        raise UsageError(f"ema is {ema}: give the decay of the average, from 0 (none) up to, not including, 1")
    if clip_norm is not None and not clip_norm > 0.0:
        raise UsageError(f"clip_norm is {clip_norm}: give the gradient's largest norm, above 0; or None, for any")


def refuse_in_fit(data: Sequence[Never], names: Mapping[str, Never]) -> None:
    """Refuse what belongs to the constructor.

    Raises:
        UsageError: there is some.
    """
    if data:
        raise UsageError("Trainer.fit takes no data: write Trainer(model, train, test)")
    for name in names:
        where = f"Trainer(..., {name}=...)" if name in (*BatchOptions.__annotations__, "epochs", "seed") else ""
        if where:
            raise UsageError(f"Trainer.fit has no argument '{name}': write {where}")
    refuse("Trainer.fit", names, ("resume", "accept_changes"))


def as_device(given: DeviceLike, is_portable: bool | None = False) -> DeviceSettings | Device:
    """Return the device that a user means: a number is that of a CUDA device, as in PyTorch.

    Raises:
        UsageError: it is none; or the run's bits must be portable, and it is set up for others.
    """
    if isinstance(given, Device) and is_portable and not given.portable:
        raise UsageError("run.portable sets up the device itself: give its name or tr.DeviceSettings(), no Device")
    if isinstance(given, DeviceSettings | Device):
        return given
    if isinstance(given, torch.device):
        given = f"cuda:{given.index}" if given.type == "cuda" and given.index is not None else given.type
    elif isinstance(given, int) and not isinstance(given, bool):
        given = f"cuda:{given}"
    if not isinstance(given, str):
        raise UsageError(f'device is {given!r}: give a name such as "cuda:1", a torch.device or tr.DeviceSettings()')
    return DeviceSettings(name=given)


def as_callbacks(given: CallbacksLike | None) -> list[Callback]:
    """Return the callbacks that a user means: one, its class, or several.

    Raises:
        UsageError: one of them is no callback.
    """
    each = given if isinstance(given, Sequence) else [] if given is None else [given]
    return [_as_callback(callback) for callback in each]


def _as_callback(given: Any) -> Callback:
    if isinstance(given, type) and issubclass(given, Callback):
        try:
            given = given()
        except TypeError as error:
            raise UsageError(f"callbacks has the class {given.__name__}: give an object of it ({error})") from None
    if not isinstance(given, Callback):
        name = getattr(given, "__name__", type(given).__name__)
        raise UsageError(f"callbacks has {name}, which is no tr.Callback: derive a class from it, with on_step or so")
    return given
