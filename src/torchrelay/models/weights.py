"""Step 3: weights from a file, checked completely before any is copied into the model.

A safetensors file holds nothing but tensors. A `.pt` or `.pth` file is a pickle, which could run code: only
PyTorch's restricted unpickler reads it, and a file with more than tensors is refused.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from torchrelay.errors import RelayError, UsageError, nearest

_PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
_SHOWN = 8  # keys of each kind in a message

Log = Callable[[str], None]


def load_weights(model: nn.Module, source: str | Path, new_head: bool = False, log: Log = lambda _: None) -> None:
    """Load weights from a file into a model: all of them, or none if any doesn't fit.

    Args:
        model: changed in place; tensors are converted to its dtypes.
        source: a `.safetensors`, `.pt` or `.pth` file of named tensors, on their own or below "state_dict" or "model".
        new_head: keep the model's last layer and ignore its weights in the file.
        log: receives a line about what was loaded.

    Raises:
        RelayError: the file can't be read or doesn't fit; the message lists keys and shapes, the model is unchanged.
    """
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found = _plain_names(read_weights(Path(source).expanduser()), expected)
    head = find_head(model)
    if new_head and head is None:
        raise RelayError(
            f"{source} can't be loaded with a new head: {type(model).__name__} has no last layer that stays"
        )
    if new_head:
        kept = f"{head}."
        expected = {name: value for name, value in expected.items() if not name.startswith(kept)}
        found = {name: value for name, value in found.items() if not name.startswith(kept)}
    _check(str(source), found, expected, head)
    model.load_state_dict(found, strict=False)  # strict would ask for the new head's keys
    log(f"loaded {len(found)} tensors from {source}" + (f"; the head '{head}' is new" if new_head else ""))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a file, on the CPU; code in it is never run.

    Raises:
        RelayError: there is no such file, it is damaged, or it holds more than tensors.
    """
    if path.is_dir():
        inside = path / "model.safetensors"
        remedy = f"name {inside}" if inside.is_file() else f"name a file in it ending in {', '.join(SUFFIXES)}"
        raise RelayError(f"{path} is a folder, not a file of weights: {remedy}")
    if not path.is_file() and re.match(r"\w+:/", str(path)):
        raise UsageError(f"model.pretrained {path} is an address: download the file, and give its path")
    if not path.is_file():
        there = [str(p) for p in path.parent.glob("*") if p.suffix in SUFFIXES]
        raise UsageError(f"there is no file of weights at {path}{nearest(str(path), there) or ': check the path'}")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise RelayError(f"{path} isn't a whole safetensors file ({_first_line(error)}): fetch it again") from error
    if path.suffix not in _PICKLES:
        raise RelayError(f"{path} has an unknown ending: weights are read from {', '.join(SUFFIXES)}")
    return _only_tensors(path, _read_pickle(path))


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # errors are raised below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        what = f"asks to run {wanted[1]}" if wanted else "holds more than tensors, or is damaged"
        raise RelayError(f"{path} {what}: refused; save its state_dict as safetensors where you trust it") from error
    except Exception as error:  # damaged bytes can raise anything
        raise RelayError(f"{path} can't be read ({_first_line(error)}): fetch or save it again") from error


def _only_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """Return the tensors of an unpickled state dict, or of one under a usual key."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise RelayError(f"{path} holds no state dict but {type(content).__name__}: save model.state_dict()")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise RelayError(f"{path} isn't a state dict: its '{name}' is {type(value).__name__}, not a tensor")
    return dict(content)


def _plain_names(found: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Strip the prefixes of torch.compile ("_orig_mod.") and of the parallel wrappers ("module.") from the names."""
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    own = any(name.startswith("module.") for name in expected)
    while found and not own and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
    return found


def _check(source: str, found: dict[str, Tensor], expected: dict[str, Tensor], head: str | None) -> None:
    """Raise an error that lists every difference, unless names and shapes agree."""
    # Files from before PyTorch 0.4.1 lack BatchNorm's counter, which only an unset momentum needs.
    missing = [name for name in expected if name not in found and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    reshaped = [name for name in found if name in expected and found[name].shape != expected[name].shape]
    if not (missing or unexpected or reshaped):
        return
    if (classes := class_counts(found, expected, head)) is not None:
        theirs, ours = classes
        raise RelayError(
            f"{source} doesn't fit, nothing was loaded: it was trained for {theirs} classes, and the model has {ours}: "
            "set model.new_head=true to train a new head"
        )
    parts = (
        _listed("missing", [f"{name} {_shape(expected[name])}" for name in missing]),
        _listed("unexpected", [f"{name} {_shape(found[name])}" for name in unexpected]),
        _listed(
            "of another shape",
            [f"{name} {_shape(found[name])} for the model's {_shape(expected[name])}" for name in reshaped],
        ),
    )
    only_head = head is not None and all(name.startswith(f"{head}.") for name in missing + unexpected + reshaped)
    remedy = "set model.new_head = true to train a new head" if only_head else "it seems to be another model's"
    raise RelayError(f"{source} doesn't fit, nothing was loaded: {'; '.join(filter(None, parts))}: {remedy}")


def class_counts(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: str | None
) -> tuple[int, int] | None:
    """Return the numbers of classes of two state dicts if nothing but these tells them apart.

    Args:
        found: tensors from elsewhere.
        expected: those of the model.
        head: the name of the model's last layer.
    """
    others = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    if (
        head is None
        or not others
        or found.keys() - expected.keys()
        or not all(n.startswith(f"{head}.") for n in others)
    ):
        return None
    theirs, ours = found[others[0]], expected[others[0]]
    return None if theirs.ndim != ours.ndim or not ours.ndim else (theirs.shape[0], ours.shape[0])


def _listed(kind: str, items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {kind} ({', '.join(items[:_SHOWN])}{more})" if items else ""


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def find_head(model: nn.Module) -> str | None:
    """Return the name of the output layer, or None if the model has no such submodule.

    It is the result of timm's `get_classifier` if the model has that method; else the last linear layer (or
    convolution, as in SqueezeNet) in `head`, `heads`, `fc` or `classifier`, if there is one; else the
    last linear layer of the model.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    get_classifier: Any = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else None
    if isinstance(classifier, nn.Linear | nn.Conv2d) and classifier in names:
        return names[classifier]
    for usual in ("head", "heads", "fc", "classifier"):
        part = getattr(model, usual, None)
        if isinstance(part, nn.Module):
            layers = [module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
            if layers:
                return names[layers[-1]]
    linear = [name for module, name in names.items() if name and isinstance(module, nn.Linear)]
    return linear[-1] if linear else None
