"""Step 7: the rollback to the checkpoint before a loss spike."""

import json
from collections.abc import Callable
from pathlib import Path

from torchrelay.checkpoint.checkpointer import Checkpointer
from torchrelay.checkpoint.format import Contents, read
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.errors import RelayError, explained
from torchrelay.run.settings import RunSettings
from torchrelay.train.spikes import Spike
from torchrelay.train.state import TrainingState


def newest(
    checkpoints: Checkpointer, group: ProcessGroup, say: Callable[[str], None], before: int | None = None
) -> Contents | None:
    """Return the newest whole checkpoint (of fewer steps than `before`): rank 0 chooses it, all ranks read it."""
    if group.size == 1:
        return checkpoints.newest(say, before)
    if group.main:
        contents = checkpoints.newest(say, before)
        group.broadcast_bytes(b"" if contents is None else str(contents.step).encode())
        return contents
    step = group.broadcast_bytes(None).decode()
    return read(checkpoints.find(step)) if step else None


def stop_at_spike(spike: Spike, folder: Path | None) -> RelayError:
    """Return the error with which a run stops at a spike."""
    where = f"; its sample indices are in {_file(folder, spike)}" if folder is not None else ""
    return RelayError(
        f"{spike.what}; try a lower optimizer.lr, optimizer.clip_norm=1, or run.on_spike=rollback; no checkpoint "
        f"contains this step{where}"
    )


def write_down(spike: Spike, folder: Path, samples: list[int]) -> None:
    """Write a spike and its batch's sample indices into the run folder, for people to look at."""
    content = {"step": spike.step, "what": spike.what, "samples": samples}
    path = _file(folder, spike)
    with explained(f"write {path}"):
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _file(folder: Path, spike: Spike) -> Path:
    return folder / f"spike-step-{spike.step:08d}.json"


def roll_back(
    spike: Spike,
    state: TrainingState,
    checkpoints: Checkpointer,
    settings: RunSettings,
    say: Callable[[str], None],
) -> int:
    """Restore the checkpoint before a spike, and leave out the batch that shows it from then on.

    If the loss is merely high and the batch before is left out already, an earlier step did the harm: the last batch
    that was trained on is left out as well. A resumed run decides the same again.

    Returns:
        How many lines of metrics.jsonl the restored checkpoint knows of.

    Raises:
        RelayError: too many batches would be left out, or no checkpoint from before the spike is kept.
    """
    skipped = state.progress.skipped
    steps = [spike.step]
    if spike.finite and spike.step - 1 in skipped:
        earlier = next((step for step in range(spike.step - 1, 0, -1) if step not in skipped), None)
        steps += [] if earlier is None else [earlier]
    if len(skipped) + len(steps) > settings.max_skipped:
        raise RelayError(
            f"{spike.what}, and {len(skipped)} batches are left out already: look at the data, lower optimizer.lr, or "
            "raise run.max_skipped, then resume"
        )
    checkpoints.wait()
    contents = newest(checkpoints, state.strategy.group, say, before=min(steps))
    if contents is None:
        raise RelayError(
            f"{spike.what}, and no checkpoint before step {min(steps)} is kept: raise checkpoint.keep and start again"
        )
    skipped = skipped | {step: state.samples_of(step) for step in steps}
    state.restore(contents)
    state.progress.skipped = skipped
    state.progress.stop_reason = None  # the steps that follow decide again whether the run ends
    left_out = " and ".join(f"step {step}" for step in sorted(steps))
    say(f"{spike.what}: rolling back to step {contents.step:,} and leaving out the batch of {left_out}")
    if state.strategy.group.main:
        checkpoints.remove_after(contents.step)  # the later ones contain what the left-out batch led to
    lines: int = contents.state["metrics_lines"]
    return lines
