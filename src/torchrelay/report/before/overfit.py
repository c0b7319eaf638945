"""Whether a network can learn a handful of samples at all: the quickest way to find a mistake in model, loss or data.

After Karpathy, "A Recipe for Training Neural Networks" (karpathy.github.io/2019/04/25/recipe): overfit a single batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torchrelay.errors import RelayError
from torchrelay.run.terminal import metric, number
from torchrelay.train.step import StepResult
from torchrelay.train.trainer import Trainer

_MOST_STEPS = 500
_TELL = 50  # steps between two lines
_STAYS = 3  # steps in a row that must be right
_SMALL = 0.05  # of the first loss, to which the loss must fall where there is no share of right answers


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Attributes:
        learned: whether it was learned.
        steps: that were taken.
        first: the loss of the first step.
        last: the loss of the last one.
        share: the task's headline metric on the samples, where it is a share.
    """

    learned: bool
    steps: int
    first: float
    last: float
    share: float | None = None

    def text(self, samples: int) -> str:
        """Return it in words."""
        share = "" if self.share is None else f", {metric(self.share, percent=True).strip()} right"
        what = f"loss {number(self.first)} to {number(self.last)}{share}"
        return f"{'learned' if self.learned else 'did not learn'} {samples:,} samples in {self.steps:,} steps: {what}"


def overfit(trainer: Trainer, say: Callable[[str], None]) -> Outcome:
    """Train on the first batch again and again until it is learned.

    Args:
        trainer: without augmentation, whose batches are as large as the number of samples to learn, with a constant
            rate.
        say: called with a line now and then.

    Raises:
        RelayError: the loss isn't finite.
    """
    with trainer.session.alone():
        trainer.model.train()
        batch = next(trainer.judge.checked(trainer.batches.epoch(0)))
        first, in_a_row, outcome = None, 0, None
        for step in range(_MOST_STEPS):
            result = trainer.train_step.step(batch, step)
            if result.spike is not None:
                raise RelayError(f"{result.spike.what}: try a smaller optimizer.lr, or look for a division by 0")
            loss = float(result.loss)
            first = loss if first is None else first
            share = _share(trainer, result)
            is_right = share >= 1 if share is not None else loss <= _SMALL * abs(first)
            in_a_row = in_a_row + 1 if is_right else 0
            outcome = Outcome(in_a_row >= _STAYS, step + 1, first, loss, share)
            if outcome.learned:
                break
            if (step + 1) % _TELL == 0:
                right = "" if share is None else f", {metric(share, percent=True).strip()} right"
                say(f"step {step + 1:,}: loss {number(loss)}{right}")
    assert outcome is not None  # noqa: S101 - at least one step was taken
    return outcome


def _share(trainer: Trainer, result: StepResult) -> float | None:
    """Return the task's headline metric on the batch, where it is a share that a step measures."""
    task = trainer.task
    if not task.percent or not result.measures or task.headline not in result.measures[0][0]:
        return None
    measured = [(float(sums[task.headline]), float(count)) for sums, count in result.measures if count]
    right, counted = map(sum, zip(*measured, strict=True))
    return right / max(counted, 1)
