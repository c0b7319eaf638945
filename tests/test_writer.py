"""Checkpoints written behind the training's back: the copy in memory, the thread, its failures."""

import pytest
import torch

from torchrelay import checkpoint
from torchrelay.checkpoint import CheckpointSettings, Contents
from torchrelay.errors import RelayError
from torchrelay.writer import Writer, in_memory


def test_tied_and_strided_weights_are_saved(tmp_path):
    weight = torch.randn(4, 6)
    written = in_memory(Contents(0, {"a": weight, "b": weight, "c": weight.t()}, {}))
    read = checkpoint.read(checkpoint.write(tmp_path, written))
    assert torch.equal(read.model["b"], weight)
    assert torch.equal(read.model["c"], weight.t())


def test_what_is_in_memory_does_not_change_with_the_model():
    weight = torch.zeros(3)
    saved = in_memory(Contents(0, {"w": weight}, {"s": [weight]}))
    weight += 1
    assert torch.equal(saved.model["w"], torch.zeros(3))
    assert torch.equal(saved.state["s"][0], torch.zeros(3))


def test_the_writer_writes_behind_and_prunes(tmp_path):
    writer = Writer(tmp_path, CheckpointSettings(keep=2, keep_best=0))
    for step in range(5):
        writer.save(Contents(step, {"w": torch.ones(3)}, {}))
    writer.close()
    assert [p.name[-1] for p in checkpoint.whole(tmp_path)] == ["3", "4"]


def test_a_failed_write_is_raised_at_the_next_save(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    writer = Writer(blocked / "checkpoints", CheckpointSettings())
    writer.save(Contents(0, {}, {}))
    with pytest.raises(RelayError, match=r"can't save .*step-00000000"):
        writer.save(Contents(1, {}, {}))
    writer.close()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    writer = Writer(tmp_path, CheckpointSettings())
    mask = torch.tensor([0.0, float("-inf")])  # a buffer may hold what it likes
    writer.save(Contents(1, {"w": torch.ones(2), "mask": mask}, {}, trained=("w",)))
    writer.save(Contents(2, {"w": torch.tensor([1.0, float("nan")]), "mask": mask}, {}, trained=("w",)))
    with pytest.raises(RelayError, match="the weights 'w' are not finite after step 2"):
        writer.close()
    assert [path.name for path in checkpoint.whole(tmp_path)] == ["step-00000001"]


def test_a_second_copy_lies_where_the_first_lay_and_is_right():
    memory: dict[str, torch.Tensor] = {}
    first = in_memory(Contents(1, {"w": torch.arange(6.0)}, {"s": [torch.ones(2)]}), memory)
    where = first.model["w"].data_ptr()
    second = in_memory(Contents(2, {"w": torch.arange(6.0) + 1}, {"s": [torch.ones(3)]}), memory)
    assert second.model["w"].data_ptr() == where
    assert second.model["w"].tolist() == [1, 2, 3, 4, 5, 6]
    assert second.state["s"][0].tolist() == [1, 1, 1], "what has another shape gets memory of its own"


def test_what_is_being_written_is_not_copied_over(tmp_path):
    """Each checkpoint has its own step's numbers, however fast they follow each other."""
    writer = Writer(tmp_path, CheckpointSettings(keep=50))
    for step in range(30):
        writer.save(Contents(step, {"w": torch.full((50_000,), float(step))}, {"s": torch.full((9,), step)}))
    writer.close()
    for step, path in enumerate(checkpoint.whole(tmp_path)):
        found = checkpoint.read(path)
        assert set(found.model["w"].tolist()) == {float(step)}
        assert set(found.state["s"].tolist()) == {step}
