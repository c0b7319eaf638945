"""Successive halving: who is promoted when, whatever the order in which results come in."""

import random

import pytest

from torchrelay.report.sweep.rungs import Halving, Job, Trial, stops


def trial(number, *metrics, state="open", target=None):
    reached = dict(enumerate(metrics, 1))
    return Trial(number, {}, state, reached, max(1, len(metrics)) if target is None else target)


def first(halving, trials):
    return next(halving.jobs(trials), None)


def test_a_new_trial_begins_where_none_can_be_promoted():
    halving = Halving(rungs=3, reduction=3, maximize=True, most=9)
    assert first(halving, []) == Job(None, 1)
    assert first(halving, [trial(0, 0.5), trial(1, 0.6)]) == Job(None, 1)


def test_the_best_third_of_a_rung_goes_on_at_once():
    halving = Halving(rungs=3, reduction=3, maximize=True, most=9)
    assert first(halving, [trial(0, 0.5), trial(1, 0.6), trial(2, 0.1)]) == Job(1, 2)
    assert first(Halving(3, 3, maximize=False), [trial(0, 0.5), trial(1, 0.6), trial(2, 0.1)]) == Job(2, 2)


def test_an_interrupted_trial_comes_first():
    halving = Halving(rungs=3, reduction=3, maximize=True, most=9)
    assert first(halving, [trial(0, 0.5, target=2), trial(1, 0.6), trial(2, 0.1)]) == Job(0, 2)


def test_the_highest_rung_is_promoted_from_first():
    trials = [trial(0, 0.1), trial(1, 0.2), trial(2, 0.3, 0.5), trial(3, 0.3, 0.6), trial(4, 0.3, 0.7), trial(5, 0.9)]
    assert first(Halving(3, 3, maximize=True, most=9), trials) == Job(4, 3)


def test_a_failed_trial_counts_as_the_worst_of_its_rung():
    halving = Halving(rungs=2, reduction=3, maximize=True, most=3)
    failed = [trial(0, state="failed"), trial(1, state="failed"), trial(2, 0.1)]
    assert first(halving, failed) == Job(2, 2)
    assert first(halving, [trial(0, state="failed"), trial(1, state="failed"), trial(2, state="failed")]) is None


def test_equal_metrics_are_ordered_by_number():
    assert first(Halving(2, 3, maximize=True), [trial(0, 0.5), trial(1, 0.5), trial(2, 0.5)]) == Job(0, 2)


def test_the_best_of_too_few_trials_is_trained_in_full_all_the_same():
    halving, trials = Halving(rungs=3, reduction=3, maximize=True, most=2), [trial(0, 0.5), trial(1, 0.6)]
    assert first(halving, trials) == Job(1, 2)
    trials[1] = trial(1, 0.6, 0.7)
    assert first(halving, trials) == Job(1, 3)
    trials[1] = trial(1, 0.6, 0.7, 0.8, state="done")
    assert first(halving, trials) is None


def test_with_one_rung_every_trial_is_trained_in_full():
    halving = Halving(rungs=1, reduction=3, maximize=True, most=2)
    assert [*halving.jobs([trial(0, 0.5, state="done")])] == [Job(None, 1)]
    assert [*halving.jobs([trial(0, 0.5, state="done"), trial(1, 0.4, state="done")])] == []


@pytest.mark.parametrize("order", range(5))
def test_any_order_of_results_ends_with_one_trial_in_full_at_least_and_the_best_of_each_rung_promoted(order):
    """Several workers: each job ends at a random moment."""
    draw, halving = random.Random(order), Halving(rungs=3, reduction=3, maximize=True, most=27)
    known, running = list[Trial](), dict[int, Job]()
    quality = [draw.random() for _ in range(27)]
    while True:
        jobs = [job for job in halving.jobs(known) if job.number is None or job.number not in running]
        if jobs and len(running) < 4 and (draw.random() < 0.5 or not running):
            job = jobs[0]
            number = len(known) if job.number is None else job.number
            if job.number is None:
                known.append(trial(number))
            old = known[number]
            known[number] = Trial(number, {}, "open", old.reached, job.rung)
            running[number] = Job(number, job.rung)
            continue
        if not running:
            break
        number = draw.choice([*running])
        job, old = running.pop(number), known[number]
        reached = {**old.reached, job.rung: quality[number]}
        known[number] = Trial(number, {}, "done" if job.rung == 3 else "open", reached, job.rung)
    assert len(known) == 27
    for rung in (1, 2):
        here = sorted((each for each in known if rung in each.reached), key=lambda each: -each.reached[rung])
        assert all(each.rung > rung for each in here[: len(here) // 3])
    assert any(each.state == "done" for each in known)
    assert halving.best(known).metric == max(each.metric for each in known if each.state == "done")


@pytest.mark.parametrize(
    ("evaluations", "rungs", "found"),
    [(9, 3, [1, 3, 9]), (10, 3, [1, 3, 10]), (30, 3, [3, 10, 30]), (4, 3, [1, 1, 4]), (1, 3, [1, 1, 1]), (5, 1, [5])],
)
def test_rungs_are_at_evaluations(evaluations, rungs, found):
    assert stops(evaluations, rungs, 3) == found
