"""Step 1: recipes: a run's parameters as data, and the trainer that they describe.

Names are imported when they are first used, so that the shipped recipes can be listed without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrelay.recipe.build import build_trainer
    from torchrelay.recipe.code import load_code
    from torchrelay.recipe.predictor import Predictor, load_predictor
    from torchrelay.recipe.recipe import Recipe, load, parse

_HOME = {
    "Predictor": "predictor",
    "Recipe": "recipe",
    "build_trainer": "build",
    "load": "recipe",
    "load_code": "code",
    "load_predictor": "predictor",
    "parse": "recipe",
}
__all__ = ["Predictor", "Recipe", "build_trainer", "load", "load_code", "load_predictor", "parse"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"torchrelay.recipe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'torchrelay.recipe' has no attribute '{name}'")
