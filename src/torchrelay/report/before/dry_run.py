"""A dry run: a few batches through everything that a run does, and what the whole run will need."""

import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from torchrelay.checkpoint.checkpointer import CheckpointSettings
from torchrelay.checkpoint.format import read, write
from torchrelay.data.augment.stages import stages
from torchrelay.duration import steps_between
from torchrelay.errors import RelayError, explained
from torchrelay.run.terminal import duration
from torchrelay.train.evaluation import Evaluator
from torchrelay.train.judge import Judge
from torchrelay.train.state import TrainingState
from torchrelay.train.trainer import Trainer

_STEPS = 5  # that are timed at each size of the images, after one that chooses kernels
_MIB, _GB = 2**20, 1e9


@dataclass(frozen=True)
class Forecast:
    """What a whole run will need.

    Attributes:
        step: seconds of the mean step.
        evaluation: seconds of an evaluation of all parts.
        checkpoint: bytes of a checkpoint.
        seconds: of all steps and evaluations.
        disk: bytes of all checkpoints that are there at a time.
        memory: bytes that were in use at most.
    """

    step: float
    evaluation: float
    checkpoint: int
    seconds: float
    disk: int
    memory: int


def dry_run(trainer: Trainer, saving: CheckpointSettings, near: Path, say: Callable[[str], None]) -> Forecast:
    """Try steps, an evaluation and a checkpoint, and say what the whole run will need.

    All processes of a run call it. The trainer's weights are other ones afterwards.

    Args:
        trainer: new, without a run folder.
        saving: how many checkpoints are kept.
        near: where the run's folder will be; a checkpoint is written on the same disk, and removed.
        say: called with each line.

    Raises:
        RelayError: something of it fails, or there isn't enough room for the checkpoints.
    """
    state, judge, evaluator = trainer.state, trainer.judge, trainer.evaluator
    progress, group, batch_size = state.progress, state.strategy.group, state.batches.batch_size
    with trainer.session.alone():
        judge.rehearse()
        step = _time_steps(state, judge)
        steps = min(progress.total_steps, progress.max_steps or progress.total_steps)
        rate = batch_size / step
        say(f"a step: {1e3 * step:,.1f} ms ({rate:,.0f} samples/s); all {steps:,} of them: {duration(steps * step)}")
        evaluation = _time_evaluation(evaluator, group.size, say)
        checkpoint = _try_checkpoint(state, near, say)
    every = steps_between(trainer.settings.evaluate_every, progress.steps_per_epoch, steps, "epochs")
    evaluations = -(-steps // every) if every else 1
    disk = checkpoint * (saving.keep + saving.keep_best + 1)  # the next one is written before an old one goes
    device = state.train_step.device.device
    found = Forecast(step, evaluation, checkpoint, steps * step + evaluations * evaluation, disk, _peak_memory(device))
    say(f"memory: {found.memory / _MIB:,.0f} MiB at most so far, of {_all_memory(device) / _MIB:,.0f}")
    _check_room(disk, near, say)
    often = f"{evaluations:,} evaluation{'s' * (evaluations != 1)}"
    say(f"the whole run: about {duration(found.seconds)}, {often} included, its start and its checkpoints not")
    group.barrier("the end of the dry run")
    return found


def _time_steps(state: TrainingState, judge: Judge) -> float:
    """Return the seconds of the run's mean step; the first step is checked as in a run."""
    took, taken = 0.0, 0
    state.model.train()
    for epoch, share in stages(state.batches.pipeline, state.progress.epochs):
        batches = judge.checked(state.batches.epoch(epoch))
        times = []
        for batch in itertools.islice(batches, 1 + _STEPS):
            began = time.perf_counter()
            result = state.train_step.step(batch, taken)
            if result.spike is not None:
                raise RelayError(f"{result.spike.what}: try a smaller rate, or look at the data by: torchrelay check")
            result.loss.item()  # waits for the device
            times.append(time.perf_counter() - began)
            taken += 1
        took += share * min(times[1:] or times)
    return took


def _time_evaluation(evaluator: Evaluator, processes: int, say: Callable[[str], None]) -> float:
    seconds = 0.0
    for name, part in evaluator.parts.items():
        evaluator.evaluate(name, rounds=1)  # chooses kernels
        began = time.perf_counter()
        evaluator.evaluate(name, rounds=1)
        took = -(-len(part) // processes) * (time.perf_counter() - began)
        say(f"an evaluation on the {name} data ({part.samples:,} samples): {duration(took)}")
        seconds += took
    return seconds


def _try_checkpoint(state: TrainingState, near: Path, say: Callable[[str], None]) -> int:
    """Write a checkpoint and restore it; return its bytes, 0 on other ranks than the first."""
    contents = state.contents(0)  # whole tensors, for which all ranks are needed
    group = state.strategy.group
    if not group.main:
        return 0
    with explained(f"write a checkpoint into {_existing(near)}"):
        folder = tempfile.TemporaryDirectory(dir=_existing(near), prefix=".dry-run-")
    with folder:
        began = time.perf_counter()
        path = write(Path(folder.name), contents)
        took = time.perf_counter() - began
        size = sum(file.stat().st_size for file in path.iterdir())
        if group.size == 1:
            state.restore(read(path))
    say(f"a checkpoint: {size / _MIB:,.1f} MiB, written in {duration(took)} and restored")
    return size


def _existing(near: Path) -> Path:
    """Return the nearest folder above a path that exists."""
    return next(path for path in (near, *near.absolute().parents) if path.is_dir())


def _check_room(disk: int, near: Path, say: Callable[[str], None]) -> None:
    free = shutil.disk_usage(_existing(near)).free
    text = f"up to {disk / _GB:,.2f} GB of checkpoints, with {free / _GB:,.1f} GB free in {_existing(near)}"
    if disk > free:
        raise RelayError(f"the run would write {text}: make room, or lower checkpoint.keep")
    if disk:
        say(f"disk: {text}")


def _peak_memory(device: torch.device) -> int:
    """Return the bytes that were in use at most: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _all_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
