"""`torchrelay find-lr RECIPE`: the range of learning rates in which the network learns, and one to begin with."""

import argparse
from pathlib import Path

from torchrelay.commands.options import (
    add_common,
    add_processes,
    add_recipe,
    code_of,
    count,
    run_in_processes,
    terminal_of,
)
from torchrelay.errors import UsageError, explained

HELP = "find a learning rate: it grows from step to step until the loss does"
_BELOW, _ABOVE = 1e-3, 1e2  # of the recipe's rate, where the test begins and ends


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe(parser)
    parser.add_argument(
        "--from", type=_rate, dest="lowest", metavar="LR", help="the first rate (the recipe's, divided by 1000)"
    )
    parser.add_argument(
        "--to", type=_rate, dest="highest", metavar="LR", help="the last rate (the recipe's, times 100)"
    )
    parser.add_argument("--steps", type=count, default=100, metavar="N", help="steps to take (100)")
    parser.add_argument(
        "--out", type=Path, default=Path("find-lr.png"), metavar="FILE", help="the picture (find-lr.png)"
    )
    add_common(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Take the steps, draw the losses, and print the suggestion with its reason. No run is written."""
    from torchrelay.distributed import process
    from torchrelay.recipe import recipe

    loaded = recipe.load(options.recipe, [*options.overrides, "schedule.name=constant"])
    own = getattr(loaded.optimizer, "lr", None)
    if not own:
        raise UsageError("the recipe's optimizer.lr is 0 or unset: set what other rates are compared with")
    lowest, highest = options.lowest or _BELOW * own, options.highest or _ABOVE * own
    if lowest >= highest:
        raise UsageError(f"--from {lowest:g} isn't below --to {highest:g}")
    if run_in_processes(options, loaded, options.out.absolute().parent):
        return
    from torchrelay.recipe.build import build_trainer
    from torchrelay.report.before.learning_rate import draw, find_rate

    terminal = terminal_of(options)
    found = find_rate(
        build_trainer(loaded, code=code_of(options), terminal=terminal), own, lowest, highest, options.steps
    )
    if process.rank() > 0:
        return
    with explained(f"write {options.out}"):
        draw(found, own, options.out)
    terminal.say(f"suggestion: optimizer.lr={found.suggestion:.2g} (the recipe has {own:g})")
    terminal.say(found.reason())
    terminal.say(f"a schedule that warms up, such as one_cycle, can take more; the losses are in {options.out}")


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' isn't a rate above 0")
    return rate
