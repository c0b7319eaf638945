"""`torchrelay recipe NAME`: print a recipe with all its keys and their meanings."""

import argparse
import sys

from torchrelay.commands.options import add_overrides, add_recipe
from torchrelay.errors import UsageError

HELP = "print a recipe with all its keys and their meanings"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe(parser, nargs="?")
    add_overrides(parser)
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")


def run(options: argparse.Namespace) -> None:
    """Print the recipe, or the schema."""
    from torchrelay.recipe import recipe

    if options.schema:
        sys.stdout.write(recipe.schema())
        return
    if options.recipe is None:
        raise UsageError("recipe needs a name or a file: 'torchrelay recipes' lists the shipped ones")
    sys.stdout.write(recipe.load(options.recipe, options.overrides).to_toml())
