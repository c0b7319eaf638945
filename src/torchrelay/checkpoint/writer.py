"""Step 3: checkpoints written in the background from a copy in memory; only staging that copy holds training up.

And most of the staging doesn't either: weights don't change until the next optimizer step, so large ones are copied
during the next forward and backward pass, and the optimizer waits for them (Mohan et al., "CheckFreq", FAST 2021). A
model may change its own weights in its forward pass, though; whether this one does is checked after the first copy,
which is made immediately.
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

from torchrelay.checkpoint.format import Contents, Manifest, read_manifest, write
from torchrelay.checkpoint.retention import clean, prune
from torchrelay.run.lock import around_fork

_LARGE = 2**15  # bytes from which a tensor is worth a call of its own
_PLAIN = {Tensor, nn.Parameter}  # a tensor of another class may keep its data elsewhere


class _Copy(NamedTuple):
    """A tensor to copy, its path in the tree, and the tensor in memory that receives it."""

    path: str
    target: Tensor
    source: Tensor


def stage(contents: Contents, memory: dict[str, Tensor] | None = None) -> Contents:
    """Return a copy in CPU memory that further training doesn't change.

    Args:
        contents: what to copy.
        memory: tensors of an earlier copy by path, which are overwritten where they fit and to which new ones are
            added: fresh memory takes half as long again, since the operating system clears each page.
    """
    staged, copies = _plan(contents, {} if memory is None else memory)
    _copy(copies)
    return staged


def _plan(contents: Contents, memory: dict[str, Tensor]) -> tuple[Contents, list[_Copy]]:
    """Return contents with tensors allocated in memory, and the copies that will fill them."""
    copies: list[_Copy] = []
    tree = _allocate({"model": contents.model, "state": contents.state, "ema": contents.ema}, memory, "", copies)
    return replace(contents, model=tree["model"], state=tree["state"], ema=tree["ema"]), copies


def _allocate(tree: Any, memory: dict[str, Tensor], path: str, copies: list[_Copy]) -> Any:
    """Return the tree with tensors in memory in place of its own, and append each copy to make to `copies`."""
    if isinstance(tree, Tensor):
        target = memory.get(path)
        if target is None or target.shape != tree.shape or target.dtype != tree.dtype:
            # The same layout copies fastest. Tied weights get separate tensors, as safetensors requires.
            target = memory[path] = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda, requires_grad=False)
        copies.append(_Copy(path, target, tree))
        return target
    if isinstance(tree, dict):
        return {key: _allocate(value, memory, f"{path}.{key}", copies) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_allocate(value, memory, f"{path}.{i}", copies) for i, value in enumerate(tree))
    return tree


def _copy(copies: list[_Copy]) -> None:
    """Copy tensors.

    Large ones in CPU memory are copied by memmove. PyTorch would use its threads, which synchronize at every tensor,
    and instructions that read the target before writing it; that takes at least twice as long.
    """
    rest = []
    for copy in copies:
        if _fits_memmove(copy):
            ctypes.memmove(copy.target.data_ptr(), copy.source.data_ptr(), copy.source.nbytes)
        else:
            rest.append(copy)
    on_gpu = any(copy.source.is_cuda for copy in rest)
    if rest:
        # One call for all: a call per tensor would take as long as the copying. Only CUDA synchronizes below, so only
        # its copies may be non-blocking.
        with torch.no_grad():
            torch._foreach_copy_([copy.target for copy in rest], [copy.source for copy in rest], non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.current_stream().synchronize()


def _fits_memmove(copy: _Copy) -> bool:
    """Return whether a tensor is large enough for a memmove, and its bytes are those that the target needs."""
    _, target, source = copy
    if not source.is_cpu or source.nbytes < _LARGE or type(source) not in _PLAIN or source.layout is not torch.strided:
        return False
    return source.stride() == target.stride() and not source.is_conj() and not source.is_neg()


class Writer:
    """Writes checkpoints on a background thread, one at a time, and prunes old ones after each.

    A failed write is raised by the next `save` or `wait`, whichever comes first, so it never goes unnoticed.

    Args:
        folder: the folder of checkpoints.
        keep: how many of the newest to keep.
        keep_best: how many of the best to keep as well.
        before_write: called on the thread before each write.
        after_write: called on the thread with the manifest of what was written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        keep_best: int,
        before_write: Callable[[], None] = lambda: None,
        after_write: Callable[[Manifest], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self.keep, self.keep_best = keep, keep_best
        self._before_write, self._after_write = before_write, after_write
        clean(folder)
        self._memory: dict[str, Tensor] = {}  # of the last copy; free to reuse once that is written
        self._queue: queue.Queue[tuple[Contents, list[_Copy]] | None] = queue.Queue(maxsize=1)
        self._staged = threading.Event()  # everything of the last save is copied
        self._staged.set()
        self._first: list[_Copy] | None = None  # weights of the first copy, until they are compared
        self._weights_rest: bool | None = None  # only the optimizer changes weights; None: not known yet
        self._failure: BaseException | None = None
        self.undeleted: list[str] = []  # messages about old checkpoints, for the training thread to say
        self._thread = threading.Thread(target=self._work, name="checkpoint writer", daemon=True)
        self._thread.start()

    def save(self, contents: Contents, *, training_continues: bool = False) -> None:
        """Stage `contents` in memory and return; see `Checkpointer.save`.

        Raises:
            RelayError: an earlier write failed.
        """
        self.wait()
        staged, copies = _plan(contents, self._memory)
        weights = [copy for copy in copies if _is_optimized(copy.path, contents) and _fits_memmove(copy)]
        later = weights if training_continues and self._weights_rest else []
        deferred = set(map(id, later))
        _copy([copy for copy in copies if id(copy) not in deferred])
        if self._weights_rest is None:
            self._first = weights
        if later:
            self._staged.clear()
        self._queue.put((staged, later))

    def settle(self, *, trained: bool = False) -> None:
        """Wait until everything is staged, as the weights are about to change.

        Args:
            trained: whether a training step's forward and backward pass ran since the last save.
        """
        self._staged.wait()
        # Only after a forward and backward pass can unchanged weights prove that the model doesn't change them itself.
        if trained and self._first is not None:
            self._weights_rest = all(torch.equal(target, source) for _, target, source in self._first)
            self._first = None

    def wait(self) -> None:
        """Wait until nothing is left to write.

        Raises:
            RelayError: a write failed.
        """
        self._queue.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Finish writing, end the thread, and raise a failure that is still pending."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.wait()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                with around_fork:
                    self._write(*item)
            except BaseException as error:  # noqa: BLE001 - raised on the training thread instead
                self._failure = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, contents: Contents, later: list[_Copy]) -> None:
        try:
            _copy(later)
        finally:
            self._staged.set()
        self._before_write()
        contents.check_finite()  # here, where training doesn't wait for it
        self._after_write(read_manifest(write(self.folder, contents)))
        self.undeleted = prune(self.folder, self.keep, self.keep_best)


def _is_optimized(path: str, contents: Contents) -> bool:
    """Return whether only an optimizer step should change this tensor: a weight, an average, optimizer state."""
    return path.startswith((".state.optimizer.", ".ema.")) or path.removeprefix(".model.") in contents.weights
