"""A file that anything relies on appears as a whole, and is on the disk before it has its name."""

import os

import pytest

from torchrelay.errors import RelayError
from torchrelay.run import disk
from torchrelay.run.record import read_record


def test_a_file_is_flushed_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115, PTH119
        fsync(descriptor)

    def replaced(old, new) -> None:
        events.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", replaced)
    monkeypatch.setattr(os, "replace", replaced)
    disk.write(tmp_path / "recipe.toml", "text")
    assert events == [".recipe.toml.partial", "renamed", tmp_path.name]
    assert (tmp_path / "recipe.toml").read_text(encoding="utf-8") == "text"


def test_an_empty_recipe_is_damaged_and_not_a_run_of_defaults(tmp_path):
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(RelayError, match=r"recipe.toml is damaged.*it has no section \[run\]"):
        read_record(tmp_path)


def test_a_recipe_that_is_far_too_long_is_damaged_at_once(tmp_path):
    (tmp_path / "recipe.toml").write_text("[run]\n" + "#" * 5 * 2**20)
    with pytest.raises(RelayError, match=r"recipe.toml is damaged.*it is too long"):
        read_record(tmp_path)
