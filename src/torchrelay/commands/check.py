"""`torchrelay check RECIPE`: look at a recipe's data before a training, and say what would spoil it."""

import argparse
from pathlib import Path

from torchrelay.commands.options import add_common, add_recipe, code_of, terminal_of
from torchrelay.errors import RelayError, explained

HELP = "look for what would spoil a training in a recipe's data: copies, wrong labels, odd images"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_recipe(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write a page with thumbnails of what was found (HTML)"
    )
    parser.add_argument("--strict", action="store_true", help="exit with code 1 if something serious was found")
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Print a table of what was found, and write the page."""
    from rich.console import Console

    from torchrelay.recipe import recipe
    from torchrelay.report.check.check import check
    from torchrelay.report.check.table import table

    loaded = recipe.load(options.recipe, options.overrides)
    report = check(loaded, code_of(options), terminal_of(options).say)
    console = Console(highlight=False, quiet=options.quiet)
    console.print("")
    console.print(table(report) if report.findings else "nothing was found that would spoil a training\n")
    for note in report.notes:
        console.print(note, markup=False)
    if options.out is not None:
        from torchrelay.report.check.page import page

        with explained(f"write {options.out}", "give --out another path"):
            options.out.write_text(page(report, Path(loaded.data.root or loaded.data.name).name), encoding="utf-8")
        console.print(f"the page is {options.out}", markup=False)
    if options.strict and report.serious:
        findings = "1 finding is" if report.serious == 1 else f"{report.serious} findings are"
        raise RelayError(f"{findings} serious: correct the data, or leave out --strict")
