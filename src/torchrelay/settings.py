"""The one base class of everything that a recipe can set.

A setting lives beside the code that it sets (the optimizer's in `optim`, the device's in `device`); `recipe` only
composes these classes. The docstring under a field is what `torchrelay recipe` prints beside its value.
"""

import ast
import inspect
import textwrap
from contextlib import suppress
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler


class Settings(BaseModel):
    """Typed, checked, immutable parameters; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """Return the docstring under each field, by the field's name.

        They are read from the source when somebody asks. Pydantic can read them when it makes the classes, which
        would be a third of the time that importing them takes, for what a training never shows.
        """
        found = {}
        for kind in reversed(cls.__mro__[: cls.__mro__.index(Settings)]):
            with suppress(OSError, TypeError):  # of a class that somebody typed in there is no source
                (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
                assert isinstance(definition, ast.ClassDef)  # noqa: S101 - that is what a class's source is
                for field, text in pairwise(definition.body):
                    match field, text:
                        case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                            found[name] = inspect.cleandoc(meaning)
        return found

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the JSON schema, with the fields' meanings."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, meaning in cls.meanings().items():
            if name in properties:
                properties[name]["description"] = meaning
        return schema
