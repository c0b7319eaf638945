"""The overhead of a framework over a hand-written training step.

    python -m benchmarks.speed.overhead [--quick] [--out FILE]
    pip install 'torchrelay[peers]'  # for the rows of the other frameworks

The network is tiny (64-64-64-10), so most of a step is overhead: batches of 32 made beforehand, SGD with momentum, the
CPU, one thread. Each framework runs in its own process, where it takes turns with the hand-written loop; its overhead
is the difference between the two within a round.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from benchmarks import page
from benchmarks.page import NOT_MEASURED, Goal, Spread, Table
from benchmarks.speed import peers
from torchrelay import __version__

TITLE = "The overhead over a hand-written training step"
STEPS, ROUNDS = 1000, 5
QUICK_STEPS, QUICK_ROUNDS = 60, 2


@dataclass(frozen=True)
class Case:
    """A training loop, and the hand-written one that does the same work."""

    name: str
    loop: peers.Loop
    beside: peers.Loop = peers.by_hand
    module: str = ""  # the module to import
    package: str = ""  # the distribution to install; "": torchrelay itself

    @property
    def version(self) -> str | None:
        """The installed version, or None if it isn't installed."""
        if not self.package:
            return __version__
        return importlib.metadata.version(self.package) if importlib.util.find_spec(self.module) else None


CASES = {
    "torchrelay": Case("torchrelay, all off", peers.prepared),
    "torchrelay-all": Case("torchrelay, a whole run", peers.torchrelay_with_all),
    "torchrelay-arrays": Case("torchrelay, from arrays", peers.torchrelay_from_arrays, peers.by_hand_from_arrays),
    "ignite": Case("pytorch-ignite", peers.ignite, module="ignite", package="pytorch-ignite"),
    "skorch": Case("skorch", peers.skorch, module="skorch", package="skorch"),
    "accelerate": Case("accelerate", peers.accelerate, module="accelerate", package="accelerate"),
    "accelerate-loader": Case(
        "accelerate, with its loader", peers.accelerate_with_loader, module="accelerate", package="accelerate"
    ),
    "lightning": Case("lightning", peers.lightning, module="lightning", package="lightning"),
    "keras": Case("keras", peers.keras, module="keras", package="keras"),
}

GOALS = {"torchrelay": (20.0, 8.0), "torchrelay-all": (44.0, 25.0)}  # bar and aim, us per median step

NOTE = """\
us per step, one thread; medians of {rounds} rounds of {steps:,} steps, minimum and maximum in parentheses. The overhead
is the difference from the hand-written loop of the same round in the same process: once between the median steps, and
once between the mean steps, which include occasional work (TensorBoard every 50 steps, garbage collection). Start and
end of a training don't count.

- torchrelay, all off: no run folder, no progress bar, no metrics. Only what its promises need remains: each step seeds
  the generators, and a loss that isn't finite stops the run. A `Batches` object returns the batches made beforehand.
- torchrelay, a whole run: progress bar, accuracy, metrics.jsonl and TensorBoard every 50 steps, run folder,
  checkpoints, a per-step schedule.
- torchrelay, from arrays: all off, but it computes the order of the samples and gathers them; the hand-written loop
  uses `randperm` and `index_select`.
- pytorch-ignite: an `Engine` around a hand-written step, no handlers. skorch: `callbacks="disable"`, no validation
  split. accelerate: prepared model and optimizer; a second row with a prepared `DataLoader`. lightning:
  `Trainer(barebones=True)`, without logger, progress bar, checkpoints, sanity check or summary. keras: its torch
  backend, its own layers, `verbose=0`. Each gets the batches as an iterable without a loader, if it accepts one."""


def tables(quick: bool = False) -> list[Table]:
    """Return the table: a row for each framework, with the time of the hand-written loop."""
    steps, rounds = (QUICK_STEPS, QUICK_ROUNDS) if quick else (STEPS, ROUNDS)
    rows: list[Sequence[str | Spread]] = []
    goals: list[Goal] = []
    for key, case in CASES.items():
        if case.version is None:
            rows.append((case.name, "not installed", "", "", ""))
            continue
        own, beside = run(key, steps, rounds)
        added = [[a[kind] - b[kind] for a, b in zip(own, beside, strict=True)] for kind in ("median", "mean")]
        took = [[one["median"] for one in each] for each in (own, beside)]
        name = f"{case.name} ({case.version})" if case.package else case.name
        rows.append((name, *(Spread(tuple(each)) for each in (*added, *reversed(took)))))
        if key in GOALS:
            goals.append(Goal(case.name, median(added[0]), *GOALS[key], "{:+.0f} us"))
    rows.append(("any of them on a GPU", NOT_MEASURED, "", "", ""))
    heads = ("", "overhead, median step", "overhead, mean step", "median step by hand", "median step")
    return [Table("Overhead of a step", heads, rows, NOTE.format(rounds=rounds, steps=steps), goals)]


def run(key: str, steps: int, rounds: int) -> list[list[dict[str, float]]]:
    """Measure a case in its own process; return the us per step of its rounds and of the hand-written loop's."""
    command = [sys.executable, "-m", "benchmarks.speed.overhead", "--case", key, "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--rounds", str(rounds)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: the benchmark of {CASES[key].name} failed:\n{done.stderr}")
    found: list[list[dict[str, float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def side_by_side(case: Case, steps: int, rounds: int) -> list[list[dict[str, float]]]:
    """Let a loop and the hand-written one take turns, after a warm-up round."""
    torch.set_num_threads(1)
    pairs = peers.made(steps)
    loops = (case.loop, case.beside)
    found: list[list[dict[str, float]]] = [[], []]
    for number in range(rounds + 1):
        for rounds_of, loop in zip(found, loops, strict=True):
            torch.use_deterministic_algorithms(False)  # an exact run sets it; a hand-written loop doesn't
            gc.collect()
            times = [seconds * 1e6 for seconds in loop(pairs).steps()]
            if number:
                rounds_of.append({"median": median(times), "mean": fmean(times)})
    return found


def main() -> None:
    parser: Any = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options, _ = parser.parse_known_args()
    if options.case is None:
        page.main(__doc__ or "", TITLE, tables)
    else:
        print("\n" + json.dumps(side_by_side(CASES[options.case], options.steps, options.rounds)))


if __name__ == "__main__":
    main()
