"""Random runs, interrupted and moved, end in the bytes of undisturbed ones: a few of them; and a difference is seen."""

import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its processes are forked")
if sys.platform.startswith("linux"):
    from benchmarks.exactness import properties


def test_a_configuration_follows_from_its_seed(tmp_path):
    drawn = [properties.draw(seed, tmp_path) for seed in range(100)]
    assert drawn == [properties.draw(seed, tmp_path) for seed in range(100)]
    assert len({str(each) for each in drawn}) == 100
    assert {each.recipe["parallel"]["replicas"] for each in drawn} == {1, 2, 4}
    assert len({each.recipe["optimizer"]["name"] for each in drawn}) > 8


@pytest.mark.slow
def test_three_random_runs_end_in_the_bytes_of_undisturbed_ones():
    found = list(properties.verdicts(3, 40))
    assert [each.what for each in found if each.what.startswith(("different", "a command", "the undisturbed"))] == []
    assert "| ended in other bytes, or in an error | 0 |" in properties.page(found, "…")


def test_a_run_that_ends_in_other_bytes_is_listed_with_its_seed(tmp_path):
    configuration = properties.draw(7, tmp_path)
    text = properties.page([properties.Verdict(configuration, "different: evaluation.json")], "…")
    assert "| ended in other bytes, or in an error | 1 |" in text
    assert "- seed 7: different: evaluation.json" in text
