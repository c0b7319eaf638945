"""`torchrelay train RECIPE`: train in a new run folder."""

import argparse
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from torchrelay.commands.options import (
    add_common,
    add_processes,
    add_recipe,
    add_restarts,
    code_of,
    run_in_processes,
    terminal_of,
)
from torchrelay.distributed import process
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
    add_common(parser)
    add_processes(parser)
    add_restarts(parser)


def run(options: argparse.Namespace) -> None:
    """Train; where the launcher has restarted this process, resume."""
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
