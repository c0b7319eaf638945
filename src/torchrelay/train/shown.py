"""Step 7: what a notebook shows of a trainer and of its results."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torchrelay.run import notebook
from torchrelay.run.metrics import headline_named
from torchrelay.run.terminal import metric
from torchrelay.tasks.task import Task

_ROWS = 8  # epochs of a trainer's table


class Result(dict[str, float]):
    """The metrics of a run's last evaluation by name: a dict, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return metrics_table(self, {}, "")


def metrics_table(values: Mapping[str, float], tables: Mapping[str, Sequence[float]], title: str) -> str:
    """Return metrics as a table in HTML; of those with a value a class, the range."""
    rows = [(_words(name), _shown(name, value)) for name, value in values.items()]
    for name, row in tables.items():
        if there := [value for value in row if not math.isnan(value)]:
            rows.append((_words(name), f"{_shown(name, min(there))} to {_shown(name, max(there))}"))
    return notebook.table(("", ""), rows, title)


def trainer_table(description: str, task: Task, history: Sequence[Mapping[str, Any]]) -> str:
    """Return what is trained, where it stands and its last epochs as a table in HTML.

    Args:
        description: in one line.
        task: whose headline metric is shown beside the loss.
        history: lines of metrics of epochs and evaluations.
    """
    rows: dict[int, dict[tuple[str, str], str]] = {}
    for line in history:
        cells = rows.setdefault(line["epoch"], {})
        for name in dict.fromkeys((task.headline, "loss")):
            if isinstance(value := line.get(name), int | float):
                percent = task.percent and name == task.headline
                cells[name, line["split"]] = metric(float(value), percent).strip()
    columns = dict.fromkeys(
        key for name in (task.headline, "loss") for row in rows.values() for key in row if key[0] == name
    )
    heads = ("epoch", *(f"{split} {_words(name)}" for name, split in columns))
    last = list(rows.items())[-_ROWS:]
    shown = [(str(epoch), *(row.get(key, "") for key in columns)) for epoch, row in last]
    if not shown:
        return notebook.table((), (), "Trainer", description)
    return notebook.table(heads, shown, "Trainer", description)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(name: str, value: float) -> str:
    return metric(value, headline_named(name).percent).strip()
