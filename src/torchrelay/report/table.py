"""A run's metrics as numbers: the headline metric, the best evaluation, a table with a row per epoch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrelay.run.metrics import Headline, Line
from torchrelay.run.terminal import duration, metric

SPLITS = ("train", "validation", "test")
_NOT_METRICS = {"step", "epoch", "split", "time", "seconds", "lr", "samples_per_second", "loss"}
# Words in the names of metrics that are shown as percentages.
_SHARES = ("accuracy", "f1", "precision", "recall", "auroc", "iou", "dice")


def headline_of(lines: Sequence[Line]) -> Headline:
    """Guess the metric by which a run is judged: accuracy, else the first besides the loss, else the loss."""
    names = [name for line in lines if line["split"] in SPLITS for name in line if name not in _NOT_METRICS]
    name = "accuracy" if "accuracy" in names else next(iter(names), "loss")
    is_share = any(word in name for word in _SHARES)
    return Headline(name, percent=is_share, higher_is_better=is_share)


def best_line(lines: Sequence[Line], headline: Headline) -> Line | None:
    """Return the line of the best evaluation (the first of equal ones), by validation data where there are any.

    Returns:
        None if nothing was evaluated.
    """
    for split in ("validation", "test"):
        evaluated = [line for line in lines if line["split"] == split and math.isfinite(value(line, headline.name))]
        if evaluated:
            sign = -1.0 if headline.higher_is_better else 1.0
            return min(evaluated, key=lambda line: sign * value(line, headline.name))
    return None


def value(line: Mapping[str, Any], name: str) -> float:
    """Return a metric of a line, or NaN if it is missing or null."""
    number = line.get(name)
    return math.nan if number is None else float(number)


def metrics_table(lines: Sequence[Line], headline: Headline | None = None) -> str:
    """Return a table with a row per epoch: headline metric and loss of each split, learning rate, throughput, time.

    A star marks the best epoch, by validation data where there are any, else by test data.
    """
    headline = headline or headline_of(lines)
    splits = [split for split in SPLITS if any(line["split"] == split for line in lines)]
    columns = [(split, name) for name in dict.fromkeys((headline.name, "loss")) for split in splits]
    best = best_line(lines, headline)
    rows = [["", "epoch", *(f"{split} {name.replace('_', ' ')}" for split, name in columns), "lr", "samples/s", "time"]]
    by_epoch: dict[int, dict[str, Line]] = {}
    for line in lines:
        if line["split"] in splits:
            by_epoch.setdefault(line["epoch"], {})[line["split"]] = line
    for epoch, of_split in sorted(by_epoch.items()):
        train = of_split.get("train", {})
        cells = ["*" if best is not None and best["epoch"] == epoch else "", str(epoch)]
        cells += [_cell(of_split.get(split, {}), name, headline) for split, name in columns]
        cells += [f"{train['lr']:.4g}" if train.get("lr") is not None else ""]
        cells += [f"{train['samples_per_second']:,.0f}" if train.get("samples_per_second") is not None else ""]
        cells += [duration(train["seconds"]) if train.get("seconds") is not None else ""]
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cell(line: Mapping[str, Any], name: str, headline: Headline) -> str:
    if name not in line:
        return ""
    return metric(value(line, name), headline.percent and name == headline.name)
