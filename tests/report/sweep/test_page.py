"""A sweep's page: all trials, nothing from data unescaped, nothing from a network."""

from dataclasses import replace

import pytest

from torchrelay.recipe import recipe
from torchrelay.report.sweep.journal import Journal
from torchrelay.report.sweep.page import importance, render
from torchrelay.report.sweep.plan import Plan
from torchrelay.report.sweep.rungs import Trial
from torchrelay.report.sweep.space import Parameter

SPACE = (Parameter("optimizer.lr", 0.001, 1.0, log=True), Parameter("model.name", choices=("mlp", "<b>net</b>")))
PLAN = Plan(recipe.load("digits"), SPACE, "tpe", 3, 3, "accuracy", "maximize", "test", True, 0, 3, 8)


def stop(rung):
    return {"step": 10 * 3**rung, "epoch": 3**rung // 3, "seconds": 1.0, "steps": 270}


def trials():
    found = []
    for number in range(8):
        rungs = 3 if number == 7 else 2 if number > 4 else 1
        values = {"optimizer.lr": 0.001 * 2**number, "model.name": SPACE[1].choices[number % 2]}
        reached = {rung: 0.1 * number + 0.01 * rung for rung in range(1, rungs + 1)}
        state = "done" if rungs == 3 else "open"
        found.append(Trial(number, values, state, reached, rungs, stops={rung: stop(rung) for rung in reached}))
    found[0] = replace(found[0], state="failed", reached={}, reason="<script>loss</script>", stops={})
    return found


def test_the_page_shows_all_trials_and_escapes_what_comes_from_data(tmp_path):
    page = render(tmp_path / "rates", PLAN, {"optimizer.lr": 0.75, "model.name": 0.25}, trials())
    for number in range(8):
        assert f'<tr data-trial="{number}"' in page
    assert "&lt;script&gt;loss" in page
    assert "<script>loss" not in page
    assert "<b>net" not in page
    assert "75%" in page
    assert "73.00%" in page  # the best
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_page_of_few_trials_is_made_too(tmp_path, count):
    assert "Trials" in render(tmp_path, PLAN, {}, trials()[:count])


def test_the_key_that_decides_is_the_most_important_one(tmp_path):
    found = importance(Journal(tmp_path, PLAN), trials())
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.get) == "optimizer.lr"
    assert importance(Journal(tmp_path, PLAN), trials()[:3]) == {}
