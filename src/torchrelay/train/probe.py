"""Step 4: what `auto` becomes: the precision, the memory format and the threads that are fastest here.

bf16 is twice as fast as float32 on one processor and twice as slow on another, so a recipe can't know. Before a run
starts, forward and backward passes of its own model are timed with each choice, in under two seconds.
"""

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrelay import rng
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.device.device import Device, mapped
from torchrelay.distributed.launch import cores
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.tasks.task import Task, loss_and_outputs, total
from torchrelay.train.record import log
from torchrelay.train.self_check import overrun_layer

Choice = dict[str, Any]  # settings of the device by name
_BUDGET = 1.6  # seconds: a quarter to see how many samples a pass needs, half for each comparison
_TURNS = 5
_LONG_ENOUGH = 0.03  # seconds of a pass, or Python's own time decides
_HOPELESS = 2.0  # times the fastest, from which on a choice isn't timed any further
_GAIN = 1.03  # times, below which the choice that is mentioned first is taken


def decide(
    device: Device,
    model: nn.Module,
    task: Task,
    parts: Sequence[Batches],
    group: ProcessGroup,
    kind: str,
    say: Callable[[str], None],
) -> Device:
    """Return a device whose settings are all decided: those that were "auto" by the fastest passes, on rank 0.

    The model, the task and all random numbers stay as they are.

    Args:
        device: whose settings may be undecided.
        model: is copied.
        task: computes the loss.
        parts: batches of the training data, of which one sample is read, and all others that follow the decision.
        group: the processes, which measure at the same time and follow rank 0.
        kind: of their strategy; a model that is to be sharded isn't copied, and keeps the defaults.
        say: called with the decision and its reason.
    """
    if not device.undecided:
        return device
    threads = torch.get_num_threads()
    with rng.kept(device.device), log.muted():
        if kind == "fsdp" and group.size > 1:
            choice, reason = _defaults(device), "a sharded model isn't timed"
        else:
            choice, reason = _fastest(device, model, task, parts[0], alone=group.size == 1)
    choice, reason = json.loads(group.broadcast_bytes(json.dumps([choice, reason]).encode()))
    torch.set_num_threads(choice.get("threads", threads))
    say(f"auto: {', '.join(_text(choice))} ({reason})")
    device = device.decided(choice)
    for each in parts:
        each.device = device
    return device


def _fastest(device: Device, model: nn.Module, task: Task, batches: Batches, *, alone: bool) -> tuple[Choice, str]:
    try:
        trials = _Trials(device, model, task, batches)
        choices = [choice for choice in _choices(device, trials.has_images) if not trials.is_unsafe(choice)]
        found = trials.run(choices)
        best = _best(found)
        if "threads" in device.undecided:
            counts = sorted({torch.get_num_threads(), cores(), max(1, cores() // 2)}, reverse=True) if alone else []
            found = trials.run([{**best, "threads": each} for each in counts]) or {_key(best): found[_key(best)]}
            best = {"threads": torch.get_num_threads()} | _best(found)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run's first step meets it, and names its sample
        return _defaults(
            device
        ), f"the model can't be tried alone: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return best, trials.describe()


def _defaults(device: Device) -> Choice:
    values = {"precision": "float32", "channels_last": False, "threads": torch.get_num_threads()}
    return {name: values[name] for name in device.undecided}


def as_recorded(device: Device, record: dict[str, Any]) -> tuple[Device, int | None]:
    """Return a device as recipe.toml says that its run was decided, and the number of replicas."""
    own = record.get("device", {})
    device = device.decided({name: own[name] for name in device.undecided if name in own})
    if isinstance(device.settings.threads, int):
        torch.set_num_threads(device.settings.threads)
    return device, record.get("parallel", {}).get("replicas")


def with_decisions(record: dict[str, Any], device: Device) -> dict[str, Any]:
    """Return what goes into recipe.toml, with what was decided in place of "auto"."""
    left = [name for name, value in record.get("device", {}).items() if value == "auto" and name != "name"]
    decided = {name: getattr(device.settings, name) for name in left}
    return record | {"device": record["device"] | decided} if decided else record


def _key(choice: Choice) -> str:
    return json.dumps(choice)


def _best(found: dict[str, float]) -> Choice:
    """Return the first choice that is hardly slower than the fastest."""
    fastest = min(found.values())
    best: Choice = json.loads(next(key for key, seconds in found.items() if seconds <= _GAIN * fastest))
    return best


def _text(choice: Choice) -> list[str]:
    """Return a choice in words."""
    words = [choice["precision"]] if "precision" in choice else []
    if "channels_last" in choice:
        words.append("channels last" if choice["channels_last"] else "channels first")
    if "threads" in choice:
        words.append(f"{choice['threads']} thread{'s' * (choice['threads'] > 1)}")
    return words


def _choices(device: Device, has_images: bool) -> Iterator[Choice]:
    """Yield each combination of what precision and memory format may be; where two are equal, the first is taken."""
    reduced = ["bf16"]
    if device.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        reduced = ["fp16"] * (not device.settings.graph)  # a graph can't skip the steps in which fp16 overflows
    options: Choice = {"precision": ["float32", *reduced], "channels_last": [False, True][: 1 + has_images]}
    names = [name for name in options if name in device.undecided]
    for values in itertools.product(*(options[name] for name in names)):
        yield dict(zip(names, values, strict=True))


class _Trials:
    """Times passes of a copy of a model.

    Args:
        device: whose decided settings stay.
        model: is copied.
        task: computes the loss.
        batches: whose first sample is repeated.
    """

    def __init__(self, device: Device, model: nn.Module, task: Task, batches: Batches) -> None:
        self._device, self._task = device, copy.deepcopy(task)
        self._model = copy.deepcopy(model).to(device.device).train()
        self._two = batches.dummy_batch()
        self._most = max(2, batches.batch_size // batches.replicas)
        self.has_images = isinstance(self._two.inputs, Tensor) and self._two.inputs.ndim == 4
        self._times: dict[str, float] = {}
        self._samples = 2

    def is_unsafe(self, choice: Choice) -> bool:
        """Return whether a kernel of this choice is known to corrupt memory."""
        return overrun_layer(self._model, self._device.decided(choice)) is not None

    def run(self, choices: Sequence[Choice]) -> dict[str, float]:
        """Return the seconds of a pass with each choice, by its key: the least of some turns; a slow one has none."""
        if not choices:
            return {}
        if not self._times:
            self._grow(choices[0])
        began, found = time.perf_counter(), {_key(choice): self._first_pass(choice) for choice in choices}
        hopeful = {key: list[float]() for key, took in found.items() if took <= _HOPELESS * min(found.values())}
        for _ in range(_TURNS):
            for key, own in hopeful.items():
                own.append(self._pass(json.loads(key), self._samples))
            if time.perf_counter() - began > _BUDGET / 2:
                break
        found |= {key: min(own) for key, own in hopeful.items()}
        self._times |= found
        return found

    def _first_pass(self, choice: Choice) -> float:
        """Return about how long a pass takes: the first one chooses kernels, and a few samples show what is hopeless.

        A choice that this device doesn't have takes for ever.
        """
        few = max(2, self._samples // 8)
        try:
            return min(self._pass(choice, few) for _ in range(2)) * self._samples / few
        except RuntimeError:
            return float("inf")

    def _grow(self, choice: Choice) -> None:
        """Take so many samples that a pass takes long enough, on one thread: several wait long on a busy machine.

        Otherwise what is compared would be these waits.
        """
        began, choice = time.perf_counter(), choice | {"threads": 1}
        threads = torch.get_num_threads()
        while self._samples < self._most and time.perf_counter() - began < _BUDGET / 4:
            if min(self._pass(choice, self._samples) for _ in range(3)) >= _LONG_ENOUGH:
                break
            self._samples = min(2 * self._samples, self._most)
        torch.set_num_threads(threads)

    def _pass(self, choice: Choice, samples: int) -> float:
        """Return the seconds of a forward and a backward pass."""
        device = self._device.decided(choice)
        torch.set_num_threads(choice.get("threads", torch.get_num_threads()))
        layout = torch.channels_last if device.settings.channels_last else torch.contiguous_format
        self._model.to(memory_format=layout)
        batch = self._batch(samples, device)
        _wait(device)
        began = time.perf_counter()
        with device.autocast():
            loss = total(loss_and_outputs(self._task, self._model, batch, self._task.updates[0])[0], self._task)
        loss.backward()  # type: ignore[no-untyped-call]
        _wait(device)
        took = time.perf_counter() - began
        self._model.zero_grad()
        return took

    def _batch(self, samples: int, device: Device) -> Batch:
        """Return the two samples as often as needed."""
        half = samples // 2

        def repeated(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.ndim and len(value) == 2
            return value.repeat(half, *[1] * (value.ndim - 1)) if is_batched else value

        inputs, targets = device.arrange(mapped(repeated, self._two.inputs)), mapped(repeated, self._two.targets)
        indices = np.zeros(2 * half, dtype=np.int64)
        return replace(self._two, inputs=inputs, targets=targets, indices=indices, replica_sizes=(2 * half,))

    def describe(self) -> str:
        """Return the times of the last choices in words."""
        times = [f"{', '.join(_text(json.loads(key)))} {1e3 * took:.3g}" for key, took in self._times.items()]
        return f"ms for {self._samples} samples, forward and backward: {'; '.join(times)}"


def _wait(device: Device) -> None:
    if device.device.type == "cuda":
        torch.cuda.synchronize(device.device)
