"""`torchrelay audit FOLDER`: replay random intervals of a run, and compare them with its receipt."""

import argparse
import secrets
import tempfile
from pathlib import Path

from torchrelay.commands.options import (
    add_common,
    add_folder,
    add_processes,
    code_of,
    count,
    recipe_of_run,
    run_in_processes,
    terminal_of,
    whole,
)

HELP = "check a run against its receipt, by replaying random intervals of its steps"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_folder(parser)
    parser.add_argument(
        "--sample", type=count, default=20, metavar="N", help="replay N intervals, drawn at random (20)"
    )
    parser.add_argument("--seed", type=whole, metavar="S", help="of the draw (a random one)")
    parser.add_argument(
        "--reach", type=count, default=1000, metavar="N", help="replay at most N steps from each checkpoint (1000)"
    )
    add_common(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Audit, and print a line for each interval and a verdict."""
    recipe = recipe_of_run(options)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    # All processes draw the same, and none needs its own copy of the folder.
    with tempfile.TemporaryDirectory(prefix="torchrelay-") as logs:  # nothing is written in the run's folder
        if run_in_processes(options, recipe, Path(logs), "--seed", str(seed)):
            return
    from torchrelay.report.audit.audit import Audit, ByRecipe
    from torchrelay.run.record import read_files

    say = terminal_of(options).say
    replayers = ByRecipe(recipe, code_of(options))
    audit = Audit(options.folder, replayers, read_files(options.folder), say, options.reach)
    audit.check_files()
    if not recipe.run.exact:
        say("run.exact is false: kernels may add in any order, so numbers that differ in their last bits prove nothing")
    audit.replay(options.sample, seed)
    audit.conclude(seed, options.devices)
