"""The comparison with nanoGPT: the same text in the same parts, and losses that mean the same."""

import math

import pytest
import torch
from torch.nn import functional as F

from benchmarks.speed import fashion, nanogpt
from benchmarks.speed.nanogpt import Run
from torchrelay.data import text


@pytest.mark.parametrize("characters", [1_000, 1_009, 2_345, 9_994])
def test_the_text_is_divided_for_both_at_the_same_character(tmp_path, characters):
    corpus = tmp_path / "text.txt"
    corpus.write_text(("the quick brown fox jumps over the lazy dog. " * 300)[:characters])
    validation, share = nanogpt.held_out(corpus)
    assert len(validation) == characters - int(characters * 0.9)
    ours = text(corpus, 1, share)[1].inputs.flatten()
    assert torch.equal(ours, validation[:-1])  # the last character has no next one


def test_the_mean_loss_is_that_of_the_next_character_in_whole_windows():
    part = torch.arange(64 * 5 + 30) % 7
    assert nanogpt.mean_loss(lambda x: torch.zeros(*x.shape, 7), part) == pytest.approx(math.log(7))
    assert nanogpt.mean_loss(lambda x: 100.0 * F.one_hot((x + 1) % 7, 7), part) == pytest.approx(0.0)


def test_a_script_whose_seed_cannot_be_set_is_refused(tmp_path):
    (tmp_path / "train.py").write_text("print('no seed')\n")
    with pytest.raises(SystemExit, match="has the seed 1337 0 times, not once"):
        nanogpt.theirs(tmp_path, 1, torch.zeros(65, dtype=torch.int64))


def test_the_tables_verdicts_are_of_the_worst_loss_and_the_median_time():
    found = nanogpt.table([(Run(1.90, 60.0), Run(1.88, 18.0)), (Run(1.88, 60.0), Run(1.89, 24.0))])
    mean, worst, seconds = (goal.row()[2] for goal in found.goals)
    assert mean.endswith(": met")
    assert worst.endswith(": **not met**")
    assert seconds == "0.333: **not met**"  # 0.35


def test_fashion_mnists_verdicts_are_of_the_lowest_accuracy_and_the_longest_run():
    found = fashion.table([(0.92, 20.0), (0.89, 61.0)])
    assert [goal.row()[2].partition(": ")[2] for goal in found.goals] == ["**not met**"] * 2
