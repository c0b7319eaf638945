"""Some steps of a run again, in memory: from its recipe, or from one of its checkpoints. Nothing is written."""

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from torchrelay.checkpoint.format import Contents, pack, weights_hash
from torchrelay.checkpoint.writer import stage
from torchrelay.data.batch import Batch
from torchrelay.data.files import Marks, differences
from torchrelay.recipe.build import build_trainer
from torchrelay.recipe.recipe import Recipe
from torchrelay.run.identity import compare
from torchrelay.run.terminal import Terminal
from torchrelay.train.callbacks import Callback, Training
from torchrelay.train.state import TrainingState
from torchrelay.train.trainer import Trainer


@dataclass(frozen=True)
class Replayed:
    """What some steps led to.

    Attributes:
        losses: the bits of each step's loss, as a receipt has them.
        norms: those of the gradient's norm, where it is computed.
        weights: the SHA-256 of the weights after the steps that were asked for; empty on ranks above 0.
        end: what a checkpoint after the last step would hold.
    """

    losses: dict[int, str]
    norms: dict[int, str]
    weights: dict[int, str]
    end: Contents


class Replayer:
    """Replays steps of a run; one trainer serves for all of them.

    Args:
        trainer: one like the run's, without a folder.
        skipped: the steps that the run left out.
    """

    def __init__(self, trainer: Trainer, skipped: Collection[int] = ()) -> None:
        self.trainer, self._steps = trainer, _Steps(trainer.state, skipped)
        trainer.callbacks.append(self._steps)

    @property
    def is_main(self) -> bool:
        """Whether this process compares and speaks."""
        return self.trainer.strategy.group.main

    def differences(self, contents: Contents, files: Marks) -> list[str]:
        """Return what of that on which bits depend isn't as it was for a checkpoint: data, device, versions, threads.

        Args:
            contents: the checkpoint's.
            files: of the run's data, as they were.
        """
        state, saved = self.trainer.state, contents.state["identity"]
        state.train_step.device.keep_threads(saved["threads"])
        warnings = compare(saved, state.identity(), True, lambda: differences(files, state.files()))
        return [warning.partition(": the result may differ")[0] for warning in warnings]

    def replay(
        self, start: Contents | None, last: int, weighed: Collection[int] = (), *, fresh_options: bool = False
    ) -> Replayed:
        """Take the steps from a checkpoint, or from the beginning, to `last`.

        Args:
            start: the checkpoint's contents; None: from the beginning.
            last: the last step.
            weighed: the steps after which the weights are hashed.
            fresh_options: whether the recipe's rates and decays count, not the checkpoint's.
        """
        steps = self._steps
        steps.begin(start, last, weighed, fresh_options)
        self.trainer.fit()
        assert steps.end is not None  # noqa: S101 - the loop ends after `last`
        return Replayed(steps.losses, steps.norms, steps.weights, steps.end)


def of_recipe(
    recipe: Recipe, code: ModuleType | None = None, skipped: Collection[int] = (), *, fresh: bool = True
) -> Replayer:
    """Return what replays a recipe's steps.

    Args:
        recipe: the run's.
        code: the module of the user's own with which it was started.
        skipped: the steps that it left out.
        fresh: whether steps from the beginning will be asked for, for which pretrained weights are needed.

    Raises:
        RelayError: the data can't be loaded, or the recipe names something that is no longer there.
    """
    changes: dict[str, object] = {"max_steps": None, "patience": None}
    if recipe.schedule.name != "plateau":  # otherwise rates follow the evaluations
        changes["evaluate_batches"] = 1
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update=changes)})
    return Replayer(build_trainer(recipe, code=code, terminal=Terminal(quiet=True), fresh=fresh), skipped)


class _Steps(Callback):
    """Starts a trainer from a checkpoint, keeps what its steps lead to, and stops it."""

    def __init__(self, state: TrainingState, skipped: Collection[int]) -> None:
        self._state, self._skipped = state, skipped
        self._initial: Contents | None = None

    def begin(self, start: Contents | None, last: int, weighed: Collection[int], fresh_options: bool) -> None:
        self._start, self._last, self._weighed, self._fresh = start, last, weighed, fresh_options
        self.losses: dict[int, str] = {}
        self.norms: dict[int, str] = {}
        self.weights: dict[int, str] = {}
        self.end: Contents | None = None

    def on_start(self, trainer: Training) -> None:  # noqa: ARG002
        state = self._state
        if self._initial is None:
            self._initial = stage(state.contents(0))
        # A copy: an optimizer works on the very tensors that it is given.
        state.restore(stage(self._start or self._initial), fresh_options=self._fresh)
        state.progress.skipped = {step: [] for step in self._skipped}
        state.progress.stop_reason = None
        if self._start is None and 0 in self._weighed:
            self.weights[0] = weights_hash(self._initial.model)

    def on_step(self, trainer: Training, batch: Batch, loss: Tensor) -> None:  # noqa: ARG002
        state = self._state
        step, norm = state.progress.step, state.progress.grad_norm
        self.losses[step] = _bits(loss)
        if norm is not None:
            self.norms[step] = _bits(norm)
        if step in self._weighed or step >= self._last:
            self.end = stage(state.contents(0))
            self.weights[step] = weights_hash(self.end.model)
        if step >= self._last:
            trainer.stop("replayed")


def _bits(number: Tensor) -> str:
    return struct.pack(">d", number.item()).hex()


def first_difference(one: Contents, other: Contents) -> str:
    """Return the first tensor whose bits differ between two checkpoints, and by how much; "" if none does.

    The model's weights and buffers come first, in its own order, then their average and the optimizer's state.
    """
    there = dict(_tensors(other))
    for name, tensor in _tensors(one):
        if name not in there:
            return f"{name} is missing"
        theirs = there.pop(name)
        if tensor.shape != theirs.shape or tensor.dtype != theirs.dtype:
            return f"{name} has another shape or type"
        a, b = (each.contiguous().view(-1).view(torch.uint8) for each in (tensor, theirs))
        if torch.equal(a, b):
            continue
        bytes_each = tensor.element_size()
        count = int((a.view(-1, bytes_each) != b.view(-1, bytes_each)).any(1).sum())
        apart = float((tensor.double() - theirs.double()).abs().max())
        return f"{name} ({count:,} of {tensor.numel():,} values, by up to {apart:.3g})"
    return f"{next(iter(there))} is new" if there else ""


def _tensors(contents: Contents) -> Iterator[tuple[str, Tensor]]:
    for name in dict.fromkeys([*contents.weights, *sorted(contents.model)]):
        if name in contents.model:
            yield name, contents.model[name]
    for name, tensor in sorted((contents.ema or {}).items()):
        yield f"the average of {name}", tensor
    for name, tensor in pack(contents.state["optimizer"])[1].items():
        yield f"the optimizer's {name}", tensor
