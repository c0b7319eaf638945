"""What may be varied is read and checked before anything is made."""

import pytest

from torchrelay.errors import UsageError
from torchrelay.report.sweep.space import Parameter, grid, overrides_of, parse


def read(*texts, sets=()):
    return parse(texts, "digits", sets)


def test_ranges_have_the_type_of_their_key():
    (lr, batch, decay) = read("optimizer.lr=1e-3..1:log", "data.batch_size=16..64", "optimizer.weight_decay=0..1e-3")
    assert (lr.low, lr.high, lr.log) == (0.001, 1.0, True)
    assert (batch.low, batch.high, batch.is_whole) == (16, 64, True)
    assert isinstance(decay.low, float)


@pytest.mark.parametrize(
    ("text", "choices"),
    [
        ("model.name=mlp|small-cnn", ("mlp", "small-cnn")),
        ("model.name=[mlp, small-cnn]", ("mlp", "small-cnn")),
        ('model.name=["mlp", "small-cnn"]', ("mlp", "small-cnn")),
        ("data.drop_last=true|false", ("true", "false")),
        ("data.batch_size=[32, 64]", ("32", "64")),
        ('data.augment=[["flip"], []]', ('["flip"]', "[]")),
        ("schedule.warmup=2%|5%", ("2%", "5%")),
    ],
)
def test_choices_are_lists_or_stand_between_bars(text, choices):
    assert read(text)[0].choices == choices


def test_an_optimizer_may_be_varied_together_with_its_keys():
    space = read("optimizer.name=sgd|adamw", "optimizer.lr=1e-4..1e-1:log")
    assert [each.key for each in space] == ["optimizer.name", "optimizer.lr"]


def test_a_grid_counts_up_choices_and_short_ranges_of_whole_numbers():
    found = grid(read("data.batch_size=32|64", "run.epochs=1..3"))
    assert len(found) == 6
    assert found[1] == {"data.batch_size": "32", "run.epochs": 2}


def test_values_become_overrides_without_losing_a_bit():
    assert overrides_of({"optimizer.lr": 0.1 + 0.2, "model.name": "mlp"}) == [
        "optimizer.lr=0.30000000000000004",
        "model.name=mlp",
    ]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "nothing to vary"),
        (["optimizer.lr"], "LOW..HIGH"),
        (["optimizer.lr="], "LOW..HIGH"),
        (["lr=0.1|0.2"], "write --vary 'optimizer.lr=0.1|0.2'"),
        (["optimizer.rate=1e-3..1e-1"], "unknown key 'optimizer.rate'"),
        (["optimizer.lr=1e-1..1e-3"], "isn't below"),
        (["optimizer.lr=0..1:log"], "above 0"),
        (["optimizer.lr=a..b"], "should be a number"),
        (["optimizer.lr=-1..1"], "optimizer.lr should be"),
        (["data.batch_size=1.5..3"], "whole number"),
        (["model.name=mlp..small-cnn"], "isn't a number"),
        (["run.exact=0..1"], "run.exact"),
        (["optimizer.lr=0.1"], "one value"),
        (["optimizer.lr=0.1|0.1"], "names a value twice"),
        (["optimizer.lr=0.1|"], "empty value"),
        (["optimizer.lr=0.1|0.2", "optimizer.lr=0.3|0.4"], "given twice"),
        (["data.batch_size=32|many"], "should be a whole number"),
        (["run.max_steps=1..5"], "a sweep decides itself"),
        (["optimizer.name=sgd|adamw", "optimizer.momentum=0.5|0.9"], "unknown key 'optimizer.momentum'"),
        (['data.augment=[["flip", []]'], "isn't a TOML list"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(texts, says):
    with pytest.raises(UsageError) as caught:
        read(*texts)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_cannot_be_varied_and_set():
    with pytest.raises(UsageError, match="varied and set"):
        read("optimizer.lr=0.1|0.2", sets=["optimizer.lr=0.1"])


def test_a_range_has_no_grid():
    with pytest.raises(UsageError, match="a grid needs the values themselves"):
        grid([Parameter("optimizer.lr", 0.1, 0.2)])
