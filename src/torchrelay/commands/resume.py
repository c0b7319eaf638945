"""`torchrelay resume FOLDER`: resume a run from its newest intact checkpoint."""

import argparse

from torchrelay.commands.options import (
    add_common,
    add_folder,
    add_processes,
    add_restarts,
    recipe_of_run,
    run_in_processes,
    trainer_of_run,
)

HELP = "resume a run from its newest checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_folder(parser)
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume even if the data or the recipe has changed"
    )
    add_common(parser)
    add_processes(parser)
    add_restarts(parser)


def run(options: argparse.Namespace) -> None:
    """Resume."""
    recipe = recipe_of_run(options)
    if not run_in_processes(options, recipe, options.folder):
        trainer_of_run(options, recipe).resume(accept_changes=options.accept_changes)
