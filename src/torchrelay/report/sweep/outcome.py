"""What a sweep has found: its lines on the terminal, and the best recipe as a file."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrelay.errors import RelayError, explained
from torchrelay.recipe import recipe as recipes
from torchrelay.report.sweep.plan import Plan
from torchrelay.report.sweep.rungs import Trial
from torchrelay.report.sweep.space import Value
from torchrelay.run import disk
from torchrelay.run.terminal import metric as shown

BEST = "best.toml"


def rung_line(plan: Plan, trial: Trial, best: Trial | None) -> str:
    """Return the line of a trial that has reached a rung or failed."""
    what = f"{trial.name}  {values_text(trial.values)}"
    if trial.state == "failed":
        return f"{what}  failed: {trial.reason}"
    stop = trial.stops[trial.rung]
    found = f"{what}  {words(plan, trial.metric)} after epoch {stop['epoch']}"
    if plan.rungs > 1:
        found += f", rung {trial.rung} of {plan.rungs}"
    return found + ("  (best)" if best is not None and best.number == trial.number else "")


def words(plan: Plan, value: float) -> str:
    """Return a metric's value as people read it."""
    return shown(value, plan.percent).strip() if math.isfinite(value) else "–"


def values_text(values: Mapping[str, Value]) -> str:
    """Return a trial's values in a line, with as many digits as people need."""
    return " ".join(f"{name}={value_text(values[key])}" for key, name in short_names([*values]).items())


def value_text(value: Value) -> str:
    """Return a value with as many digits as people need."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the whole where two have the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def steps_taken(trials: Sequence[Trial]) -> tuple[int, int]:
    """Return how many steps were trained, and how many it would be if each trial that has a rung had been in full."""
    stops = [each.stops[each.rung] for each in trials if each.reached]
    return sum(stop["step"] for stop in stops), sum(stop["steps"] for stop in stops)


def write_best(folder: Path, plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    """Write best.toml, a recipe that gives the best trial's run again, and return that trial; None if there is none.

    Raises:
        RelayError: the file can't be written.
    """
    best = plan.halving.best(trials)
    if best is None:
        return None
    recipe = recipes.load(str(folder / best.name / "recipe.toml"))
    stop = best.stops[best.rung]
    so_far = "" if best.state == "done" else f", trained so far to epoch {stop['epoch']}"
    head = (
        f"# The best of {len(trials)} trials, {best.name}{so_far}: {plan.split} {plan.metric} "
        f"{words(plan, best.metric)}\n#\n# torchrelay train {BEST}\n\n"
    )
    with explained(f"write {folder / BEST}"):
        disk.write(folder / BEST, head + recipe.to_toml())
    return best


def summary(folder: Path, plan: Plan, trials: Sequence[Trial]) -> list[str]:
    """Return the lines at a sweep's end.

    Raises:
        RelayError: all trials have failed.
    """
    best, failed = plan.halving.best(trials), [each for each in trials if each.state == "failed"]
    if best is None:
        if failed:
            raise RelayError(
                f"all {len(failed)} trials have failed; {failed[0].name}: {failed[0].reason}; the others' reasons are "
                f"in {folder / 'sweep.html'}"
            )
        return ["no trial has reached a rung yet"]
    taken, whole = steps_taken(trials)
    counts = f"{len(trials)} trials" + (f", {len(failed)} failed" if failed else "")
    lines = [
        f"best: {best.name}, {plan.split} {plan.metric.replace('_', ' ')} {words(plan, best.metric)}: "
        f"{values_text(best.values)}",
        f"{counts}; {taken:,} steps, {taken / max(whole, 1):.0%} of training each in full",
    ]
    if plan.split == "test" and not plan.recipe.data.validation:
        lines.append("hint: the best was chosen on the test data, which flatters it: set data.validation=0.1")
    quoted = shlex.quote(str(folder / BEST))
    return [*lines, f"train it again: torchrelay train {quoted}", f"the page is {folder / 'sweep.html'}"]
