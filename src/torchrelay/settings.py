"""The base class of all settings of a recipe.

A setting lives beside the code that uses it (the optimizer's in `optim`, the device's in `device`); `recipe` only
composes these classes. `torchrelay recipe` prints the docstring under a field beside its value. What is wrong with a
value is said in one line and in plain words; pydantic's own errors are neither.
"""

import ast
import difflib
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import pairwise
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo

from torchrelay.errors import UsageError, nearest, warn_renamed

# Keys and transforms of recipes that have a new name. The old ones are accepted for one release.
RENAMED = {
    "data.normalise": "data.normalize",
    "optimizer.normalise_weights": "optimizer.normalize_weights",
}
RENAMED_TRANSFORMS = {"colour_jitter": "color_jitter", "centre_crop": "center_crop"}

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
}
# What people call keys that have another name here.
_ALIASES = {
    "learning_rate": "lr",
    "batch": "batch_size",
    "bs": "batch_size",
    "wd": "weight_decay",
    "num_workers": "workers",
    "optim": "optimizer.name",
    "data": "data.root",
    "data_dir": "data.root",
    "device": "device.name",
    "dropout": "model.options.dropout",
    "steps": "max_steps",
}
_SIMILAR = 0.75  # how alike a key must be to what somebody wrote


def rename_keys(recipe: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """Return a recipe's table with the present names of its keys and transforms.

    Args:
        recipe: sections of keys and values, as in a TOML file.
        warn: whether a `FutureWarning` names the new name of each old one.
    """
    renamed = {name: dict(section) if isinstance(section, dict) else section for name, section in recipe.items()}
    for old, new in RENAMED.items():
        (section, old_key), new_key = old.split("."), new.partition(".")[2]
        values = renamed.get(section)
        if isinstance(values, dict) and old_key in values:
            values[new_key] = values.pop(old_key)
            if warn:
                warn_renamed(old, new, stacklevel=3)
    data = renamed.get("data")
    for key in ("augment", "prepare"):
        if isinstance(data, dict) and isinstance(data.get(key), list):
            data[key] = [_rename_transform(transform, warn) for transform in data[key]]
    return renamed


def _rename_transform(transform: Any, warn: bool) -> Any:
    """Return a transform, which is its name or a table with it, under its present name."""
    old = transform.get("name") if isinstance(transform, dict) else transform
    if not isinstance(old, str) or old not in RENAMED_TRANSFORMS:
        return transform
    if warn:
        warn_renamed(f"transform '{old}'", f"'{RENAMED_TRANSFORMS[old]}'", stacklevel=4)
    return transform | {"name": RENAMED_TRANSFORMS[old]} if isinstance(transform, dict) else RENAMED_TRANSFORMS[old]


class Settings(BaseModel):
    """Typed, checked, immutable parameters; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # options of a model of the user's may hold infinity, which TOML has
        protected_namespaces=(),
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(f"{type(self).__name__}: {explain(error, type(self))}") from None

    # Without it, pydantic would build nested settings by `__init__`, whose error couldn't say where they stand.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError:
            own = type(self).__name__
            raise UsageError(
                f"{own}.{name} can't be set, since settings never change: make others by {own}(…)"
            ) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Show the signature as one would write a call; pydantic's shows how each value is checked."""
        kind, nothing = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
        defaults = {
            name: nothing if info.is_required() else info.get_default(call_default_factory=True)
            for name, info in cls.model_fields.items()
        }
        parameters = [inspect.Parameter(name, kind, default=default) for name, default in defaults.items()]
        cls.__signature__ = inspect.Signature(parameters)

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        for old, new in RENAMED.items():
            old_key, new_key = old.partition(".")[2], new.partition(".")[2]
            if isinstance(values, dict) and old_key in values and new_key in cls.model_fields:
                warn_renamed(old, new, stacklevel=3)
                values = {new_key if key == old_key else key: value for key, value in values.items()}
        return values

    @classmethod
    @cache
    def meanings(cls) -> dict[str, str]:
        """Return the docstring under each field, by the field's name.

        The source is parsed on demand. With `use_attribute_docstrings`, pydantic parses it for every class at import,
        which makes importing all settings half again as slow, and a training never shows the docstrings.
        """
        docstrings = {}
        for base in reversed(cls.__mro__[: cls.__mro__.index(Settings)]):
            with suppress(OSError, TypeError):  # a class defined interactively has no source
                (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
                assert isinstance(definition, ast.ClassDef)  # noqa: S101 - the source of a class
                for field, below in pairwise(definition.body):
                    match field, below:
                        case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                            docstrings[name] = inspect.cleandoc(text)
        return docstrings

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON schema, with the fields' docstrings as descriptions."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, meaning in cls.meanings().items():
            if name in properties:
                properties[name]["description"] = meaning
        return schema


# ------------------------------------------------------------------------------------------------ what is wrong


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Return one line for the first of pydantic's errors: the key, what is wrong, and the remedy.

    Args:
        error: raised by the settings.
        root: their class.
    """
    # A misspelled key comes first: it explains why the right one is missing.
    first, *others = sorted(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    names = _without_tags(place, root)
    dotted, found = ".".join(names), first["input"]
    # The errors of a union's members about one value count as one.
    alike = [o for o in others if _without_tags([str(part) for part in o["loc"]], root) == names]
    more = f" (and {len(others) - len(alike)} more)" if len(others) > len(alike) else ""
    if first["type"] == "extra_forbidden":
        *sections, key = place
        dotted = ".".join([*_without_tags(sections, root), key])
        return f"unknown key '{dotted}'{_remedy(root, sections, key, found)}{more}"
    if first["type"] == "value_error":
        return f"{dotted}: {first['msg'].removeprefix('Value error, ')}{more}".removeprefix(": ")
    if first["type"] == "missing":
        return f"{dotted} is missing{more}"
    wanted = " or ".join(dict.fromkeys(in_plain_words(each["msg"]) for each in (first, *alike)))
    given = "" if isinstance(found, dict) else f", not {str(found).lower() if isinstance(found, bool) else repr(found)}"
    example = _example(root, names) if first["type"].endswith(("_type", "_parsing", "_from_float")) else ""
    return f"{dotted or root.__name__} should be {wanted}{given}{example}{more}"


def in_plain_words(message: str) -> str:
    """Return what pydantic says that a value should be, in plain words."""
    message = message.removeprefix("Input should be ").partition(", unable to")[0].partition(", got a number")[0]
    message = message.partition(" or instance of")[0].partition(" after validation")[0]
    for theirs, plain in _PLAIN_WORDS.items():
        message = message.replace(theirs, plain)
    return message


def keys_named(root: type[BaseModel], name: str) -> list[str]:
    """Return the dotted keys that somebody may mean by a name without a section, such as "lr" or "batch-size"."""
    wanted = name.lower().replace("-", "_")
    wanted = _ALIASES.get(wanted, wanted)
    if "." in wanted:
        section, _, key = wanted.partition(".")
        return (
            [wanted] if key.partition(".")[0] in _keys(root, [section] if section in root.model_fields else []) else []
        )
    if wanted in root.model_fields and not any(members(root.model_fields[wanted].annotation)):
        return [wanted]  # these settings have no sections
    if wanted in root.model_fields and "name" in _keys(root, [wanted]):
        return [f"{wanted}.name"]
    keys = [(key, f"{section}.{key}") for section in root.model_fields for key in _keys(root, [section])]
    near = difflib.get_close_matches(wanted, [key for key, _ in keys], n=1, cutoff=_SIMILAR)
    return [dotted for key, dotted in keys if key in near]


def _remedy(root: type[BaseModel], sections: Sequence[str], key: str, value: Any) -> str:
    """Return which key somebody may mean who wrote an unknown one: of this section, or of another one."""
    known = _keys(root, sections)
    inside = next(iter(value), "") if isinstance(value, dict) else ""
    if near := nearest(key, known):
        return near
    elsewhere = [dotted for dotted in keys_named(root, inside or key) if dotted.partition(".")[0] not in sections]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    return "; known here: " + ", ".join(known)


def _example(root: type[BaseModel], names: Sequence[str]) -> str:
    """Return an example of a key's value: its default, or the one that its meaning gives."""
    *sections, key = names or [""]
    for owner in _owners(root, sections):
        if key not in owner.model_fields:
            continue
        field: FieldInfo = owner.model_fields[key]
        default = field.get_default(call_default_factory=True)
        if isinstance(default, bool | int | float | str):
            return f" (such as {key} = {json.dumps(default)})"
        meanings: dict[str, str] = owner.meanings() if hasattr(owner, "meanings") else {}
        meaning = meanings.get(key, "")
        if found := re.search(r"such as (\[.*\])", meaning):
            return f" (such as {key} = {found[1]})"
    return ""


def members(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the settings classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not None:
        for argument in get_args(annotation):
            yield from members(argument)


def _keys(root: type[BaseModel], sections: Sequence[str]) -> list[str]:
    """Return the keys known in a section."""
    return sorted({key for owner in _owners(root, sections) for key in owner.model_fields})


def _owners(root: type[BaseModel], sections: Sequence[str]) -> list[type[BaseModel]]:
    """Return the settings that a section may hold; a union's tag in the path chooses among its members."""
    candidates = [root]
    for section in sections:
        inside = [
            m for c in candidates if section in c.model_fields for m in members(c.model_fields[section].annotation)
        ]
        tagged = [c for c in candidates if "name" in c.model_fields and c.model_fields["name"].default == section]
        candidates = inside or tagged or candidates
    return candidates


def _without_tags(place: Sequence[str], root: type[BaseModel]) -> list[str]:
    """Return an error's location without the parts that say which member of a union pydantic tried."""
    kept: list[str] = []
    candidates = [root]
    for part in place:
        inside = [m for c in candidates if part in c.model_fields for m in members(c.model_fields[part].annotation)]
        known = any(part in c.model_fields for c in candidates)
        if known or part.isdecimal() or not kept:
            kept.append(part)
        candidates = inside or candidates
    return kept
