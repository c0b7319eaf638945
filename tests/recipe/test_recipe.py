"""Recipes: shipped ones, printing, overrides, and errors."""

import json
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

import torchrelay as tr
from torchrelay.data.augment import ColorJitter, Flip, PaddedCrop, RandomResizedCrop
from torchrelay.data.settings import DataSettings
from torchrelay.errors import RelayError, UsageError
from torchrelay.recipe import recipe, shipped
from torchrelay.run.identity import compare_recipes
from torchrelay.settings import Settings, members


def said_of(capsys, *overrides: str, name: str = "digits") -> str:
    with pytest.raises(UsageError) as caught:
        recipe.load(name, overrides)
    text = str(caught.value)
    assert "\n" not in text
    assert "Input should be" not in text
    assert "pydantic" not in text
    return text


# ------------------------------------------------------------------------------------------------ what ships


@pytest.mark.parametrize("name", shipped.headers())
def test_a_shipped_recipe_round_trips_through_toml(name):
    loaded = recipe.load(name)
    assert recipe.parse(tomllib.loads(loaded.to_toml()), name) == loaded


@pytest.mark.parametrize("name", shipped.headers())
def test_a_shipped_recipe_starts_with_its_purpose_and_command(name):
    lines = shipped.path(name).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")
    assert any(line.startswith(f"# torchrelay train {name}") for line in lines)


@pytest.mark.parametrize("name", shipped.headers())
def test_a_shipped_recipe_leaves_its_replicas_to_the_number_of_devices(name):
    assert recipe.load(name).parallel.replicas is None


def settings_classes() -> list[type[Settings]]:
    found: dict[str, type[Settings]] = {}

    def visit(model: type[BaseModel]) -> None:
        for field in model.model_fields.values():
            for member in members(field.annotation):
                if member.__name__ not in found:
                    found[member.__name__] = member
                    visit(member)

    visit(recipe.Recipe)
    return list(found.values())


@pytest.mark.parametrize("settings", settings_classes(), ids=lambda settings: settings.__name__)
def test_each_key_has_a_description(settings):
    """`name`, the tag of a table, needs no description."""
    meanings = settings.meanings()
    assert settings.model_fields.keys() - meanings.keys() <= {"name"}, f"of {settings.__name__} have no docstring"
    for meaning in meanings.values():
        assert "\n" not in meaning
        assert meaning.endswith((".", ".)"))


def test_descriptions_are_inherited_and_need_the_source():
    class Warmer(tr.optim.Cosine):
        warmth: int = 3
        """How warm."""

    assert Warmer.meanings() == tr.optim.Cosine.meanings() | {"warmth": "How warm."}
    assert Warmer.model_json_schema()["properties"]["warmth"]["description"] == "How warm."
    typed_in = type("TypedIn", (tr.optim.Cosine,), {"__module__": "nowhere"})
    assert typed_in.meanings() == tr.optim.Cosine.meanings()


def test_a_printed_recipe_has_the_description_and_default_of_each_key():
    lines = recipe.load("digits", ["optimizer.lr=0.3"]).to_toml().splitlines()
    assert "[optimizer]" in lines
    (rate,) = [line for line in lines if line.startswith("lr = ")]
    assert rate.startswith("lr = 0.3  # The ")
    assert rate.endswith("(default 0.1)")
    (unset,) = [line for line in lines if line.startswith("# max_steps")]
    assert "Unset: train all epochs." in unset
    for line in lines:
        if line and not line.startswith("["):
            assert "#" in line


def test_the_schema_supports_completion_in_editors():
    schema = json.loads(recipe.schema())
    assert set(schema["properties"]) == set(recipe.Recipe.model_fields)
    assert schema["additionalProperties"] is False
    run = schema["$defs"]["RunSettings"]["properties"]
    assert run["epochs"]["minimum"] == 1
    assert run["epochs"]["description"] == "Number of passes over the training data."
    transforms = schema["$defs"]["DataSettings"]["properties"]["augment"]["items"]
    assert "crop" in json.dumps(schema["$defs"])
    assert transforms


def test_the_schema_in_the_docs_is_up_to_date():
    """`make docs` writes it."""
    assert (Path(__file__).parents[2] / "docs" / "reference" / "recipe.schema.json").read_text() == recipe.schema()


def test_the_python_name_is_the_same_class():
    assert tr.Recipe is recipe.Recipe
    assert recipe.Recipe() == recipe.parse({}, "nothing")


# ------------------------------------------------------------------------------------------------ --set


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("run.epochs=3", "run", "epochs", 3),
        ("run.epochs = 3", "run", "epochs", 3),
        ("run.exact=false", "run", "exact", False),
        ("data.download=True", "data", "download", True),
        ("data.root=some where/else", "data", "root", "some where/else"),
        ('data.root="some where"', "data", "root", "some where"),
        ("data.root=a=b", "data", "root", "a=b"),
        ("data.root=Ärger/七", "data", "root", "Ärger/七"),
        ("optimizer.lr=1e-3", "optimizer", "lr", 1e-3),
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("checkpoint.every=10 min", "checkpoint", "every", "10 min"),
        ("data.augment=[]", "data", "augment", []),
        ('data.augment=["flip"]', "data", "augment", [Flip()]),
        (
            'data.augment=["flip", {name="crop", padding=3}]',
            "data",
            "augment",
            [Flip(), PaddedCrop(padding=3)],
        ),
        (
            'data.augment=[{name="random_resized_crop", size=8, scale=[0.5, 1]}]',
            "data",
            "augment",
            [RandomResizedCrop(size=8, scale=(0.5, 1.0))],
        ),
        ("model.options.widths=[8, 16, 16]", "model", "options", {"widths": [8, 16, 16]}),
        ("loss.class_weights=balanced", "loss", "class_weights", "balanced"),
        ("loss.class_weights=[1, 2.5]", "loss", "class_weights", [1.0, 2.5]),
        ("model.pretrained=true", "model", "pretrained", True),
        ("model.pretrained=True", "model", "pretrained", True),
        ("model.pretrained=IMAGENET1K_V2", "model", "pretrained", "IMAGENET1K_V2"),
        ("run.seed=9223372036854775807", "run", "seed", 2**63 - 1),
    ],
)
def test_an_override_takes_the_type_of_its_key(override, section, key, value):
    assert getattr(getattr(recipe.load("digits", [override]), section), key) == value


def test_the_last_override_of_a_key_wins():
    assert recipe.load("digits", ["run.epochs=3", "run.epochs=4"]).run.epochs == 4


def test_another_optimizer_starts_from_its_own_defaults_in_any_order():
    for overrides in (["optimizer.lr=0.5", "optimizer.name=adamw"], ["optimizer.name=adamw", "optimizer.lr=0.5"]):
        assert recipe.load("digits", overrides).optimizer == tr.optim.AdamW(lr=0.5)
    assert recipe.load("digits", ["optimizer.name=sgd"]) == recipe.load("digits")


def test_a_recipe_file_is_loaded(tmp_path):
    file = tmp_path / "my own.toml"
    file.write_text('[run]\nepochs = 2\n[data]\naugment = ["flip"]\n')
    loaded = recipe.load(str(file), ["run.seed=5"])
    assert (loaded.run.epochs, loaded.run.seed, loaded.data.augment) == (2, 5, [Flip()])


# ------------------------------------------------------------------------------------------------ renamed keys


@pytest.mark.parametrize(
    ("content", "overrides", "value"),
    [
        ("normalise = false", [], False),
        ("normalise = true", ["data.normalize=false"], False),
        ("normalize = true", ["data.normalise=false"], False),
        ("normalise = true", ["data.normalise=false"], False),
    ],
)
def test_an_old_key_is_accepted_with_a_warning_that_names_the_new_one(content, overrides, value, tmp_path):
    file = tmp_path / "old.toml"
    file.write_text(f"[data]\n{content}\n")
    with pytest.warns(FutureWarning, match=r"data\.normalise has been renamed to data\.normalize;"):
        assert recipe.load(str(file), overrides).data.normalize is value


def test_an_old_key_of_an_optimizer_and_an_old_transform_are_accepted():
    with pytest.warns(FutureWarning, match=r"normalise_weights has been renamed to optimizer\.normalize_weights"):
        loaded = recipe.load("digits", ["optimizer.name=muon", "optimizer.normalise_weights=true"])
    assert loaded.optimizer.normalize_weights
    with pytest.warns(FutureWarning, match="transform 'colour_jitter' has been renamed to 'color_jitter'"):
        assert recipe.load("digits", ['data.augment=["colour_jitter"]']).data.augment == [ColorJitter()]


def test_an_old_name_works_in_python_and_warns_once_per_call():
    with pytest.warns(FutureWarning, match=r"data\.normalise has been renamed") as seen:
        assert DataSettings(normalise=False) == DataSettings(normalize=False)
    assert len(seen) == 1
    with pytest.raises(UsageError, match=r"^RunSettings: unknown key 'normalise'; "):
        tr.RunSettings(normalise=False)


def test_a_recipe_with_old_names_does_not_change_a_run():
    new = recipe.load("digits", ['data.augment=[{name="color_jitter", hue=0.2}]', "data.normalize=false"])
    record = new.model_dump(mode="json", exclude_none=True)
    old = json.loads(json.dumps(record).replace('"normalize"', '"normalise"').replace("color_jitter", "colour_jitter"))
    assert old != record
    assert compare_recipes(old, record, accept_changes=False) == []
    with pytest.raises(RelayError, match=r"data\.normalize was False and is True"):
        compare_recipes(old, record | {"data": record["data"] | {"normalize": True}}, accept_changes=False)


# ------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("override", "says"),
    [
        # unknown keys, at each level
        ("rum.epochs=3", "digits: unknown key 'rum'; did you mean 'run'?"),
        ("run.epoch=3", "digits: unknown key 'run.epoch'; did you mean 'epochs'?"),
        ("run.qqqqq=3", "digits: unknown key 'run.qqqqq'; known here: epochs, evaluate_batches, evaluate_every,"),
        ("optimizer.lrr=1", "digits: unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("schedule.warmpu=1", "digits: unknown key 'schedule.warmpu'; did you mean 'warmup'?"),
        ('data.augment=[{name="crop", paddding=1}]', "unknown key 'data.augment.0.paddding'; did you mean 'padding'?"),
        ('optimizer.groups=[{matc=["head*"]}]', "unknown key 'optimizer.groups.0.matc'; did you mean 'match'?"),
        # unknown names
        ("optimizer.name=sdg", "digits: optimizer: there is no optimizer 'sdg'; did you mean 'sgd'?"),
        ("schedule.name=cosin", "digits: schedule: there is no schedule 'cosin'; did you mean 'cosine'?"),
        ('data.augment=["flipp"]', "digits: data.augment.0: unknown transform 'flipp'; did you mean 'flip'?"),
        ('data.prepare=["flip"]', "digits: data.prepare.0: unknown transform 'flip': choose one of resize,"),
        ('data.augment=[{padding=1}]', "digits: data.augment.0: a transform needs a name: one of flip, "),
        # wrong types
        ("run.epochs=three", "digits: run.epochs should be a whole number, not 'three'"),
        ("run.epochs=2.5", "digits: run.epochs should be a whole number, not 2.5"),
        ("run.epochs=true", "digits: run.epochs should be a number, not true or false"),
        ("optimizer.lr=false", "digits: optimizer.lr should be a number, not true or false"),
        ('data.augment=[{name="crop", padding=true}]', "digits: data.augment.0.padding should be a number, not true"),
        ("run.epochs=", "digits: run.epochs should be a whole number, not ''"),
        ("run.exact=perhaps", "digits: run.exact should be true or false, not 'perhaps'"),
        ("data.augment=flip", "digits: data.augment should be a list, not 'flip'"),
        ("data.augment=[3]", "digits: data.augment.0 should be a table, not 3"),
        ("data.root=3", "digits: data.root should be a string, not 3"),
        ("data.options=3", "digits: data.options should be a table, not 3"),
        ("optimizer.lr=[1]", "digits: optimizer.lr should be a number, not [1]"),
        ("loss.class_weights=balancd", "digits: loss.class_weights should be a list or 'balanced', not 'balancd'"),
        ('optimizer.groups=[{lr=1}]', "digits: optimizer.groups.0.match is missing"),
        ('optimizer.groups=[{match=[]}]', "digits: optimizer.groups.0.match should be a list with at least 1 item"),
        # impossible values
        ("run.epochs=0", "digits: run.epochs should be at least 1, not 0"),
        ("run.seed=-1", "digits: run.seed should be at least 0, not -1"),
        ("run.seed=9223372036854775808", "digits: run.seed should be less than 9223372036854775808, not"),
        ("optimizer.lr=nan", "digits: optimizer.lr should be a finite number, not nan"),
        ("optimizer.momentum=2", "digits: optimizer.momentum should be less than 1, not 2"),
        ("data.sampling=shufle", "digits: data.sampling should be 'shuffle', 'balanced' or 'sequential', not 'shufle'"),
        ("data.test_share=0", "digits: data.test_share should be more than 0, not 0"),
        ("data.mean=[0.5]", "digits: data: data.mean and data.std go together: set both or none"),
        ("device.precision=float16", "device.precision should be 'float32', 'bf16', 'fp16' or 'auto', not 'float16'"),
        ("checkpoint.every=1 fortnight", "digits: checkpoint.every: '1 fortnight' has no unit that we know"),
        ("checkpoint.every=0 epochs", "digits: checkpoint.every: '0 epochs' is no interval"),
        ("schedule.warmup=5", "digits: schedule.warmup: 5 has no unit: write '5 epochs' or '5 steps'"),
        # what isn't written as it should be
        ("epochs=3", "--set epochs=3: write --set run.epochs=3"),
        ("run.epochs", "--set run.epochs: write --set run.epochs=VALUE"),
        ("=3", "--set =3: write section.key=value"),
        (".epochs=3", "--set .epochs=3: write --set run.epochs=3"),
        ("run.epochs.x=3", "--set run.epochs.x=3: 'epochs' is a value, not a section"),
        ("data.augment=[flip]", "[flip] isn't a TOML value: put its strings in double quotes"),
    ],
)  # fmt: skip
def test_a_wrong_override_gives_one_line(override, says, capsys):
    assert says in said_of(capsys, override)


def test_several_errors_are_counted(capsys):
    assert said_of(capsys, "run.epochs=0", "run.sed=3").endswith("did you mean 'seed'? (and 1 more)")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[run\nepochs = 1", "isn't TOML: "),
        (b"\xff\xfe\x00", "can't be read as text"),
        (b"run = 3", "run should be a table, not 3"),
        (b"[run]\nepochs = 1979-05-27", "run.epochs should be a whole number, not "),
        (b"[run]\nepochs = 1\nepochs = 2", "isn't TOML: "),
        (b"[[data.augment]]\nname = 'crop'\npaddding = 1", "unknown key 'data.augment.0.paddding'; did you mean"),
        (b"[optimizer]\nlr = 0.1\n[optimiser]\nlr = 0.1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
    ],
)
def test_an_invalid_file_is_reported_with_the_cause(content, says, tmp_path, capsys):
    file = tmp_path / "wrong.toml"
    file.write_bytes(content)
    text = said_of(capsys, name=str(file))
    assert text.startswith(f"{file}")
    assert says in text


@pytest.mark.parametrize("name", ["../digits", "digits.toml", "", ".", "recipes/digits"])
def test_only_a_shipped_name_or_a_file_is_a_recipe(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"there is no recipe '{name}'" in said_of(capsys, name=name)


def test_a_recipe_file_may_contain_a_recorded_environment(tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text('[run]\nepochs = 2\n[environment]\ntorch = "9.9"\n')
    assert recipe.load(str(file)).run.epochs == 2


# ------------------------------------------------------------------------------------------------ what a fuzzer found


@pytest.mark.parametrize("text", ["[" * 5000, "9" * 5000])
def test_toml_that_python_cannot_hold_is_refused_with_a_line(tmp_path, capsys, text):
    (tmp_path / "x.toml").write_text(f"[run]\nepochs = {text}")
    assert "isn't TOML" in said_of(capsys, name=str(tmp_path / "x.toml"))
    said_of(capsys, f"run.epochs={text}")


def test_an_override_that_is_not_unicode_is_refused_with_a_line(capsys):
    said_of(capsys, "run.\udce6=3")


def test_keys_that_need_quotes_are_written_so_that_they_can_be_read():
    made = recipe.load("digits", ['model.options={"a b" = 1, "\\n" = 2, "" = {"é.x" = 3}}'])
    assert recipe.parse(tomllib.loads(made.to_toml()), "again") == made


def test_infinity_in_the_options_of_a_model_is_written_and_read_again():
    made = recipe.load("digits", ["model.options={limits = [1, inf, {low = -inf}]}"])
    assert recipe.parse(tomllib.loads(made.to_toml()), "again") == made
    assert made.model_dump(mode="json")["model"]["options"] == {"limits": [1, float("inf"), {"low": float("-inf")}]}
