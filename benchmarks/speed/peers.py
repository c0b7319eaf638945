"""An epoch over the same batches: by hand, with torchrelay, and with each peer in its fastest setting.

Each loop takes batches made beforehand and returns a clock that recorded when each of them was requested. A peer is
imported only in its own loop, since it may not be installed.
"""

import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import torchrelay as tr
from torchrelay.data.augment import Pipeline
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.run.terminal import Terminal

FEATURES, WIDTH, CLASSES, BATCH = 64, 64, 10, 32
WARM = 20  # warm-up steps
Pairs = Sequence[tuple[Tensor, Tensor]]  # inputs (BATCH, FEATURES) float32, targets (BATCH,) int64


class Clock:
    """Batches that record when each was requested: a step lasts from one request to the next in every loop."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches
        self.asked: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.asked.clear()
        for batch in self.batches:
            self.tick()
            yield batch

    def tick(self) -> None:
        """Take the time; at both ends of the span of `mean`, synchronize with the GPU first."""
        if len(self.asked) in (WARM, len(self.batches) - 1) and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self.asked.append(time.perf_counter())

    def mean(self) -> float:
        """Return the mean seconds per step, without the warm-up."""
        return (self.asked[-1] - self.asked[WARM]) / (len(self.asked) - 1 - WARM)

    def steps(self) -> list[float]:
        """Return the seconds of each step, without the warm-up."""
        return [float(seconds) for seconds in np.diff(self.asked)[WARM:]]


def made(steps: int) -> Pairs:
    """Return random batches."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(steps, BATCH, FEATURES, generator=random)
    return list(zip(inputs, torch.randint(0, CLASSES, (steps, BATCH), generator=random), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))
    return nn.Sequential(*layers)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


# ------------------------------------------------------------------------------------------------ by hand


def by_hand(pairs: Pairs) -> Clock:
    clock, model = Clock(pairs), network().to(pairs[0][0].device)
    optimizer = sgd(model)
    for inputs, targets in clock:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return clock


def by_hand_from_arrays(pairs: Pairs) -> Clock:
    clock, model, (inputs, targets) = Clock(pairs), network(), arrays(pairs)
    optimizer = sgd(model)
    for places in torch.split(torch.randperm(len(targets)), BATCH):
        clock.tick()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs.index_select(0, places)), targets.index_select(0, places))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return clock


def arrays(pairs: Pairs) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*pairs, strict=True)
    return torch.cat(inputs), torch.cat(targets)


# ------------------------------------------------------------------------------------------------ torchrelay


class CrossEntropy(tr.Task):
    """The loss without metrics, as for the peers."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")


class Prepared(Batches):
    """Batches made beforehand, instead of those of a source."""

    def __init__(self, clock: Clock, trainer: tr.Trainer) -> None:
        super().__init__(trainer.batches.source, BATCH, trainer.device, Pipeline())
        self.clock = clock

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:  # noqa: ARG002 - there is one epoch
        yield from self.clock


class Ticks(tr.Callback):
    """Takes the time after each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step(self, trainer: Any, batch: Batch, loss: Tensor) -> None:  # noqa: ARG002
        self.clock.tick()


class Screen(io.StringIO):
    """A stream that claims to be a terminal, so that the progress bar is drawn."""

    def isatty(self) -> bool:
        return True


def trainer(pairs: Pairs, **settings: Any) -> tr.Trainer:
    """Return a trainer for one epoch; without settings, every optional part is off."""
    off: dict[str, Any] = {"task": CrossEntropy(), "terminal": Terminal(quiet=True)}
    optimizer = tr.optim.SGD(lr=0.01, momentum=0.9, weight_decay=0.0)  # as the others
    plain: dict[str, Any] = {"epochs": 1, "batch_size": BATCH, "normalize": False, "device": "cpu"}
    return tr.Trainer(network(), arrays(pairs), optimizer=optimizer, **plain | off | settings)


def prepared(pairs: Pairs, **settings: Any) -> Clock:
    """Train on batches made beforehand."""
    made_of = trainer(pairs, **settings)
    batches = [
        Batch(inputs, targets, np.arange(place * BATCH, (place + 1) * BATCH), (BATCH,), size=BATCH)
        for place, (inputs, targets) in enumerate(pairs)
    ]
    clock = Clock(batches)
    made_of.batches = Prepared(clock, made_of)
    made_of.fit()
    return clock


def torchrelay_with_all(pairs: Pairs) -> Clock:
    """Train a full run: progress bar, accuracy, metrics and TensorBoard every 50 steps, checkpoints, a schedule."""
    os.environ["TERM"] = "xterm"
    with tempfile.TemporaryDirectory() as folder:
        on: dict[str, Any] = {"task": tr.Classification(), "terminal": Terminal(stream=Screen())}
        return prepared(pairs, run=Path(folder) / "run", schedule=tr.optim.Cosine(), **on)


def torchrelay_from_arrays(pairs: Pairs) -> Clock:
    """Train from arrays: compute the order, gather the samples."""
    clock = Clock(pairs)
    trainer(pairs, callbacks=[Ticks(clock)]).fit()
    return clock


# ------------------------------------------------------------------------------------------------ peers


def ignite(pairs: Pairs) -> Clock:
    from ignite.engine import Engine

    clock, model = Clock(pairs), network().to(pairs[0][0].device)
    optimizer = sgd(model)

    def step(_engine: Any, batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    model.train()
    Engine(step).run(clock, max_epochs=1)
    return clock


def skorch(pairs: Pairs) -> Clock:
    import skorch

    clock = Clock(pairs)
    net = skorch.NeuralNet(
        network(),
        nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=0.01,
        optimizer__momentum=0.9,
        max_epochs=1,
        train_split=None,
        callbacks="disable",
        verbose=0,
        iterator_train=lambda _dataset, **_settings: clock,
    )
    net.fit(np.zeros((1, FEATURES), np.float32), np.zeros(1, np.int64))  # the iterator returns the real batches
    return clock


def accelerate(pairs: Pairs) -> Clock:
    """Prepare only the model and the optimizer: batches made beforehand need no loader."""
    return _accelerate(pairs, with_loader=False)


def accelerate_with_loader(pairs: Pairs) -> Clock:
    """Also prepare the loader, as accelerate's guide does."""
    return _accelerate(pairs, with_loader=True)


def _accelerate(pairs: Pairs, with_loader: bool) -> Clock:
    from accelerate import Accelerator

    accelerator, clock = Accelerator(cpu=True), Clock(pairs)
    model = network()
    model, optimizer = accelerator.prepare(model, sgd(model))
    loader = accelerator.prepare(DataLoader(pairs, batch_size=None)) if with_loader else pairs  # type: ignore[arg-type]
    model.train()
    for inputs, targets in loader:
        clock.tick()
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
    return clock


def lightning(pairs: Pairs) -> Clock:
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = network()

        def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.model)

    clock = Clock(pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about loader workers, which aren't used
        # `barebones` is its own mode for measuring overhead: no logger, bar, checkpoint, sanity check or summary.
        lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, barebones=True).fit(Module(), clock)
    return clock


def keras(pairs: Pairs) -> Clock:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            layers.Input((FEATURES,)),
            layers.Dense(WIDTH, activation="relu"),
            layers.Dense(WIDTH, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    clock = Clock(pairs)
    model.fit(iter(clock), steps_per_epoch=len(clock), epochs=1, verbose=0)
    return clock


Loop = Callable[[Pairs], Clock]
