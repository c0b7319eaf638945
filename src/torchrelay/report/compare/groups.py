"""Runs of one recipe over seeds, and what is said of two such groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrelay.errors import UsageError
from torchrelay.report.compare.facts import Facts, find_runs, is_run, read_facts, varied
from torchrelay.report.compare.verdict import Difference, SameSamples, difference, mcnemar
from torchrelay.run.metrics import Headline
from torchrelay.run.terminal import metric

SAMPLES = "samples.safetensors"
_CLEAR = 0.05  # the probability below which luck is ruled out
_MOST_KEYS = 4  # that are named in one message


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes:
        name: that people see.
        runs: one or more, by their seeds.
    """

    name: str
    runs: Sequence[Facts]

    def values(self, headline: Headline, *, best: bool) -> dict[int, float]:
        """Return a metric of each run by its seed, of its last evaluation or its best one; those that have none aren't.

        Args:
            headline: the metric.
            best: whether the best evaluation counts.
        """
        found = {run.seed: run.at_best(headline) if best else run.at_end(headline.name) for run in self.runs}
        return {seed: each for seed, each in found.items() if math.isfinite(each)}

    @cached_property
    def unfinished(self) -> int:
        """How many of the runs aren't done."""
        return sum(run.status != "done" for run in self.runs)


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Return a group for each folder: a run, or the runs below it, whose recipes must agree but for the seed.

    Single runs of one recipe with different seeds are one group, too.

    Raises:
        UsageError: a folder holds no run, or runs of several recipes or twice one seed.
    """
    groups: list[Group] = []
    for folder in folders:
        paths = [folder] if is_run(folder) else list(find_runs(folder))
        if not paths:
            raise UsageError(f"{folder} isn't a run and holds none: give folders that 'torchrelay train' made")
        runs = [read_facts(path) for path in paths]
        check_alike(folder, runs)
        alone = len(runs) == 1 and folder == paths[0]
        same = next((group for group in groups if alone and _is_of(group, runs[0])), None)
        if same is None:
            groups.append(Group(str(folder), runs))
        else:
            groups[groups.index(same)] = Group(same.name, [*same.runs, *runs])
    return groups


def check_alike(folder: Path, runs: Sequence[Facts]) -> None:
    """Refuse runs in one folder that can't be compared as seeds of one recipe."""
    if any(run.recipe != runs[0].recipe for run in runs):
        keys = [key for key in varied(runs) if key in runs[0].recipe or any(key in run.recipe for run in runs)]
        named = ", ".join(keys[:_MOST_KEYS]) + ", …" * (len(keys) > _MOST_KEYS)
        raise UsageError(
            f"the runs in {folder} differ in {named}: give the folders of each recipe's runs, as in: "
            "torchrelay compare RUN RUN"
        )
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"the runs in {folder} have a seed twice: give the folders to compare, one by one")


def _is_of(group: Group, run: Facts) -> bool:
    first = group.runs[0]
    is_new = is_run(Path(group.name)) and run.seed not in {each.seed for each in group.runs}
    return is_new and run.recipe == first.recipe and run.versions == first.versions


def verdict(one: Group, other: Group, headline: Headline, *, best: bool = False) -> list[str]:
    """Return what can be said of two groups, in words with figures.

    Args:
        one: the first.
        other: the second, which is said to be better, worse or not distinguishable.
        headline: the metric.
        best: whether each run's best evaluation counts instead of its last.
    """
    values, others = one.values(headline, best=best), other.values(headline, best=best)
    if not values or not others:
        missing = one if not values else other
        return [f"{missing.name} has no {headline.words} yet: nothing to compare"]
    found = difference(values, others)
    said = [_of_recipes(found, one, other, headline)]
    same = same_samples(one.runs[0], other.runs[0])
    if same is not None:
        said.append(_of_networks(same, one.runs[0], other.runs[0]))
    return said


def _of_recipes(found: Difference, one: Group, other: Group, headline: Headline) -> str:
    counts = " and ".join(str(count) for count in found.seeds)
    seeds = (
        f"{counts} seed{'s' * (found.seeds != (1,))}{', in pairs' if found.is_paired and found.seeds[0] > 1 else ''}"
    )
    unit = " points" if headline.percent else ""
    mean, low, high = (_number(each, headline, "+") for each in (found.mean, found.low, found.high))
    if math.isinf(found.half):
        return (
            f"{headline.words}: the difference of {other.name} and {one.name} is {mean}{unit}; whether that is luck "
            f"can't be said from {seeds}: train more by --seeds"
        )
    signed, bounds = f"{mean} ± {_number(found.half, headline)}{unit}", f"bootstrap: {low} to {high}"
    if not found.is_clear:
        return (
            f"{headline.words}: {other.name} and {one.name} are not distinguishable with {seeds}: the difference is "
            f"{signed} ({bounds})"
        )
    is_better = (found.mean > 0) == headline.higher_is_better
    return (
        f"{headline.words}: {other.name} is {'better' if is_better else 'worse'} than {one.name}: {signed} "
        f"with {seeds} ({bounds})"
    )


def _of_networks(same: SameSamples, one: Facts, other: Facts) -> str:
    parted = (
        f"of {same.samples:,} samples, {one.name} alone is right on {same.only_one:,} and {other.name} alone on "
        f"{same.only_other:,}"
    )
    if same.p >= _CLEAR:
        return f"these two networks are not distinguishable on the same samples: {parted} (McNemar: p = {same.p:.2g})"
    better = one if same.only_one > same.only_other else other
    return (
        f"of these two networks, {better.name} is better on the same samples: {parted} (McNemar: p = {same.p:.1g}); "
        "another seed may be otherwise"
    )


def _number(amount: float, headline: Headline, sign: str = "") -> str:
    """Return a difference of a metric: of shares, in percentage points."""
    return f"{100 * amount:{sign}.2f}" if headline.percent else f"{amount:{sign}.4g}"


def spread(values: Sequence[float], headline: Headline) -> str:
    """Return the mean of values, with their standard deviation if there are several."""
    if not values:
        return "–"
    mean = metric(float(np.mean(values)), headline.percent).strip()
    if len(values) == 1:
        return mean
    deviation = float(np.std(values, ddof=1))
    return f"{mean} ± {100 * deviation:.2f}" if headline.percent else f"{mean} ± {deviation:.2g}"


def same_samples(one: Facts, other: Facts) -> SameSamples | None:
    """Compare which samples two networks got right; None if either run hasn't kept them, or they are others."""
    first, second = (_right(run.folder / SAMPLES) for run in (one, other))
    if first is None or second is None:
        return None
    (targets, right), (other_targets, other_right) = first, second
    if len(targets) != len(other_targets) or not np.array_equal(targets, other_targets):
        return None
    return mcnemar(right, other_right)


def _right(path: Path) -> "tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]] | None":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            names = set(file.keys())
            columns = {name: file.get_tensor(name) for name in ("prediction", "target") if name in names}
    except (OSError, SafetensorError):
        return None
    if len(columns) < 2 or any(each.ndim != 1 or each.dtype.kind != "i" for each in columns.values()):
        return None
    return columns["target"], columns["prediction"] == columns["target"]
