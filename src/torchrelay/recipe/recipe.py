"""Step 1: the recipe: typed parameters from a TOML file, with overrides and defaults.

A recipe is data. It composes the settings of the seven steps, each of which stands beside the code that it sets. It
names only what torchrelay, torchvision, timm and torch.optim have, so that a recipe from a stranger can't run code.
"""

import json
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from torchrelay.checkpoint.checkpointer import CheckpointSettings
from torchrelay.data.settings import DataSettings
from torchrelay.device.device import DeviceSettings
from torchrelay.distributed.replicas import ParallelSettings
from torchrelay.errors import UsageError, nearest
from torchrelay.models.factory import ModelSettings
from torchrelay.optim.optimizers import SGD, OptimizerSettings
from torchrelay.optim.schedules import Constant, ScheduleSettings
from torchrelay.recipe import shipped
from torchrelay.run.settings import RunSettings
from torchrelay.settings import Settings, explain, keys_named, rename_keys
from torchrelay.tasks.task import LossSettings

Table = dict[str, Any]  # a TOML table
_LARGEST = 2**20  # bytes of a recipe
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
    return load_table(table, overrides, name)


def load_table(table: Table, overrides: Sequence[str], where: str) -> Recipe:
    """Apply overrides to a table, check it and return it as a recipe; see `load`.

    Args:
        table: as a TOML file has it.
        overrides: strings such as "optimizer.lr=0.02".
        where: names the table in an error.

    Raises:
        UsageError: a key or a value is wrong.
    """
    table = rename_keys(table)
    # First what clears its section.
    for override in sorted(overrides, key=lambda text: not text.startswith(_KINDS)):
        _apply(table, override)
        table = rename_keys(table)
    return parse(table, where)


def parse(table: Table, where: str) -> Recipe:
    """Check a table and return it as a recipe.

    Raises:
        UsageError: naming the first wrong key or value, and the nearest right name.
    """
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain(error, Recipe)}") from None
    except UnicodeEncodeError:  # from pydantic; a path may have such bytes
        raise UsageError(f"{where}: a key or a value isn't Unicode text: rename what it names") from None
    for key in _booleans_for_numbers(table, recipe.model_dump()):
        raise UsageError(f"{where}: {key} should be a number, not true or false")
    return recipe


def schema() -> str:
    """Return the JSON schema of recipes, by which editors complete and check them."""
    return json.dumps(Recipe.model_json_schema(), indent=2) + "\n"


def _read(name: str) -> Table:
    path = shipped.path(name) or Path(name)
    if (path / "recipe.toml").is_file():
        raise UsageError(f"{name} is a run's folder: resume it by torchrelay resume, or give its {name}/recipe.toml")
    if name and path.name and path.is_dir():
        raise UsageError(
            f"{name} is a folder, and a recipe is a TOML file; to train on its images: "
            f"torchrelay train image-folder --set {shlex.quote(f'data.root={name}')}"
        )
    if not path.is_file():
        names = shipped.headers()
        raise UsageError(
            f"there is no recipe '{name}', neither a shipped one nor a file"
            f"{nearest(name, names) or '; the shipped ones are ' + ', '.join(names)}"
        )
    if path.stat().st_size > _LARGEST:
        raise UsageError(f"{name} has {path.stat().st_size:,} bytes, too many for a recipe: give its TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} can't be read as text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} isn't TOML: {error}") from None


def _apply(table: Table, override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not sections or not all((*sections, last)):
        remedy = meant(last, text if equals else "VALUE") or "write section.key=value, such as optimizer.lr=0.02"
        raise UsageError(f"--set {override}: {remedy}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
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


def meant(name: str, value: str) -> str:
    """Return which override somebody may mean who gave a key without its section; "" if none."""
    keys = keys_named(Recipe, name) if name else []
    if len(keys) > 2:
        return f"'{name}' is a key of several sections: choose {', '.join(keys[:-1])} or {keys[-1]}"
    candidates = " or ".join(f"--set {shlex.quote(f'{key}={value}')}" for key in keys)
    return candidates and f"write {candidates}"


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


def _lines(recipe: Recipe) -> Iterator[str]:
    for section, meaning_of_section in Recipe.meanings().items():
        yield f"# {meaning_of_section}"
        yield f"[{section}]"
        values: Settings = getattr(recipe, section)
        shown, meanings = values.model_dump(mode="json"), values.meanings()
        for key, info in sorted(type(values).model_fields.items(), key=lambda item: item[0] != "name"):
            default = info.get_default(call_default_factory=True)
            meaning = f"  # {' '.join(meanings[key].split())}" if key in meanings else ""
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
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if value is None:
        return "unset"
    if isinstance(value, bool | int | float | str):
        return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
    return tomli_w.dumps({"v": str(value)}).removeprefix("v = ").strip()


def _toml_key(name: str) -> str:
    """Return a key as TOML writes it: in quotes where it has other characters than a name."""
    return tomli_w.dumps({name: 0}).rpartition(" = ")[0]
