"""The confusion matrix, and the bars of many classes."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from torchrelay.report.confusion import confusion_matrix


def drawn(figure: Figure) -> np.ndarray[Any, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.array(Image.open(buffer).convert("RGB"))


def shown_texts(figure: Figure) -> Sequence[Text]:
    """Return the visible texts after drawing."""
    figure.draw_without_rendering()
    seen = figure.findobj(lambda each: isinstance(each, Text) and each.get_visible() and bool(each.get_text()))
    return [text for text in seen if isinstance(text, Text)]


def cells(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_confusion_matrix_shows_counts_and_colors_shares() -> None:
    figure = confusion_matrix(torch.tensor([[90, 10], [0, 1900]]), ["cat", "dog"])
    assert cells(figure) == ["90", "10", "0", "1,900"]
    assert figure.axes[0].images[0].get_array().tolist() == [[0.9, 0.1], [0, 1]]  # type: ignore[union-attr]
    assert figure.axes[0].get_title(loc="left") == "99.50% of 2,000 samples right"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog"]


def test_a_class_without_samples_is_blank_and_wrong_names_are_replaced_by_numbers() -> None:
    figure = confusion_matrix(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]]), ["cat", "dog"])
    assert np.isfinite(figure.axes[0].images[0].get_array()).all()  # type: ignore[arg-type]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    assert figure.axes[0].get_title(loc="left") == "83.33% of 6 samples right"
    assert confusion_matrix(torch.zeros(2, 2).long()).axes[0].get_title(loc="left") == "0.00% of 0 samples right"


@pytest.mark.parametrize(("classes", "counted"), [(20, True), (21, False), (50, False)])
def test_above_twenty_classes_the_confusion_matrix_has_no_numbers(classes: int, counted: bool) -> None:
    figure = confusion_matrix(torch.eye(classes).long())
    assert len(cells(figure)) == (classes**2 if counted else 0)
    assert len(figure.axes[0].get_yticks()) == classes


def bars(figure: Figure) -> list[list[tuple[str, float, str]]]:
    """Return the label, the length and the note of each bar of each panel."""
    return [
        [
            (label.get_text(), patch.get_width(), note.get_text())  # type: ignore[attr-defined]
            for label, patch, note in zip(axes.get_yticklabels(), axes.patches, axes.texts, strict=False)
        ]
        for axes in figure.axes
    ]


def test_of_many_classes_the_most_confused_pairs_and_the_worst_classes_are_shown() -> None:
    matrix = torch.eye(200).long() * 10
    matrix[7, 7], matrix[7, 9], matrix[9, 7], matrix[150, 3], matrix[60, 60] = 6, 4, 5, 30, 0
    figure = confusion_matrix(matrix, [f"bird {index}" for index in range(200)], "after epoch 3")
    pairs, worst = bars(figure)
    assert pairs == [
        ("bird 150 → bird 3", 30, "30  (75.0%)"),
        ("bird 9 → bird 7", 5, "5  (33.3%)"),
        ("bird 7 → bird 9", 4, "4  (40.0%)"),
    ]
    assert worst == [
        ("bird 150", 0.25, "25.0% of 40"),
        ("bird 7", 0.6, "60.0% of 10"),
        ("bird 9", pytest.approx(2 / 3), "66.7% of 15"),
    ]
    assert figure.axes[0].get_title(loc="left").startswith("98.07% of 2,025 samples right after epoch 3\n")


def test_of_many_classes_twenty_bars_are_shown_and_none_if_all_is_right() -> None:
    assert [len(panel) for panel in bars(confusion_matrix(torch.ones(100, 100).long()))] == [20, 20]
    right = confusion_matrix(torch.eye(51).long())
    assert bars(right) == [[], []]
    assert [[text.get_text() for text in axes.texts] for axes in right.axes] == [["none"], ["none"]]


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (2, "{}"),
        (10, "class{}"),
        (20, "a class with a very long name, number {}"),
        (100, "a class with a very long name, number {}"),
        (500, "{}"),
    ],
)
def test_no_text_of_the_confusion_matrix_is_clipped(classes: int, name: str) -> None:
    matrix = torch.full((classes, classes), 12_345)
    matrix[0, 1] = 123_456
    figure = confusion_matrix(matrix, [name.format(index) for index in range(classes)])
    for text in shown_texts(figure):
        box, page = text.get_window_extent(), figure.bbox
        assert page.x0 <= box.x0 < box.x1 <= page.x1, text
        assert page.y0 <= box.y0 < box.y1 <= page.y1, text


def test_numbers_are_readable_on_their_colors() -> None:
    figure = confusion_matrix(torch.tensor([[100, 0], [50, 50]]))
    assert [text.get_color() for text in figure.axes[0].texts] == ["white", "#c4c4c4", "white", "white"]
    picture = drawn(figure)
    assert (picture == drawn(confusion_matrix(torch.tensor([[100, 0], [50, 50]])))).all()
