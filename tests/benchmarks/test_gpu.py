"""The GPU benchmarks, run on the CPU at a small size, so that errors are found without a GPU."""

import json
import math
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from benchmarks.page import Goal, Spread
from benchmarks.speed import gpu, peers, records
from benchmarks.speed.records import Images, Run
from torchrelay.data import batches as batches_module

ROOT = Path(__file__).parents[2]

SMALL = gpu.Size(batch=2, images=8, warm=1, steps=2, traced=1, tiny=peers.WARM + 6, rounds=1)
ON_CPU = ("device.name=cpu", "device.graph=false", "device.precision=float32", "data.batch_size=8")

# ------------------------------------------------------------------------------------------------ a step


@pytest.fixture
def tiny_network(monkeypatch):
    """A tiny network in place of ResNet-18, which takes a CPU half a minute in bf16."""

    def network(classes):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
        )

    monkeypatch.setattr(gpu, "resnet18_small", network)


def test_overlapping_spans_count_once():
    assert gpu.together([]) == 0
    assert gpu.together([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.7), (3.0, 4.0)]) == 6.0


def test_spans_are_filtered_by_category(tmp_path):
    events = [
        {"ph": "X", "cat": "kernel", "ts": 1.0, "dur": 2.5},
        {"ph": "X", "cat": "gpu_user_annotation", "ts": 0.0, "dur": 100.0},
        {"ph": "X", "cat": "gpu_memcpy", "ts": 9.0, "dur": 1.0},
        {"ph": "M", "name": "process_name"},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert gpu.spans_of(tmp_path / "trace.json", gpu.KERNELS) == [(1.0, 3.5), (9.0, 10.0)]


@pytest.mark.usefixtures("tiny_network")
def test_the_busy_table_has_consistent_shares():
    began = time.perf_counter()
    found = gpu.busy_table("cpu", SMALL)
    took = time.perf_counter() - began
    assert [row[0] for row in found.rows] == list(gpu.CASES)
    for _, wall, device, share in found.rows:
        assert float(device) > 0
        assert 0 < float(wall) < 1e3 * took
        assert float(share.strip("%")) == pytest.approx(100 * float(device) / float(wall), rel=0.02)
    assert found.goals[0].found is not None


def test_arrays_stay_in_host_memory_only_inside_the_context():
    before = batches_module._ON_DEVICE
    with gpu.in_host_memory():
        assert batches_module._ON_DEVICE == 0
    assert batches_module._ON_DEVICE == before > 0


@pytest.mark.parametrize("ignite", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_overhead_table_compares_with_the_hand_written_loop(monkeypatch, ignite):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: ignite or None)
    monkeypatch.setattr(gpu.importlib.metadata, "version", lambda name: "1.2")
    monkeypatch.setattr(peers, "ignite", peers.by_hand)
    found = gpu.tiny_table("cpu", SMALL)
    names = [row[0] for row in found.rows]
    assert names[:2] == ["by hand", "torchrelay, all off"]
    assert ("pytorch-ignite (1.2)" in names, "pytorch-ignite" in names) == (ignite, not ignite)
    eager, graph, kernels = found.goals
    assert (eager.found is not None) == ignite
    assert graph.found > 0
    assert kernels.found > 0
    by_hand = found.rows[0][1].median
    rows = {name: cells for name, *cells in found.rows}
    assert rows["torchrelay, all off"][1].median == pytest.approx(rows["torchrelay, all off"][0].median - by_hand)
    assert graph.found == pytest.approx(rows[gpu.GRAPH][0].median / by_hand)


@pytest.mark.usefixtures("tiny_network")
def test_the_exactness_table_has_both_steps():
    found = gpu.exactness_table("cpu", SMALL)
    ((name, exact, without, _),) = found.rows
    assert name == "cpu, bf16"
    assert found.goals[0].found == exact.median / without.median - 1


def test_without_a_gpu_all_figures_are_not_measured():
    found = [*(table("", gpu.QUICK) for table in gpu.TABLES), *records.tables(quick=True)]
    assert [goal.found for table in found for goal in table.goals] == [None] * 8
    assert {row[1] for table in found for row in table.rows} <= {"not measured", "not installed"}


def test_a_failing_table_does_not_lose_the_others(monkeypatch, tmp_path):
    def broken(device, size):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(gpu, "TABLES", (broken, gpu.exactness_table))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--quick", "--out", str(tmp_path / "gpu.md")])
    gpu.main()
    text = (tmp_path / "gpu.md").read_text()
    assert "## Failed: broken" in text
    assert "| RuntimeError | out of memory |" in text
    assert "## The cost of exactness on a GPU" in text
    assert "## Compared with the reference's whole training" in text


def test_the_mean_step_excludes_the_warm_up():
    clock = peers.Clock([None] * (peers.WARM + 5))
    clock.asked = [0.0] * peers.WARM + [10.0, 11.0, 12.0, 13.0, 18.0]
    assert clock.mean() == 2.0


def test_a_goal_may_lack_a_bar_or_an_aim():
    assert Goal("x", 0.3, None, 0.2, "{:.1f}").row() == ("x", "0.3", "", "0.2: **not met**")
    assert Goal("x", None, 0.2, None, "{:.1f}").row() == ("x", "not measured", "0.2: not measured", "")


# ------------------------------------------------------------------------------------------------ to an accuracy

LOADING = """
import torch
for name, count in (("train", 16), ("test", 8)):
    found = torch.load(f"cifar10/{name}.pt")
    assert found["images"].shape == (count, 32, 32, 3) and found["images"].dtype == torch.uint8
    assert found["labels"].tolist() == [0] * (count // 2) + [1] * (count // 2) and found["classes"] == ["cat", "dog"]
"""
RUNNING = """
import time
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |")
print("|  warmup  |   eval  |     0.1000  |   0.1000  |       0.1000  |       40.0000  |")
print("|       1  |      0  |     0.5000  |   0.5000  |               |        1.0000  |")
for run in range(200):
    end = "\\r" if run % 2 else "\\n"
    print(f"|       {run}  |   eval  |     0.9000  |   0.8000  |       0.25{run:02}  |   {run + 2}.5000  |", end=end)
    print("Mean", end=end)
    if run == LAST:
        print(flush=True)
        time.sleep(100)
"""


def script(folder: Path, last: int = 199, loading: str = LOADING) -> Path:
    """A script that prints like the public ones, and hangs after its last run."""
    path = folder / "their_script.py"
    path.write_text(loading + RUNNING.replace("LAST", str(last)))
    return path


@pytest.fixture
def images(tmp_path) -> Images:
    random = np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            (tmp_path / "photographs" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photographs" / part / name / f"{number}.png")
    return Images(tmp_path / "photographs", "image-folder", tmp_path / "cache")


@pytest.mark.slow
def test_a_script_is_killed_after_its_runs(tmp_path, images):
    assert records.beside_on(images, script(tmp_path), 3, 60) == [Run(0.25 + n / 1e4, n + 2.5) for n in range(3)]


def test_a_slow_or_failing_script_is_reported(tmp_path):
    slow = script(tmp_path, 1, loading="")
    assert len(records.beside(slow, tmp_path, 3, 3)) == 2  # what it has done by then counts
    with pytest.raises(RuntimeError, match=r"No such file or directory: 'cifar10/train\.pt'"):
        records.beside(script(tmp_path, loading="open('cifar10/train.pt')"), tmp_path, 3, 60)


@pytest.mark.slow
def test_the_records_table_compares_our_times_with_the_scripts(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        records, "OURS", {"cifar10-94": ("run.epochs=1",), "cifar10-94, broken": ("model.name=nothing",)}
    )
    scripts = [script(tmp_path, loading=""), tmp_path / "missing.py"]
    found = records.records_table(images, scripts, runs=2, patience=60, changes=ON_CPU)
    rows = {name: cells for name, *cells in found.rows}
    assert list(rows) == ["cifar10-94", "cifar10-94, broken", "their_script.py", "missing.py", *records.SCRIPTS]
    assert rows["their_script.py"] == [Spread((2.5, 3.5), 3), "25.00% (25.00 to 25.01, 2)"]
    assert rows["cifar10-94, broken"][0] == rows["missing.py"][0] == "failed"
    assert "can't open file" in rows["missing.py"][1]
    assert rows["airbench94_muon.py"] == ["not measured", ""]
    goals = {goal.what: goal.found for goal in found.goals}
    ratio = goals.pop("`cifar10-94`: time relative to their_script.py")
    assert ratio == pytest.approx(rows["cifar10-94"][0].median / 3)
    assert list(goals.values()) == [None, None]


def test_a_time_is_infinite_below_the_accuracy():
    runs = [Run(0.93, 3.0), Run(0.95, 2.0), Run(0.94, 7.0)]
    assert records.time_to(0.94, runs) == 3.0
    assert records.time_to(0.941, runs) == math.inf
    assert records.time_to(0.1, "failed") == math.inf


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [0.0, 1.1])
def test_the_reference_table_compares_whole_trainings(images, monkeypatch, accuracy):
    monkeypatch.setattr(records, "FAST", {"cifar10-fast": ("run.epochs=1",)})
    monkeypatch.setattr(records, "REFERENCE", accuracy)
    small = ("run.epochs=1", 'data.prepare=[{name="resize",size=32}]')
    device = [change for change in ON_CPU if "batch" not in change]
    found = records.reference_table(images, runs=1, changes=[*small, *device, "data.batch_size=16"])
    (_, ours, _), (name, whole, _) = found.rows
    assert name == "cifar10-reference, whole"
    wanted = 0.0 if accuracy > 1 else whole.median / ours.median
    assert found.goals[0].found == pytest.approx(wanted)


@pytest.mark.ci
@pytest.mark.slow
def test_the_arguments_select_the_tables(images, tmp_path, monkeypatch):
    parser = ArgumentParser()
    records.add_arguments(parser)
    nothing = [part() for part in records.parts(parser.parse_args([]))]
    assert nothing == records.tables()
    monkeypatch.setattr(records, "OURS", {"cifar10-94": ("run.epochs=1", *ON_CPU)})
    options = parser.parse_args(
        ["--root", str(images.root), "--airbench", str(script(tmp_path, loading="")), "--runs", "1"]
    )
    beside, reference = (part() for part in records.parts(options))
    assert beside.rows[1][0] == "their_script.py"
    assert reference == records.reference_table(None)
