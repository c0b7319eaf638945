"""`torchrelay tune RECIPE`: measure which device settings train a recipe fastest on this machine."""

import argparse

from torchrelay.commands.options import add_common, add_recipe, code_of, count, terminal_of

HELP = "find the settings that train a recipe fastest on this machine (tunes speed, not accuracy)"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe(parser)
    parser.add_argument("--seconds", type=count, default=60, metavar="N", help="start no trial after N seconds (60)")
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Time the settings, and print the lines to keep."""
    from torchrelay.commands import tuning
    from torchrelay.recipe import recipe

    loaded, code = recipe.load(options.recipe, options.overrides), code_of(options)
    tuning.show(tuning.tune(loaded, options.seconds, code=code, say=terminal_of(options).say))
