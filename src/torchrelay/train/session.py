"""Step 7: what surrounds the loop: opening or resuming a run before its first step, closing it after its last."""

import json
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from torchrelay.checkpoint.format import Contents, read
from torchrelay.data.files import Marks, differences, together
from torchrelay.data.order import order
from torchrelay.data.sources import ArraySource
from torchrelay.errors import Interrupted, RelayError, UsageError
from torchrelay.models.ema import EMA
from torchrelay.models.factory import InitFromData
from torchrelay.run import identity
from torchrelay.run.folder import RunFolder
from torchrelay.run.terminal import Counters, metric
from torchrelay.train.recovery import SpikeError
from torchrelay.train.signals import StopNow, StopSignal

if TYPE_CHECKING:
    from torchrelay.train.trainer import Trainer

_INITIAL_SAMPLES = 5_000  # training images from which a model may initialize itself


@contextmanager
def session(trainer: "Trainer", resume: bool, accept_changes: bool) -> Iterator[None]:
    """Hold the run's folder, log and signals while the loop runs; go on from a checkpoint if asked to.

    Raises:
        Interrupted: a signal came, and a checkpoint is saved.
    """
    if resume and trainer.folder is None:
        raise UsageError("this trainer has no run folder to resume: give Trainer(..., run=...)")
    with ExitStack() as stack:
        stack.enter_context(trainer.device.explain_errors(trainer.batches.batch_size))
        trainer.signal = stack.enter_context(StopSignal())
        stack.callback(_close, trainer)
        if trainer.folder is not None and trainer.group.main:
            trainer.run = RunFolder(trainer.folder, trainer.terminal, resume=resume)
            for note in trainer.notes:
                trainer.run.note(note)
        trainer.say(_introduction(trainer))
        if resume:
            _go_on(trainer, accept_changes)
        else:
            _begin(trainer)
        for callback in trainer.callbacks:
            callback.on_start(trainer)
        trainer.stopwatch.start()
        try:
            with trainer.terminal.progress(lambda: _counters(trainer), trainer.unit):
                yield
            _finish(trainer)
        except StopNow:
            raise _interrupted(trainer) from None


@contextmanager
def recovery(trainer: "Trainer") -> Iterator[None]:
    """Go back to the last checkpoint before a step whose loss went wrong, and leave its batch out, if asked to.

    Raises:
        SpikeError: a loss went wrong and the run shall stop, or too many batches would be left out.
    """
    try:
        yield
    except SpikeError as spike:
        path = _write_down(trainer, spike)
        if trainer.folder is None or trainer.settings.on_spike == "stop":
            where = f"; its sample indices are in {path}" if path is not None else ""
            raise RelayError(f"{spike}; no checkpoint holds anything of it{where}") from None
        _roll_back(trainer, trainer.run, spike)


def _write_down(trainer: "Trainer", spike: SpikeError) -> Path | None:
    """Write which samples a step's batch had, for people to look at."""
    if trainer.folder is None:
        return None
    path = trainer.folder / f"spike-step-{spike.step:08d}.json"
    facts = {"step": spike.step, "what": spike.what, "samples": _samples(trainer, spike.step)}
    path.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return path


def _samples(trainer: "Trainer", step: int) -> list[int]:
    """Return the indices of the samples of a step, counted from 1."""
    found: list[int] = trainer.batches.indices(*divmod(step - 1, len(trainer.batches))).tolist()
    return found


def _roll_back(trainer: "Trainer", run: RunFolder | None, spike: SpikeError) -> None:
    """Stand where the run stood before the batch to be left out.

    That is the one that shows the spike. If the loss is high, and the batch before is left out already, then the harm
    was done earlier, and the last batch that was trained on is left out as well. A resumed run decides the same again.
    """
    steps = [spike.step]
    if spike.finite and spike.step - 1 in trainer.skipped:
        earlier = next((s for s in range(spike.step - 1, 0, -1) if s not in trainer.skipped), None)
        steps += [] if earlier is None else [earlier]
    if len(trainer.skipped) + len(steps) > trainer.settings.max_skipped:
        raise RelayError(
            f"{spike.what}, and {len(trainer.skipped)} batches are left out already: the data or optimizer.lr may be "
            "at fault; else raise run.max_skipped and resume"
        )
    trainer.checkpointer.wait()
    contents = _newest(trainer, before=min(steps))
    if contents is None:
        raise RelayError(
            f"{spike.what}, and no checkpoint before step {min(steps)} is kept to go back to: raise checkpoint.keep "
            "and start again"
        )
    trainer.optimizer.zero_grad()
    skipped = trainer.skipped | {step: _samples(trainer, step) for step in steps}
    _stand_at(trainer, contents)
    trainer.skipped = skipped
    trainer.stop_reason = None  # the steps that follow decide anew whether the run ends
    if run is not None:
        trainer.checkpointer.remove_after(contents.step)  # they hold what the left-out batch led to
        run.rewind(contents.state["metrics_lines"])
    left_out = " and ".join(f"step {step}" for step in sorted(steps))
    trainer.say(f"{spike.what}: going back to step {contents.step:,} and leaving out the batch of {left_out}")


def _stand_at(trainer: "Trainer", contents: Contents) -> None:
    """Stand where a checkpoint stands; what it was judged by stays with it, should it be saved again."""
    trainer.load_weights(contents)
    trainer.load_state_dict(contents.state)
    trainer.evaluated_at = (contents.step, contents.metrics)


def _close(trainer: "Trainer") -> None:
    trainer.signal, trainer.phase = StopSignal(), ""  # a signal ended this session, not what comes after it
    for batches in (trainer.batches, *trainer.evaluated.values()):
        batches.close()
    try:
        trainer.checkpointer.close()
    finally:
        run, trainer.run = trainer.run, None
        if run is not None:
            run.close()


def _begin(trainer: "Trainer") -> None:
    """Initialize from the data, take the first process's weights, write down what runs, save what it starts from."""
    if isinstance(trainer.model, InitFromData):
        trainer.model.init_from(_initial_images(trainer))
    trainer.strategy.broadcast_weights()
    if trainer.ema is not None:
        trainer.ema = EMA(trainer.model, trainer.ema.decay)  # which begins with the initial weights
    if trainer.run is not None:
        trainer.run.write_files(_files(trainer))
        trainer.run.write_recipe(trainer.record)
    trainer.save()


def _files(trainer: "Trainer") -> Marks:
    """Return all files that the run's data comes from."""
    sources = [batches.source for batches in (trainer.batches, *trainer.evaluated.values())]
    return together(source.files for source in sources if source.files is not None)


def _newest(trainer: "Trainer", before: int | None = None) -> Contents | None:
    """Return the newest whole checkpoint: the first process looks for it, and all read the same."""
    if trainer.group.size == 1:
        return trainer.checkpointer.newest(trainer.say, before)
    if trainer.group.main:
        contents = trainer.checkpointer.newest(trainer.say, before)
        trainer.group.broadcast_bytes(b"" if contents is None else str(contents.step).encode())
        return contents
    step = trainer.group.broadcast_bytes(None).decode()
    return read(trainer.checkpointer.find(step)) if step else None


def _go_on(trainer: "Trainer", accept_changes: bool) -> None:
    """Stand where the newest whole checkpoint stands."""
    contents = _newest(trainer)
    if contents is None:
        trainer.say("no checkpoint was saved yet: starting from the beginning")
        if trainer.run is not None:
            trainer.run.rewind(0)
        _begin(trainer)
        return
    _keep_threads(trainer, contents)
    if trainer.run is not None:
        _compare(trainer, trainer.run, contents, accept_changes)
    options = [dict(group, params=None) for group in trainer.optimizer.param_groups]
    _stand_at(trainer, contents)
    if accept_changes:  # then the recipe's rates and decays count, not those that were saved
        for group, fresh in zip(trainer.optimizer.param_groups, options, strict=True):
            group.update({key: value for key, value in fresh.items() if key != "params"})
    if trainer.run is not None:
        trainer.run.rewind(contents.state["metrics_lines"])
        trainer.run.write_recipe(trainer.record)  # which may now ask for more epochs
        trainer.run.write_files(_files(trainer))
    if trainer.epochs_done >= trainer.settings.epochs:
        trainer.say(f"the run is done: {trainer.step:,} steps")
    else:
        trainer.say(f"going on after step {trainer.step:,} of {trainer.total_steps:,}")


def _keep_threads(trainer: "Trainer", contents: Contents) -> None:
    """Compute with as many threads as before, unless the settings say how many: others would give other bits."""
    before = contents.state["identity"]["threads"]
    if trainer.device.settings.threads is None and before != torch.get_num_threads():
        torch.set_num_threads(before)
        trainer.say(f"going on with {before} thread{'s' * (before > 1)} an operation, as it began (see device.threads)")


def _compare(trainer: "Trainer", run: RunFolder, contents: Contents, accept_changes: bool) -> None:
    """Compare what the run was started with and what there is now.

    Raises:
        RelayError: something would lead to another result, and that wasn't accepted.
    """
    # The recipe first: a seed that changed also changes which samples are set apart.
    for change in identity.compare_recipes(run.read_recipe(), trainer.record, accept_changes):
        trainer.say(f"changed: {change}")
    files = _files(trainer)
    for warning in identity.compare(
        contents.state["identity"],
        trainer.identity(),
        accept_changes,
        data_changes=lambda: differences(run.read_files(), files),
    ):
        trainer.say(f"warning: {warning}")


def _interrupted(trainer: "Trainer") -> Interrupted:
    """Save, and say how to go on."""
    signal = trainer.signal.received.name if trainer.signal.received is not None else "a signal"
    done = f"stopped by {signal} after step {trainer.step:,}"
    if trainer.folder is None:
        return Interrupted(f"{done}; there is no run folder to resume from")
    try:
        trainer.save()
    except SpikeError:  # of a step that nobody had read yet; the resumed run meets it again
        if trainer.settings.on_spike == "stop":
            raise
    trainer.checkpointer.wait()
    trainer.group.barrier("the last checkpoint")  # whoever started us ends all when one ends
    return Interrupted(f"{done}, saved; go on with: torchrelay resume {shlex.quote(str(trainer.folder))}")


def _finish(trainer: "Trainer") -> None:
    if trainer.stop_reason is not None:
        trainer.say(f"stopped: {trainer.stop_reason}")
    trainer.checkpointer.wait()
    if trainer.last_evaluation is None and trainer.evaluated:  # the run had come to its end before
        trainer.evaluate(trainer.selects_on)
    for callback in trainer.callbacks:
        callback.on_end(trainer)
    if trainer.best is not None:
        shown = metric(trainer.best.value, trainer.task.percent).strip()
        name = trainer.task.headline.replace("_", " ")
        trainer.say(f"best {trainer.selects_on} {name}: {shown} (epoch {trainer.best.epoch})")


def _introduction(trainer: "Trainer") -> str:
    data = trainer.batches.source
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return (
        f"{trainer.record['model']['name']} ({parameters:,} parameters) on {data.name} ({len(data):,} samples), "
        f"{trainer.total_steps:,} steps on {trainer.device.describe()}"
    )


def _counters(trainer: "Trainer") -> Counters:
    """Return what the progress bar shows; its own thread asks, so a step costs nothing."""
    return Counters(
        epoch=min(trainer.epochs_done + 1, trainer.settings.epochs),
        epochs=trainer.settings.epochs,
        step=trainer.step,
        steps=trainer.total_steps,
        samples=trainer.samples_seen,
        loss=trainer.step_log.last,
        phase=trainer.phase,
    )


def _initial_images(trainer: "Trainer") -> Tensor:
    """Return some training images, evenly from all of them and as evaluation prepares them."""
    source = trainer.batches.source
    if not isinstance(source, ArraySource):
        name = type(trainer.model).__name__
        raise UsageError(f"{name} initializes itself from images in memory: use arrays or an image folder")
    places = np.arange(min(len(source), _INITIAL_SAMPLES))
    chosen = torch.from_numpy(order(trainer.settings.seed, 0, places, len(source)))
    images: Tensor = trainer.device.arrange(trainer.pipeline.evaluate(trainer.device.move(source.inputs[chosen])))
    return images
