"""Step 7: the parts of a trainer, and what it shows of them."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchrelay.data.batches import Batches
from torchrelay.device.device import Device
from torchrelay.distributed.strategy import Strategy
from torchrelay.errors import UsageError
from torchrelay.run.folder import RunFolder
from torchrelay.run.settings import RunSettings
from torchrelay.tasks.task import Task
from torchrelay.train.callbacks import Callback
from torchrelay.train.evaluation import Evaluation, Evaluator
from torchrelay.train.judge import Judge
from torchrelay.train.logs import description
from torchrelay.train.progress import Best, Progress
from torchrelay.train.record import Log, log
from torchrelay.train.session import Session
from torchrelay.train.shown import trainer_table
from torchrelay.train.state import TrainingState
from torchrelay.train.step import TrainStep


class Parts:
    """What a trainer is made of. Its parts are there to be used; where the run stands can be read from the trainer."""

    settings: RunSettings
    batches: Batches
    model: nn.Module
    strategy: Strategy
    task: Task
    progress: Progress
    train_step: TrainStep
    evaluator: Evaluator
    callbacks: list[Callback]
    state: TrainingState
    session: Session
    judge: Judge

    def __init_subclass__(cls) -> None:
        """Refuse a method that would never be called, or would hide the step."""
        for name in ("train_step", "training_step"):
            if name in vars(cls):
                raise UsageError(
                    f"{cls.__name__} defines {name}, and a step's loss is the task's: write a tr.Task with "
                    "compute(model, batch, update), and give it as task="
                )

    def __repr__(self) -> str:
        """Return what is trained on what, and where it stands."""
        return f"Trainer({description(self.state, self.session.folder)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the same, and the last epochs."""
        return trainer_table(description(self.state, self.session.folder), self.task, self.history)

    @property
    def log(self) -> Log:
        """What logs a number, an image, a text or a histogram from a callback: `tr.log`."""
        return log

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.progress.step

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the model's parameters."""
        return self.train_step.optimizer

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics of the epochs and evaluations since `fit` began."""
        return self.session.history

    @property
    def device(self) -> Device:
        """Where and in which precision the model computes."""
        return self.train_step.device

    @property
    def run(self) -> RunFolder | None:
        """The open run folder: on rank 0, while the loop runs."""
        return self.session.run

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the training data's classes."""
        return self.batches.source.classes

    @property
    def best(self) -> Best | None:
        """The best evaluation so far."""
        return self.progress.best

    @property
    def last_evaluation(self) -> Evaluation | None:
        """The last evaluation of the part that `selects_on` names."""
        return self.evaluator.last

    @property
    def selects_on(self) -> str:
        """The part of the data by which the best model is selected: "validation", "test" or "train"."""
        return self.evaluator.selects_on
