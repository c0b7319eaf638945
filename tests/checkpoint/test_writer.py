"""Checkpoints written in the background: the copy in memory, the thread, its failures."""

import threading

import pytest
import torch

from torchrelay import checkpoint
from torchrelay.checkpoint import Contents
from torchrelay.checkpoint import writer as writer_module
from torchrelay.checkpoint.writer import Writer, stage
from torchrelay.errors import RelayError


def test_tied_and_strided_weights_are_saved(tmp_path):
    weight = torch.randn(4, 6)
    written = stage(Contents(0, {"a": weight, "b": weight, "c": weight.t()}, {}))
    read = checkpoint.read(checkpoint.write(tmp_path, written))
    assert torch.equal(read.model["b"], weight)
    assert torch.equal(read.model["c"], weight.t())


def test_the_copy_in_memory_does_not_change_with_the_model():
    weight = torch.zeros(3)
    saved = stage(Contents(0, {"w": weight}, {"s": [weight]}))
    weight += 1
    assert torch.equal(saved.model["w"], torch.zeros(3))
    assert torch.equal(saved.state["s"][0], torch.zeros(3))


def large_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every memory layout, each large enough for its own copy call."""
    images = torch.randn(64, 8, 16, 16)
    waves = torch.randn(128, 128, dtype=torch.complex64)
    return {
        "contiguous": images,
        "channels last": images.to(memory_format=torch.channels_last),
        "transposed": torch.randn(200, 300).t(),
        "with gaps": torch.randn(200, 300)[:, ::2],
        "a part": torch.randn(600, 100)[100:500],
        "expanded": torch.randn(300, 1).expand(300, 100),
        "bfloat16": images.bfloat16(),
        "int64": torch.arange(20_000),
        "bool": images > 0,
        "conjugate": waves.conj(),
        "negative": waves.conj().imag,
        "trained": torch.nn.Parameter(images.clone()),
        "of another class": torch.randn(20_000).as_subclass(Other),
    }


class Other(torch.Tensor):
    """A tensor class of a user."""


@pytest.mark.parametrize("name", large_tensors())
def test_a_large_tensor_is_copied_whatever_its_layout(name):
    tensor = large_tensors()[name]
    before = tensor.detach().clone()
    memory: dict[str, torch.Tensor] = {}
    stage(Contents(0, {"w": torch.zeros_like(tensor)}, {}), memory)
    copy = stage(Contents(1, {"w": tensor}, {}), memory).model["w"]
    with torch.no_grad():
        tensor.copy_(torch.zeros_like(tensor)) if name != "expanded" else tensor[:, :1].zero_()
    assert torch.equal(copy, before)
    assert not copy.requires_grad


def test_large_contiguous_tensors_are_copied_without_torchs_threads(monkeypatch):
    """torch's threads would wait for each other at every tensor."""
    handed: list[torch.Tensor] = []
    copy = torch._foreach_copy_

    def watched(places, tensors, **options):
        handed.extend(tensors)
        return copy(places, tensors, **options)

    monkeypatch.setattr(torch, "_foreach_copy_", watched)
    small, large = torch.ones(10), torch.ones(100_000)
    stage(Contents(0, {"small": small, "large": large, "strided": large[::2]}, {}))
    assert [tensor.shape for tensor in handed] == [small.shape, (50_000,)]


def test_the_writer_saves_in_the_background_and_prunes(tmp_path):
    writer = Writer(tmp_path, keep=2, keep_best=0)
    for step in range(5):
        writer.save(Contents(step, {"w": torch.ones(3)}, {}))
    writer.close()
    assert [p.name[-1] for p in checkpoint.complete(tmp_path)] == ["3", "4"]


def test_a_failed_write_is_raised_at_the_next_save(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    writer = Writer(blocked / "checkpoints", keep=2, keep_best=1)
    writer.save(Contents(0, {}, {}))
    with pytest.raises(RelayError, match=r"can't save .*step-00000000"):
        writer.save(Contents(1, {}, {}))
    writer.close()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    writer = Writer(tmp_path, keep=2, keep_best=1)
    mask = torch.tensor([0.0, float("-inf")])  # a buffer may hold what it likes
    writer.save(Contents(1, {"w": torch.ones(2), "mask": mask}, {}, trained=("w",)))
    writer.save(Contents(2, {"w": torch.tensor([1.0, float("nan")]), "mask": mask}, {}, trained=("w",)))
    with pytest.raises(RelayError, match="the weights 'w' are not finite after step 2"):
        writer.close()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000001"]


def test_a_second_copy_reuses_the_memory_of_the_first():
    memory: dict[str, torch.Tensor] = {}
    first = stage(Contents(1, {"w": torch.arange(6.0)}, {"s": [torch.ones(2)]}), memory)
    where = first.model["w"].data_ptr()
    second = stage(Contents(2, {"w": torch.arange(6.0) + 1}, {"s": [torch.ones(3)]}), memory)
    assert second.model["w"].data_ptr() == where
    assert second.model["w"].tolist() == [1, 2, 3, 4, 5, 6]
    assert second.state["s"][0].tolist() == [1, 1, 1], "what has another shape gets memory of its own"


def test_a_new_copy_does_not_overwrite_one_that_is_being_written(tmp_path):
    """Each checkpoint holds the values of its own step, even when saves follow each other fast."""
    writer = Writer(tmp_path, keep=50, keep_best=1)
    for step in range(30):
        writer.save(Contents(step, {"w": torch.full((50_000,), float(step))}, {"s": torch.full((9,), step)}))
    writer.close()
    for step, path in enumerate(checkpoint.complete(tmp_path)):
        found = checkpoint.read(path)
        assert set(found.model["w"].tolist()) == {float(step)}
        assert set(found.state["s"].tolist()) == {step}


# ----------------------------------------------------------------------------------------------- while training goes on


def state_of(step: int, size: int = 200_000) -> Contents:
    weights, momentum = torch.full((size,), float(step)), torch.full((size,), step + 0.5)
    buffer = torch.full((size,), step + 0.25)
    state = {"optimizer": {"state": {0: {"momentum_buffer": momentum}}}, "callbacks": [torch.full((size,), step)]}
    return Contents(step, {"w": weights, "buffer": buffer}, state, ema={"w": weights + 0.75}, weights=("w",))


def in_place(contents: Contents) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tensors that only an optimizer step changes."""
    assert contents.ema is not None
    momentum = contents.state["optimizer"]["state"][0]["momentum_buffer"]
    return contents.model["w"], momentum, contents.ema["w"]


@pytest.fixture
def held_up(monkeypatch):
    """Block copies in the writer's thread until released; the caller's thread copies freely."""
    released, waiting, copy = threading.Event(), threading.Event(), writer_module._copy

    def slowly(pairs):
        if pairs and threading.current_thread().name == "checkpoint writer":
            waiting.set()
            assert released.wait(20)
        copy(pairs)

    monkeypatch.setattr(writer_module, "_copy", slowly)
    return released, waiting


def test_weights_are_copied_in_the_background_until_the_optimizer_step(tmp_path, held_up):
    released, waiting = held_up
    writer = Writer(tmp_path, keep=2, keep_best=1)
    writer.save(state_of(0), training_continues=True)
    writer.settle(trained=True)  # the weights have not changed
    second = state_of(1)
    writer.save(second, training_continues=True)
    assert waiting.wait(20)  # and `save` has returned
    second.model["buffer"].zero_()  # a forward pass, which changes buffers
    second.state["callbacks"][0].zero_()
    settled = threading.Thread(target=writer.settle, kwargs={"trained": True})
    settled.start()
    settled.join(0.2)
    assert settled.is_alive()
    released.set()
    settled.join(20)
    for tensor in in_place(second):
        tensor.zero_()  # the optimizer's step
    writer.close()
    found, expected = checkpoint.read(checkpoint.complete(tmp_path)[-1]), state_of(1)
    assert torch.equal(found.model["buffer"], expected.model["buffer"])
    assert torch.equal(found.state["callbacks"][0], expected.state["callbacks"][0])
    assert all(map(torch.equal, in_place(found), in_place(expected)))


@pytest.mark.parametrize("training_continues", [True, False])
def test_the_first_copy_and_copies_outside_training_are_immediate(training_continues, tmp_path):
    writer = Writer(tmp_path, keep=3, keep_best=1)
    for step in (0,) if training_continues else (0, 1):
        contents = state_of(step)
        writer.save(contents, training_continues=training_continues)
        if not training_continues:
            writer.settle(trained=True)  # from here on a training may copy in the background
        for tensor in in_place(contents):
            tensor.zero_()
        writer.wait()
    writer.close()
    for step, path in enumerate(checkpoint.complete(tmp_path)):
        assert all(map(torch.equal, in_place(checkpoint.read(path)), in_place(state_of(step))))


def test_weights_changed_by_a_forward_pass_are_copied_immediately(tmp_path):
    writer = Writer(tmp_path, keep=2, keep_best=1)
    contents = state_of(0)
    writer.save(contents, training_continues=True)
    contents.model["w"].data[7] += 1  # which no version counter sees
    writer.settle(trained=True)
    for step in (1, 2):
        contents = state_of(step)
        writer.save(contents, training_continues=True)
        contents.model["w"].data.zero_()
        writer.settle(trained=True)
    writer.close()
    for path in checkpoint.complete(tmp_path):
        found = checkpoint.read(path)
        assert torch.equal(found.model["w"], state_of(found.step).model["w"])


def test_settling_before_the_first_step_does_not_hide_in_place_changes(tmp_path):
    """An evaluation before the first step settles before the forward pass that changes the weights."""
    writer = Writer(tmp_path, keep=2, keep_best=1)
    contents = state_of(0)
    writer.save(contents, training_continues=True)
    writer.settle()
    contents.model["w"].data[7] += 1
    writer.settle(trained=True)
    contents = state_of(1)
    writer.save(contents, training_continues=True)
    contents.model["w"].data.zero_()
    writer.close()
    assert torch.equal(checkpoint.read(checkpoint.complete(tmp_path)[-1]).model["w"], state_of(1).model["w"])
