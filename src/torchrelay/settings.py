"""The one base class of everything that a recipe can set.

A setting lives beside the code that it sets (the optimizer's in `optim`, the device's in `device`); `recipe` only
composes these classes. The docstring under a field is what `torchrelay recipe` prints beside its value.
"""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Typed, checked, immutable parameters; an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
