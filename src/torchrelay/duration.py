"""Durations as people say them: "30 epochs", "2000 steps", "5%", "10 min"; turned into steps once."""

import re
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]+)\s*", re.IGNORECASE)
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

    Raises:
        ValueError: it isn't one.
    """

    __slots__ = ("amount", "unit")
    amount: float
    unit: str  # epochs, steps, %, seconds, minutes or hours

    def __new__(cls, text: str) -> "Duration":
        match = _TEXT.fullmatch(text)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ValueError(f"'{text}' is no duration: write '30 epochs', '2000 steps', '5%' or '10 min'")
        duration = super().__new__(cls, text.strip())
        duration.amount, duration.unit = float(match[1]), unit
        return duration

    @property
    def seconds(self) -> float | None:
        """The seconds of a duration by the clock, None of one in steps."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Return how many steps this is, rounded, at least one unless it is zero.

        Raises:
            ValueError: it is a duration by the clock, on which nothing that is computed may depend.
        """
        if self.unit in _SECONDS:
            raise ValueError(f"'{self}' is measured by the clock: write it in epochs, steps or percent")
        unit = {"epochs": float(steps_per_epoch), "steps": 1.0, "%": total_steps / 100}[self.unit]
        return max(1, round(self.amount * unit)) if self.amount else 0

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic read it from a text and write it as one."""
        return core_schema.no_info_after_validator_function(
            cls, core_schema.str_schema(), serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Describe it to editors."""
        return {"type": "string", "examples": ["1 epoch", "500 steps", "5%"]}


class StepDuration(Duration):
    """A duration that isn't measured by the clock."""

    __slots__ = ()

    def __new__(cls, text: str) -> "StepDuration":
        duration = super().__new__(cls, text)
        if duration.seconds is not None:
            raise ValueError(f"'{text}' is measured by the clock: write it in epochs, steps or percent")
        return duration  # type: ignore[return-value]
