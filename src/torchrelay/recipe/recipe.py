"""Step 1: the recipe: typed parameters from a TOML file, with overrides and defaults.

A recipe is data. It composes the settings of the seven steps, each of which stands beside the code that it sets. It
names only what torchrelay, torchvision, timm and torch.optim have, so that a recipe from a stranger can't run code.
"""

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

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
    "a valid string": "a string",
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
# The other keys of these sections depend on the name.
_KINDS = ("optimizer.name=", "schedule.name=")


class Recipe(Settings):
    """All parameters of a run; the sections follow the seven steps."""

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
        """Return the whole recipe as TOML: each key with its meaning, and with its default where the value differs."""
        return "\n".join(_lines(self)) + "\n"


def load(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its shipped name or its file, and apply overrides.

    Args:
        name: a shipped recipe's name, or the path of a TOML file.
        overrides: strings such as "optimizer.lr=0.02"; the right side is a TOML value, or else a string. An override
            of the optimizer's or schedule's name resets its section: the file's keys belong to the old one.

    Raises:
        UsageError: there is no such recipe, or a key or a value is wrong.
    """
    table = rename_keys(_read(name))
    table.pop("environment", None)  # a run's folder adds it: versions, not parameters
    # First what clears its section.
    for override in sorted(overrides, key=lambda text: not text.startswith(_KINDS)):
        _apply(table, override)
        table = rename_keys(table)
    return parse(table, name)


def parse(table: Table, where: str) -> Recipe:
    """Check a table and return it as a recipe.

    Raises:
        UsageError: naming the first wrong key or value, and the nearest right name.
    """
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(error)}") from None
    for key in _booleans_for_numbers(table, recipe.model_dump()):
        raise UsageError(f"{where}: {key} should be a number, not true or false")
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
        # True and False are Python's spelling.
        value = {"True": True, "False": False}.get(text.strip(), text.strip())
        # The shell removes quotes that aren't quoted themselves.
        if text.strip().startswith(("[", "{")):
            raise UsageError(
                f"--set {override}: {value} isn't a TOML value: put its strings in double quotes and the whole in "
                f"single quotes, as in --set '{key.strip()}=[\"flip\"]'"
            ) from None
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: '{section}' is a value, not a section")
    if override.startswith(_KINDS) and str(table.get("name", value)).lower() != str(value).lower():
        table.clear()
    table[last] = value


def _booleans_for_numbers(given: Any, parsed: Any, key: str = "") -> Iterator[str]:
    """Yield the keys whose value is a boolean that pydantic took for 1 or 0."""
    if isinstance(given, dict) and isinstance(parsed, dict):
        for name in given.keys() & parsed.keys():
            yield from _booleans_for_numbers(given[name], parsed[name], f"{key}.{name}".lstrip("."))
    elif isinstance(given, list) and isinstance(parsed, list | tuple):
        for number, pair in enumerate(zip(given, parsed, strict=False)):
            yield from _booleans_for_numbers(*pair, f"{key}.{number}")
    elif isinstance(given, bool) and not isinstance(parsed, bool) and isinstance(parsed, int | float):
        yield key


def _explain(error: ValidationError) -> str:
    """Return one line for the first of pydantic's errors: the key, what is wrong, and the remedy."""
    # A misspelled key comes first: it explains why the right one is missing.
    first, *others = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    dotted = ".".join(_without_tags(place))
    # The errors of a union's members about one value count as one.
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
    """Return what pydantic says that a value should be, in plain words."""
    message = message.removeprefix("Input should be ").partition(", unable to")[0].partition(", got a number")[0]
    message = message.partition(" or instance of")[0]
    for theirs, plain in _PLAIN_WORDS.items():
        message = message.replace(theirs, plain)
    return message


def _members(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
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
    """Return an error's location without the parts that say which member of a union pydantic tried."""
    kept: list[str] = []
    candidates: list[type[BaseModel]] = [Recipe]
    for part in place:
        inside = [m for c in candidates if part in c.model_fields for m in _members(c.model_fields[part].annotation)]
        known = any(part in c.model_fields for c in candidates)
        if known or part.isdecimal() or not kept:
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
                yield f"# {key} ={meaning}"  # TOML has no null: a missing key is unset
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
