"""Does a sweep by halving find the best trial, and in what share of the steps? On Fashion-MNIST.

    python -m benchmarks.sweep --data FOLDER --sweeps FOLDER [--out docs/evidence/sweep.md]

The same trials are trained twice: with promotion at rungs, and all in full. FOLDER of the data has Fashion-MNIST's idx
files; that of the sweeps keeps them, so the same command goes on where an earlier one was stopped.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.page import circumstances, markdown
from torchrelay import cli
from torchrelay.report.sweep.journal import Journal
from torchrelay.report.sweep.outcome import steps_taken
from torchrelay.report.sweep.plan import read_plan
from torchrelay.report.sweep.rungs import Trial

VARY = ("--vary", "optimizer.lr=1e-3..1:log", "--vary", "optimizer.weight_decay=1e-5..1e-2:log")
TRIALS = 9
SETTINGS = ("data.name=fashion-mnist", "model.name=mlp", "run.epochs=9", "data.batch_size=512", "data.validation=0.1")


def sweep(data: Path, folder: Path, rungs: int) -> list[Trial]:
    """Sweep, or go on, and return the trials."""
    sets = [f"--set={each}" for each in (*SETTINGS, f"data.root={data}")]
    line = ["sweep", "digits", *VARY, *sets, "--trials", str(TRIALS), "--sampler", "random"]
    if cli.main([*line, "--rungs", str(rungs), "--run", str(folder)]):
        raise SystemExit(f"the sweep in {folder} ended early")
    journal = Journal(folder, read_plan(folder))
    with journal.hold():
        return journal.trials()


def table(halved: Sequence[Trial], full: Sequence[Trial]) -> str:
    """Return both sweeps side by side, the best in full first."""
    rows = []
    for one, other in sorted(zip(halved, full, strict=True), key=lambda pair: -pair[1].reached.get(1, -1.0)):
        if one.values != other.values:
            raise SystemExit(f"{one.name} has other values in the two sweeps")
        values = [f"{value:.3g}" for value in one.values.values()]
        rungs = [f"{one.reached[rung]:.2%}" if rung in one.reached else "" for rung in (1, 2, 3)]
        rows.append([one.name, *values, *rungs, f"{other.metric:.2%}" if other.reached else "failed"])
    heads = ["trial", "lr", "weight decay", "epoch 1", "epoch 3", "epoch 9", "all in full"]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of Fashion-MNIST's idx files")
    parser.add_argument("--sweeps", type=Path, required=True, help="where the sweeps are, or will be")
    parser.add_argument("--out", type=Path, help="where to write the table")
    options = parser.parse_args()
    where = circumstances()
    halved = sweep(options.data, options.sweeps / "fashion-mnist-sweep", 3)
    full = sweep(options.data, options.sweeps / "in-full", 1)
    plan = read_plan(options.sweeps / "fashion-mnist-sweep")
    best, true = (plan.halving.best(trials) for trials in (halved, full))
    if best is None or true is None:
        raise SystemExit("no trial has reached a rung")
    (taken, whole), same = steps_taken(halved), best.number == true.number
    found = "the same trial" if same else f"{best.name}, where {true.name} is the best"
    equal = all(one.reached[3] == full[one.number].metric for one in halved if 3 in one.reached)
    text = (
        f"# Halving against training all in full\n\n{where}\n\n"
        "Made by `python -m benchmarks.sweep --data FOLDER --sweeps FOLDER`: "
        f"{TRIALS} random trials of learning rate and weight decay for a small network on Fashion-MNIST, "
        "judged by the accuracy on a tenth of the training images, "
        "9 epochs in full; 1 in 3 goes on after epochs 1 and 3.\n\n"
        f"Halving takes {taken:,} of {whole:,} steps ({taken / whole:.0%}) and finds {found}. Trials that were "
        f"promoted to the end have {'exactly' if equal else 'NOT'} the accuracy of those that never paused.\n\n"
        f"{table(halved, full)}\n"
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
