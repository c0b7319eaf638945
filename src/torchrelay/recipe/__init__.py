"""Step 1: recipes: a run's parameters as data, and the trainer that they describe.

Names are imported when they are first used, so that the shipped recipes can be listed without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrelay.recipe.build import build_trainer
    from torchrelay.recipe.code import load_code
    from torchrelay.recipe.recipe import Recipe, load, parse
    from torchrelay.recipe.trained import Trained

_HOME = {
    "Recipe": "recipe",
    "Trained": "trained",
    "build_trainer": "build",
    "load": "recipe",
    "load_code": "code",
    "parse": "recipe",
}
__all__ = ["Recipe", "Trained", "build_trainer", "load", "load_code", "parse"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"torchrelay.recipe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'torchrelay.recipe' has no attribute '{name}'")
