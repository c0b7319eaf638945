"""The page of benchmarks: a verdict follows from the figure alone, and every benchmark runs."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import __main__ as all_of_them
from benchmarks import measure
from benchmarks.page import Goal, Spread, Table, sections
from benchmarks.speed import memory, overhead, peers, startup
from tools import pictures

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("found", "more", "verdicts"),
    [
        (0.019, False, ("met", "met")),
        (0.02, False, ("met", "met")),
        (0.03, False, ("met", "**not met**")),
        (0.05000001, False, ("**not met**", "**not met**")),  # though it is shown as 5.0%
        (-0.3, False, ("met", "met")),
        (0.06, True, ("met", "met")),
        (0.01, True, ("**not met**", "**not met**")),
        (None, False, ("not measured", "not measured")),
    ],
)
def test_a_verdict_follows_from_the_unrounded_figure(found, more, verdicts):
    bar, aim = (0.05, 0.02) if not more else (0.02, 0.05)
    _, _, of_bar, of_aim = Goal("memory", found, bar, aim, "{:+.1%}", more).row()
    assert (of_bar.partition(": ")[2], of_aim.partition(": ")[2]) == verdicts


def test_a_goal_shows_its_figure_bar_and_aim():
    row = Goal("memory", 0.034, 0.05, 0.02, "{:+.1%}").row()
    assert row == ("memory", "+3.4%", "+5.0%: met", "+2.0%: **not met**")
    assert Goal("memory", None, 0.05, 0.02, "{:+.1%}").row()[1] == "not measured"


def test_a_spread_shows_median_minimum_and_maximum():
    assert str(Spread((3.0, 1.0, 2.04))) == "2.0 (1.0 to 3.0)"
    assert str(Spread((1234.5,), 0)) == "1,234"


def table(title: str, *goals: Goal) -> Table:
    return Table(title, ("", "MB"), [("by hand", Spread((1.0, 2.0, 3.0)))], "A note.", goals)


def test_tables_have_titles_except_a_single_one():
    both = sections([table("One"), table("Two")], 3)
    assert both.startswith("### One\n\nA note.\n\n|  | MB |\n| --- | ---: |\n| by hand | 2.0 (1.0 to 3.0) |\n\n### Two")
    assert "###" not in sections([table("One")], 3)


def test_the_page_starts_with_a_table_of_all_goals():
    goal = Goal("beside the loop", 0.5, 0.05, 0.02, "{:+.1%}")
    text = all_of_them.text({"memory": [table("Digits", goal), table("Images")]}, "A machine.")
    summary = text.index("| Digits: beside the loop | +50.0% | +5.0%: **not met** | +2.0%: **not met** |")
    assert text.startswith("# Benchmarks\n\nA machine.\n")
    assert summary < text.index(f"## {memory.TITLE}") < text.index("### Images") < text.index("## Long benchmarks")
    assert "--quick" not in text
    assert "don't quote its figures" in all_of_them.text({}, "A machine.", quick=True)


def test_loader_workers_start_in_a_benchmark_by_the_default_method():
    """Spawned workers would import PyTorch in each epoch, which once made torchvision look three times slower."""
    with measure.fresh_process() as pool:
        assert pool.submit(multiprocessing.get_start_method).result() == multiprocessing.get_start_method()


def test_the_command_writes_the_page(cli, tmp_path):
    """Without the new process of each benchmark, which would import torch."""
    program = f"""
        import sys
        from concurrent.futures import ThreadPoolExecutor
        sys.path.insert(0, {str(ROOT)!r})
        from benchmarks import __main__ as all_of_them
        all_of_them.fresh_process = lambda: ThreadPoolExecutor(1)
        all_of_them.main()
        """
    done = cli("--quick", "--only", "order", "--out", tmp_path / "page.md", program=program, folder=ROOT)
    assert done.returncode == 0, done.stderr
    assert all_of_them.title("order") in (tmp_path / "page.md").read_text()


def test_the_pages_of_the_long_benchmarks_exist():
    for long in all_of_them.LONG:
        assert (ROOT / "docs" / "evidence" / long.table).is_file(), long


def test_the_startup_table_is_relative_to_import_torch():
    found = startup.table({name: [3.0] for name in startup.CASES} | {"import torch": [2.0]})
    rows = {name: (str(seconds), times) for name, seconds, times in found.rows}
    assert len(rows) == len(startup.CASES)
    assert rows["`import torch`"] == ("2.00", "1.00")
    assert rows["`torchrelay --help`"] == ("3.00", "1.50")


def test_a_clock_times_each_step_after_the_warm_up():
    clock = peers.Clock([None] * (peers.WARM + 5))
    for _ in clock:
        pass
    assert len(clock.steps()) == 4
    assert min(clock.steps()) > 0


def test_the_hand_written_loop_and_torchrelay_give_the_same_weights(monkeypatch):
    """Both do the same work: the tiny network ends in the same bits."""
    made = []
    network = peers.network
    monkeypatch.setattr(peers, "network", lambda: made.append(network()) or made[-1])
    pairs = peers.made(3)
    peers.by_hand(pairs)
    peers.prepared(pairs)
    by_hand, ours = (model.state_dict() for model in made)
    assert all(by_hand[name].equal(ours[name]) for name in by_hand)
    assert not network().state_dict()["0.weight"].equal(ours["0.weight"])  # something was learned


def test_a_peer_that_is_not_installed_has_a_row(monkeypatch):
    absent = overhead.Case("absent", peers.by_hand, module="no_such_module", package="no-such-package")
    monkeypatch.setattr(overhead, "CASES", {"absent": absent})
    (found,) = overhead.tables(quick=True)
    assert found.rows[0] == ("absent", "not installed", "", "", "")


def width(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.width


def test_the_bars_are_drawn(tmp_path):
    one = Spread((40.0, 50.0, 60.0))
    rows = [("torchrelay, all off", one, one, one, one), ("keras", "not installed", "", "", "")]
    pictures.draw_overhead(Table("", (), rows), tmp_path / "deep" / "overhead.png")
    assert width(tmp_path / "deep" / "overhead.png") == 2 * pictures.WIDTH


@pytest.mark.parametrize("best", [0.9, 0.7])
def test_accuracy_over_time_is_drawn_whether_or_not_the_goal_is_met(tmp_path, best):
    pictures.draw_accuracy([(100, 0.5), (1000, 0.8)], [(10, 0.4), (20, best)], tmp_path / "found.png")
    assert width(tmp_path / "found.png") == 2 * pictures.WIDTH


def test_the_references_times_are_computed_from_its_rate():
    assert pictures.of_tutorial(50.0)[-1] == (1_500_000 / 50.0, 0.8844)


def test_a_runs_times_exclude_earlier_evaluations():
    lines = [
        {"split": "step", "epoch": 1, "time": 105.0, "loss": 2.0},
        {"split": "train", "epoch": 1, "time": 110.0, "accuracy": 0.3},
        {"split": "test", "epoch": 1, "time": 113.0, "accuracy": 0.4},
        {"split": "train", "epoch": 2, "time": 120.0, "accuracy": 0.5},
        {"split": "test", "epoch": 2, "time": 122.0, "accuracy": 0.6},
        {"split": "train", "epoch": 3, "time": 130.0, "accuracy": 0.7},
        {"split": "test", "epoch": 3, "time": 131.0, "accuracy": 0.8},
    ]
    assert pictures.of_run(lines, began=100.0) == [(13.0, 0.4), (19.0, 0.6), (26.0, 0.8)]


@pytest.mark.slow
@pytest.mark.parametrize("name", all_of_them.SHORT)
def test_each_benchmark_runs(name, tmp_path):
    out = tmp_path / "evidence" / "page.md"
    out.parent.mkdir()
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", name, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| --- | ---: |" in out.read_text()
    assert (tmp_path / "pictures" / "overhead.png").is_file() == (name == "overhead")
