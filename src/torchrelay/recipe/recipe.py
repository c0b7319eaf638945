"""Step 1: the recipe: typed parameters from a TOML file, overrides, and the defaults.

A recipe is data. It composes the settings of the seven steps, each of which stands beside the code that it sets, and
names only what ships (or what torchvision, timm and torch.optim have); a stranger's recipe runs nothing.
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from torchrelay.checkpoint.schedule import CheckpointSettings
from torchrelay.data.settings import DataSettings
from torchrelay.device.device import DeviceSettings
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import UsageError, nearest
from torchrelay.models.factory import ModelSettings
from torchrelay.optim.optimizers import SGD, OptimizerSettings
from torchrelay.optim.schedules import Constant, ScheduleSettings
from torchrelay.recipe import shipped
from torchrelay.run.settings import RunSettings
from torchrelay.settings import Settings, rename_keys
from torchrelay.tasks.task import LossSettings

Table = dict[str, Any]  # a TOML table
_PLAIN_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid dictionary or object to extract fields from": "a table",
    "a valid dictionary": "a table",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
    "List should have": "a list with",
    "Tuple should have": "a list with",
    " after validation": "",
}
_KINDS = ("optimizer.name=", "schedule.name=")  # sections whose other keys depend on the name


class Recipe(Settings):
    """All parameters of a run, the seven steps as its sections."""

    run: RunSettings = RunSettings()
    """1. How long, from which seed, how exactly."""
    data: DataSettings = DataSettings()
    """2. Which samples, in which batches, how augmented."""
    model: ModelSettings = ModelSettings()
    """3. Which network, from which weights."""
    device: DeviceSettings = DeviceSettings()
    """4. Where the arithmetic runs."""
    parallel: ParallelSettings = ParallelSettings()
    """4. How a global batch is divided."""
    optimizer: OptimizerSettings = Field(default=SGD())
    """5. How the weights are updated."""
    schedule: ScheduleSettings = Field(default=Constant())
    """5. How the learning rate changes by step."""
    loss: LossSettings = LossSettings()
    """6. What is minimized."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    """7. When to save, what to keep."""

    def to_toml(self) -> str:
        """Return the recipe, resolved, as TOML: each key with its meaning, and its default where that is another."""
        return "\n".join(_lines(self)) + "\n"


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its shipped name or its file, and apply overrides.

    Args:
        name: a shipped recipe's name, or the path of a TOML file.
        overrides: texts such as "optimizer.lr=0.02"; the right side is a TOML value, or else a string. Another
            optimizer or schedule by name starts from its own defaults: the file's keys were meant for the old one.

    Raises:
        UsageError: no such recipe, or a key or a value in it is wrong.
    """
    table = rename_keys(_read(name))
    table.pop("environment", None)  # a run's folder adds it: versions, not parameters
    # First what clears its section.
    for override in sorted(overrides, key=lambda text: not text.startswith(_KINDS)):
        _apply(table, override)
        table = rename_keys(table)
    return parse(table, name)


def parse(table: Table, where: str) -> Recipe:
    """Check a table and return the recipe it is.

    Raises:
        UsageError: naming the first wrong key or value, and the nearest right name.
    """
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(error)}") from None
    for place in _truths_for_numbers(table, recipe.model_dump()):
        raise UsageError(f"{where}: {place} should be a number, not true or false")
    return recipe


def schema() -> str:
    """Return the JSON schema of recipes, by which editors complete and check them."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _read(name: str) -> Table:
    path = shipped.path(name) or Path(name)
    if not path.is_file():
        names = shipped.headers()
        raise UsageError(
            f"there is no recipe '{name}', neither a shipped one nor a file"
            f"{nearest(name, names) or '; the shipped ones are ' + ', '.join(names)}"
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} can't be read as text: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} isn't TOML: {error}") from None


def _apply(table: Table, override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not sections or not all((*sections, last)):
        raise UsageError(f"--set {override}: write section.key=value, such as optimizer.lr=0.02")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = {"True": True, "False": False}.get(text.strip(), text.strip())  # as Python spells them
        if text.strip().startswith(("[", "{")):  # a shell takes quotes away unless they stand in quotes
            raise UsageError(
                f"--set {override}: {value} is no TOML value; its strings need quotes, and the shell needs quotes "
                f"around it all, as in --set '{key.strip()}=[\"flip\"]'"
            ) from None
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: '{section}' is a value, not a section")
    if override.startswith(_KINDS) and str(table.get("name", value)).lower() != str(value).lower():
        table.clear()
    table[last] = value


def _truths_for_numbers(given: Any, taken: Any, place: str = "") -> Iterator[str]:
    """Yield the places where true or false was given and pydantic took it for 1 or 0."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for key in given.keys() & taken.keys():
            yield from _truths_for_numbers(given[key], taken[key], f"{place}.{key}".lstrip("."))
    elif isinstance(given, list) and isinstance(taken, list | tuple):
        for number, pair in enumerate(zip(given, taken, strict=False)):
            yield from _truths_for_numbers(*pair, f"{place}.{number}")
    elif isinstance(given, bool) and not isinstance(taken, bool) and isinstance(taken, int | float):
        yield place


def _explain(error: ValidationError) -> str:
    """Return one line for the first of pydantic's findings: the place, what is wrong, and the remedy."""
    # A misspelt key goes first: it explains why the right one is missing.
    first, *others = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    dotted = ".".join(_without_tags(place))
    # What members of a union say of the same value is one finding.
    alike = [o for o in others if _without_tags([str(part) for part in o["loc"]]) == _without_tags(place)]
    more = f" (and {len(others) - len(alike)} more)" if len(others) > len(alike) else ""
    if first["type"] == "extra_forbidden":
        *sections, key = place
        known = _keys(Recipe, sections)
        dotted = ".".join([*_without_tags(sections), key])
        return f"unknown key '{dotted}'{nearest(key, known) or '; known here: ' + ', '.join(known)}{more}"
    if first["type"] == "value_error":
        return f"{dotted}: {first['msg'].removeprefix('Value error, ')}{more}"
    wanted = " or ".join(dict.fromkeys(_in_plain_words(found["msg"]) for found in (first, *alike)))
    if first["type"] == "missing":
        return f"{dotted} is missing{more}"
    found = first["input"]
    given = "" if isinstance(found, dict) else f", not {str(found).lower() if isinstance(found, bool) else repr(found)}"
    return f"{dotted} should be {wanted}{given}{more}"


def _in_plain_words(message: str) -> str:
    """Return what pydantic says that a value should be, in words that aren't a programmer's."""
    message = message.removeprefix("Input should be ").partition(", unable to")[0].partition(", got a number")[0]
    message = message.partition(" or instance of")[0]
    for theirs, plain in _PLAIN_WORDS.items():
        message = message.replace(theirs, plain)
    return message


def _members(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None or get_origin(annotation) is Union:
        for argument in get_args(annotation):
            yield from _members(argument)


def _keys(model: type[BaseModel], sections: Sequence[str]) -> list[str]:
    """Return the keys known in a section; a union's tag in the path chooses among its members."""
    candidates = [model]
    for section in sections:
        inside = [
            m for c in candidates if section in c.model_fields for m in _members(c.model_fields[section].annotation)
        ]
        tagged = [c for c in candidates if "name" in c.model_fields and c.model_fields["name"].default == section]
        candidates = inside or tagged or candidates
    return sorted({key for candidate in candidates for key in candidate.model_fields})


def _without_tags(place: Sequence[str]) -> list[str]:
    """Leave out what pydantic puts into a location to say which member of a union it tried."""
    kept: list[str] = []
    candidates: list[type[BaseModel]] = [Recipe]
    for part in place:
        inside = [m for c in candidates if part in c.model_fields for m in _members(c.model_fields[part].annotation)]
        known = any(part in c.model_fields for c in candidates)
        if known or part.isdecimal() or not kept or len(kept) == 0:
            kept.append(part)
        candidates = inside or candidates
    return kept


def _lines(recipe: Recipe) -> Iterator[str]:
    for section, meaning_of_section in Recipe.meanings().items():
        yield f"# {meaning_of_section}"
        yield f"[{section}]"
        values: Settings = getattr(recipe, section)
        shown, meanings = values.model_dump(mode="json"), values.meanings()
        for key, info in sorted(type(values).model_fields.items(), key=lambda item: item[0] != "name"):
            default = info.get_default(call_default_factory=True)
            meaning = f"  # {meanings[key]}" if key in meanings else ""
            differs = "" if getattr(values, key) == default or info.is_required() else f" (default {_toml(default)})"
            if shown[key] is None:
                yield f"# {key} ={meaning}"  # TOML has no null: a key that isn't there is unset
            else:
                yield f"{key} = {_toml(shown[key])}{meaning}{differs}"
        yield ""


def _toml(value: Any) -> str:
    """Return a value as TOML writes it, on one line."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if value is None:
        return "unset"
    if isinstance(value, bool | int | float | str):
        return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
    return tomli_w.dumps({"v": str(value)}).removeprefix("v = ").strip()
