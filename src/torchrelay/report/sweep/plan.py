"""What a sweep does, as `sweep.toml` in its folder says: the recipe, what is varied, how trials are drawn."""

import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from torchrelay.duration import steps_between
from torchrelay.errors import RelayError, UsageError, explained, intact, nearest
from torchrelay.recipe.recipe import Recipe, load_table, parse
from torchrelay.report.sweep import space
from torchrelay.report.sweep.rungs import Halving, stops
from torchrelay.run import disk
from torchrelay.run.identity import differing
from torchrelay.run.metrics import headline_named
from torchrelay.train.trainer import Trainer

NAME = "sweep.toml"
_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """All that decides which trials a sweep makes.

    Attributes:
        recipe: of each trial, before its values are put in.
        vary: what is varied.
        sampler: "tpe", "random" or "grid".
        rungs: at how many points of a run trials are compared; the last one is its end.
        reduction: of so many trials at a rung, one is trained on.
        metric: its name.
        direction: "maximize" or "minimize".
        split: the part of the data on which it is measured.
        percent: whether the metric is shown as a percentage.
        seed: from which, with a trial's number, its values are drawn.
        rungs_asked: how many were asked for; a short run has fewer.
        trials: how many there may be; 0: any number.
        code: the user's file; "" if there is none.
        code_sha256: of that file.
    """

    recipe: Recipe
    vary: tuple[space.Parameter, ...]
    sampler: Literal["tpe", "random", "grid"]
    rungs: int
    reduction: int
    metric: str
    direction: Literal["maximize", "minimize"]
    split: str
    percent: bool
    seed: int
    rungs_asked: int
    trials: int = 0
    code: str = ""
    code_sha256: str = ""

    @property
    def halving(self) -> Halving:
        """How trials are promoted."""
        return Halving(self.rungs, self.reduction, self.direction == "maximize", self.trials or None)

    def write(self, folder: Path) -> None:
        """Write sweep.toml; from then on the folder holds a sweep."""
        own = {key: value for key, value in asdict(self).items() if key not in ("recipe", "vary") and value != ""}
        vary = [{key: value for key, value in asdict(each).items() if value not in (None, ())} for each in self.vary]
        table = {"format": _FORMAT, "sweep": own, "vary": vary, "recipe": _table(self.recipe)}
        with explained(f"write {folder / NAME}"):
            disk.write(folder / NAME, tomli_w.dumps(table))


def read_plan(folder: Path) -> Plan:
    """Read the plan of a sweep.

    Raises:
        UsageError: the folder holds none, or one of a later release.
        RelayError: the file is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise UsageError(f"{folder} holds no sweep: it has no {NAME}; give a folder that 'torchrelay sweep' made")
    with explained(f"read {path}"), intact(path, "restore it from a copy: it says what the sweep varies"):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if table["format"] > _FORMAT:
            raise UsageError(f"{path} is of a later release, format {table['format']}: update torchrelay")
        vary = [space.Parameter(**each | {"choices": tuple(each.get("choices", ()))}) for each in table["vary"]]
        return Plan(recipe=parse(table["recipe"], str(path)), vary=tuple(vary), **table["sweep"])


def compare(before: Plan, now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to continue a sweep with something else than it was started with.

    Args:
        before: as its folder says.
        now: what the command was given, by the names of the plan's attributes; what it wasn't given is missing.
        folder: the sweep's.

    Raises:
        UsageError: something differs; the text says what was and what is.
    """
    changes = []
    for name, value in now.items():
        was = getattr(before, name)
        if name == "recipe":
            pairs = differing(_table(was), _table(value))
            changes += [f"{key} was {_shown(one)} and is {_shown(other)}" for key, (one, other) in pairs.items()]
        elif name == "code_sha256" and was != value:
            changes.append(f"the file of --code {before.code or 'was none and'} is another one")
        elif name != "code" and was != value:
            changes.append(f"{name.removesuffix('_asked')} was {_shown(was)} and is {_shown(value)}")
    if changes:
        raise UsageError(
            f"{folder} holds another sweep: {'; '.join(changes)}; undo it, or give another folder by --run"
        )


def sha256_of(code: Path | None) -> str:
    """Return the SHA-256 of the user's file; "" if there is none."""
    return "" if code is None or not code.is_file() else hashlib.sha256(code.read_bytes()).hexdigest()


def trial_recipe(recipe: Recipe, threads: int | None) -> Recipe:
    """Return the recipe of trials: nobody is notified of each, and threads are those that a trial has.

    Args:
        recipe: the user's.
        threads: for a trial, if its recipe doesn't say how many.
    """
    device, run = recipe.device, recipe.run.model_copy(update={"notify": None})
    if not isinstance(device.threads, int) and threads is not None:
        device = device.model_copy(update={"threads": threads})
    return recipe.model_copy(update={"device": device, "run": run})


def fitted(plan: Plan, trainer: Trainer, metric: str | None, direction: str | None) -> Plan:
    """Return a plan with what a trainer knows: the metric, where it is measured, and how many rungs a run has.

    Args:
        plan: with as many rungs as were asked for.
        trainer: of a trial.
        metric: its name; None: the task's own.
        direction: "maximize" or "minimize"; None: the metric's own.

    Raises:
        UsageError: there is no such metric, or evaluations are due by the clock.
    """
    task, split = trainer.task, trainer.selects_on
    name = metric or task.headline
    if metric is not None and (found := trainer.evaluator.evaluate(split, rounds=1)) is not None:
        _check_metric(name, found.values, UsageError)
    headline = headline_named(name)
    higher = task.higher_is_better if name == task.headline else headline.higher_is_better
    given = direction or ("maximize" if higher else "minimize")
    rungs = len(set(rung_steps(trainer, split, plan.rungs, plan.reduction)))
    found_out = {"metric": name, "split": split, "percent": headline.percent, "rungs": rungs}
    return replace(plan, direction=given, **found_out)  # type: ignore[arg-type]


def rung_steps(trainer: Trainer, split: str, rungs: int, reduction: int) -> list[int]:
    """Return after how many steps a run is at each rung: where it evaluates anyway, so that nothing else is computed.

    Args:
        trainer: of the run.
        split: the part of the data on which it is judged.
        rungs: how many there are.
        reduction: of so many trials at a rung, one is trained on.

    Raises:
        UsageError: evaluations are due by the clock.
    """
    progress, interval = trainer.state.progress, trainer.settings.evaluate_every
    every = steps_between(interval, progress.steps_per_epoch, progress.total_steps, "epochs")
    if split == "train":  # there is nothing to evaluate on, and an epoch's end has the metrics of its batches
        every = progress.steps_per_epoch
    if not every:
        raise UsageError(
            f"run.evaluate_every is '{interval}', and trials are compared where they evaluate: give epochs or steps"
        )
    counts = stops(-(-progress.limit // every), rungs, reduction)
    return [min(count * every, progress.limit) for count in counts]


def metric_of(plan: Plan, known: Mapping[str, Any]) -> float:
    """Return the plan's metric of an evaluation; NaN if it isn't finite.

    Args:
        plan: of the sweep.
        known: what was measured, by name.

    Raises:
        RelayError: there is no such metric.
    """
    _check_metric(plan.metric, known, RelayError)
    value = known[plan.metric]
    return math.nan if value is None else float(value)


def _check_metric(name: str, known: Mapping[str, Any], error: type[RelayError]) -> None:
    if name not in known:
        remedy = nearest(name, known) or f"; there are {', '.join(known)}"
        raise error(f"--metric {name}: an evaluation doesn't measure it{remedy}")


def with_values(plan: Plan, values: Mapping[str, space.Value]) -> Recipe:
    """Return the recipe of a trial.

    Raises:
        UsageError: the values don't fit each other.
    """
    return load_table(_table(plan.recipe), space.overrides_of(values), "the trial's recipe")


def _table(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True)


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    return " ".join(each.text for each in value) if isinstance(value, tuple) else str(value)
