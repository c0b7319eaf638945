"""What a person waits for before anything happens: fresh processes, the median of several, against `import torch`.

    python -m benchmarks.startup [--repeats 5]

The cases take turns, so that a busy moment of the machine falls on all of them.
"""

import argparse
import statistics
import subprocess
import sys
import time

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


def measure(repeats: int) -> dict[str, float]:
    """Return the median seconds of each case; one round before counts for nothing, it fills the disk's cache."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats + 1):
        for name, arguments in CASES.items():
            since = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - since)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def table(medians: dict[str, float]) -> str:
    """Return a Markdown table of the medians, and how many times the reference each is."""
    lines = ["| fresh process | seconds | against `import torch` |", "| --- | ---: | ---: |"]
    for name, seconds in medians.items():
        lines.append(f"| `{name}` | {seconds:.2f} | {seconds / medians[REFERENCE]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long a start takes.")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each case")
    print(table(measure(parser.parse_args().repeats)))


if __name__ == "__main__":
    main()
