"""Nested outputs: joined over batches, and sent between processes without pickle."""

from typing import NamedTuple

import pytest
import torch

from torchrelay.errors import RelayError
from torchrelay.train.trees import joined, pack, unpack


class Found(NamedTuple):
    boxes: torch.Tensor
    name: str


def test_packing_round_trips():
    value = {
        "rows": [Found(torch.arange(3), "a"), Found(torch.ones(2, 2)[:, 1], "b")],
        "pair": (1, 2.5, None, True),
        "half": {"x": torch.tensor(1.0, dtype=torch.bfloat16)},
        3: "three",
    }
    found = unpack(pack(value))
    assert str(found) == str(value)
    assert isinstance(found["rows"][0], Found)
    assert found["half"]["x"].dtype == torch.bfloat16


def test_other_objects_are_refused():
    with pytest.raises(RelayError, match="several processes can't share object, which the task returns"):
        pack({"x": object()})


def test_nested_batches_are_concatenated():
    batches = [Found(torch.zeros(2, 3), ["a", "b"]), Found(torch.ones(1, 3), ["c"])]
    found = joined(batches)
    assert found.boxes.shape == (3, 3)
    assert found.name == ["a", "b", "c"]
    assert joined([{"x": torch.zeros(1)}, {"x": torch.ones(2)}])["x"].tolist() == [0, 1, 1]
    with pytest.raises(RelayError, match=r"let the task's predict\(\) return a list"):
        joined([torch.zeros(2, 3), torch.zeros(2, 4)])
