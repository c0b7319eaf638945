"""Folders become groups of seeds, of which a verdict is given in words."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from torchrelay.errors import UsageError
from torchrelay.report.compare.groups import SAMPLES, read_groups, spread, verdict
from torchrelay.run.metrics import headline_named
from written_runs import write_run

ACCURACY = headline_named("accuracy")


def write_seeds(folder, values, lr):
    for seed, each in enumerate(values):
        write_run(folder / f"seed-{seed}", (each,), seed=seed, optimizer_lr=lr)
    return folder


def test_a_folder_of_seeds_is_a_group_and_single_runs_of_one_recipe_are_one(tmp_path):
    seeds = write_seeds(tmp_path / "a", (0.5, 0.6), 0.1)
    alone = [write_run(tmp_path / name, (0.5,), seed=number, optimizer_lr=0.2) for number, name in enumerate("bc")]
    assert [len(group.runs) for group in read_groups([seeds, *alone])] == [2, 2]


def test_runs_of_several_recipes_in_one_folder_are_refused_with_what_differs(tmp_path):
    write_run(tmp_path / "a", optimizer_lr=0.1)
    write_run(tmp_path / "b", optimizer_lr=0.2, seed=1)
    with pytest.raises(UsageError, match=r"differ in .*optimizer\.lr"):
        read_groups([tmp_path])


def test_a_seed_twice_and_a_folder_without_runs_are_refused(tmp_path):
    for name in "ab":
        write_run(tmp_path / "all" / name)
    with pytest.raises(UsageError, match="have a seed twice"):
        read_groups([tmp_path / "all"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="isn't a run and holds none"):
        read_groups([tmp_path / "none"])


def test_two_recipes_that_do_not_differ_are_not_distinguishable(tmp_path):
    one = write_seeds(tmp_path / "one", (0.901, 0.905, 0.898, 0.903, 0.9), 0.1)
    other = write_seeds(tmp_path / "other", (0.904, 0.9, 0.902, 0.899, 0.903), 0.2)
    (said,) = verdict(*read_groups([one, other]), ACCURACY)
    assert "other and" in said
    assert "are not distinguishable with 5 seeds, in pairs: the difference is +0.02 ± 0.5" in said


def test_two_recipes_that_differ_are_told_apart(tmp_path):
    one = write_seeds(tmp_path / "one", (0.901, 0.905, 0.898, 0.903, 0.9), 0.1)
    other = write_seeds(tmp_path / "other", (0.884, 0.88, 0.882, 0.879, 0.883), 0.2)
    (said,) = verdict(*read_groups([one, other]), ACCURACY)
    assert "is worse than" in said
    assert ": -1.98 ± 0.5" in said


def test_one_seed_each_is_no_verdict(tmp_path):
    groups = read_groups([write_run(tmp_path / name, (0.5,), model_name=name) for name in "ab"])
    (said,) = verdict(*groups, ACCURACY)
    assert "can't be said from 1 seed: train more by --seeds" in said


def keep_samples(run, right, targets):
    prediction = np.where(right, targets, targets + 1)
    save_file({"prediction": prediction, "target": targets}, run / SAMPLES)


def test_two_networks_are_compared_on_the_same_samples(tmp_path):
    runs = [write_run(tmp_path / name, (0.5,), model_name=name) for name in "abc"]
    targets = np.arange(1000) % 10
    for run, wrong in zip(runs, (slice(0, 50), slice(0, 100), slice(5, 58)), strict=True):
        right = np.ones(1000, dtype=bool)
        right[wrong] = False
        keep_samples(run, right, targets)
    first, worse, alike = read_groups(runs)
    assert "of these two networks" in verdict(first, worse, ACCURACY)[1]
    assert "alone is right on 50" in verdict(first, worse, ACCURACY)[1]
    assert "not distinguishable on the same samples" in verdict(first, alike, ACCURACY)[1]
    keep_samples(runs[1], right, targets[::-1].copy())  # other samples
    assert len(verdict(first, worse, ACCURACY)) == 1


def test_a_damaged_file_of_samples_is_left_out(tmp_path):
    runs = [write_run(tmp_path / name, (0.5,), model_name=name) for name in "ab"]
    for run in runs:
        (run / SAMPLES).write_bytes(b"damaged")
    assert len(verdict(*read_groups(runs), ACCURACY)) == 1


def test_a_spread_is_shown_in_points_of_a_share():
    assert spread([0.5, 0.75], ACCURACY) == "62.50% ± 17.68"
    assert spread([2.0, 1.0], headline_named("loss")) == "1.5000 ± 0.71"
    assert spread([], ACCURACY) == "–"
