"""`torchrelay sweep RECIPE --vary KEY=VALUES…`: many runs that differ in a few keys; the best are trained on."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchrelay.commands.options import add_common, code_of, count, terminal_of, whole
from torchrelay.errors import Interrupted, RelayError, UsageError

if TYPE_CHECKING:
    from torchrelay.report.sweep.plan import Plan
    from torchrelay.report.sweep.rungs import Trial

HELP = "search for a recipe's best values; promising trials go on, bit for bit"
_EPILOG = """\
examples:
  torchrelay sweep digits --vary optimizer.lr=1e-3..1e-1:log --trials 18
  torchrelay sweep digits --vary 'data.batch_size=32|64|128' --sampler grid
  torchrelay sweep runs/digits-sweep

The same command again goes on with a sweep that was stopped, or joins one that
is running, also from other machines that share the folder.
"""
_TRIALS, _RUNGS = 20, 3
_REWRITTEN = 60.0  # seconds after which a sweep in progress writes its page again


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a shipped recipe, a TOML file, or the folder of a sweep to go on with"
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=VALUES",
        help="LOW..HIGH, LOW..HIGH:log, A|B|C or [A, B, C] of a recipe's key; can be repeated",
    )
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="the sweep's folder (runs/NAME-sweep)")
    parser.add_argument("--trials", type=count, metavar="N", help=f"try N combinations of values ({_TRIALS})")
    parser.add_argument(
        "--time", type=_seconds, metavar="DURATION", help="stop after this long, such as '90 min' or 2h"
    )
    parser.add_argument(
        "--sampler", choices=("tpe", "random", "grid"), help="how values are drawn: tpe learns from trials (tpe)"
    )
    parser.add_argument(
        "--rungs", type=count, metavar="N", help="compare trials at N points of a run; 1: train all in full (3)"
    )
    parser.add_argument(
        "--reduction", type=_reduction, metavar="N", help="train on the best 1/N of the trials at each point (3)"
    )
    parser.add_argument("--metric", metavar="NAME", help="the metric to judge by (the task's own)")
    parser.add_argument("--direction", choices=("maximize", "minimize"), help="what is better (the metric's own)")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="train N trials at a time (1)")
    add_common(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of --workers


def run(options: argparse.Namespace) -> None:
    """Sweep: begin, go on, or join."""
    from torchrelay.report.sweep.journal import need_optuna

    need_optuna()
    if options.worker:
        return _work(options)
    folder, plan = _open(options)
    say, started = terminal_of(options).say, time.monotonic()
    say(f"{folder}: {_description(plan)}")
    stopped = _run_workers(options, folder, plan, started) if options.workers > 1 else _run_here(options, folder, plan)
    trials = _write_page(folder, plan)
    from torchrelay.report.sweep.outcome import summary

    if stopped not in ("done", "time"):
        way = f"torchrelay sweep {shlex.quote(str(folder))}{'' if options.code is None else f' --code {options.code}'}"
        raise Interrupted(f"stopped by {stopped}, saved; {len(trials)} trials so far; go on with: {way}")
    for line in summary(folder, plan, trials):
        say(line)
    if stopped == "time":
        say(f"the time is over; go on with: torchrelay sweep {shlex.quote(str(folder))}")
    return None


# ------------------------------------------------------------------------------------------------ which sweep


def _open(options: argparse.Namespace) -> "tuple[Path, Plan]":
    """Return the folder and the plan of a new sweep or of one to go on with.

    Raises:
        UsageError: an option is wrong, or the folder holds another sweep.
    """
    from torchrelay.commands.train import run_name
    from torchrelay.report.sweep.plan import NAME

    named = Path(options.recipe)
    if (named / NAME).is_file():
        return _go_on(options, named)
    folder = options.run or Path("runs") / f"{run_name(options.recipe, options.overrides)}-sweep"
    if (folder / NAME).is_file():
        return _go_on(options, folder)
    return _begin(options, folder)


def _go_on(options: argparse.Namespace, folder: Path) -> "tuple[Path, Plan]":
    """Return the plan of a sweep that has begun, with the number of trials that is asked for now."""
    from dataclasses import replace

    from torchrelay.recipe import recipe
    from torchrelay.report.sweep import journal, plan, space

    before = plan.read_plan(folder)
    now: dict[str, Any] = {
        name: value
        for name in ("sampler", "reduction", "metric", "direction")
        if (value := getattr(options, name)) is not None
    }
    if options.rungs is not None:
        now["rungs_asked"] = options.rungs
    if folder == Path(options.recipe):
        if options.vary or options.overrides or options.run:
            raise UsageError(f"{folder} is a sweep, whose recipe is settled: leave out --vary, --set and --run")
        if before.code and options.code is None:
            raise UsageError(f"{folder} was started with a file of code: add --code {before.code}")
    else:
        threads = before.recipe.device.threads
        given = recipe.load(options.recipe, options.overrides)
        now["recipe"] = plan.trial_recipe(given, threads if isinstance(threads, int) else None)
        now["vary"] = space.parse(options.vary, options.recipe, options.overrides)
    plan.compare(before, now | {"code_sha256": plan.sha256_of(options.code)}, folder)
    most = options.trials
    if most is not None and before.sampler == "grid":
        most = min(most, len(space.grid(before.vary)))
    if most is None or most == before.trials:
        return folder, before
    changed = replace(before, trials=most)
    with journal.hold(folder):
        changed.write(folder)
    return folder, changed


def _begin(options: argparse.Namespace, folder: Path) -> "tuple[Path, Plan]":
    """Check all that can be checked, and make the folder of a new sweep; another process may be first."""
    from torchrelay.errors import explained
    from torchrelay.report.sweep import journal
    from torchrelay.report.sweep.plan import NAME

    plan = _new_plan(options)
    others = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    if set(others) - {NAME, "sweep.lock", "claims", "journal"}:
        raise UsageError(f"{folder} isn't empty and holds no sweep, but {min(others)}: choose a new folder by --run")
    with explained(f"make {folder}", "choose another folder by --run"):
        folder.mkdir(parents=True, exist_ok=True)
    with journal.hold(folder):
        if not (folder / NAME).is_file():
            plan.write(folder)
            return folder, plan
    return _go_on(options, folder)


def _new_plan(options: argparse.Namespace) -> "Plan":
    import torch

    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.report.sweep import plan as plans
    from torchrelay.report.sweep import space
    from torchrelay.run.terminal import Terminal

    vary = space.parse(options.vary, options.recipe, options.overrides)
    sampler: Any = options.sampler or "tpe"
    trials = options.trials or (0 if options.time else _TRIALS)
    if sampler == "grid":
        trials = min(options.trials or len(space.grid(vary)), len(space.grid(vary)))
    threads = max(1, torch.get_num_threads() // options.workers) if options.workers > 1 else None
    loaded = plans.trial_recipe(recipe.load(options.recipe, options.overrides), threads)
    rungs = options.rungs or _RUNGS
    plan = plans.Plan(
        recipe=loaded,
        vary=vary,
        sampler=sampler,
        rungs=rungs,
        reduction=options.reduction or 3,
        metric="",
        direction="maximize",
        split="",
        percent=True,
        seed=loaded.run.seed,
        rungs_asked=rungs,
        trials=trials,
        code="" if options.code is None else str(options.code),
        code_sha256=plans.sha256_of(options.code),
    )
    first = plans.with_values(plan, {each.key: each.ends()[0] for each in vary})
    trainer = build_trainer(first, code=code_of(options), terminal=Terminal(quiet=True))
    return plans.fitted(plan, trainer, options.metric, options.direction)


def _description(plan: "Plan") -> str:
    """Return what a sweep will do, in a line."""
    varied = ", ".join(each.text for each in plan.vary)
    number = f"{plan.trials} trials" if plan.trials else "trials"
    halving = f", of which 1 in {plan.reduction} goes on at each of {plan.rungs - 1} rungs" if plan.rungs > 1 else ""
    return f"{number} of {varied}{halving}; {plan.direction} {plan.split} {plan.metric}"


# ------------------------------------------------------------------------------------------------ the work


def _run_here(options: argparse.Namespace, folder: Path, plan: "Plan") -> str:
    """Work in this process; return why it ended."""
    from torchrelay.report.sweep.outcome import rung_line, write_best
    from torchrelay.report.sweep.page import NAME, write_page
    from torchrelay.report.sweep.worker import Worker

    say, page = terminal_of(options).say, folder / NAME

    def finished(trials: "Sequence[Trial]", trial: "Trial") -> None:
        say(rung_line(plan, trial, write_best(folder, plan, trials)))
        if not page.exists() or time.time() - page.stat().st_mtime > _REWRITTEN:
            write_page(folder, plan, worker.journal, trials)

    deadline = None if options.time is None else time.monotonic() + options.time
    worker = Worker(folder, plan, code_of(options), finished, deadline)
    return worker.run()


def _work(options: argparse.Namespace) -> None:
    """Be one of several workers, which end with the process that started them."""
    from torchrelay.distributed.process import end_with
    from torchrelay.report.sweep.plan import read_plan

    end_with(os.getppid())
    folder = Path(options.recipe)
    stopped = _run_here(options, folder, read_plan(folder))
    if stopped not in ("done", "time"):
        raise Interrupted(f"a worker was stopped by {stopped}, saved")


def _run_workers(options: argparse.Namespace, folder: Path, plan: "Plan", started: float) -> str:
    """Run several workers; return why they ended.

    Raises:
        RelayError: all have failed, or some and there is something left to do.
    """
    import torch

    from torchrelay.report.sweep import fleet

    line = ["sweep", str(folder), "--worker", *["--quiet"] * options.quiet, *["--debug"] * options.debug]
    line += [] if options.code is None else ["--code", str(options.code)]
    if options.time is not None:
        line += ["--time", f"{max(1.0, options.time - (time.monotonic() - started)):.0f} s"]
    devices = torch.cuda.device_count() if plan.recipe.device.name in ("auto", "cuda") else 0
    own = fleet.environments(options.workers, os.environ.get("CUDA_VISIBLE_DEVICES"), devices)
    ended = fleet.run(line, own, terminal_of(options).say)
    if ended.signal:
        return ended.signal
    if ended.failed:
        raise RelayError(
            f"{ended.failed} of {options.workers} workers failed, as they say above; go on with: "
            f"torchrelay sweep {shlex.quote(str(folder))}"
        )
    return "time" if options.time is not None and time.monotonic() - started >= options.time else "done"


def _write_page(folder: Path, plan: "Plan") -> "list[Trial]":
    """Write the page, and return the trials."""
    from torchrelay.report.sweep.journal import Journal
    from torchrelay.report.sweep.outcome import write_best
    from torchrelay.report.sweep.page import write_page

    journal = Journal(folder, plan)
    with journal.hold():
        trials = journal.trials()
        write_best(folder, plan, trials)
        write_page(folder, plan, journal, trials)
    return trials


def _seconds(text: str) -> float:
    from torchrelay.duration import Duration

    try:
        seconds = Duration(text).seconds
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not seconds:
        raise argparse.ArgumentTypeError(f"'{text}' is no time: write '90 min' or 2h")
    return seconds


def _reduction(text: str) -> int:
    return whole(text, 2)
