"""Step 7: everything that a checkpoint holds, collected from the parts and restored to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrelay.checkpoint.format import Contents, pack, weights_hash
from torchrelay.data.batches import Batches
from torchrelay.data.files import Marks, differences, together
from torchrelay.data.order import order
from torchrelay.data.sources import ArraySource
from torchrelay.data.stream_reader import StreamReader
from torchrelay.device.device import Device, identity_of
from torchrelay.errors import RelayError, UsageError
from torchrelay.run.folder import RunFolder
from torchrelay.run.identity import Identity, compare, compare_recipes, differing
from torchrelay.run.receipt import Change
from torchrelay.train.callbacks import Callback
from torchrelay.train.progress import Progress
from torchrelay.train.step import TrainStep

# Training images from which a model may initialize itself.
_INITIAL_SAMPLES = 5_000


class TrainingState:
    """Collects the state of a training for a checkpoint, and restores it.

    There is no random state in it: randomness follows from (seed, step) and (seed, epoch, index). Of a stream, it holds
    where the last batch ended.

    Args:
        model: which is trained.
        train_step: with its optimizer, schedule and moving average.
        progress: where the run stands.
        batches: of the training data.
        evaluated: the batches of the other parts of the data, by name.
        callbacks: in the order in which they are called.
    """

    def __init__(
        self,
        model: nn.Module,
        train_step: TrainStep,
        progress: Progress,
        batches: Batches,
        evaluated: Mapping[str, Batches],
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.model, self.train_step, self.progress = model, train_step, progress
        self.batches, self.evaluated, self.callbacks = batches, evaluated, callbacks
        self.strategy, self.ema = train_step.strategy, train_step.ema

    def contents(self, metrics_lines: int) -> Contents:
        """Return a checkpoint's contents; with FSDP, whole tensors on rank 0, for which all ranks must call it.

        Args:
            metrics_lines: how many lines metrics.jsonl has.
        """
        full = self.strategy.full_state
        step, metrics, score = self.progress.evaluated_at
        if step != self.progress.step:
            metrics, score = {}, None
        return Contents(
            step=self.progress.step,
            model=full(self.model.state_dict()),
            state=full(self.state_dict() | {"metrics_lines": metrics_lines, **self.facts()}),
            ema=full(self.ema.state_dict()) if self.ema is not None else None,
            score=score,
            metrics=metrics,
            weights=tuple(name for name, _ in self.model.named_parameters()),
            trained=tuple(name for name, weight in self.model.named_parameters() if weight.requires_grad),
        )

    def weights_hash(self) -> str:
        """Return the SHA-256 that a checkpoint's weights would have; all ranks must call it, and rank 0 learns it."""
        weights = self.strategy.full_state(self.model.state_dict())
        return weights_hash(weights) if self.strategy.group.main else ""

    def restore(self, contents: Contents, *, fresh_options: bool = False) -> None:
        """Continue from a checkpoint.

        Args:
            contents: its contents.
            fresh_options: whether the rates and decays of the recipe count, not the saved ones.
        """
        groups = self.train_step.groups
        options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.load_weights(contents)
        self.load_state_dict(contents.state)
        if fresh_options:
            for group, fresh in zip(self.train_step.groups, options, strict=True):
                group.update(fresh)
        self.progress.evaluated_at = (contents.step, contents.metrics, contents.score)

    def load_weights(self, contents: Contents) -> None:
        """Load a checkpoint's weights, the averaged ones included.

        Raises:
            RelayError: they belong to another model.
        """
        try:
            self.strategy.load_state(self.model, contents.model)
        except RuntimeError as error:
            theirs, ours = len(contents.state["data"]["classes"]), len(self.batches.source.classes)
            if theirs != ours:
                raise RelayError(
                    f"the checkpoint was trained for {theirs} classes, and {self.batches.source.name} has {ours}: give "
                    "the data that it was trained on"
                ) from error
            raise RelayError(
                f"the checkpoint's weights don't fit {self.strategy.model_name}: {str(error).splitlines()[-1].strip()}"
            ) from error
        if self.ema is not None and contents.ema is not None:
            self.strategy.load_state(self.ema, contents.ema)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes in a run beside the weights."""
        progress, step = self.progress.state_dict(), self.train_step.state_dict()
        skipped, guard = progress.pop("skipped"), step.pop("guard")
        callbacks = [callback.state_dict() for callback in self.callbacks]
        stream = {} if self.batches.stream is None else {"stream": self._stream_state(self.batches.stream)}
        return {**progress, "guard": guard, "skipped": skipped, **step, "callbacks": callbacks, **stream}

    def _stream_state(self, stream: StreamReader) -> dict[str, Any]:
        """Return where the last batch of a stream ended that was trained, if a checkpoint can hold it."""
        batches = self.batches
        epoch, batch = divmod(self.progress.step - 1, len(batches))
        state = stream.state_dict(epoch, min((batch + 1) * batches.batch_size, batches.samples))
        try:
            pack(state)
        except TypeError as error:
            raise RelayError(f"{batches.source.name}.state_dict(): {error}") from error
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.progress.load_state_dict(state)
        self.train_step.load_state_dict(state)
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=False):
            callback.load_state_dict(saved)
        if self.batches.stream is not None:
            self.batches.stream.load_state_dict(state.get("stream", {}))

    def facts(self) -> dict[str, Any]:
        """Return what stays the same in a run: what a prediction must know of the data, and the run's identity."""
        source, pipeline = self.batches.source, self.batches.pipeline
        data = {
            "classes": list(source.classes),
            "shape": list(source.inputs.shape[1:]) if isinstance(source, ArraySource) else None,
            "mean": None if pipeline.mean is None else list(pipeline.mean),
            "std": None if pipeline.std is None else list(pipeline.std),
        }
        return {"data": data, "identity": self.identity()}

    def identity(self) -> Identity:
        """Return what this run's bits depend on."""
        device: Device = self.train_step.device
        return identity_of(device.device, is_portable=device.portable) | {
            "data": self.batches.source.fingerprint(),
            **{f"{name}_data": part.source.fingerprint() for name, part in self.evaluated.items()},
            "samples": len(self.batches.source),
            "seed": self.batches.seed,
            "batch_size": self.batches.batch_size,
            "replicas": self.batches.replicas,
            "precision": device.settings.precision,
        }

    def compare(
        self,
        run: RunFolder,
        record: dict[str, Any],
        contents: Contents,
        accept_changes: bool,
        say: Callable[[str], None],
    ) -> Change:
        """Compare what a run was started with and what it is resumed with; return what changes the result.

        Raises:
            RelayError: something does, and `accept_changes` is off.
        """
        before, files = run.read_recipe(), self.files()
        # The recipe first: another seed also changes which samples are set apart for validation.
        for change in compare_recipes(before, record, accept_changes):
            say(f"changed: {change}")
        saved = contents.state["identity"]
        for warning in compare(
            saved, self.identity(), accept_changes, data_changes=lambda: differences(run.read_files(), files)
        ):
            say(f"warning: {warning}")
        return differing(before, record, result=True)

    def files(self) -> Marks:
        """Return all files that the data comes from."""
        sources = [batches.source for batches in (self.batches, *self.evaluated.values())]
        return together(source.files for source in sources if source.files is not None)

    def samples_of(self, step: int) -> list[int]:
        """Return the sample indices of a step's global batch; steps are counted from 1."""
        indices: list[int] = self.batches.indices(*divmod(step - 1, len(self.batches))).tolist()
        return indices


def initial_images(state: TrainingState) -> Tensor:
    """Return some training images, spread evenly and prepared as for an evaluation."""
    batches, source = state.batches, state.batches.source
    if not isinstance(source, ArraySource):
        name = type(state.model).__name__
        raise UsageError(f"{name} initializes itself from images in memory: use arrays or an image folder")
    positions = np.arange(min(len(source), _INITIAL_SAMPLES))
    chosen = torch.from_numpy(order(batches.seed, 0, positions, len(source)))
    images = batches.pipeline.evaluate(batches.device.move(source.inputs[chosen]))
    arranged: Tensor = batches.device.arrange(images)
    return arranged
