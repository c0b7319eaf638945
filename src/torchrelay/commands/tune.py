"""`torchrelay tune RECIPE`: measure which device settings train a recipe fastest on this machine.

They are timed side by side, one setting after another. Each setting is tried on top of the best ones so far, in turns
with them, so that what slows the machine slows both. A time is a mean over the whole run: if images grow with the
epochs, the smallest and the largest are timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from torchrelay.commands.options import add_common, add_recipe, code_of, count, terminal_of
from torchrelay.errors import RelayError, UsageError

if TYPE_CHECKING:
    from types import ModuleType

    from torchrelay.data.batch import Batch
    from torchrelay.recipe.recipe import Recipe
    from torchrelay.train.trainer import Trainer

HELP = "find the settings that train a recipe fastest on this machine (tunes speed, not accuracy)"
# Turns of a comparison, the fewest steps and the fewest seconds of a turn.
_ROUNDS, _STEPS, _LONG_ENOUGH = 3, 2, 0.15
# A smaller gain can't be told from noise.
_GAIN = 0.03


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe(parser)
    parser.add_argument("--seconds", type=count, default=60, metavar="N", help="start no trial after N seconds (60)")
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Time the settings, and print the lines to keep."""
    from torchrelay.recipe import recipe

    loaded, code = recipe.load(options.recipe, options.overrides), code_of(options)
    show(tune(loaded, options.seconds, code=code, say=terminal_of(options).say))


@dataclass(frozen=True)
class Trial:
    """A setting and what it gains."""

    setting: str
    """As a recipe has it, such as `device.precision = "bf16"`."""
    seconds: float | None = None
    """Of the mean step of the run; None if it wasn't tried or failed."""
    samples: int = 0
    """Of a step."""
    steps: int = 0
    """Of the whole run."""
    times: float = 1.0
    """The rate divided by that of the best setting before."""
    kept: bool = False
    note: str = ""


def tune(
    recipe: Recipe,
    seconds: float = 60.0,
    *,
    code: ModuleType | None = None,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """Time settings of the device and the optimizer for a recipe. Nothing is written, and no run is touched.

    Args:
        recipe: what to train; its own settings come first.
        seconds: after which no further trial starts.
        code: a module of the user's own, in which the recipe's names are looked up first.
        only: names of the settings to try, such as "precision"; none: all.
        say: called with the setting that is being tried.

    Returns:
        The recipe's own settings, then each other one as it was tried.

    Raises:
        UsageError: the recipe's bits must be portable.
        RelayError: the recipe itself can't be trained.
    """
    import torch

    if recipe.run.portable:
        raise UsageError("tune tries settings that a portable run can't have: add --set run.portable=false")
    threads = torch.get_num_threads()
    # Each setting is timed with a number of threads of its own, which it sets again before its turn.
    if recipe.device.threads is None:
        recipe = _with(recipe, "device", "threads", threads)
    try:
        return _trials(recipe, time.monotonic() + seconds, code, only, say)
    finally:
        torch.set_num_threads(threads)


def _trials(
    recipe: Recipe,
    until: float,
    code: ModuleType | None,
    only: Sequence[str],
    say: Callable[[str], None],
) -> list[Trial]:
    place = Timed(recipe, code)
    best = recipe = recipe.model_copy(update={"device": place.trainer.device.settings})  # "auto" is decided
    (took,) = in_turns([place])
    trials = [Trial("the recipe's own", took, place.samples, place.steps, kept=True)]
    for section, name, value in _settings(recipe):
        if only and name not in only:
            continue
        setting = f"{section}.{name} = {_toml(value)}"
        if time.monotonic() > until:
            trials.append(Trial(setting, note="not measured: no time left"))
            continue
        say(f"trying {setting}")
        changed = _with(best, section, name, value)
        try:
            other = Timed(changed, code)
            before, took = in_turns([place, other])
        except (RelayError, RuntimeError) as error:
            trials.append(Trial(setting, note=f"fails: {str(error).splitlines()[0][:80]}"))
            continue
        times = (other.samples / took) / (place.samples / before)
        is_batch = name == "batch_size"  # which trains another network
        repaid = name != "compile" or other.steps * (before - took) > other.first
        kept = times > 1 + _GAIN and repaid and not is_batch
        note = "trains otherwise" if is_batch else ""
        if name == "compile":
            note = f"first step {other.first:.1f} s{'' if repaid else ', not repaid'}"
        trials.append(Trial(setting, took, other.samples, other.steps, times, kept, note))
        if kept:
            best, place = changed, other
    return trials


def show(trials: list[Trial]) -> None:
    """Print the trials as a table, and the recipe's lines to keep."""
    from rich.console import Console
    from rich.table import Table

    from torchrelay.run.terminal import duration

    console = Console(highlight=False)
    table = Table(box=None)
    for name in ("", "ms a step", "samples/s", "vs. best", "all steps"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("")
    for trial in trials:
        if trial.seconds is None:
            table.add_row(trial.setting, "", "", "", "", trial.note)
            continue
        style = "bold green" if trial.kept and trial is not trials[0] else ""
        rate, ms = f"{trial.samples / trial.seconds:,.0f}", f"{1e3 * trial.seconds:,.2f}"
        whole = duration(trial.steps * trial.seconds)
        table.add_row(trial.setting, ms, rate, f"{trial.times:.2f}", whole, trial.note, style=style)
    console.print(table)
    console.print(
        "\nall steps: of the whole run, without its start, its evaluations and its checkpoints", soft_wrap=True
    )
    kept = [trial.setting for trial in trials[1:] if trial.kept]
    timed = [trial for trial in trials[1:] if trial.seconds is not None]
    left = sum(trial.note.startswith("not measured") for trial in trials)
    unknown = f"{left} {'was' if left == 1 else 'were'} not measured: give more --seconds."
    if not kept:
        found = "Of the settings that were timed, none was clearly faster." if timed else ""
        console.print(
            "\n" + " ".join(filter(None, [found or "No other setting was timed.", unknown * bool(left)])),
            soft_wrap=True,
        )
        return
    console.print("\nKeep these (they change the last bits of a run's numbers; a precision changes more):\n")
    for section in dict.fromkeys(setting.partition(".")[0] for setting in kept):
        console.print(f"[{section}]", markup=False)
        for setting in kept:
            if setting.startswith(f"{section}."):
                console.print(setting.removeprefix(f"{section}."), markup=False)
    if left:
        console.print(f"\n{unknown}")


def _settings(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """Yield what is tried: the likeliest gain first, and last what takes long to start."""
    import torch

    from torchrelay.device.device import set_up
    from torchrelay.distributed.launch import cores

    device = set_up(recipe.device, recipe.run.exact).device
    if device.type == "cpu":
        threads, available = torch.get_num_threads(), cores()
        for count in sorted({1, max(1, available // 2), available} - {threads}, reverse=True):
            yield "device", "threads", count
    for precision in ("bf16", "float32", *["fp16"] * (device.type == "cuda")):
        if precision != recipe.device.precision:
            yield "device", "precision", precision
    if device.type == "cuda" and not recipe.device.tf32:
        yield "device", "tf32", True
    yield "device", "channels_last", not recipe.device.channels_last
    if not getattr(recipe.optimizer, "fused", True):  # SGD and AdamW have it
        yield "optimizer", "fused", True
    for factor in (0.5, 2):
        yield "data", "batch_size", max(1, int(recipe.data.batch_size * factor))
    if not recipe.device.compile:
        yield "device", "compile", True


def _with(recipe: Recipe, section: str, name: str, value: Any) -> Recipe:
    part = getattr(recipe, section).model_copy(update={name: value})
    return recipe.model_copy(update={section: part})


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


class Timed:
    """A recipe's trainer whose steps are timed.

    Args:
        recipe: what it trains.
        code: a module of the user's own.

    Attributes:
        samples: of a step.
        steps: of the whole run.
        first: seconds of the first two steps, in which models are compiled and kernels chosen.
    """

    def __init__(self, recipe: Recipe, code: ModuleType | None) -> None:
        from torchrelay.data.augment.stages import stages
        from torchrelay.recipe.build import build_trainer
        from torchrelay.run.terminal import Terminal

        self.trainer = build_trainer(recipe, code=code, terminal=Terminal(quiet=True))
        self.trainer.model.train()
        progress = self.trainer.progress
        self.steps, self._taken = min(progress.total_steps, progress.max_steps or progress.total_steps), 0
        found = stages(self.trainer.batches.pipeline, progress.epochs)
        self._stages = [(_forever(self.trainer, epoch), share) for epoch, share in found]
        began = time.perf_counter()
        for batches, _ in self._stages:
            self.samples = self._step(batches)
            self._step(batches)
        self.first = time.perf_counter() - began

    def _step(self, batches: Iterator[Batch]) -> int:
        batch = next(batches)
        self.trainer.train_step.step(batch, self._taken)
        self._taken += 1
        return batch.size

    def time(self) -> float:
        """Return the mean seconds of a step of the whole run, from some steps of each stage."""
        from torchrelay.device.device import set_up

        # The switches belong to the whole process, and another trainer has just set its own.
        set_up(self.trainer.device.settings, self.trainer.settings.exact)
        return sum(share * self._seconds(batches) for batches, share in self._stages)

    def _seconds(self, batches: Iterator[Batch]) -> float:
        import torch

        device, began, steps = self.trainer.device.device, time.perf_counter(), 0
        while steps < _STEPS or time.perf_counter() - began < _LONG_ENOUGH:
            self._step(batches)
            steps += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / steps


def _forever(trainer: Trainer, epoch: int) -> Iterator[Batch]:
    """Yield full batches of an epoch again and again."""
    full = next(trainer.batches.epoch(epoch)).size
    while True:
        yield from (batch for batch in trainer.batches.epoch(epoch) if batch.size == full)


def in_turns(places: Sequence[Timed]) -> list[float]:
    """Return the seconds of the mean step of each: the median of some turns."""
    times = [[place.time() for place in places] for _ in range(_ROUNDS)]
    return [median(column) for column in zip(*times, strict=True)]
