"""`torchrelay ask RUN stop|save|evaluate`: ask something of a run that goes on, wherever its folder can be reached."""

import argparse
import sys
from pathlib import Path

from torchrelay.errors import UsageError, explained
from torchrelay.run.lock import is_locked
from torchrelay.run.requests import REQUESTS, file_of

HELP = "ask a running run to stop, to save a checkpoint or to evaluate"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    meant = "; ".join(f"{request}: {meaning}" for request, meaning in REQUESTS.items())
    parser.add_argument("request", choices=REQUESTS, metavar="REQUEST", help=meant)


def run(options: argparse.Namespace) -> None:
    """Put the request into the run's folder."""
    folder = options.run
    if not (folder / "lock").is_file():
        raise UsageError(f"{folder} isn't a run: it has no lock; give a folder that 'torchrelay train' made")
    # Only Linux can tell; elsewhere a run that isn't running removes the request when it begins.
    if sys.platform == "linux" and not is_locked(folder / "lock"):
        raise UsageError(f"{folder} isn't running, so nobody is there to {options.request}")
    file = file_of(folder, options.request)
    with explained(f"write {file}"):
        file.touch()
    print(f"asked; {file} goes when it is done")
