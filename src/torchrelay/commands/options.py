"""Options that several commands share, and what they stand for."""

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torchrelay.distributed import process
from torchrelay.errors import UsageError
from torchrelay.recipe import shipped
from torchrelay.run.pins import PINS, needs_pins

if TYPE_CHECKING:
    from torchrelay.recipe.recipe import Recipe
    from torchrelay.recipe.trained import Trained
    from torchrelay.run.terminal import Terminal
    from torchrelay.train.trainer import Trainer

_RUNS, _RECIPES = ("folder", "good", "bad"), ("recipe", "deep")  # options that name one

# ------------------------------------------------------------------------------------------------ parsing


def add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add the recipe's name."""
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help="the name of a shipped recipe, or a TOML file")


def add_folder(parser: argparse.ArgumentParser) -> None:
    """Add the run's folder."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the run's folder")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add what changes a recipe's keys."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the recipe, such as optimizer.lr=0.02; can be repeated",
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that builds a model from a recipe."""
    add_overrides(parser)
    parser.add_argument("--code", type=Path, metavar="FILE", help="a Python file whose names the recipe may use")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add on how many devices to run."""
    parser.add_argument(
        "--devices", type=count, default=1, metavar="N", help="use N devices of this machine, one process each (1)"
    )
    parser.set_defaults(port=None, restarts=0, shutdown_timeout=600.0)


def add_restarts(parser: argparse.ArgumentParser) -> None:
    """Add how the processes of a training meet, and what happens to them when one fails or a signal comes."""
    parser.add_argument("--port", type=int, metavar="PORT", help="the rendezvous port of the processes (a free one)")
    parser.add_argument(
        "--restarts", type=whole, default=0, metavar="N", help="restart the processes up to N times after a failure (0)"
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="after a signal, wait this long for the processes to save a checkpoint (600)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add which of a run's checkpoints to use."""
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="which checkpoint: best, last, or a step (best)"
    )


def whole(text: str, least: int = 0) -> int:
    """Read a whole number."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"'{text}' isn't a whole number of at least {least}")
    return int(text)


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    return whole(text, 1)


# ------------------------------------------------------------------------------------------------ their meaning


def set_pins(options: argparse.Namespace) -> None:
    """Set what a portable run needs in the environment, while torch isn't imported yet."""
    if "torch" in sys.modules:
        return
    runs, recipes = ([getattr(options, name, None) for name in names] for names in (_RUNS, _RECIPES))
    files = [run / "recipe.toml" for run in runs if run]
    files += [shipped.path(recipe) or Path(recipe) for recipe in recipes if recipe]
    files += [Path(recipe) / "sweep.toml" for recipe in recipes if recipe]
    if any(needs_pins(file, getattr(options, "overrides", ())) for file in files):
        os.environ.update(PINS)


def code_of(options: argparse.Namespace) -> ModuleType | None:
    """Return the user's file as a module."""
    from torchrelay.recipe.code import load_code

    return None if options.code is None else load_code(options.code)


def terminal_of(options: argparse.Namespace) -> "Terminal":
    """Return where the command writes to: of several processes rank 0 speaks, and others that have a file for it."""
    from torchrelay.run.terminal import Terminal

    quiet = options.quiet or getattr(options, "json", False)  # JSON stands alone on standard output
    return Terminal(quiet=quiet or (process.rank() > 0 and not process.started_by_launcher()))


def recipe_of_run(options: argparse.Namespace) -> "Recipe":
    """Return the recipe in a run's folder with the overrides applied.

    Raises:
        UsageError: the folder holds no run, or its run needs the Python code that it was started with.
    """
    from torchrelay.recipe import recipe
    from torchrelay.run.record import read_record

    file = options.folder / "recipe.toml"
    if not file.is_file():
        raise UsageError(
            f"{options.folder} isn't a run: it has no recipe.toml; give a folder that 'torchrelay train' made"
        )
    environment = read_record(options.folder).get("environment", {})
    if environment.get("started_from") == "python":
        raise UsageError(
            f"{options.folder} was started from Python: call trainer.resume() or .load() in the script that started it "
            "or torchrelay.report.audit.audit.audit()"
        )
    if "code" in environment and options.code is None:
        raise UsageError(f"{options.folder} was started with a file of code: add --code {environment['code']}")
    return recipe.load(str(file), options.overrides)


def trainer_of_run(options: argparse.Namespace, recipe: "Recipe") -> "Trainer":
    """Return the trainer of a run that has started.

    Where it was killed before its first checkpoint, it starts again, with the pretrained weights.
    """
    from torchrelay.checkpoint.retention import complete
    from torchrelay.recipe.build import build_trainer

    fresh, code = not complete(options.folder / "checkpoints"), code_of(options)
    return build_trainer(recipe, options.folder, code=code, terminal=terminal_of(options), fresh=fresh)


def trained_of_run(options: argparse.Namespace) -> "Trained":
    """Return a run's trained model, which classifies images.

    Raises:
        UsageError: the run has no such checkpoint, or its task isn't classification.
    """
    from torchrelay.checkpoint import read
    from torchrelay.checkpoint.retention import find
    from torchrelay.recipe.trained import trained
    from torchrelay.tasks import Classification

    recipe = recipe_of_run(options)
    found = trained(recipe, read(find(options.folder / "checkpoints", options.checkpoint)), code_of(options))
    if not isinstance(found.task, Classification):
        raise UsageError(
            f"{options.folder} predicts no classes, since its loss.name is '{recipe.loss.name}': use Trainer.predict()"
        )
    return found


def run_in_processes(options: argparse.Namespace, recipe: "Recipe", folder: Path, *more: str) -> bool:
    """Run the command in `--devices` processes and wait for them; return False where this process must run it.

    Args:
        options: of the command.
        recipe: what it trains.
        folder: the run's folder.
        more: arguments for the processes, beside those that this one was given.

    Raises:
        UsageError: the machine hasn't that many devices, they can't share the run, or it needs a single process.
        LaunchError: a process failed.
    """
    from torchrelay.distributed import launch, replicas

    if options.devices == 1 or process.started_by_launcher():
        return False
    if recipe.parallel.kind == "dp":
        raise UsageError(
            f"--devices {options.devices}: parallel.kind 'dp' uses all visible devices from one process: leave out "
            "--devices, and choose the devices by CUDA_VISIBLE_DEVICES"
        )
    launch.check_devices(recipe.device.name, options.devices)
    replicas.count_replicas(recipe.parallel, options.devices, recipe.run.exact)
    command, *rest = options.arguments
    launch.start(
        [command, *more, *rest],
        options.devices,
        folder,
        threads=recipe.device.threads if isinstance(recipe.device.threads, int) else None,
        restarts=options.restarts,
        shutdown_timeout=options.shutdown_timeout,
        port=options.port,
    )
    return True
