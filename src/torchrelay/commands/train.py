"""`torchrelay train RECIPE`: train in a new run folder."""

import argparse
import glob
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torchrelay.commands.options import (
    add_common,
    add_processes,
    add_recipe,
    add_restarts,
    code_of,
    count,
    run_in_processes,
    terminal_of,
)
from torchrelay.distributed import process
from torchrelay.errors import RelayError, UsageError
from torchrelay.recipe import shipped

HELP = "train a network from a recipe"
_EPILOG = f"""\
shipped recipes ('torchrelay recipes' describes them):
  {", ".join(shipped.headers())}

examples:
  torchrelay train digits
  torchrelay train image-folder --set data.root=photos --set run.epochs=20 --run runs/photos
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    add_recipe(parser)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="the run's folder (a new one in runs/)")
    parser.add_argument(
        "--seeds", type=count, metavar="N", help="train N runs that differ in run.seed alone, one after another"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="try a few batches, an evaluation and a checkpoint, say what the run will need, and end",
    )
    parser.add_argument(
        "--overfit", type=count, metavar="N", help="see whether the network can learn N samples at all, and end"
    )
    add_common(parser)
    add_processes(parser)
    add_restarts(parser)


def run(options: argparse.Namespace) -> None:
    """Train; where the launcher has restarted this process, resume."""
    if options.overfit is not None:
        _overfit(options)
    elif options.dry_run:
        _dry_run(options)
    elif options.seeds is not None:
        _train_seeds(options)
    else:
        _train(options)


def _overfit(options: argparse.Namespace) -> None:
    """Train on a few samples alone; nothing is written.

    Raises:
        RelayError: they weren't learned.
    """
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.report.before.overfit import overfit

    if options.devices > 1:
        raise UsageError("--overfit tries a batch on one device: leave out --devices")
    alone = (f"data.batch_size={options.overfit}", "data.augment=[]", "schedule.name=constant")
    loaded = recipe.load(options.recipe, [*options.overrides, *alone])
    terminal = terminal_of(options)
    trainer = build_trainer(loaded, code=code_of(options), terminal=terminal)
    outcome = overfit(trainer, terminal.say)
    text = outcome.text(min(options.overfit, trainer.batches.samples))
    if not outcome.learned:
        raise RelayError(
            f"the network {text}: try other rates (torchrelay find-lr), and look at the targets, the loss and the "
            "layers that are frozen"
        )
    terminal.say(text)


def _dry_run(options: argparse.Namespace) -> None:
    """Try what a run does; nothing stays on disk."""
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.report.before.dry_run import dry_run

    loaded = recipe.load(options.recipe, options.overrides)
    near = options.run or Path("runs")
    with tempfile.TemporaryDirectory(prefix="torchrelay-") as logs:
        if run_in_processes(options, loaded, Path(logs)):
            return
    terminal = terminal_of(options)
    trainer = build_trainer(loaded, code=code_of(options), terminal=terminal)
    dry_run(trainer, loaded.checkpoint, near, terminal.say)


def _train_seeds(options: argparse.Namespace) -> None:
    """Train a run for each seed from run.seed on in a folder of its own; go on where an earlier call was stopped."""
    from torchrelay.commands import resume
    from torchrelay.recipe import recipe
    from torchrelay.report.compare import facts, groups

    first = recipe.load(options.recipe, options.overrides).run.seed
    folder = options.run or Path("runs") / f"{run_name(options.recipe, options.overrides)}-seeds"
    for seed in range(first, first + options.seeds):
        own = argparse.Namespace(**vars(options) | {"run": folder / f"seed-{seed}", "folder": folder / f"seed-{seed}"})
        has_begun = facts.is_run(own.run)
        if has_begun and facts.read_facts(own.run).status == "done":
            continue
        own.overrides = [*options.overrides, f"run.seed={seed}"]
        own.arguments = _arguments(own, "resume" if has_begun else "train")
        own.accept_changes = False
        (resume.run if has_begun else _train)(own)
    (group,) = groups.read_groups([folder])
    headline = group.runs[0].headline
    values = [*group.values(headline, best=False).values()]
    what = f"{group.runs[0].split} {headline.words} over {len(values)} seeds"
    terminal_of(options).say(f"{what}: {groups.spread(values, headline)} (compare with: torchrelay compare {folder})")


def _arguments(options: argparse.Namespace, command: str) -> list[str]:
    """Return the command line of the processes that train one of several seeds."""
    line = [command, str(options.run), *(f"--set={each}" for each in options.overrides)]
    if command == "train":
        line = [command, options.recipe, *line[2:]]  # whoever starts the processes adds --run
    line += [] if options.code is None else ["--code", str(options.code)]
    return [*line, *["--quiet"] * options.quiet, "--devices", str(options.devices)]


def _train(options: argparse.Namespace) -> None:
    """Train a single run."""
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.run.folder import check_free

    loaded = recipe.load(options.recipe, options.overrides)
    folder = options.run or _default_folder(run_name(options.recipe, options.overrides))
    # Before the data is read, which may take long. Of several processes rank 0 checks it once all have met, so that an
    # error doesn't leave the others waiting.
    if os.environ.get("WORLD_SIZE", "1") == "1" and not process.is_restart(folder):
        check_free(folder)
    if run_in_processes(options, loaded, folder, "--run", str(folder)):
        return
    restarted = process.is_restart(folder)  # rank 0's answer counts for all
    if restarted:  # perhaps on fewer devices than the run began with
        started = recipe.load(str(folder / "recipe.toml")).parallel.replicas
        loaded = recipe.load(options.recipe, [f"parallel.replicas={started}", *options.overrides])
    trainer = build_trainer(loaded, folder, code=code_of(options), terminal=terminal_of(options), fresh=not restarted)
    if restarted:
        trainer.resume()
    else:
        process.record_launch(folder)
        trainer.fit()
    trainer.say(f"the run is in {folder}")


def run_name(recipe: str, overrides: Sequence[str]) -> str:
    """Return a run's name: the recipe's name and the overrides."""
    changes = [re.sub(r"[^\w.=+-]+", "_", override) for override in overrides]
    return "-".join([Path(recipe).stem, *changes])[:120]


def _default_folder(name: str) -> Path:
    """Return the folder of the run that this launch started earlier, or a free one."""
    from torchrelay.run.folder import free_folder

    candidates = sorted(Path("runs").glob(f"{glob.escape(name)}*"))
    return next((folder for folder in candidates if process.is_restart(folder)), None) or free_folder(name)
