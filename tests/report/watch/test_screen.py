"""What is shown of runs fits into the terminal, and says where they stand."""

import json
import math
import time

import pytest

from torchrelay.report.watch.chart import Curve, chart
from torchrelay.report.watch.follow import Followed
from torchrelay.report.watch.screen import frame
from written_runs import write_run


def run_of(tmp_path, name="run", epochs=4, **settings):
    write_run(tmp_path / name, accuracies=[1 - 0.5**epoch for epoch in range(1, epochs + 1)], **settings)
    return Followed(tmp_path / name)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 10), (200, 12), (20, 3)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_runs_fit_into_a_terminal(tmp_path, size, count):
    shown = frame([run_of(tmp_path, f"run-{number}") for number in range(count)], size)
    lines = shown.split("\n")
    assert len(lines) <= size[1]
    assert max(line.cell_len for line in lines) <= size[0]
    assert all(f"run-{number}" in shown.plain for number in range(min(count, size[1] - 1)))


def test_a_head_says_where_the_run_stands_and_how_long_it_takes(tmp_path):
    run = run_of(tmp_path, run_epochs=8, done=False)
    now = time.time()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for step in (41, 42):
            line = {"step": step, "epoch": 5, "split": "step", "loss": 0.1, "samples_per_second": 1234.5}
            file.write(json.dumps(line | {"time": now + step - 42}) + "\n")
    run.refresh()
    head = frame([run], (160, 20)).plain.splitlines()[0]
    for text in ("running", "epoch 5/8", "0:38 left", "1,234 samples/s", "step 42/80", " ago"):
        assert text in head


def test_a_run_without_a_line_of_metrics_is_shown(tmp_path):
    assert "nothing yet" in frame([run_of(tmp_path, epochs=0, done=False)], (80, 24)).plain


def test_more_runs_than_lines_are_counted(tmp_path):
    shown = frame([run_of(tmp_path, f"run-{number}") for number in range(5)], (80, 3)).plain
    assert shown.splitlines()[-1] == "3 more in a higher terminal"


def test_a_chart_goes_from_the_bottom_left_to_the_top_right():
    curve = Curve("test", "red", [(float(x), x / 10) for x in range(11)])
    title, *rows, below = (line.plain for line in chart("accuracy", [curve], (30, 8), percent=True, unit="epochs"))
    assert title.startswith("accuracy  test 100.00%")
    filled = [min(place for place, cell in enumerate(row) if cell > "\u2800") for row in rows]
    assert filled == sorted(filled, reverse=True)
    assert filled[-1] == 8
    assert rows[0].endswith("⠊") or rows[0][-1] > "\u2800"
    assert "100.00%" in rows[0]
    assert "0.00%" in rows[-1]
    assert below.endswith("10 epochs")


@pytest.mark.parametrize("values", [[math.nan], [1.0], [0.0, 0.0], [1e-9, 1e9], [-5.0, math.inf, 5.0], [math.nan, 2.0]])
@pytest.mark.parametrize("plain", [False, True])
def test_any_values_can_be_drawn(values, plain):
    curve = Curve("train", "blue", [*enumerate(values)])
    lines = chart("loss", [curve], (30, 6), percent=False, unit="steps", plain=plain)
    assert {line.cell_len for line in lines} == {30}
    assert len(lines) == 6
    assert (max("".join(line.plain for line in lines)) > "\u2800") is not plain or math.isnan(values[0])


def test_ten_thousand_lines_are_drawn_in_a_fraction_of_a_second(tmp_path):
    run = run_of(tmp_path)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        for step in range(10_000):
            file.write(json.dumps({"step": step, "epoch": 1, "split": "step", "loss": 1 / (step + 1)}) + "\n")
    run.refresh()
    before = time.process_time()
    frame([run], (120, 40))
    assert time.process_time() - before < 0.5
