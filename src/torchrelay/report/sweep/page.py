"""A sweep's page: one HTML file that needs no network; what comes from data is escaped in `page.html.jinja`."""

import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from torchrelay import __version__
from torchrelay.errors import RelayError, explained
from torchrelay.report.page.svg import Points
from torchrelay.report.sweep import outcome, pictures
from torchrelay.report.sweep.journal import Journal
from torchrelay.report.sweep.plan import Plan
from torchrelay.report.sweep.rungs import Trial
from torchrelay.run import disk
from torchrelay.run.metrics import ASKED, read_metrics, value
from torchrelay.run.terminal import duration

NAME = "sweep.html"
_FEWEST = 4  # trials for which an importance says something
_MOST_CURVES = 300  # more are no longer told apart, and make the page large


def write_page(folder: Path, plan: Plan, journal: Journal, trials: Sequence[Trial]) -> None:
    """Write the page.

    Args:
        folder: the sweep's.
        plan: what it does.
        journal: held by the caller.
        trials: all there are.

    Raises:
        RelayError: the file can't be written.
    """
    text = render(folder, plan, importance(journal, trials), trials)
    with explained(f"write {folder / NAME}"):
        disk.write(folder / NAME, text)


def importance(journal: Journal, trials: Sequence[Trial]) -> dict[str, float]:
    """Return how much of the difference between trials each key explains at the first rung, which all have reached.

    By PED-ANOVA (Watanabe et al., IJCAI 2023). Empty if there are too few trials, or only one key.
    """
    import optuna

    known = [each for each in trials if 1 in each.reached]
    if len(known) < _FEWEST or len(known[0].values) < 2:
        return {}
    at_first = [Trial(each.number, each.values, state="done", reached={1: each.reached[1]}) for each in known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few trials, and of values that are all alike
        found = optuna.importance.get_param_importances(
            journal.seen_by_optuna(at_first), evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    return {key: share for key, share in found.items() if share == share}


def render(folder: Path, plan: Plan, shares: dict[str, float], trials: Sequence[Trial]) -> str:
    """Return the page as text; see `write_page`."""
    forms = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    form = forms.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    known, ranked = [each for each in trials if each.reached and each.state != "failed"], _ranked(plan, trials)
    grades = {each.number: 1 - place / max(1, len(known) - 1) for place, each in enumerate(ranked[: len(known)])}
    drawn = ranked[: min(len(known), _MOST_CURVES)]
    series = {each.number: _curve(folder, plan, each) for each in drawn}

    def show(number: float) -> str:
        return f"{100 * number:.4g}%" if plan.percent else f"{number:.4g}"

    names = outcome.short_names([each.key for each in plan.vary])
    best = plan.halving.best(trials)
    return form.render(
        name=folder.name,
        plan=plan,
        metric=f"{plan.split} {plan.metric.replace('_', ' ')}",
        tiles=_tiles(plan, trials, best),
        best=best,
        keys=[*names.items()],
        importance=shares,
        curves=pictures.curves(series, grades, show),
        parallel=pictures.parallel(plan.vary, drawn, grades, plan.metric.replace("_", " "), show),
        left_out=len(known) - len(drawn),
        rows=[_row(plan, each, grades) for each in ranked],
        on_test=plan.split == "test",
        commands=_commands(folder, best),
        folder=folder,
        version=__version__,
    )


def _ranked(plan: Plan, trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials, those that came furthest first, of these the best; then those that failed or only began."""
    sign = -1 if plan.direction == "maximize" else 1

    def key(each: Trial) -> tuple[Any, ...]:
        is_known = bool(each.reached) and each.state != "failed"
        return (not is_known, -each.rung, sign * each.metric if is_known else 0.0, each.number)

    return sorted(trials, key=key)


def _curve(folder: Path, plan: Plan, trial: Trial) -> Points:
    """Return (epoch, metric) at each evaluation up to the trial's last rung."""
    try:
        lines = read_metrics(folder / trial.name)
    except RelayError:  # moved away, or damaged: the rungs are in the journal
        return [(stop["epoch"], trial.reached[rung]) for rung, stop in trial.stops.items()]
    stop = trial.stops[trial.rung]
    # Evaluations within an epoch have the number of the running one.
    return [
        (each["step"] / stop["step"] * stop["epoch"], value(each, plan.metric))
        for each in lines
        if each["split"] == plan.split and each["step"] <= stop["step"] and not each.get(ASKED)
    ]


def _tiles(plan: Plan, trials: Sequence[Trial], best: Trial | None) -> list[tuple[str, str, str]]:
    done = sum(each.state == "done" for each in trials)
    failed = sum(each.state == "failed" for each in trials)
    taken, whole = outcome.steps_taken(trials)
    seconds = sum(each.stops[each.rung]["seconds"] for each in trials if each.reached)
    more = f"{done} in full, {len(trials) - done - failed} stopped early" + (f", {failed} failed" if failed else "")
    tiles = [("trials", f"{len(trials)} of {plan.trials}" if plan.trials else str(len(trials)), more)]
    if best is not None:
        stop = best.stops[best.rung]
        where = f"{best.name}, after epoch {stop['epoch']}"
        tiles.insert(0, (f"best {plan.split} {plan.metric.replace('_', ' ')}", outcome.words(plan, best.metric), where))
        tiles.append(("steps", f"{taken / max(1, whole):.0%}", f"{taken:,} of {whole:,} for all in full"))
        tiles.append(("training", duration(seconds), "of all trials together"))
    return tiles


def _row(plan: Plan, trial: Trial, grades: dict[int, float]) -> dict[str, Any]:
    """Return a trial as the table shows it."""
    stop = trial.stops[trial.rung] if trial.reached else {}
    states = {"done": "in full", "failed": "failed", "open": "stopped early" if trial.rung else "not yet"}
    return {
        "number": trial.number,
        "name": trial.name,
        "grade": f"{100 * grades.get(trial.number, 0.0):.0f}%",
        "values": [outcome.value_text(trial.values[each.key]) for each in plan.vary],
        "rungs": [
            outcome.words(plan, trial.reached[rung]) if rung in trial.reached else ""
            for rung in range(1, plan.rungs + 1)
        ],
        "epoch": stop.get("epoch", ""),
        "state": states[trial.state],
        "reason": trial.reason,
    }


def _commands(folder: Path, best: Trial | None) -> list[tuple[str, str]]:
    own = shlex.quote(str(folder))
    found = [("Go on with the sweep, with more trials", f"torchrelay sweep {own} --trials N")]
    if best is not None:
        trial = shlex.quote(str(folder / best.name))
        found.insert(0, ("Train the best recipe again", f"torchrelay train {shlex.quote(str(folder / outcome.BEST))}"))
        found.append(("Train a trial to its end, such as the best", f"torchrelay resume {trial}"))
        found.append(("Look at a trial", f"torchrelay report {trial}"))
    return found
