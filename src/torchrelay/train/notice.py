"""Step 7: tells the user's command how a run has ended."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchrelay.errors import Interrupted
from torchrelay.run.notify import notify
from torchrelay.train.state import TrainingState


@contextmanager
def noticed(
    command: str | None,
    state: TrainingState,
    folder: Path | None,
    has_begun: Callable[[], bool],
    say: Callable[[str], None],
) -> Iterator[None]:
    """Run `run.notify` after this context: the run is done, has failed, or was stopped.

    Args:
        command: of the user's; None: there is none.
        state: where the run stands.
        folder: the run's; without one nobody is told.
        has_begun: whether the folder was the run's to take.
        say: called with a warning.
    """
    if command is None or folder is None or not state.strategy.group.main:
        yield
        return
    began = time.monotonic()

    def tell(status: str, text: str = "") -> None:
        if has_begun():
            facts = _facts(state) | {"MESSAGE": text} if text else _facts(state)
            seconds = round(time.monotonic() - began, 1)
            notify(command, {"RUN": folder.resolve(), "STATUS": status, "SECONDS": seconds} | facts, say)

    try:
        yield
    except BaseException as error:
        tell("stopped" if isinstance(error, Interrupted) else "failed", str(error) or type(error).__name__)
        raise
    tell("done")


def _facts(state: TrainingState) -> dict[str, Any]:
    """Return where the run stands; the headline metric if it was evaluated."""
    progress, task = state.progress, state.train_step.task
    facts = {"STEP": progress.step, "EPOCH": progress.epoch_of(progress.step), "METRIC": task.headline}
    value = progress.evaluated_at[1].get(task.headline)
    if value is not None:
        facts["VALUE"] = value
    if progress.best is not None:
        facts |= {"BEST": progress.best.value, "BEST_EPOCH": progress.best.epoch}
    return facts
