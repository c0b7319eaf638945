"""The summary lines of a run."""

import pytest

import torchrelay as tr
from torchrelay.train.logs import best_text
from torchrelay.train.progress import Best


@pytest.mark.parametrize(
    ("part", "end"),
    [("test", "(epoch 3; selected on the test data)"), ("validation", "(epoch 3)"), ("train", "(epoch 3)")],
)
def test_the_best_line_says_if_the_test_data_selected_the_model(part, end):
    assert best_text(Best(0.5, 3), tr.Classification(), part).strip() == f"best {part} accuracy: 50.00% {end}"
