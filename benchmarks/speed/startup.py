"""Start-up times of commands and imports in new processes, relative to `import torch`.

    python -m benchmarks.speed.startup [--quick] [--out FILE]

The cases take turns, so that other load slows all of them alike.
"""

import subprocess
import sys
import time
from collections.abc import Mapping
from statistics import median

from benchmarks import page
from benchmarks.measure import installed
from benchmarks.page import Spread, Table

TITLE = "Starts"
CASES = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torchrelay": ["-c", "import torchrelay"],
    "import torchrelay, tr.Trainer": ["-c", "import torchrelay as tr; tr.Trainer"],
    "torchrelay --help": ["-m", "torchrelay", "--help"],
    "torchrelay recipes": ["-m", "torchrelay", "recipes"],
    "torchrelay recipe digits": ["-m", "torchrelay", "recipe", "digits"],
}
REFERENCE = "import torch"


def measure(repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each case, after a round that writes the bytecode."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats + 1):
        for name, arguments in CASES.items():
            since = time.perf_counter()
            subprocess.run([sys.executable, *arguments], env=installed(), check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - since)
    return {name: values[1:] for name, values in seconds.items()}


def table(found: Mapping[str, list[float]]) -> Table:
    """Return the table of the seconds, absolute and relative to the reference."""
    reference = median(found[REFERENCE])
    rows = [(f"`{name}`", Spread(tuple(each), 2), f"{median(each) / reference:.2f}") for name, each in found.items()]
    note = f"Seconds of new processes, medians of {len(found[REFERENCE])}."
    return Table("New processes", ("", "seconds", f"relative to `{REFERENCE}`"), rows, note)


def tables(quick: bool = False) -> list[Table]:
    """Return the table."""
    return [table(measure(1 if quick else 5))]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
