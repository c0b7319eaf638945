"""`torchrelay profile RECIPE`: show where the time of a training step goes."""

import argparse
from pathlib import Path

from torchrelay.commands.options import add_common, add_recipe, code_of, count, terminal_of
from torchrelay.commands.train import run_name

HELP = "show where the time of a training step goes"


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
    from torchrelay.commands import profiling
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer
    from torchrelay.run.folder import free_folder

    loaded = recipe.load(options.recipe, options.overrides)
    folder = options.out or free_folder(run_name(options.recipe, options.overrides), Path("profiles"))
    trainer = build_trainer(loaded, code=code_of(options), terminal=terminal_of(options))
    profiling.show(profiling.examine(trainer, options.steps, folder), folder)
