"""The base class of all settings of a recipe.

A setting lives beside the code that uses it (the optimizer's in `optim`, the device's in `device`); `recipe` only
composes these classes. `torchrelay recipe` prints the docstring under a field beside its value.
"""

import ast
import inspect
import textwrap
from contextlib import suppress
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator

from torchrelay.errors import warn_renamed

# Keys and transforms of recipes that have a new name. The old ones are accepted for one release.
RENAMED = {
    "data.normalise": "data.normalize",
    "optimizer.normalise_weights": "optimizer.normalize_weights",
}
RENAMED_TRANSFORMS = {"colour_jitter": "color_jitter", "centre_crop": "center_crop"}


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
        protected_namespaces=(),
    )

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
