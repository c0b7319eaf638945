"""A checkpointer in a custom loop, without a trainer or a run folder."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from torchrelay.checkpoint import Checkpointer, CheckpointSettings, Contents, read
from torchrelay.duration import Duration
from torchrelay.errors import RelayError


def train(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Train a small model in a hand-written loop that resumes from the newest checkpoint; return its weights."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = CheckpointSettings(every=Duration("4 steps"))
    with Checkpointer(folder, settings, steps_per_epoch=10, total_steps=steps) as checkpointer:
        start = 0
        if (contents := checkpointer.newest(pytest.fail)) is not None:
            model.load_state_dict(contents.model)
            optimizer.load_state_dict(contents.state["optimizer"])
            start = contents.step
        for step in range(start + 1, steps + 1):
            inputs = torch.rand(8, 4, generator=torch.Generator().manual_seed(step))
            model(inputs).square().sum().backward()
            checkpointer.settle(trained=True)
            optimizer.step()
            optimizer.zero_grad()
            if checkpointer.due_after(step):
                state = {"optimizer": optimizer.state_dict()}
                weights = tuple(name for name, _ in model.named_parameters())
                contents = Contents(step, model.state_dict(), state, weights=weights)
                checkpointer.save(contents, training_continues=True)
    return model.state_dict()


def test_a_custom_loop_resumes_to_the_same_weights(tmp_path):
    uninterrupted = train(tmp_path / "one", 20)
    train(tmp_path / "other", 11)
    resumed = train(tmp_path / "other", 20)
    assert all(torch.equal(resumed[name], weight) for name, weight in uninterrupted.items())
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["step-00000016", "step-00000020"]


def test_a_checkpoint_is_due_by_steps_or_by_the_clock(tmp_path):
    def times(every: str) -> Checkpointer:
        return Checkpointer(tmp_path, CheckpointSettings(every=Duration(every)), steps_per_epoch=10, total_steps=30)

    assert [step for step in range(1, 13) if times("4 steps").due_after(step)] == [4, 8, 12]
    assert [step for step in range(1, 31) if times("50%").due_after(step)] == [15, 30]
    assert not times("4 steps").due_by_clock()
    with times("1 h") as hourly:
        assert not hourly.due_by_clock()
        assert not any(hourly.due_after(step) for step in range(1, 100))
        hourly._saved_at -= 3601
        assert hourly.due_by_clock()
        hourly.save(Contents(1, {}, {}))
        assert not hourly.due_by_clock()


def test_reading_starts_no_thread(tmp_path):
    train(tmp_path, 8)
    before = threading.active_count()
    reader = Checkpointer(tmp_path, CheckpointSettings(), steps_per_epoch=10, total_steps=20)
    newest = reader.newest(pytest.fail)
    assert newest is not None
    assert newest.step == read(reader.find("last")).step == 8
    assert threading.active_count() == before
    reader.close()


def test_a_closed_checkpointer_saves_again(tmp_path):
    calls: list[str] = []
    checkpointer = Checkpointer(
        tmp_path, CheckpointSettings(), steps_per_epoch=1, total_steps=2, before_write=lambda: calls.append("flushed")
    )
    for step in (1, 2):
        checkpointer.save(Contents(step, {"w": torch.ones(3)}, {}))
        checkpointer.close()
    assert calls == ["flushed", "flushed"]
    checkpointer.remove_after(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_failed_write_is_raised_on_leaving_the_loop(tmp_path):
    (tmp_path / "file").write_text("a file where the folder should be")
    with (
        pytest.raises(RelayError, match=r"can't save .*step-00000001"),
        Checkpointer(tmp_path / "file" / "x", CheckpointSettings(), steps_per_epoch=1, total_steps=1) as checkpointer,
    ):
        checkpointer.save(Contents(1, {}, {}))
