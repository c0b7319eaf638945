"""`torchrelay report FOLDER…`: write a run as one HTML page that opens anywhere."""

import argparse
from pathlib import Path

from torchrelay.commands.options import code_of, terminal_of
from torchrelay.errors import UsageError

HELP = "write a run as one HTML page: curves, metrics, the worst samples, calibration"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="the run's folder; several: a page each"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page of a single run (FOLDER/report.html)")
    parser.add_argument("--no-data", action="store_true", help="don't read the run's data: no pictures of samples")
    parser.add_argument("--code", type=Path, metavar="FILE", help="a Python file whose names the recipe may use")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def run(options: argparse.Namespace) -> None:
    """Write the pages."""
    from torchrelay.report.page.facts import nearest_recipe, read_facts
    from torchrelay.report.page.findings import worst
    from torchrelay.report.page.page import write_page

    if options.out is not None and len(options.folders) > 1:
        raise UsageError("--out is one file: give a single run, or leave it out to write each page into its run")
    found = [read_facts(folder) for folder in options.folders]  # before a page is written, if one isn't a run
    code, say = code_of(options), terminal_of(options).say
    for facts in found:
        pictures = None
        if facts.samples and not options.no_data:
            from torchrelay.report.page.pictures import read_pictures

            pictures = read_pictures(facts, [card["index"] for card in worst(facts)], code)
        path = options.out or facts.folder / "report.html"
        write_page(facts, path, pictures, nearest_recipe(facts))
        say(f"the page is {path}")
