"""Trackers by name: each gets every line once, also after a resume, and none stops a run."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import torchrelay as tr
from torchrelay.errors import Interrupted, UsageError
from torchrelay.run import named
from torchrelay.run.named import Named, factories
from torchrelay.run.terminal import Terminal


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.closed = False

    def write(self, line) -> None:
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True


class Failing(Kept):
    def write(self, line) -> None:
        raise ConnectionError("no route\nto host")


class StopAt(tr.Callback):
    def __init__(self, step) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def build(run, *trackers, stop=-1, terminal=None):
    torch.manual_seed(2)
    data = torch.rand(48, 8, generator=torch.Generator().manual_seed(3)), torch.arange(48) % 3
    return tr.Trainer(
        torch.nn.Linear(8, 3),
        data,
        data,
        batch_size=12,
        run=run,
        settings=tr.RunSettings(epochs=3, log_every=1, trackers=trackers),
        terminal=terminal or Terminal(quiet=True),
        callbacks=[StopAt(stop)],
    )


def test_each_line_is_handed_over_and_all_are_after_a_rewind():
    made: list[Kept] = []
    tracker = Named("mine", lambda: made.append(Kept()) or made[-1], pytest.fail)
    tracker.rewrite([])
    tracker.write({"step": 1})
    tracker.write({"step": 2})
    tracker.rewrite([{"step": 1}])
    tracker.write({"step": 2})
    tracker.close()
    assert [each.closed for each in made] == [True, True]
    assert [each.lines for each in made] == [[{"step": 1}, {"step": 2}]] * 2


def test_a_tracker_that_fails_is_one_warning(tmp_path):
    said: list[str] = []
    tracker = Named("mine", Failing, said.append)
    for _ in range(2):
        tracker.rewrite([])
        tracker.write({"step": 1})
        tracker.write({"step": 2})
        tracker.close()
    assert said == [
        "warning: the tracker mine failed (ConnectionError: no route): the next resume writes its charts anew"
    ]


def test_a_tracker_that_can_not_be_made_is_a_warning():
    said: list[str] = []
    tracker = Named("mine", lambda: 1 / 0, said.append)
    tracker.rewrite([])
    tracker.write({"step": 1})
    tracker.close()
    assert len(said) == 1


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(monkeypatch):
    monkeypatch.setattr(named, "_PATIENCE", 0.1)

    class Hanging(Kept):
        def write(self, line) -> None:
            time.sleep(5)

    said: list[str] = []
    tracker = Named("mine", Hanging, said.append)
    tracker.rewrite([])
    before = time.monotonic()
    for step in range(1000):
        tracker.write({"step": step})
    tracker.close()
    assert time.monotonic() - before < 3
    assert "it had not finished after 0.1 s" in said[0]


def test_a_name_that_nobody_has_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        UsageError, match=r"there is no 'wandbb': choose from tensorboard, wandb, .*did you mean 'wandb'"
    ):
        build(tmp_path / "run", "wandbb").fit()
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_refused_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(named, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"which isn't installed: pip install 'torchrelay\[mlflow\]'"):
        factories(["mlflow"])


def test_without_tensorboard_there_is_no_folder_of_it_and_the_run_is_the_same(tmp_path, same_runs):
    build(tmp_path / "with", "tensorboard").fit()
    build(tmp_path / "without").fit()
    assert (tmp_path / "with" / "tensorboard").exists()
    assert not (tmp_path / "without" / "tensorboard").exists()
    same_runs(tmp_path / "with", tmp_path / "without")


PLUGIN = """
import json, pathlib
class Mine:
    def __init__(self, folder, settings):
        self.file = (folder / "mine.txt").open("w")
        json.dump(settings, self.file)
    def write(self, line): self.file.write(f"\\n{line['step']} {line['split']}")
    def close(self): self.file.close()
"""


def test_a_tracker_of_ones_own_is_found_by_its_entry_point(tmp_path, monkeypatch):
    package = tmp_path / "site" / "mine-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[torchrelay.trackers]\nmine = tracker_of_mine:Mine\n")
    (tmp_path / "site" / "tracker_of_mine.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(Interrupted):
        build(tmp_path / "run", "mine", stop=6).fit()
    build(tmp_path / "run", "mine").resume()
    settings, *lines = (tmp_path / "run" / "mine.txt").read_text().splitlines()
    assert json.loads(settings)["run.epochs"] == 3
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [f"{line['step']} {line['split']}" for line in metrics]


# ------------------------------------------------------------------------------------------------ the real packages


def points_of_mlflow(run: Path) -> dict[str, list[tuple[int, float]]]:
    with sqlite3.connect(run / "mlflow.db") as database:
        rows = database.execute(
            "select key, step, value from metrics join runs using (run_uuid) where lifecycle_stage = 'active'"
        ).fetchall()
    return by_name(rows)


def points_of_trackio(run: Path) -> dict[str, list[tuple[int, float]]]:
    with sqlite3.connect(run / "trackio" / "torchrelay.db") as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics")]
    return by_name([(name, step, value) for step, values in rows for name, value in values.items()])


def points_of_wandb(run: Path) -> dict[str, list[tuple[int, float]]]:
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    steps = {line["step"] for line in lines_of(run)}
    # Its format is its own: each name and each value is text in it.
    return {
        name: [] for name in ("train/loss/step", "test/accuracy") if content.count(name.encode()) >= len(steps) // 4
    }


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def by_name(rows) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, step, value in sorted(rows):
        found.setdefault(name, []).append((step, value))
    return found


TRAIN = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from test_named import build
from torchrelay.errors import Interrupted
run = Path({run!r})
try:
    build(run, {name!r}, stop=6).fit()
except Interrupted:
    pass
build(run, {name!r}).resume()
"""


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_a_resumed_run_has_each_point_once(tmp_path, name):
    pytest.importorskip(name)
    run = tmp_path / "run"
    program = TRAIN.format(path=[str(Path(__file__).parent), *sys.path], run=str(run), name=name)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "MLFLOW", "TRACKIO"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "warning: the tracker" not in (run / "log.txt").read_text()
    assert done.stdout == ""
    if name == "wandb":
        assert {*points_of_wandb(run)} == {"train/loss/step", "test/accuracy"}
        return
    found = points_of_mlflow(run) if name == "mlflow" else points_of_trackio(run)
    lines = lines_of(run)
    assert found["train/loss/step"] == [(line["step"], line["loss"]) for line in lines if line["split"] == "step"]
    assert found["test/accuracy"] == [(line["step"], line["accuracy"]) for line in lines if line["split"] == "test"]
    assert len(found["train/loss/step"]) == 12
