"""Step 1: trackers of other packages, each of which holds a run in files of the run folder unless told otherwise.

A tracker is made anew when a run is resumed, and then receives all lines that are left: so it first removes what it has
of this run. Each package is imported only when its tracker is made.
"""

import contextlib
import io
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrelay.run.metrics import Line
from torchrelay.run.trackers import numbers_of

_PROJECT = "torchrelay"


def _values(line: Line) -> dict[str, float]:
    """Return the numbers of a line by names such as "train/loss", "train/loss/step" and "test/accuracy"."""
    split = "train" if line["split"] == "step" else line["split"]
    return {f"{split}/{tag}": value for tag, value in numbers_of(line).items()}


class WandB:
    """Weights & Biases, offline (`wandb sync` uploads the run) unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        own = folder / "wandb"
        own.mkdir(exist_ok=True)
        for old in own.glob("*run-*"):
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
        name = own / "id.txt"  # of the run, for ever, so that a later upload replaces an earlier one
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:12])
        mode: Any = os.environ.get("WANDB_MODE", "offline")  # wandb refuses another word by itself
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.resolve().name,
            id=name.read_text().strip(),
            dir=folder,
            config=dict(settings),
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )

    def write(self, line: Line) -> None:
        """Log a line at its step."""
        self._run.log(_values(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """MLflow, in the SQLite file mlflow.db of the run folder, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve()}/mlflow.db")
        self._client, tag = MlflowClient(tracking_uri=uri), "torchrelay.folder"
        where = str(folder.resolve())
        found = self._client.get_experiment_by_name(_PROJECT)
        experiment = found.experiment_id if found else self._client.create_experiment(_PROJECT)
        of_this = [run for run in self._client.search_runs([experiment]) if run.data.tags.get(tag) == where]
        for old in of_this:
            self._client.delete_run(old.info.run_id)
        run = self._client.create_run(experiment, run_name=folder.resolve().name, tags={tag: where})
        self._id = run.info.run_id
        self._client.log_batch(self._id, params=[Param(name, str(value)) for name, value in settings.items()])

    def write(self, line: Line) -> None:
        """Log a line at its step and time."""
        from mlflow.entities import Metric

        milliseconds, step = int(1000 * line.get("time", 0.0)), line["step"]
        metrics = [Metric(name, value, milliseconds, step) for name, value in _values(line).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._id)


class Trackio:
    """Trackio, in the folder trackio of the run folder, or where TRACKIO_DIR says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))  # it is read at the import
        import trackio

        name = folder.resolve().name
        with contextlib.suppress(ValueError):  # there is no such project yet
            for old in list(trackio.Api().runs(_PROJECT)):
                if old.name == name and (old.config or {}).get("folder") == str(folder.resolve()):
                    old.delete()
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                _PROJECT,
                name,
                config={**settings, "folder": str(folder.resolve())},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        with contextlib.suppress(AttributeError):  # at the interpreter's exit it would finish the run again, and say so
            trackio.context_vars.current_run.set(None)

    def write(self, line: Line) -> None:
        """Log a line at its step."""
        self._run.log(_values(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()
