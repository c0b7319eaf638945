"""What a sweep varies: `optimizer.lr=1e-3..1e-1:log`, `data.batch_size=32|64` or `model.name=["mlp", "small-cnn"]`."""

import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchrelay.errors import UsageError
from torchrelay.recipe import recipe as recipes
from torchrelay.recipe.recipe import Recipe

Value = int | float | str  # of a parameter in a trial; a choice's is its text
_RANGE = re.compile(r"(?P<low>[-+.\w]+?)\.\.(?P<high>[-+.\w]+?)(?P<log>:log)?")
_NAMES = ("optimizer.name", "schedule.name")  # which decide what other keys there are
# What the sweep itself decides, or what has no effect on a result.
_REFUSED = {
    "run.max_steps": "a sweep decides itself when a trial pauses: give run.epochs, or --rungs",
    "run.notify": "it is called for a run, and has no effect on one",
}
_FEW = 12  # whole numbers of a range that a grid counts up
_CHECKED = 500  # combinations that are checked before a sweep begins


@dataclass(frozen=True)
class Parameter:
    """A recipe key and what it may be.

    Attributes:
        key: dotted.
        low: of a range, which includes both ends; None for choices.
        high: of a range.
        log: whether a range is drawn from by its logarithm.
        choices: as TOML, or else strings, as `--set` takes them.
    """

    key: str
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What is varied, as `--vary` takes it."""
        if self.choices:
            return f"{self.key}={'|'.join(self.choices)}"
        return f"{self.key}={self.low!r}..{self.high!r}{':log' * self.log}"

    @property
    def is_whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return isinstance(self.low, int)

    def ends(self) -> tuple[Value, ...]:
        """Return the values that are checked before a sweep begins: all choices, or both ends."""
        return self.choices or (self.low, self.high)  # type: ignore[return-value]

    def counted(self) -> tuple[Value, ...]:
        """Return all values for a grid.

        Raises:
            UsageError: it is a range with too many of them.
        """
        if self.choices:
            return self.choices
        if isinstance(self.low, int) and isinstance(self.high, int) and self.high - self.low < _FEW:
            return tuple(range(self.low, self.high + 1))
        raise UsageError(
            f"--vary {self.text}: a grid needs the values themselves: write {self.key}=A|B|C, or use --sampler tpe"
        )


def parse(texts: Sequence[str], recipe: str, overrides: Sequence[str]) -> tuple[Parameter, ...]:
    """Read what is to be varied, and check each value against the recipe.

    Args:
        texts: as `--vary` was given them.
        recipe: its name or file.
        overrides: of the recipe, as `--set` was given them.

    Raises:
        UsageError: a key, a range or a value is wrong.
    """
    if not texts:
        raise UsageError("there is nothing to vary: give --vary, such as --vary optimizer.lr=1e-3..1e-1:log")
    parts = [_split(text) for text in texts]
    keys = [key for key, _ in parts]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"--vary {key} is given twice: give all its values in one")
        if any(override.partition("=")[0].strip() == key for override in overrides):
            raise UsageError(f"{key} is varied and set: leave out --set {key}, or --vary {key}")
        if key in _REFUSED:
            raise UsageError(f"--vary {key}: {_REFUSED[key]}")
    # The other keys of a name's section are read with the first name that is tried.
    names = [f"{key}={_texts(key, value)[0]}" for key, value in parts if key in _NAMES and ".." not in value]
    space = tuple(_parameter(key, value, recipe, [*overrides, *names]) for key, value in parts)
    _check(space, recipe, overrides)
    return space


def overrides_of(values: Mapping[str, Value]) -> list[str]:
    """Return a trial's values as overrides of its recipe."""
    return [f"{key}={value if isinstance(value, str) else repr(value)}" for key, value in values.items()]


def grid(space: Sequence[Parameter]) -> list[dict[str, Value]]:
    """Return all combinations of values; the last parameter changes first.

    Raises:
        UsageError: a range has too many values.
    """
    return [
        dict(zip([each.key for each in space], values, strict=True))
        for values in itertools.product(*(each.counted() for each in space))
    ]


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key or not value:
        raise UsageError(
            f"--vary {text}: write section.key=LOW..HIGH, LOW..HIGH:log or A|B|C, such as optimizer.lr=1e-3..1e-1:log"
        )
    if "." not in key:
        meant = recipes.meant(key, value) or "write section.key, such as optimizer.lr"
        raise UsageError(f"--vary {text}: {meant.replace('--set', '--vary')}")
    return key, value


def _parameter(key: str, value: str, recipe: str, overrides: Sequence[str]) -> Parameter:
    if (found := _RANGE.fullmatch(value)) is not None:
        return _range(key, value, found, recipe, overrides)
    choices = _texts(key, value)
    if len(choices) < 2:
        raise UsageError(
            f"--vary {key}={value} is one value: give a range (LOW..HIGH) or several (A|B), or set it by --set"
        )
    if len(set(choices)) < len(choices):
        raise UsageError(f"--vary {key}={value} names a value twice")
    return Parameter(key, choices=tuple(choices))


def _range(key: str, value: str, found: re.Match[str], recipe: str, overrides: Sequence[str]) -> Parameter:
    where = f"--vary {key}={value}"
    low, high = (_number(found[end], key, recipe, overrides, where) for end in ("low", "high"))
    if type(low) is not type(high):
        low, high = float(low), float(high)
    if low >= high:
        raise UsageError(f"{where}: {found['low']} isn't below {found['high']}")
    if found["log"] and low <= 0:
        raise UsageError(f"{where}: a logarithm needs numbers above 0")
    return Parameter(key, low, high, log=bool(found["log"]))


def _number(text: str, key: str, recipe: str, overrides: Sequence[str], where: str) -> int | float:
    """Return an end of a range with the type that the recipe's key has."""
    value = value_of(recipes.load(recipe, [*overrides, f"{key}={text}"]), key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{where}: {key} isn't a number: list its values, as in {key}=A|B")
    return value


def _texts(key: str, value: str) -> list[str]:
    """Return the choices as TOML, or else strings."""
    if not value.startswith("["):
        texts = [each.strip() for each in value.split("|")]
        if not all(texts):
            raise UsageError(f"--vary {key}={value}: there is an empty value between two bars")
        return texts
    try:
        items = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        inside = value.removeprefix("[").removesuffix("]")
        if any(letter in inside for letter in "[]{}\"'"):
            raise UsageError(
                f"--vary {key}={value} isn't a TOML list: put strings in double quotes and the whole in single quotes"
            ) from None
        return [each.strip() for each in inside.split(",") if each.strip()]  # [sgd, adamw], as one writes it in a shell
    return [each if isinstance(each, str) else _toml(each) for each in items]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a dotted key; None if it is unset."""
    found: Any = recipe.model_dump()
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _check(space: Sequence[Parameter], recipe: str, overrides: Sequence[str]) -> None:
    """Try the combinations of choices with both ends of all ranges, as many as can be tried in a moment."""
    choices = [each for each in space if each.choices]
    ranges = [each for each in space if not each.choices]
    for combination in itertools.islice(itertools.product(*(each.choices for each in choices)), _CHECKED):
        values: dict[str, Value] = dict(zip([each.key for each in choices], combination, strict=True))
        for end in (0, -1) if ranges else (0,):
            ends = {each.key: each.ends()[end] for each in ranges}
            recipes.load(recipe, [*overrides, *overrides_of(values | ends)])
