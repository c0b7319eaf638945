"""Renamed things keep their old names, with a warning."""

import pytest

import torchrelay as tr
from torchrelay.errors import warn_renamed


def test_an_old_public_name_still_works_and_the_warning_names_the_new_one_and_its_user():
    with pytest.warns(FutureWarning, match=r"torchrelay\.models\.summarise has been renamed to .*\.summarize;") as seen:
        assert tr.models.summarise is tr.models.summarize
    assert seen[0].filename == __file__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'torchrelay\.models' has no attribute 'sumarise'"):
        tr.models.sumarise  # noqa: B018 - looking it up is the test


def test_a_warning_of_a_renamed_key_points_at_the_caller():
    def accept():
        warn_renamed("data.normalise", "data.normalize")

    with pytest.warns(FutureWarning, match=r"data\.normalise has been renamed to data\.normalize") as seen:
        accept()
    assert seen[0].filename == __file__
