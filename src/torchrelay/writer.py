"""Step 3: checkpoints written behind the training's back, from a copy in memory; only the copy holds training up."""

import ctypes
import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrelay.checkpoint import CheckpointSettings, Contents, clean, prune, write

_LARGE = 2**15  # bytes from which a tensor is worth a call of its own
_PLAIN = {Tensor, nn.Parameter}  # a tensor of another class may keep its numbers elsewhere


def in_memory(contents: Contents, memory: dict[str, Tensor] | None = None) -> Contents:
    """Return a copy in the CPU's memory, which further training doesn't touch.

    Args:
        contents: what to copy.
        memory: tensors of an earlier copy by their path, which may be written over, and to which new ones are
            added: fresh memory would take half as long again, since the system clears each page of it.
    """
    memory = {} if memory is None else memory
    pairs: list[tuple[Tensor, Tensor]] = []
    copy = _placed({"model": contents.model, "state": contents.state, "ema": contents.ema}, memory, "", pairs)
    _copy(pairs)
    if any(tensor.is_cuda for tensor in contents.model.values()):
        torch.cuda.current_stream().synchronize()
    return replace(contents, model=copy["model"], state=copy["state"], ema=copy["ema"])


def _placed(tree: Any, memory: dict[str, Tensor], path: str, pairs: list[tuple[Tensor, Tensor]]) -> Any:
    """Return the tree with memory in place of its tensors; `pairs` gets each with the tensor that is to be copied."""
    if isinstance(tree, Tensor):
        place = memory.get(path)
        if place is None or place.shape != tree.shape or place.dtype != tree.dtype:
            # Laid out alike, which is copied fastest. Tied weights get tensors of their own, as safetensors asks for.
            place = memory[path] = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda, requires_grad=False)
        pairs.append((place, tree))
        return place
    if isinstance(tree, dict):
        return {key: _placed(value, memory, f"{path}.{key}", pairs) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_placed(value, memory, f"{path}.{i}", pairs) for i, value in enumerate(tree))
    return tree


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors, each to its place.

    Large ones in the CPU's memory go by memmove: torch would copy them with its threads, which wait for each other at
    every tensor, and with instructions that read the target before they write it. That takes twice as long or more.
    """
    rest = []
    for place, tensor in pairs:
        if tensor.is_cpu and tensor.nbytes >= _LARGE and _lie_alike(place, tensor):
            ctypes.memmove(place.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        else:
            rest.append((place, tensor))
    if rest:
        with torch.no_grad():  # all at once: one call for each would take as long as the copying
            torch._foreach_copy_([place for place, _ in rest], [tensor for _, tensor in rest], non_blocking=True)


def _lie_alike(place: Tensor, tensor: Tensor) -> bool:
    """Return whether a tensor's memory, byte for byte, is what belongs into its place, which has no gaps."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
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
        self._waiting: queue.Queue[Contents | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def save(self, contents: Contents) -> None:
        """Copy `contents` to memory and return; the disk is written behind the caller's back.

        Raises:
            RelayError: an earlier write failed.
        """
        self.wait()
        self._waiting.put(in_memory(contents, self._memory))

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
        while (contents := self._waiting.get()) is not None:
            try:
                self._before()
                contents.check_finite()  # here, where training doesn't wait for it
                write(self.folder, contents)
                prune(self.folder, self.settings.keep, self.settings.keep_best)
            except BaseException as error:  # noqa: BLE001 - handed to the training's thread, which raises it
                self._failure = error
            finally:
                self._waiting.task_done()
        self._waiting.task_done()
