"""Durations as people write them: "30 epochs", "2000 steps", "5%", "10 min"."""

import re
from typing import Annotated, Any, Self

from pydantic import AfterValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from torchrelay.errors import UsageError, nearest

_TEXT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[a-z]+)\s*", re.IGNORECASE)
_UNITS = {
    **dict.fromkeys(("epoch", "epochs"), "epochs"),
    **dict.fromkeys(("step", "steps"), "steps"),
    "%": "%",
    **dict.fromkeys(("s", "second", "seconds"), "seconds"),
    **dict.fromkeys(("min", "minute", "minutes"), "minutes"),
    **dict.fromkeys(("h", "hour", "hours"), "hours"),
}
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


class Duration(str):
    """A text such as "1 epoch", "500 steps", "5%" (of the whole run) or "10 min".

    It is a string, so a recipe prints it the way it was written.

    Raises:
        ValueError: the text is no duration.
    """

    __slots__ = ("amount", "unit")
    amount: float
    unit: str  # epochs, steps, %, seconds, minutes or hours

    def __new__(cls, text: str) -> Self:
        """Parse a duration."""
        if not isinstance(text, str):
            raise ValueError(_without_unit(text))  # noqa: TRY004 - pydantic reports only a ValueError
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"'{text}' is no duration: write '30 epochs', '2000 steps', '5%' or '10 min'")
        amount, unit = float(match[1]), match[2].lower()
        if unit not in _UNITS:
            raise ValueError(f"'{text}' has no unit that we know: use epochs, steps, % or min{nearest(unit, _UNITS)}")
        if unit == "%" and amount > 100:
            raise ValueError(f"'{text}' is more than the whole run: write at most '100%'")
        duration = super().__new__(cls, text.strip())
        duration.amount, duration.unit = amount, _UNITS[unit]
        return duration

    @property
    def seconds(self) -> float | None:
        """The seconds of a wall-clock duration; None for any other."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Return the number of steps, rounded; at least one unless the duration is zero.

        Raises:
            UsageError: it is a wall-clock duration, on which no result may depend.
        """
        if self.unit in _SECONDS:
            raise UsageError(_wall_clock_message(self))
        unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "%": total_steps / 100}[self.unit]
        return max(1, round(self.amount * unit)) if self.amount else 0

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic parse it from a string and write it as one."""
        return core_schema.no_info_plain_validator_function(cls, serialization=core_schema.to_string_ser_schema())

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe it in the JSON schema."""
        return {"type": "string", "examples": ["1 epoch", "500 steps", "5%"]}


def _without_unit(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value} has no unit: write '{value} epochs' or '{value} steps'"
    return f"{value!r} is no duration: write '30 epochs', '2000 steps', '5%' or '10 min'"


def _wall_clock_message(duration: Duration) -> str:
    return f"'{duration}' is measured by the clock: write it in epochs, steps or percent"


def _without_clock(duration: "int | Duration") -> "int | Duration":
    if isinstance(duration, Duration) and duration.seconds is not None:
        raise ValueError(_wall_clock_message(duration))
    return duration


def _interval(value: Any) -> "int | Duration":
    """Parse an interval: a whole number, whose unit its setting knows, or a duration."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"{value} is no interval: give 1 or more")
        return value
    interval = value if isinstance(value, Duration) else Duration(value)
    if not interval.amount:
        raise ValueError(f"'{interval}' is no interval: write '1 epoch', '200 steps' or '10 min'")
    return interval


def steps_between(interval: "int | Duration", steps_per_epoch: int, total_steps: int, unit: str) -> int:
    """Return an interval in steps; 0 if the clock measures it.

    Args:
        interval: a duration, or a whole number.
        steps_per_epoch: global batches of an epoch.
        total_steps: steps of the whole run.
        unit: that of a whole number: "epochs" or "steps".
    """
    if not isinstance(interval, Duration):
        return interval if unit == "steps" else interval * steps_per_epoch
    return interval.steps(steps_per_epoch, total_steps) if interval.seconds is None else 0


def seconds_of(interval: "int | Duration") -> float:
    """Return the seconds of an interval that the clock measures; 0 for any other."""
    return (interval.seconds or 0.0) if isinstance(interval, Duration) else 0.0


_INTERVAL = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["200 steps", "10 min"]}]}
Interval = Annotated[int | Duration, PlainValidator(_interval), WithJsonSchema(_INTERVAL)]
"""How often something happens: a whole number, or a duration such as "200 steps" or "10 min"."""
StepDuration = Annotated[Duration, AfterValidator(_without_clock)]
"""A duration on which a result depends and which therefore may not be wall-clock time."""
