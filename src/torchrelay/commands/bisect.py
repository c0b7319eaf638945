"""`torchrelay bisect GOOD BAD`: where two runs part, and which of their differences makes them."""

import argparse
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torchrelay.errors import UsageError

if TYPE_CHECKING:
    from torchrelay.report.audit.bisect import Side

HELP = "find where two runs part, and which recipe key, file, code or package makes them"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("good", type=Path, metavar="GOOD", help="a run's folder")
    parser.add_argument("bad", type=Path, metavar="BAD", help="the folder of a run that should be like it")
    parser.add_argument(
        "--code", type=Path, action="append", default=[], metavar="FILE", help="a run's file of code; give it for each"
    )


def run(options: argparse.Namespace) -> None:
    """Compare the runs, and print their differences and a verdict."""
    from torchrelay.report.audit.bisect import Bisection

    good, bad = (_side(folder, options.code) for folder in (options.good, options.bad))
    print(f"verdict: {Bisection(good, bad, print).run()}")


def _side(folder: Path, code: list[Path]) -> "Side":
    from torchrelay.commands.options import recipe_of_run
    from torchrelay.recipe.code import environment, load_code
    from torchrelay.report.audit.bisect import read_side
    from torchrelay.run.record import read_record

    given = argparse.Namespace(folder=folder, overrides=[], code=code or None)
    recipe, module = recipe_of_run(given), None
    wanted = read_record(folder).get("environment", {}).get("code_sha256")
    if wanted is not None:
        modules: list[ModuleType] = [load_code(path) for path in code]
        module = next((each for each in modules if environment(each)["code_sha256"] == wanted), None)
        if module is None:
            raise UsageError(f"{folder} was started with another file of code: give that one too by --code")
    return read_side(folder, recipe, module)
