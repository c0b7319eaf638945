"""Step 7: what the trainer's constructor makes of its arguments, in the order in which it needs it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from torchrelay.data.augment.pipeline import Augment, Pipeline
from torchrelay.data.batches import Batches, Sampling
from torchrelay.data.sources import ArraySource, as_source, statistics
from torchrelay.device.device import Device, DeviceSettings, set_up
from torchrelay.distributed.process_group import ProcessGroup, init_process_group
from torchrelay.distributed.replicas import ParallelSettings, count_replicas
from torchrelay.distributed.strategy import Strategy
from torchrelay.errors import UsageError, nearest
from torchrelay.models.ema import EMA
from torchrelay.optim.optimizers import SGD, OptimizerBase
from torchrelay.optim.schedules import Constant, ScheduleSettings
from torchrelay.optim.update import Update
from torchrelay.run.settings import RunSettings
from torchrelay.tasks.classification import Classification
from torchrelay.tasks.targets import check_targets
from torchrelay.tasks.task import Task, calls_once, loss_and_outputs, total
from torchrelay.train.callbacks import Callback, EarlyStopping
from torchrelay.train.evaluation import Evaluator
from torchrelay.train.logs import Pictures, StepLog
from torchrelay.train.progress import Progress, RunningSums
from torchrelay.train.record import log
from torchrelay.train.spikes import SpikeDetector
from torchrelay.train.state import TrainingState
from torchrelay.train.step import TrainStep


class BatchOptions(TypedDict, total=False):
    """How `Trainer` makes batches of the data."""

    batch_size: int
    """Samples of a global batch; 256 if not given."""
    augment: Sequence[Augment]
    """Batched augmentation of image arrays, such as `[augment.Flip(), augment.PaddedCrop()]`."""
    prepare: Sequence[Augment]
    """What training and test images alike go through first, such as `[augment.Resize(size=112)]`."""
    normalize: bool
    """Whether images are normalized by the data's channel means and standard deviations; they are by default."""
    sampling: Sampling
    """"shuffle" (the default), "balanced" (every class equally often) or "sequential"."""
    drop_last: bool
    """Whether an epoch's last batch is left out if it is smaller; it isn't by default."""
    workers: int
    """Processes that read a Dataset; arrays need none."""
    normalise: bool
    """The former spelling of `normalize`."""


def run_settings(settings: RunSettings | None, epochs: int | None, seed: int | None) -> RunSettings:
    """Return the settings of a run with those that were given on their own."""
    changes = {name: value for name, value in (("epochs", epochs), ("seed", seed)) if value is not None}
    return RunSettings(**((settings or RunSettings()).model_dump() | changes))


def prepare_device(
    device: str | DeviceSettings | Device, parallel: ParallelSettings, exact: bool
) -> tuple[Device, ProcessGroup, int]:
    """Set up the device unless it is, join the process group, and count the replicas.

    Raises:
        UsageError: this machine has no such device, or so many processes can't share the replicas.
        RelayError: the other processes can't be reached.
    """
    if not isinstance(device, Device):
        device = set_up(device if isinstance(device, DeviceSettings) else DeviceSettings(name=device), exact)
    group = init_process_group(device.device, parallel.timeout)
    return device, group, count_replicas(parallel, group.size, exact)


def make_batches(
    train: Any,
    evaluated: Mapping[str, Any],
    options: BatchOptions,
    device: Device,
    group: ProcessGroup,
    replicas: int,
    seed: int,
) -> tuple[Batches, dict[str, Batches]]:
    """Return the batches of the training data, and of each other part that is given.

    Raises:
        UsageError: there is no such option.
    """
    if "normalise" in options:
        warnings.warn("Trainer(normalise=…) is now Trainer(normalize=…)", FutureWarning, stacklevel=3)
        options["normalize"] = options["normalise"]
    for name in options:
        if name not in BatchOptions.__annotations__:
            raise UsageError(f"Trainer has no argument '{name}'{nearest(name, BatchOptions.__annotations__)}")
    source = as_source(train)
    pipeline = Pipeline(
        transforms=tuple(options.get("augment", ())),
        prepare=tuple(options.get("prepare", ())),
        classes=len(source.classes),
        **(statistics(source) if options.get("normalize", True) else {}),
    )

    def batches(data: Any, training: bool) -> Batches:
        return Batches(
            as_source(data),
            options.get("batch_size", 256),
            device,
            pipeline,
            seed=seed,
            train=training,
            sampling=options.get("sampling", "shuffle") if training else "sequential",
            replicas=replicas if training else 1,
            rank=group.rank,
            world_size=group.size,
            workers=options.get("workers", 0),
            drop_last=options.get("drop_last", False) and training,
        )

    parts = {name: batches(data, training=False) for name, data in evaluated.items() if data is not None}
    return batches(source, training=True), parts


def batches_like(batches: Batches, data: Any) -> Batches:
    """Return data to predict on in the batches of a trainer: a source, a Dataset, or a tensor of inputs."""
    if isinstance(data, Tensor):
        data = ArraySource(data, torch.zeros(len(data), dtype=torch.int64))
    return Batches(
        as_source(data),
        batches.batch_size,
        batches.device,
        batches.pipeline,
        train=False,
        rank=batches.rank,
        world_size=batches.world_size,
    )


@dataclass(frozen=True)
class Updates:
    """How the weights are updated."""

    each: list[Update]
    schedule: ScheduleSettings
    ema: EMA | None


def make_updates(
    optimizer: Any,
    schedule: ScheduleSettings | None,
    clip_norm: float | None,
    ema: float,
    strategy: Strategy,
    task: Task,
) -> Updates:
    """Make the optimizers of a strategy's model, SGD if none is given, and what belongs to them.

    Raises:
        UsageError: an optimizer can't work on what the strategy has of the parameters, or isn't the task's.
    """
    # An average is made of the parameters that the strategy has, and before the optimizer changes them.
    average = EMA(strategy.model, ema) if ema else None
    names = task.updates
    given = optimizer if isinstance(optimizer, Mapping) else {names[0]: optimizer or SGD()}
    if list(given) != list(names):
        raise UsageError(
            f"{type(task).__name__} has the updates {', '.join(names)}: give an optimizer for each, such as "
            f"optimizer={{{', '.join(f'{name!r}: ...' for name in names)}}}"
        )
    updates = []
    for name, settings in given.items():
        made = settings(task.module(strategy.model, name))
        strategy.check_optimizer(made)
        own = settings.clip_norm if clip_norm is None and isinstance(settings, OptimizerBase) else clip_norm
        updates.append(Update(name, made, own, "model" if len(names) == 1 else f"model.{name}"))
    return Updates(updates, schedule or Constant(), average)


def prepare_task(task: Task | None, batches: Batches, evaluated: Mapping[str, Batches]) -> Task:
    """Return the task, classification if none is given; it knows the classes and has checked all targets in memory.

    Raises:
        RelayError: a target can't be learned; the text names its sample.
    """
    task = task or Classification()
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


def held_modules(task: Task) -> list[nn.Module]:
    """Return the modules that a task holds as attributes, alone or in lists, tuples and dicts."""
    found = list[nn.Module]()
    for value in vars(task).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [each for each in values if isinstance(each, nn.Module)]
    return found


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
    callbacks: Sequence[Callback],
    record: dict[str, Any],
    settle: Callable[..., None],
) -> Parts:
    """Build the parts of a run with these settings; `settle` is called before weights change or are swapped."""
    sums = RunningSums(strategy.group, batches.replicas // strategy.group.size)
    progress = Progress(settings.epochs, len(batches), settings.max_steps, sums, settings.log_every)
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
        detector=SpikeDetector(settings.spike_threshold),
        watch_norm=settings.on_spike == "rollback",
        measure=settings.train_metrics,
        dummy_batch=batches.dummy_batch,
        before_update=lambda: settle(trained=True),
    )
    views = settings.test_views
    evaluator = Evaluator(
        strategy.model, task, batches.device, evaluated, strategy=strategy, views=views, ema=updates.ema, before=settle
    )
    patience = [EarlyStopping(settings.patience)] if settings.patience else []
    every = [StepLog(progress), Pictures(batches, evaluator, progress, task, record), *patience, *callbacks]
    state = TrainingState(strategy.model, train_step, progress, batches, evaluated, every)
    return Parts(progress, train_step, evaluator, every, state)


def dummy_loss(strategy: Strategy, task: Task, batches: Batches) -> Tensor:
    """Go forward through a dummy batch: for a process without samples, whose forward pass the others wait for."""
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
) -> dict[str, Any]:
    """Return what recipe.toml says of a run: its recipe, or what is known of one that was started from Python."""
    own = {
        "run": settings.model_dump(mode="json", exclude_none=True),
        "data": {"name": batches.source.name, "batch_size": batches.batch_size},
        "model": {"name": strategy.model_name},
        "device": batches.device.settings.model_dump(mode="json", exclude_none=True),
        "environment": {"started_from": "python", "torch": torch.__version__},
    }
    return (record or own) | {"parallel": parallel.model_dump() | {"replicas": batches.replicas}}
