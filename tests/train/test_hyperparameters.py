"""What TensorBoard's table of runs shows of a run's settings."""

from typing import Any

import torchrelay as tr
from torchrelay.recipe import recipe
from torchrelay.train import hyperparameters


def shown(name: str, *overrides: str) -> dict[str, Any]:
    return hyperparameters.of(recipe.load(name, overrides).model_dump(mode="json", exclude_none=True))


def test_what_people_vary_and_what_was_changed_is_shown_and_little_else() -> None:
    plain = shown("digits")
    assert plain["optimizer.lr"] == 0.05
    assert {"run.epochs", "run.seed", "data.batch_size", "model.name", "schedule.name"} <= plain.keys()
    assert len(plain) < 20
    changed = shown("digits", "optimizer.lr=0.1", "data.drop_last=true", "run.test_views=2", "checkpoint.keep=9")
    assert {name: value for name, value in changed.items() if plain.get(name) != value} == {
        "optimizer.lr": 0.1,
        "data.drop_last": True,
        "run.test_views": 2,
        "checkpoint.keep": 9,
    }


def test_folders_and_versions_are_not_shown() -> None:
    record = recipe.load("image-folder", ["data.root=photos"]).model_dump(mode="json", exclude_none=True)
    found = hyperparameters.of(record | {"environment": {"torch": "2.10"}})
    assert not {"data.root", "environment.torch"} & found.keys()


def test_each_section_of_a_recipe_is_known() -> None:
    """Those of the optimizer and the schedule have a class for each name."""
    assert hyperparameters._SECTIONS.keys() == tr.Recipe.model_fields.keys() - {"optimizer", "schedule"}
