"""A run's page: one HTML file that needs no network. `page.html` is its form; everything from data is escaped there."""

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchrelay.errors import explained
from torchrelay.report.page import findings, svg
from torchrelay.report.page.facts import Facts
from torchrelay.run.metrics import SPLITS, Line, best_line, headline_named, value
from torchrelay.run.terminal import duration, number

MOST = 2_000_000  # bytes of a page; pictures are left out where it would be larger
_NAMED = 30  # classes of a confusion matrix that is drawn
_LONGEST = 300  # characters of a setting


def write_page(facts: Facts, path: Path, pictures: Any = None, differing: Any = None) -> None:
    """Write the page.

    Args:
        facts: of the run.
        path: the file.
        pictures: what `read_pictures` found; None: the data wasn't looked at.
        differing: what `nearest_recipe` found.

    Raises:
        RelayError: the file can't be written.
    """
    text = render(facts, pictures, differing)
    if len(text.encode()) > MOST:
        text = render(facts, None, differing, note="Pictures are left out, as the page would be larger than 2 MB.")
    with explained(f"write {path}", "choose another by --out"):
        staging = path.with_name(f".{path.name}.partial")
        staging.write_text(text, encoding="utf-8")
        staging.replace(path)


def render(facts: Facts, pictures: Any = None, differing: Any = None, note: str = "") -> str:
    """Return the page as text; see `write_page`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    forms = Environment(
        loader=PackageLoader("torchrelay.report.page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms.filters |= {"number": number, "percent": percent}
    per_epoch = max((line["step"] / line["epoch"] for line in facts.lines if line["split"] == "train"), default=0.0)
    found = findings.answers(facts)
    cards, traits = findings.worst(facts), {} if pictures is None else pictures.traits
    batch = None if pictures is None and note else _batch(facts)
    matrix = np.array(facts.evaluation.get("confusion_matrix", ()), np.int64)
    sections = {
        "facts": facts,
        "notes": [*facts.notes, *([note] if note else [])],
        "summary": _summary(facts),
        "differing": _differing(differing),
        "recipe": _settings(facts.record),
        "environment": facts.record.get("environment", {}),
        "charts": _charts(facts, per_epoch or 1.0),
        "metrics": _metrics(facts),
        "matrix": svg.confusion(matrix, facts.classes) if _is_drawn(matrix, facts) else None,
        "confused": findings.confused(facts),
        "by_class": findings.by_class(facts),
        "cards": cards,
        "thumbnails": {} if pictures is None else pictures.thumbnails,
        "missing": "" if pictures is None else pictures.missing,
        "hint": f"torchrelay report {shlex.quote(str(facts.folder))}" if pictures is None and not note else "",
        "calibration": None if found is None else findings.calibration(found),
        "slices": None if found is None else findings.slices(facts, found, traits),
        "batch": batch,
        "times": _times(facts),
        "commands": _commands(facts, differing),
    }
    if sections["calibration"]:
        sections["reliability"] = svg.reliability(sections["calibration"]["bins"], findings.BINS)
    return forms.get_template("page.html").render(sections)


def percent(share: float, digits: int = 2) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.{digits}f}%"


def _batch(facts: Facts) -> str | None:
    if not facts.first_batch:
        return None
    from torchrelay.report.page.jpeg import batch_address

    return batch_address(facts.first_batch)


def _is_drawn(matrix: Any, facts: Facts) -> bool:
    return matrix.ndim == 2 and 2 <= len(matrix) <= _NAMED and len(facts.classes) == len(matrix)


def _show(name: str, facts: Facts) -> Callable[[float], str]:
    is_share = name == facts.headline.name and facts.headline.percent
    return (lambda y: f"{100 * y:.4g}%") if is_share else (lambda y: f"{y:.4g}")


def _summary(facts: Facts) -> dict[str, Any]:
    """Return the headline of the page: the best and the last value, and how far the run is."""
    headline, lines = facts.headline, facts.lines
    words = percent if headline.percent else number
    best, tiles = best_line(lines, headline), list[tuple[str, str, str]]()
    sure = findings.intervals(facts).get(headline.name)
    if best is not None:
        text = f"at epoch {best['epoch']}"
        tiles.append((f"best {best['split']} {headline.words}", words(value(best, headline.name)), text))
    if isinstance(last := facts.evaluation.get(headline.name), int | float):
        text = f"95% interval {words(sure[0])} to {words(sure[1])}" if sure is not None else ""
        split = facts.about.get("split", best["split"] if best else "")
        tiles.append((f"last {split} {headline.words}", words(last), text))
    epochs = max((line["epoch"] for line in lines), default=0)
    asked = facts.record.get("run", {}).get("epochs")
    tiles.append(("epochs", f"{epochs} of {asked}" if asked else str(epochs), f"{_steps(lines):,} steps"))
    if seconds := sum(value(line, "seconds") for line in lines if line["split"] == "train" and "seconds" in line):
        tiles.append(("training", duration(seconds), "without evaluations"))
    # An evaluation is written when a run ends; a resumed run has an older one until then.
    done = bool(facts.evaluation) and facts.evaluation.get("step", 0) >= _steps(lines)
    data, model = facts.record.get("data", {}).get("name", ""), facts.record.get("model", {}).get("name", "")
    return {"tiles": tiles, "done": done, "data": data, "model": model}


def _steps(lines: list[Line]) -> int:
    return max((line["step"] for line in lines), default=0)


def _charts(facts: Facts, per_epoch: float) -> list[tuple[str, Any, list[str]]]:
    """Return title, picture and legend of each chart: the headline metric, the loss, the learning rate."""
    found = []
    for name in dict.fromkeys([facts.headline.name, "loss", "lr"]):
        series = {
            split: [
                (line["step"] / per_epoch, value(line, name))
                for line in facts.lines
                if line["split"] == split and name in line
            ]
            for split in ("step", *SPLITS)
        }
        steps = series.pop("step")
        if name == "lr":  # steps say it more often than epochs
            series = {"rate": steps if len(steps) > len(series["train"]) else series["train"]}
        elif len(steps) > len(series["train"]):
            series = {"steps": steps, **series}
        series = {each: pairs for each, pairs in series.items() if pairs}
        title = {"lr": "learning rate"}.get(name, name.replace("_", " "))
        if drawn := svg.curves(series, f"{title} by epoch", _show(name, facts), floor=name == "lr"):
            found.append((title, drawn, [each for each in series if each != "rate"]))
    return found


def _metrics(facts: Facts) -> dict[str, Any]:
    """Return the last numbers of each split, with the intervals of the one whose samples are known."""
    hidden = ("split", "time", "seconds", "samples_per_second", "lr", "step", "epoch")
    last = {line["split"]: line for line in facts.lines if line["split"] != "step"}
    own, step = facts.about.get("split", "test"), facts.evaluation.get("step")
    # A run that was resumed when all was done has evaluated without a line of metrics.
    if step is not None and last.get(own, {}).get("step") != step:
        last[own] = {key: each for key, each in facts.evaluation.items() if isinstance(each, int | float)}
        last[own].pop("samples", None)
    names = [key for line in last.values() for key in line if key not in hidden]
    found = findings.intervals(facts)
    rows = []
    for name in dict.fromkeys(names):
        words = percent if headline_named(name).percent else number
        values = [_value(line.get(name, ""), words) for line in last.values()]
        sure = found.get(name)
        rows.append((name, values, "" if sure is None else f"{words(sure[0])} to {words(sure[1])}"))
    return {
        "splits": [*last],
        "rows": rows,
        "own": own if found else "",
        "methods": {each[2] for each in found.values()},
    }


def _value(each: Any, words: Callable[[float], str]) -> str:
    return "not finite" if each is None else words(each) if isinstance(each, int | float) else str(each)


def _settings(record: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    return {
        section: {key: _text(each) for key, each in values.items() if each not in ({}, [])}
        for section, values in record.items()
        if section != "environment" and values
    }


def _text(each: Any) -> str:
    text = "–" if each is None else each if isinstance(each, str) else json.dumps(each, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _differing(found: tuple[str, dict[str, tuple[Any, Any]]] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"name": found[0], "pairs": {key: (_text(a), _text(b)) for key, (a, b) in found[1].items()}}


def _times(facts: Facts) -> list[tuple[str, str]]:
    train = [line for line in facts.lines if line["split"] == "train" and line.get("seconds")]
    stamps = [line["time"] for line in facts.lines if isinstance(line.get("time"), int | float)]
    rows = list[tuple[str, str]]()
    if len(stamps) > 1:
        rows.append(("from the first line of metrics to the last", duration(max(stamps) - min(stamps))))
    if train:
        seconds = [float(line["seconds"]) for line in train]
        rows.append(("training an epoch, the median", duration(float(np.median(seconds)))))
        rates = [float(line["samples_per_second"]) for line in train if line.get("samples_per_second")]
        if rates:
            rows.append(("samples per second, the median of the epochs", f"{np.median(rates):,.0f}"))
    if facts.cost:
        rows.append(("memory and work", facts.cost))
    return rows


def _commands(facts: Facts, differing: tuple[str, dict[str, tuple[Any, Any]]] | None) -> list[tuple[str, str]]:
    """Return the commands that make the run again, with what each does."""
    folder = shlex.quote(str(facts.folder))
    if facts.from_python:
        return []
    code = facts.record.get("environment", {}).get("code")
    more = f" --code {shlex.quote(str(code))}" if code else ""
    again = shlex.quote(f"{facts.folder}-again")
    found = [("the same run in another folder", f"torchrelay train {folder}/recipe.toml --run {again}{more}")]
    if differing is not None and len(differing[1]) <= 12 and all(new is not None for _, new in differing[1].values()):
        sets = "".join(f" --set {shlex.quote(f'{key}={_toml(new)}')}" for key, (_, new) in differing[1].items())
        found.append((f"from the shipped recipe {differing[0]}", f"torchrelay train {differing[0]}{sets}{more}"))
    found.append(("evaluate its best checkpoint", f"torchrelay evaluate {folder}{more}"))
    found.append(("replay parts of it, and compare", f"torchrelay audit {folder}{more}"))
    return found


def _toml(each: Any) -> str:
    return each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
