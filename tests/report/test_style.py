"""Fonts: names in any script are drawn by a font of the system, or one line says which is missing."""

import io
import json
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from torchrelay.errors import NoFontWarning
from torchrelay.report import style
from torchrelay.report.confusion import confusion_matrix
from torchrelay.report.style import save, styled
from torchrelay.run.metrics import Headline
from torchrelay.run.plots import PlotProcess

CHINESE = ("猫", "狗")
NOWHERE = "\ue123"  # of private use: no font should have it


@pytest.fixture
def has_chinese() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with styled(CHINESE):
                pass
        except NoFontWarning:
            pytest.skip("this system has no font with Chinese letters")


def ink(text: str, *names: str) -> bytes:
    """Return the pixels of a text."""
    with styled(names):
        figure = Figure(figsize=(1, 1))
        figure.text(0.1, 0.4, text, fontsize=30)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return np.array(Image.open(buffer).convert("L")).tobytes()


@pytest.mark.usefixtures("has_chinese")
def test_chinese_names_are_letters_and_no_boxes() -> None:
    boxes = {ink(letter) for letter in CHINESE}
    assert len(boxes) == 1, "two letters that a font lacks look alike"
    assert len({ink(letter, *CHINESE) for letter in CHINESE} | boxes) == 3


@pytest.mark.usefixtures("has_chinese")
def test_a_font_is_found_that_matplotlibs_list_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [entry for entry in font_manager.fontManager.ttflist if "matplotlib" in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", ours)
    font_manager.fontManager._findfont_cached.cache_clear()  # type: ignore[attr-defined]
    with styled(CHINESE):
        assert len(mpl.rcParams["font.family"]) == 2


def test_names_that_our_font_has_are_written_in_it_alone() -> None:
    with styled(["größe", "кошка", "→", "file\u200d\ufe0f"]):
        assert mpl.rcParams["font.family"] == ["DejaVu Sans"]


def test_a_letter_that_no_font_has_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.warns(NoFontWarning) as said:
        save(confusion_matrix(np.eye(2, dtype=np.int64) * 5, ("cat", f"d{NOWHERE}g")), tmp_path / "names.png")
    assert len(said) == 1
    assert (tmp_path / "names.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("letter", "script", "package"),
    [
        ("猫", "(CJK)", "fonts-noto-cjk"),
        ("ね", "(Hiragana)", "fonts-noto-cjk"),
        ("고", "(Hangul)", "fonts-noto-cjk"),
        ("ब", "(Devanagari)", "fonts-noto-core"),
        ("🐈", "(symbols and emoji)", "fonts-symbola"),
    ],
)
def test_the_line_names_the_script_and_a_package(
    letter: str, script: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(font_manager, "findSystemFonts", list)  # a system without fonts
    with pytest.warns(NoFontWarning) as said, styled([letter, "x"]):
        pass
    [line] = (str(each.message) for each in said)
    assert line.startswith(f"the plots show a box in place of {letter}: ")
    assert script in line
    assert line.endswith(f"install one, such as the package {package}")


@pytest.mark.parametrize(("text", "suffix"), [("猫", "SC"), ("猫ねこ", "JP"), ("猫고양이", "KR"), ("كلمة", "SC")])
def test_a_font_of_several_languages_is_used_in_that_of_the_names(text: str, suffix: str) -> None:
    families = [f"Noto {kind} CJK {language}" for kind in ("Serif", "Sans") for language in ("HK", "JP", "KR", "SC")]
    assert style._face(families, text) == f"Noto Sans CJK {suffix}"


@pytest.mark.plots
def test_the_run_says_the_line_once_however_often_it_draws(tmp_path: Path) -> None:
    folder, said = tmp_path / f"run {NOWHERE}", list[str]()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "epoch": 1, "split": "test", "accuracy": 0.5}) + "\n")
    found = {"accuracy_by_class": {"cat": 1.0, f"d{NOWHERE}g": 1.0}, "confusion_matrix": [[3, 0], [0, 2]]}
    (folder / "evaluation.json").write_text(json.dumps(found))
    drawing = PlotProcess(folder, said.append)
    for _ in range(2):
        drawing.start(Headline("accuracy", percent=True, higher_is_better=True), confusion=True)
        assert drawing.finish()
    [line] = said
    assert line.startswith("warning: the plots show a box in place of ")
