"""Step 7, the test: outputs that are more than a tensor: joined over batches, and sent between processes."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from torchrelay.device.device import mapped
from torchrelay.errors import RelayError


def to_cpu(value: Any) -> Any:
    """Return the same with all tensors on the CPU."""
    return mapped(lambda each: each.to("cpu"), value)


def joined(batches: Sequence[Any]) -> Any:
    """Return the predictions of several batches as one: tensors along their first dimension, lists one after another.

    Raises:
        RelayError: the tensors of two batches don't fit together.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        try:
            return torch.cat([*batches])
        except RuntimeError as error:
            raise RelayError(
                f"the predictions of two batches can't be joined ({error}): let the task's predict() return a list "
                "with an entry for each sample"
            ) from error
    if isinstance(first, Mapping):
        return {key: joined([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple):
        items = [joined(each) for each in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    if isinstance(first, list):
        return [item for batch in batches for item in batch]
    return [*batches]


def pack(value: Any) -> Tensor:
    """Return nested tensors, numbers and texts as bytes, for another process of this run.

    Raises:
        RelayError: there is something else among them.
    """
    tensors = dict[str, Tensor]()
    tree = json.dumps(_encode(to_cpu(value), tensors)).encode()
    content = len(tree).to_bytes(8, "little") + tree + safetensors.torch.save(tensors)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def unpack(content: Tensor | bytes | None) -> Any:
    """Return what another process of this run has packed."""
    content = content.cpu().numpy().tobytes() if isinstance(content, Tensor) else content or b""
    end = 8 + int.from_bytes(content[:8], "little")
    return _decode(json.loads(content[8:end]), safetensors.torch.load(content[end:]))


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON can hold it, and put its tensors into a dict."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        named = [type(value).__module__, type(value).__qualname__] if hasattr(value, "_fields") else None
        name = "list" if isinstance(value, list) else "tuple"
        return {name: [_encode(item, tensors) for item in value], "type": named}
    raise RelayError(
        f"several processes can't share {type(value).__name__}, which the task returns in an evaluation: use tensors, "
        "numbers, texts, and lists, tuples and dicts of them"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "dict" in value:
        return {key: _decode(item, tensors) for key, item in value["dict"]}
    if "list" in value:
        return [_decode(item, tensors) for item in value["list"]]
    parts = tuple(_decode(item, tensors) for item in value["tuple"])
    # A class that this process doesn't know isn't one of the task's.
    kind: Any = getattr(sys.modules.get(value["type"][0]), value["type"][1], None) if value["type"] else None
    return parts if kind is None else kind(*parts)
