"""Measure the accuracy and the time of the recipe `fashion-mnist`, beside the best baseline of the data's authors.

    python -m benchmarks.speed.fashion --root FOLDER [--seeds 5] [--out docs/evidence/fashion-mnist.md]

FOLDER has the four idx files, such as /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist. Each
seed is a separate `torchrelay train`, timed from the start of the process to its end: imports, reading, training,
evaluation and checkpoint.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, stdev

from benchmarks import measure, page
from benchmarks.page import Goal, Spread, Table
from torchrelay.run.metrics import read_metrics

TITLE = "Fashion-MNIST"
RECIPE = "fashion-mnist"
FIRST = 100  # seed; lower ones may have been used where settings were chosen
BASELINE, SECONDS = 0.897, 60.0
NOTE = """\
The baseline is the best of the scikit-learn classifiers that `benchmark/baselines.json` of the data's authors lists
(github.com/zalandoresearch/fashion-mnist): `SVC` with `C = 10` and the kernel `rbf`. Its accuracy is quoted from their
table, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms" (arXiv 1708.07747, table 3),
a mean of five trainings; it wasn't trained here. Seconds are those of the whole command, from start to end."""


def trained(root: Path, seed: int) -> tuple[float, float]:
    """Train with one seed; return the test accuracy, from 0 to 1, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / RECIPE
        seconds = measure.train(RECIPE, [f"data.root={root}", f"run.seed={seed}"], run)
        return [line["accuracy"] for line in read_metrics(run) if line["split"] == "test"][-1], seconds


def table(runs: list[tuple[float, float]]) -> Table:
    """Return the table of some seeds' accuracies and seconds."""
    accuracies, seconds = [run[0] for run in runs], tuple(run[1] for run in runs)
    spread = f" ± {100 * stdev(accuracies):.2f}" if len(runs) > 1 else ""
    rows: list[tuple[str, str | Spread, str | Spread]] = [
        (f"seed {FIRST + number}", f"{accuracy:.2%}", f"{took:.1f}") for number, (accuracy, took) in enumerate(runs)
    ]
    rows.append((f"**`{RECIPE}`**, mean and median", f"**{mean(accuracies):.2%}**{spread}", Spread(seconds)))
    rows.append(("the best baseline: `SVC`, quoted", f"{BASELINE:.1%}", ""))
    goals = [
        Goal("the lowest test accuracy", min(accuracies), BASELINE, None, "{:.2%}", more=True),
        Goal("the longest run, seconds", max(seconds), SECONDS, None, "{:.1f}"),
    ]
    return Table(TITLE, ("", "test accuracy", "seconds"), rows, NOTE, goals)


def main() -> None:
    """Measure, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of the idx files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    before, runs = page.circumstances(), []
    for seed in range(FIRST, FIRST + options.seeds):
        runs.append(trained(options.root.resolve(), seed))
        print(f"seed {seed}: {runs[-1][0]:.2%} after {runs[-1][1]:.1f} s", flush=True)
    made = f"Made by `python -m benchmarks.speed.fashion --root FOLDER`, {options.seeds} seeds."
    text = f"# {TITLE}\n\n{before}\n{made}\n\n{table(runs).text()}\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
