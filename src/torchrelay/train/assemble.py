"""Step 7: what the trainer's constructor makes of its arguments, in the order in which it needs it."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchrelay.data.accept import as_source, options_of, stacked
from torchrelay.data.augment.pipeline import Pipeline, as_transforms
from torchrelay.data.batches import Batches
from torchrelay.data.sources import statistics
from torchrelay.data.stream import StreamSource
from torchrelay.data.stream_reader import check_apart
from torchrelay.device.device import Device, DeviceSettings, set_up
from torchrelay.distributed.build import build_strategy
from torchrelay.distributed.process_group import ProcessGroup, init_process_group
from torchrelay.distributed.replicas import ParallelSettings, count_replicas
from torchrelay.distributed.strategy import Strategy
from torchrelay.duration import seconds_of, steps_between
from torchrelay.errors import UsageError
from torchrelay.models.ema import EMA
from torchrelay.optim.accept import Factor, ScheduleLike, as_optimizer, as_schedule, make
from torchrelay.optim.groups import Freezing
from torchrelay.optim.optimizers import OptimizerBase
from torchrelay.optim.schedules import ScheduleBase
from torchrelay.optim.update import Update
from torchrelay.run.record import read_record
from torchrelay.run.settings import RunSettings
from torchrelay.tasks.accept import TaskLike, as_task
from torchrelay.tasks.targets import check_targets
from torchrelay.tasks.task import Task, calls_once, held_modules, loss_and_outputs, total
from torchrelay.train.arguments import (
    BatchOptions,
    CallbacksLike,
    DeviceLike,
    OptimizersLike,
    as_callbacks,
    as_device,
    check_numbers,
    refuse,
)
from torchrelay.train.callbacks import Callback, EarlyStopping
from torchrelay.train.clock import Lines
from torchrelay.train.evaluation import Evaluator
from torchrelay.train.logs import EarlyLog, Pictures, StepLog
from torchrelay.train.probe import as_recorded, decide, with_decisions
from torchrelay.train.progress import Progress, RunningSums
from torchrelay.train.record import log
from torchrelay.train.spikes import SpikeDetector
from torchrelay.train.state import TrainingState
from torchrelay.train.step import TrainStep


def run_settings(settings: RunSettings | None, epochs: int | None, steps: int | None, seed: int | None) -> RunSettings:
    """Return the settings of a run with those that were given on their own."""
    changes = {k: v for k, v in (("epochs", epochs), ("steps", steps), ("seed", seed)) if v is not None}
    return RunSettings(**((settings or RunSettings()).model_dump() | changes))


def prepare_device(
    given: DeviceLike, parallel: ParallelSettings | None, settings: RunSettings, run: str | Path | None
) -> tuple[tuple[Device, ProcessGroup, int], ParallelSettings]:
    """Set up the device unless it is, join the process group, and count the replicas; a run keeps its own.

    Raises:
        UsageError: this machine has no such device, or so many processes can't share the replicas.
        RelayError: the other processes can't be reached.
    """
    device, parallel = as_device(given, settings.portable), parallel or ParallelSettings()
    if isinstance(device, DeviceSettings):
        device = set_up(device, settings.exact, is_portable=settings.portable)
    group = init_process_group(device.device, parallel.timeout)
    if (parallel.replicas is None or device.undecided) and run is not None and (Path(run) / "recipe.toml").exists():
        device, replicas = as_recorded(device, read_record(Path(run)))
        parallel = parallel.model_copy(update={"replicas": parallel.replicas or replicas})
    return (device, group, count_replicas(parallel, group.size, settings.exact)), parallel


def make_batches(
    train: Any,
    validation: Any,
    test: Any,
    options: BatchOptions,
    where: tuple[Device, ProcessGroup, int],
    settings: RunSettings,
    dtype: torch.dtype,
) -> tuple[Batches, dict[str, Batches]]:
    """Return the batches of the training data, and of each other part that is given; "test" may be several by name.

    The options of a DataLoader count where they aren't given. `where` is their device, the processes that share them,
    and the replicas of a training batch; `dtype` is that of the model's parameters.

    Raises:
        UsageError: there is no such option.
    """
    if "normalise" in options:
        warnings.warn("Trainer(normalise=…) is now Trainer(normalize=…)", FutureWarning, stacklevel=3)
        options["normalize"] = options["normalise"]
    refuse("Trainer", options, [*BatchOptions.__annotations__])
    device, group, replicas = where
    source = as_source(train, dtype)
    if isinstance(train, DataLoader):
        options = cast(BatchOptions, options_of(train) | options)
    pipeline = Pipeline(
        transforms=as_transforms(options.get("augment"), "augment"),
        prepare=as_transforms(options.get("prepare"), "prepare"),
        classes=len(source.classes),
        **({} if options.get("normalize") is False else statistics(source, always=bool(options.get("normalize")))),
    )

    def batches(data: Any, training: bool) -> Batches:
        return Batches(
            as_source(data, dtype),
            batch_size if training else options.get("test_batch_size", batch_size),
            device,
            pipeline,
            seed=settings.seed,
            train=training,
            sampling=options.get("sampling", "shuffle") if training else "sequential",
            replicas=replicas if training else 1,
            rank=group.rank,
            world_size=group.size,
            workers=options.get("workers", 0),
            drop_last=options.get("drop_last", False) and training,
            limit=settings.evaluate_batches if not training else settings.steps if endless else None,
            dtype=dtype,
        )

    endless = isinstance(source, StreamSource) and source.length is None
    batch_size = options.get("batch_size", 256)
    is_named = isinstance(test, dict) and not any(isinstance(each, Tensor | np.ndarray) for each in test.values())
    evaluated = {"validation": validation, **(test if is_named else {"test": test})}
    parts = {name: batches(data, training=False) for name, data in evaluated.items() if data is not None}
    made = batches(source, training=True)
    check_apart(made.stream, [part.stream for part in parts.values()])
    return made, parts


def make_strategy(
    model: nn.Module,
    task: Task,
    batches: Batches,
    evaluated: Mapping[str, Batches],
    parallel: ParallelSettings,
    where: tuple[Device, ProcessGroup, int],
    exact: bool,
    dummy_loss: Callable[[], Tensor],
    say: Callable[[str], None],
) -> Strategy:
    """Decide which settings of the device are best for the model, and return what `build_strategy` does with them."""
    device, group, _ = where
    device = decide(device, model, task, (batches, *evaluated.values()), group, parallel.kind, say)
    return build_strategy(model, parallel.kind, group, device, exact=exact, dummy_loss=dummy_loss, say=say)


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of a model's parameters."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)


def batches_like(batches: Batches, data: Any, *, inputs_alone: bool = False) -> Batches:
    """Return other data, of which a list of arrays may be inputs alone, in batches like those of a trainer."""
    return Batches(
        as_source(stacked(data) if inputs_alone else data, batches.dtype),
        batches.batch_size,
        batches.device,
        batches.pipeline,
        train=False,
        rank=batches.rank,
        world_size=batches.world_size,
        dtype=batches.dtype,
    )


@dataclass(frozen=True)
class Updates:
    """How the weights are updated."""

    each: list[Update]
    schedule: ScheduleBase | Factor
    ema: EMA | None


def make_updates(
    optimizer: OptimizersLike | None,
    schedule: ScheduleLike | None,
    clip_norm: float | None,
    ema: float,
    strategy: Strategy,
    task: Task,
) -> Updates:
    """Make the optimizers of a strategy's model, SGD if none is given, and what belongs to them.

    Args:
        optimizer: as a user gave it; a mapping without a name holds one for each of the task's updates.
        schedule: as a user gave it.
        clip_norm: the largest norm of a gradient; None: as the optimizer's settings say.
        ema: the decay of an average of the weights; 0: none.
        strategy: has the model's parameters.
        task: has the updates.

    Raises:
        UsageError: a number is out of range; an optimizer can't work on the strategy's parameters, or isn't the task's.
    """
    check_numbers(ema, clip_norm)
    # An average is made of the parameters that the strategy has, and before the optimizer changes them.
    average = EMA(strategy.model, ema) if ema else None
    names = task.updates
    several = isinstance(optimizer, Mapping) and "name" not in optimizer and (len(names) > 1 or names[0] in optimizer)
    given: Mapping[str, Any] = optimizer if several else {names[0]: optimizer}  # type: ignore[assignment]
    if list(given) != list(names):
        raise UsageError(
            f"{type(task).__name__} has the updates {', '.join(names)}: give an optimizer for each, such as "
            f"optimizer={{{', '.join(f'{name!r}: ...' for name in names)}}}"
        )
    updates = []
    for name, each in given.items():
        factory = as_optimizer(each)
        made = make(factory, task.module(strategy.model, name))
        strategy.check_optimizer(made)
        own = factory.clip_norm if clip_norm is None and isinstance(factory, OptimizerBase) else clip_norm
        updates.append(Update(name, made, own, "model" if len(names) == 1 else f"model.{name}"))
    return Updates(updates, as_schedule(schedule), average)


def prepare_task(
    given: TaskLike | None, loss: TaskLike | None, batches: Batches, evaluated: Mapping[str, Batches], log: EarlyLog
) -> Task:
    """Return the task, classification if none is given; it knows the classes and has checked all targets in memory.

    Args:
        given: as a user gave it.
        loss: another name of the same.
        batches: of the training data.
        evaluated: of the other parts.
        log: learns what a loss of PyTorch's became.

    Raises:
        UsageError: it is no task.
        RelayError: a target can't be learned; the text names its sample.
    """
    if given is not None and loss is not None:
        raise UsageError("task and loss are two names of one argument: give one of them")
    task = as_task(loss if given is None else given, batches, log.notes.append)
    if type(task).loss is Task.loss and type(task).compute is Task.compute:
        task.loss(None, None)  # raises the error that says what to define
    for module in held_modules(task):
        module.to(batches.device.device).eval().requires_grad_(False)
    classes = batches.source.classes
    if getattr(task, "classes", 0) is None and classes:
        task.classes = len(classes)  # type: ignore[attr-defined]
    for part in (batches, *evaluated.values()):
        check_targets(task.check, part)
    return task


class Parts(NamedTuple):
    """What the loop calls."""

    progress: Progress
    train_step: TrainStep
    evaluator: Evaluator
    callbacks: list[Callback]
    state: TrainingState


def join_parts(
    strategy: Strategy,
    task: Task,
    updates: Updates,
    batches: Batches,
    evaluated: Mapping[str, Batches],
    settings: RunSettings,
    callbacks: CallbacksLike,
    record: dict[str, Any],
    settle: Callable[..., None],
) -> Parts:
    """Build the parts of a run with these settings; `settle` is called before weights change or are swapped."""
    sums = RunningSums(strategy.group, batches.replicas // strategy.group.size)
    total = settings.steps or settings.epochs * len(batches)
    lines = Lines(steps_between(settings.log_every, len(batches), total, "steps"), seconds_of(settings.log_every))
    progress = Progress(settings.epochs, len(batches), settings.max_steps, sums, lines, settings.steps)
    # A CUDA graph holds a step of one replica.
    device = batches.device.without_graph() if batches.replicas > 1 else batches.device
    train_step = TrainStep(
        strategy,
        task,
        updates.each,
        device,
        replicas=batches.replicas,
        schedule=updates.schedule.bind(len(batches), progress.total_steps),
        seed=settings.seed,
        ema=updates.ema,
        detector=SpikeDetector(settings.spike_threshold, norms=settings.on_spike == "rollback"),
        watch_norm=settings.on_spike == "rollback" or settings.receipt_every is not None,
        measure=settings.train_metrics,
        dummy_batch=batches.dummy_batch,
        before_update=partial(settle, trained=True),
        freezing=Freezing(
            [group for each in updates.each for group in each.optimizer.param_groups], len(batches), total
        ),
    )
    views = settings.test_views
    evaluator = Evaluator(
        strategy.model, task, batches.device, evaluated, strategy=strategy, views=views, ema=updates.ema, before=settle
    )
    patience = [EarlyStopping(settings.patience)] if settings.patience else []
    own = [StepLog(progress), Pictures(batches, evaluator, progress, task, record)]
    every = [*own, *patience, *as_callbacks(callbacks)]
    state = TrainingState(strategy.model, train_step, progress, batches, evaluated, every)
    return Parts(progress, train_step, evaluator, every, state)


def dummy_loss(strategy: Strategy, task: Task, batches: Batches) -> Tensor:
    """Go forward through a dummy batch: for a process without samples, which the others wait for."""
    batch = batches.dummy_batch()
    with log.muted(), batches.device.autocast():
        model = strategy if calls_once(task) else strategy.module
        loss, _ = loss_and_outputs(task, model, batch, task.updates[0])
    return total(loss, task)


def full_record(
    record: dict[str, Any] | None,
    parallel: ParallelSettings,
    settings: RunSettings,
    batches: Batches,
    strategy: Strategy,
    task: Task,
) -> dict[str, Any]:
    """Return what recipe.toml says of a run: its recipe, or what is known of one that was started from Python."""
    own = {
        "run": settings.model_dump(mode="json", exclude_none=True),
        "data": {"name": batches.source.name, "batch_size": batches.batch_size},
        "model": {"name": strategy.model_name},
        "device": batches.device.settings.model_dump(mode="json", exclude_none=True),
        "environment": {"started_from": "python", "torch": torch.__version__, "task": type(task).__name__},
    }
    record = with_decisions(record or own, batches.device)
    return record | {"parallel": parallel.model_dump() | {"replicas": batches.replicas}}
