"""`torchrelay recipes`: list the shipped recipes."""

import argparse

from torchrelay.recipe import shipped

HELP = "list the shipped recipes"


def add_options(_parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command has no options of its own."""


def run(_options: argparse.Namespace) -> None:
    """Print each recipe's name and the first line of its header."""
    headers = shipped.headers()
    width = max(map(len, headers))
    for name, header in headers.items():
        print(f"{name:<{width}}  {header}")
