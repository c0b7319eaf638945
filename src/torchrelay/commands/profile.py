"""`torchrelay profile RECIPE`: show where a training step's time goes: a table, a picture, and a trace for Perfetto.

A `Clock` is marked at the end of each phase of a step; the time since the last mark goes to that phase, so the
phases add up to the step. `TrainStep.step` marks its own phases; hooks of PyTorch mark the ends of the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torchrelay.commands.options import add_common, add_recipe, code_of, count, terminal_of
from torchrelay.commands.train import run_name
from torchrelay.errors import UsageError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from torchrelay.data.batch import Batch
    from torchrelay.train.trainer import Trainer

HELP = "show where the time of a training step goes"
PHASES = {
    "input": "wait for a batch: gather, augment, copy",
    "forward": "the model, and the loss",
    "backward": "the gradients",
    "measure": "measure the training batch",
    "optimizer": "the update",
    "rest": "what is left: schedule, clipping, sums",
}
_COLOURS = ("#56B4E9", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#999999")  # Okabe and Ito
_WARM, _TRACED = 5, 3  # steps before, and steps of the trace after
_BAR = 8  # columns of a phase that takes all; with it the table fits 80


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe(parser)
    parser.add_argument("--steps", type=count, default=20, metavar="N", help="time N steps (20)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write the picture and the trace (profiles/RECIPE)"
    )
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Train a few steps and print their phases."""
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.run.folder import free_folder

    loaded = recipe.load(options.recipe, options.overrides)
    folder = options.out or free_folder(run_name(options.recipe, options.overrides), Path("profiles"))
    trainer = build_trainer(loaded, code=code_of(options), terminal=terminal_of(options))
    show(examine(trainer, options.steps, folder), folder)


@dataclass
class Clock:
    """Seconds by phase, from one mark to the next; on a GPU, of the work that was given to it.

    Args:
        device: where the model computes.
    """

    device: torch.device
    steps: list[dict[str, float]] = field(default_factory=list)
    _marks: list[tuple[str, Any]] = field(default_factory=list)
    _updates: bool = False

    def mark(self, phase: str) -> None:
        """Give what has passed since the last mark to a phase."""
        if self.device.type == "cuda":
            import torch

            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def begin_update(self) -> None:
        """Mark the start of the optimizer's step; not again where it calls the step of the class above it."""
        if not self._updates:
            self.mark("rest")
        self._updates = True

    def end_step(self) -> None:
        """Add up a step's phases; the next one begins where this one ended."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        found = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, now) in zip(self._marks, self._marks[1:], strict=False):
            found[phase] += before.elapsed_time(now) / 1e3 if self.device.type == "cuda" else now - before
        self.steps.append(found)
        self._marks, self._updates = [], False
        self.mark("rest")


@dataclass(frozen=True)
class Profile:
    """What a step's time went into."""

    seconds: dict[str, float]  # by phase
    samples: int  # of a global batch
    device: str

    @property
    def step(self) -> float:
        """Seconds of a step: the sum of its phases."""
        return sum(self.seconds.values())

    @property
    def _headline(self) -> str:
        return f"{1e3 * self.step:,.2f} ms a step, {self.samples / self.step:,.0f} samples a second"

    def table(self) -> Table:
        """Return a table of the phases."""
        from rich.table import Table

        table = Table(
            title=f"{self._headline}; {self.device}",
            title_justify="left",
            title_style="",
            box=None,
        )
        for name, justify in (("phase", "left"), ("ms", "right"), ("share", "right"), ("", "left"), ("what", "left")):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
        for phase, what in PHASES.items():
            share = self.seconds[phase] / self.step
            bar = "█" * round(_BAR * share)
            table.add_row(phase, f"{1e3 * self.seconds[phase]:.2f}", f"{share:.1%}", f"[blue]{bar}[/]", what)
        table.add_row("step", f"{1e3 * self.step:.2f}", "100.0%")
        return table

    def draw(self, path: Path) -> None:
        """Draw the phases as one bar into a PNG."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes, left = figure.add_subplot(), 0.0
        for (phase, seconds), colour in zip(self.seconds.items(), _COLOURS, strict=True):
            share = seconds / self.step
            axes.barh(0, 1e3 * seconds, left=left, color=colour, label=f"{phase} {share:.0%}", height=0.6)
            left += 1e3 * seconds
        axes.set(yticks=[], xlabel="milliseconds of a step", xlim=(0, left))
        axes.set_title(
            f"{1e3 * self.step:.1f} ms a step, {self.samples / self.step:,.0f} samples a second",
            loc="left",
            fontsize=10,
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
        figure.savefig(path, dpi=200)


def examine(trainer: Trainer, steps: int = 20, folder: Path | None = None) -> Profile:
    """Train some steps and say where their time goes. No run folder is touched; the trainer is used up.

    Args:
        trainer: not started, and without a run folder.
        steps: how many are timed, after some that aren't.
        folder: where `profile.png` and `trace.json.gz` (for ui.perfetto.dev) are written; None: nowhere.

    Raises:
        UsageError: the trainer has a run folder, or several processes.
    """
    from torch import profiler

    if trainer.session.folder is not None or trainer.strategy.group.size > 1:
        raise UsageError("a profile is of one process, and of a trainer without a run folder: give Trainer(run=None)")
    device, model, optimizer = trainer.device, trainer.model, trainer.optimizer
    clock = Clock(device.device)
    model.register_forward_pre_hook(lambda *_: clock.mark("rest"))
    optimizer.register_step_pre_hook(lambda *_: clock.begin_update())
    optimizer.register_step_post_hook(lambda *_: clock.mark("optimizer"))
    model.train()
    batches, size = _forever(trainer), 0
    clock.mark("rest")
    for _ in range(_WARM + steps):
        size = max(size, _step(trainer, batches, clock))  # an epoch's last batch may be smaller
    found = Profile(typical(clock.steps[_WARM:]), size, device.describe())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found.draw(folder / "profile.png")
        activities = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * (clock.device.type == "cuda")
        with profiler.profile(activities=activities) as traced:
            for _ in range(_TRACED):
                with profiler.record_function("step"):
                    _step(trainer, batches, clock)
        traced.export_chrome_trace(str(folder / "trace.json.gz"))
    return found


def typical(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean seconds of each phase, without the fastest and the slowest tenth of the steps.

    Means of the same steps add up to the mean step; medians of phases needn't add up to anything.
    """
    ordered = sorted(steps, key=lambda step: sum(step.values()))
    cut = max(len(steps) // 10, 1) if len(steps) > 2 else 0
    return {phase: fmean(step[phase] for step in ordered[cut : len(steps) - cut]) for phase in PHASES}


def show(found: Profile, folder: Path) -> None:
    """Print a profile, and where its files are."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(found.table())
    console.print(f"\n{folder / 'profile.png'}\n{folder / 'trace.json.gz'} for https://ui.perfetto.dev", soft_wrap=True)


def _forever(trainer: Trainer) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from trainer.batches.epoch(epoch)
        epoch += 1


def _step(trainer: Trainer, batches: Iterator[Batch], clock: Clock) -> int:
    batch = next(batches)
    clock.mark("input")
    trainer.after_step(batch, trainer.train_step.step(batch, trainer.step, clock.mark))
    clock.mark("rest")
    clock.end_step()
    return batch.size
