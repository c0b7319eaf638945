"""The page of the examples has their current line counts."""

import re
from pathlib import Path

import pytest

from benchmarks import examples

PAGE = Path(__file__).parents[2] / "docs" / "evidence" / "examples.md"


def test_the_page_has_the_lines_of_each_example_and_corresponding_program():
    rows = dict(re.findall(r"^\| `(\w+)\.py` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows.keys() == examples.SHOWN.keys()
    for name, row in rows.items():
        what, files = examples.SHOWN[name]
        assert row.startswith(f"{what} | {examples.lines(name)} | {examples.others(files)} | "), name


@pytest.mark.slow
def test_running_an_example_returns_its_result():
    seconds, result = examples.run("tables")
    assert seconds > 0
    assert re.fullmatch(r"test accuracy: \d+\.\d\d%", result)
