"""`torchrelay check`: a table, a page with nothing unescaped, exit codes, and nothing else written."""

import re

import numpy as np
import pytest
from PIL import Image

from torchrelay import cli


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "<b>dog"):
            folder = tmp_path / "photographs" / part / name
            folder.mkdir(parents=True)
            for number in range(12):
                pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    same = tmp_path / "photographs" / "train" / "<b>dog" / "1.png"
    (tmp_path / "photographs" / "test" / "<b>dog" / "2.png").write_bytes(same.read_bytes())
    return tmp_path / "photographs"


def line(photographs, *more):
    return ["check", "image-folder", f"--set=data.root={photographs}", "--set=data.cache=false", *more]


def test_findings_are_in_the_table_and_on_the_page_with_thumbnails_and_escaped_names(photographs, tmp_path, capsys):
    out = tmp_path / "check.html"
    before = set(tmp_path.rglob("*"))
    assert cli.main(line(photographs, "--out", str(out))) == 0
    said = capsys.readouterr().out
    assert "1  test image is in the training data as well" in said
    assert "train/<b>dog/1.png = test/<b>dog/2.png" in " ".join(said.split())
    page = out.read_text()
    assert "<b>dog" not in page
    assert "train/<wbr>&lt;b&gt;dog/<wbr>1.png" in page
    assert page.count("<img") == 2
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert set(tmp_path.rglob("*")) - before == {out}


def test_strict_exits_with_1_if_something_serious_was_found(photographs, capsys):
    assert cli.main(line(photographs, "--strict")) == 1
    assert "error: 1 finding is serious" in capsys.readouterr().err
    (photographs / "test" / "<b>dog" / "2.png").unlink()
    assert cli.main(line(photographs, "--strict")) == 0


def test_a_full_page_stays_below_2_mb(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for number in range(60):
            pixels = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            for copy in ("a", "b"):
                Image.fromarray(pixels).save(tmp_path / "photographs" / name / f"{number}{copy}.png")
    out = tmp_path / "check.html"
    assert cli.main([*line(tmp_path / "photographs", "--out", str(out))]) == 0
    assert 100_000 < out.stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["check", "image-folder"], "data.root isn't set"),
        (["check", "digit"], "did you mean 'digits'?"),
        (["check", "digits", "--out", "none/check.html"], "can't write none/check.html"),
    ],
)
def test_a_mistake_is_one_line(arguments, error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) in (1, 2)
    said = capsys.readouterr().err
    assert error in said
    assert said.count("\n") == 1
