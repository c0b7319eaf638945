"""What a person waits for before anything happens: fresh processes, the median of several, against `import torch`.

    python -m benchmarks.speed.startup [--quick] [--out FILE]

The cases take turns, so that a busy moment of the machine falls on all of them.
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
    """Return the seconds of each case; one round before, which writes bytecode, counts for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats + 1):
        for name, arguments in CASES.items():
            since = time.perf_counter()
            subprocess.run([sys.executable, *arguments], env=installed(), check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - since)
    return {name: values[1:] for name, values in seconds.items()}


def table(found: Mapping[str, list[float]]) -> Table:
    """Return the table of some seconds, and how many times the reference each is."""
    reference = median(found[REFERENCE])
    rows = [(f"`{name}`", Spread(tuple(each), 2), f"{median(each) / reference:.2f}") for name, each in found.items()]
    note = f"Seconds, fresh processes, medians of {len(found[REFERENCE])}."
    return Table("Fresh processes", ("", "seconds", f"of `{REFERENCE}`"), rows, note)


def tables(quick: bool = False) -> list[Table]:
    """Return the table."""
    return [table(measure(1 if quick else 5))]


if __name__ == "__main__":
    page.main(__doc__ or "", TITLE, tables)
