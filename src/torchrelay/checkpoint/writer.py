"""Step 3: checkpoints written behind the training's back, from a copy in memory; only the copy holds training up.

And most of it needn't: weights stand still until the optimizer's next step, so large ones are copied while the next
batch goes forward and backward, and the optimizer waits for them (Mohan et al., "CheckFreq", FAST 2021). A network may
write to its own weights as it goes forward, though. Whether this one does is seen after the first copy, made at once.
"""

import ctypes
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchrelay.checkpoint.format import Contents, write
from torchrelay.checkpoint.retention import clean, prune
from torchrelay.checkpoint.schedule import CheckpointSettings

_LARGE = 2**15  # bytes from which a tensor is worth a call of its own
_PLAIN = {Tensor, nn.Parameter}  # a tensor of another class may keep its numbers elsewhere


class _Pair(NamedTuple):
    """A tensor, where it stands in the tree, and its place in memory."""

    path: str
    place: Tensor
    tensor: Tensor


def in_memory(contents: Contents, memory: dict[str, Tensor] | None = None) -> Contents:
    """Return a copy in the CPU's memory, which further training doesn't touch.

    Args:
        contents: what to copy.
        memory: tensors of an earlier copy by their path, which may be written over, and to which new ones are
            added: fresh memory would take half as long again, since the system clears each page of it.
    """
    copy, pairs = _laid_out(contents, {} if memory is None else memory)
    _copy(pairs)
    return copy


def _laid_out(contents: Contents, memory: dict[str, Tensor]) -> tuple[Contents, list[_Pair]]:
    """Return contents in memory whose numbers are yet to be copied, and what is to be copied to where."""
    pairs: list[_Pair] = []
    copy = _placed({"model": contents.model, "state": contents.state, "ema": contents.ema}, memory, "", pairs)
    return replace(contents, model=copy["model"], state=copy["state"], ema=copy["ema"]), pairs


def _placed(tree: Any, memory: dict[str, Tensor], path: str, pairs: list[_Pair]) -> Any:
    """Return the tree with memory in place of its tensors; `pairs` gets each with the tensor that is to be copied."""
    if isinstance(tree, Tensor):
        place = memory.get(path)
        if place is None or place.shape != tree.shape or place.dtype != tree.dtype:
            # Laid out alike, which is copied fastest. Tied weights get tensors of their own, as safetensors asks for.
            place = memory[path] = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda, requires_grad=False)
        pairs.append(_Pair(path, place, tree))
        return place
    if isinstance(tree, dict):
        return {key: _placed(value, memory, f"{path}.{key}", pairs) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_placed(value, memory, f"{path}.{i}", pairs) for i, value in enumerate(tree))
    return tree


def _copy(pairs: list[_Pair]) -> None:
    """Copy tensors, each to its place.

    Large ones in the CPU's memory go by memmove: torch would copy them with its threads, which wait for each other at
    every tensor, and with instructions that read the target before they write it. That takes twice as long or more.
    """
    rest = []
    for pair in pairs:
        if _is_block(pair):
            ctypes.memmove(pair.place.data_ptr(), pair.tensor.data_ptr(), pair.tensor.nbytes)
        else:
            rest.append(pair)
    on_gpu = any(pair.tensor.is_cuda for pair in rest)  # elsewhere nobody would wait for such a copy
    if rest:
        with torch.no_grad():  # all at once: one call for each would take as long as the copying
            torch._foreach_copy_([pair.place for pair in rest], [pair.tensor for pair in rest], non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.current_stream().synchronize()


def _is_block(pair: _Pair) -> bool:
    """Return whether a tensor is worth a memmove, and its memory, byte for byte, is what belongs into its place."""
    _, place, tensor = pair
    if not tensor.is_cpu or tensor.nbytes < _LARGE or type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
        return False
    return tensor.stride() == place.stride() and not tensor.is_conj() and not tensor.is_neg()


class Writer:
    """Writes checkpoints on a thread of its own, one at a time, and prunes after each.

    A failed write is raised by the next `save` or by `wait`, whichever comes first; it never passes unnoticed.

    Args:
        folder: where the checkpoints are.
        settings: which are kept.
        before: called before each write, on the thread.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings, before: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._before = before
        clean(folder)
        self.settings = settings
        self._memory: dict[str, Tensor] = {}  # of the last copy; free once that is written
        self._waiting: queue.Queue[tuple[Contents, list[_Pair]] | None] = queue.Queue(maxsize=1)
        self._copied = threading.Event()  # all that the last save was to copy
        self._copied.set()
        self._first: list[_Pair] | None = None  # the weights of the first copy, until they are compared
        self._rest: bool | None = None  # whether the weights stand still until an optimizer's step; None: not known yet
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def save(self, contents: Contents, *, training_continues: bool = False) -> None:
        """Copy `contents` to memory and return; the disk is written behind the caller's back.

        Args:
            contents: what to save.
            training_continues: the caller calls `settle` before it changes weights, averages or the optimizer's
                state; so large tensors may be staged in the background, too.

        Raises:
            RelayError: an earlier write failed.
        """
        self.wait()
        copy, pairs = _laid_out(contents, self._memory)
        weights = [pair for pair in pairs if _rests(pair.path, contents) and _is_block(pair)]
        later = weights if training_continues and self._rest else []
        chosen = set(map(id, later))
        _copy([pair for pair in pairs if id(pair) not in chosen])
        if self._rest is None:
            self._first = weights
        if later:
            self._copied.clear()
        self._waiting.put((copy, later))

    def settle(self, *, trained: bool = False) -> None:
        """Wait until everything is copied, as the weights are about to change.

        Args:
            trained: whether a training step's forward and backward pass went through the model since the last save.
        """
        self._copied.wait()
        if trained and self._first is not None:  # weights had a chance to change, and shouldn't have
            self._rest = all(torch.equal(place, tensor) for _, place, tensor in self._first)
            self._first = None

    def wait(self) -> None:
        """Wait until nothing is left to write.

        Raises:
            RelayError: a write failed.
        """
        self._waiting.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Write what is left, end the thread, and raise what a write left behind."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        self.wait()

    def _work(self) -> None:
        while (found := self._waiting.get()) is not None:
            contents, later = found
            try:
                try:
                    _copy(later)
                finally:
                    self._copied.set()
                self._before()
                contents.check_finite()  # here, where training doesn't wait for it
                write(self.folder, contents)
                prune(self.folder, self.settings.keep, self.settings.keep_best)
            except BaseException as error:  # noqa: BLE001 - handed to the training's thread, which raises it
                self._failure = error
            finally:
                self._waiting.task_done()
        self._waiting.task_done()


def _rests(path: str, contents: Contents) -> bool:
    """Return whether a tensor at this place of the tree belongs to what only an optimizer's step changes."""
    return path.startswith((".state.optimizer.", ".ema.")) or path.removeprefix(".model.") in contents.weights
