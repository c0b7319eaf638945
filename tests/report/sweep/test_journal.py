"""A sweep's journal: what is drawn follows from what is known, claims end with their process."""

import subprocess
import sys

import pytest

from torchrelay.recipe import recipe
from torchrelay.report.sweep.journal import Journal
from torchrelay.report.sweep.plan import Plan, read_plan
from torchrelay.report.sweep.space import parse

VARY = ("optimizer.lr=1e-3..1:log", "model.name=mlp|small-cnn", "run.epochs=3..9")


def plan_of(sampler, vary=VARY):
    space = parse(vary, "digits", ())
    return Plan(recipe.load("digits"), space, sampler, 3, 3, "accuracy", "maximize", "test", True, 7, 3)


def drawn(folder, sampler, count, reopen=False):
    """Trials with a metric of their values, as one worker makes them."""
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, plan_of(sampler))
    for _ in range(count):
        journal = Journal(folder, plan_of(sampler)) if reopen else journal
        with journal.hold():
            values = journal.draw(journal.trials())
            number = journal.begin(values)
            journal.assign(journal.trials()[number], 1, 0)
            if number % 5 == 4:
                journal.fail(number, "its loss isn't finite")
            else:
                journal.report(number, 1, -abs(values["optimizer.lr"] - 0.1), {"step": 1, "epoch": 1})
    with journal.hold():
        return journal.trials()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sweep_that_is_continued_draws_what_an_undisturbed_one_draws(tmp_path, sampler):
    at_once = drawn(tmp_path / "at once", sampler, 16)
    again = drawn(tmp_path / "again", sampler, 16, reopen=True)
    assert at_once == again
    assert len({each.values["optimizer.lr"] for each in at_once}) == 16


def test_tpe_learns_from_trials_that_paused(tmp_path):
    trials = drawn(tmp_path / "sweep", "tpe", 40)
    late = [abs(each.values["optimizer.lr"] - 0.1) for each in trials[20:]]
    early = [abs(each.values["optimizer.lr"] - 0.1) for each in trials[:10]]
    assert sorted(late)[10] < sorted(early)[5]


def test_a_grid_is_counted_up_and_ends(tmp_path):
    journal = Journal(tmp_path, plan_of("grid", ("model.name=mlp|small-cnn", "run.epochs=3..4")))
    with journal.hold():
        values = []
        while (found := journal.draw(journal.trials())) is not None:
            values.append(tuple(found.values()))
            journal.begin(found)
    assert values == [("mlp", 3), ("mlp", 4), ("small-cnn", 3), ("small-cnn", 4)]


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = plan_of("tpe", ('data.augment=[["flip"], []]', "optimizer.weight_decay=0..1e-3"))
    plan.write(tmp_path)
    assert read_plan(tmp_path) == plan


def test_a_claim_ends_with_its_process_however_it_ends(tmp_path):
    journal = Journal(tmp_path, plan_of("tpe"))
    program = (
        "import sys, os; from pathlib import Path; from portalocker import LockFlags, portalocker as p;"
        f"file = open({str(tmp_path / 'claims' / '000')!r}, 'a+');"
        "p.LockfLocker().lock(file, LockFlags.EXCLUSIVE); print('held', flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-c", program]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert journal.claim(0) is None
        process.kill()
        process.wait()
    claim = journal.claim(0)
    assert claim is not None
    claim.release()


def test_a_damaged_journal_is_named(tmp_path):
    from torchrelay.errors import RelayError

    drawn(tmp_path / "sweep", "random", 2)
    path = tmp_path / "sweep" / "journal"
    path.write_text("not JSON\n" + path.read_text())
    with pytest.raises(RelayError, match="journal"):
        Journal(tmp_path / "sweep", plan_of("random"))
