"""Durations: how they are written, what they mean, and what is refused."""

import copy
import pickle

import pytest
from pydantic import Field

from torchrelay.duration import Duration, StepDuration
from torchrelay.errors import UsageError
from torchrelay.settings import Settings


class Times(Settings):
    any: Duration = Duration("1 epoch")
    computed: StepDuration = Duration("0 steps")
    several: list[StepDuration] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1 epoch", 100),
        ("30 epochs", 3000),
        ("1.5 epochs", 150),
        ("0.001 epochs", 1),
        ("2000 steps", 2000),
        ("1 step", 1),
        ("0 steps", 0),
        ("0%", 0),
        ("5%", 50),
        ("100 %", 1000),
        ("0.01%", 1),
        ("  7STEPS ", 7),
    ],
)
def test_a_duration_converts_to_steps(text, steps):
    assert Duration(text).steps(steps_per_epoch=100, total_steps=1000) == steps


@pytest.mark.parametrize(("text", "seconds"), [("10 min", 600), ("1 hour", 3600), ("90s", 90), ("0.5 h", 1800)])
def test_a_wall_clock_duration_converts_to_seconds_only(text, seconds):
    duration = Duration(text)
    assert duration.seconds == seconds
    with pytest.raises(UsageError, match="measured by the clock: write it in epochs"):
        duration.steps(100, 1000)


def test_a_duration_in_steps_has_no_seconds():
    assert Duration("5 epochs").seconds is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no duration: write '30 epochs'"),
        ("ten minutes", "no duration"),
        ("5", "no duration"),
        ("-1 epoch", "no duration"),
        ("1,5 epochs", "no duration"),
        ("1e3 steps", "no duration"),
        ("5 epoks", "did you mean 'epochs'"),
        ("3 fortnights", "no unit that we know"),
        ("150%", "more than the whole run"),
    ],
)
def test_an_invalid_duration_is_refused_with_the_remedy(text, says):
    with pytest.raises(ValueError, match=says):
        Duration(text)


@pytest.mark.parametrize("value", [5, 2.5, 0])
def test_a_number_without_a_unit_is_refused(value):
    with pytest.raises(UsageError, match=f"{value} has no unit: write '{value} epochs' or '{value} steps'"):
        Times(any=value)


@pytest.mark.parametrize("value", [True, None, ["1 epoch"]])
def test_only_strings_are_parsed(value):
    with pytest.raises(UsageError, match="is no duration: write '30 epochs'"):
        Times(any=value)


def test_a_duration_field_round_trips():
    times = Times(any="10 min", computed="5%", several=["1 epoch", "20 steps"])
    shown = {"any": "10 min", "computed": "5%", "several": ["1 epoch", "20 steps"]}
    assert times.model_dump(mode="json") == shown
    assert Times.model_validate_json(times.model_dump_json()) == times
    assert times.computed.unit == "%"


def test_fields_that_change_results_refuse_wall_clock_durations():
    with pytest.raises(UsageError, match="measured by the clock"):
        Times(computed="10 min")


def test_the_schema_describes_durations_as_strings():
    for name in ("any", "computed"):
        shown = Times.model_json_schema()["properties"][name]
        assert shown["type"] == "string"
        assert all(Duration(text) == text for text in shown["examples"])


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])  # noqa: S301
def test_a_duration_can_be_copied(again):
    copied = again(Duration("2 epochs"))
    assert (copied, copied.amount, copied.unit) == ("2 epochs", 2.0, "epochs")
