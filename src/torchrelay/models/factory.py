"""Step 3: the model: built by name, its weights loaded, its frozen parameters set.

A name is looked up in the user's file (`--code`), among our own networks (`small`), in torchvision and in timm, in this
order; "timm/NAME" looks in timm only. Importing this package imports neither library.
"""

import fnmatch
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import pydantic
from pydantic import Field
from torch import Tensor, nn

from torchrelay.errors import RelayError, UsageError, nearest
from torchrelay.models.convolution import pad_narrow_maps
from torchrelay.models.library import build_timm, build_torchvision, timm_names, torchvision_names
from torchrelay.models.recompute import recompute
from torchrelay.models.small import NETWORKS
from torchrelay.models.weights import SUFFIXES, Log, load_weights
from torchrelay.settings import Settings, in_plain_words


class ModelSettings(Settings):
    """The model, its initial weights, and the parameters to train."""

    name: str = "resnet18-small"
    """Ours (mlp, small-cnn, resnet18-small, fast-cnn, char-lm), one of torchvision's, timm/NAME, or one in --code."""
    pretrained: bool | str = False
    """true: the library's own weights; their name, such as "IMAGENET1K_V2"; or a .safetensors, .pt or .pth file."""
    new_head: bool = False
    """Start with a new last layer and ignore its weights in the file; required for a file with other classes."""
    freeze: list[str] = Field(default_factory=list)
    """Patterns of parameter names to freeze: ["layer1.*"]; "!" unfreezes: ["*", "!fc.*"] trains only the head."""
    recompute: list[str] | None = None
    """Patterns of modules that compute their activations again in the backward pass, to save memory: ["blocks.*"]."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the model, such as options.widths = [32, 64, 64]."""
    ema: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Evaluate an exponential moving average of the weights with this decay, such as 0.999; 0: off."""


@runtime_checkable
class InitFromData(Protocol):
    """A model that is initialized from training images before the first step of a run."""

    def init_from(self, images: Tensor) -> None:
        """Set initial weights from normalized training images (samples, channels, height, width)."""


def build(
    settings: ModelSettings,
    *,
    classes: int,
    channels: int = 3,
    image_size: int | None = None,
    code: ModuleType | None = None,
    log: Log,
) -> nn.Module:
    """Build the model of a recipe, on the CPU. Initial weights come from PyTorch's global generator: seed it first.

    Args:
        settings: the recipe's section.
        classes: the number of outputs: classes, labels, values, or the size of the vocabulary.
        channels: of the images, or the number of features.
        image_size: height and width of the images; None if the data has no images or no single size.
        code: the user's file, imported; its model classes and functions that return a model are found by name.
        log: receives a line for everything loaded, replaced or frozen.

    Raises:
        UsageError: no such model, option or pattern.
        RelayError: the weights can't be fetched or don't fit.
    """
    pretrained = settings.pretrained
    file = pretrained if isinstance(pretrained, str) and (pretrained.endswith(SUFFIXES) or "/" in pretrained) else None
    facts = {"classes": classes, "channels": channels, "image_size": image_size}
    if builder := _from_code(settings.name, code):
        model = _call(settings, builder, facts | {"num_classes": classes})
    elif settings.name in NETWORKS:
        model = _call(settings, pydantic.validate_call(NETWORKS[settings.name]), facts)
    else:
        build_named, name = _from_library(settings.name, code)
        library_model = build_named(
            name,
            classes=classes,
            channels=channels,
            image_size=image_size,
            pretrained=False if file else pretrained,
            new_head=settings.new_head,
            options=settings.options,
            log=log,
        )
        model = pad_narrow_maps(library_model)
        pretrained = file or False  # the library has loaded its own weights
    if file:
        load_weights(model, file, settings.new_head, log)
    elif pretrained:
        raise UsageError(f"model '{settings.name}' has no weights of its own: set model.pretrained to a file, or false")
    if settings.freeze:
        log(freeze(model, settings.freeze))
    return recompute(model, settings.recompute or ())


def names() -> dict[str, list[str]]:
    """Return the names of the models that ship or are installed, by family. It imports torchvision and timm."""
    return {"torchrelay": list(NETWORKS), "torchvision": torchvision_names(), "timm": timm_names()}


def freeze(model: nn.Module, patterns: list[str]) -> str:
    """Freeze the parameters whose names match, and return a line for the log.

    BatchNorm statistics of frozen layers still follow the data; only training by gradient stops.

    Args:
        model: it is changed in place.
        patterns: shell patterns, applied in order; one that begins with "!" unfreezes its parameters.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(parameters, pattern.removeprefix("!"))
        if not matching:
            raise UsageError(f"model.freeze '{pattern}' matches no parameter{nearest(pattern, parameters)}")
        for name in matching:
            parameters[name].requires_grad_(pattern.startswith("!"))
    frozen = [value for value in parameters.values() if not value.requires_grad]
    if len(frozen) == len(parameters):
        raise UsageError('model.freeze leaves nothing to train: let some go again with "!", such as "!fc.*"')
    count = sum(value.numel() for value in frozen)
    return f"{len(frozen)} of {len(parameters)} parameters are frozen ({count:,} numbers)"


def _from_code(name: str, code: ModuleType | None) -> Callable[..., Any] | None:
    """Return the model class or builder function of that name in the user's file.

    A function must be defined in the file: a recipe must not reach what it imports, such as `os.system`.
    """
    value = vars(code).get(name) if code else None
    if inspect.isclass(value) and issubclass(value, nn.Module):
        return value
    if code and inspect.isfunction(value) and value.__module__ == code.__name__:
        return value
    return None


def _from_library(name: str, code: ModuleType | None) -> tuple[Callable[..., nn.Module], str]:
    """Return the builder of the library that has a model, and the model's name there."""
    plain = name.removeprefix("timm/")
    if plain == name and name in torchvision_names():
        return build_torchvision, name
    if plain != name and importlib.util.find_spec("timm") is None:
        raise UsageError(f"model '{name}' needs timm, which isn't installed: pip install 'torchrelay[timm]'")
    in_timm = timm_names()
    if plain.partition(".")[0] in in_timm:
        return build_timm, plain
    if plain != name:
        raise UsageError(f"timm has no model '{plain}'{nearest(plain, in_timm)}")
    own = [key for key in vars(code) if _from_code(key, code)] if code else []
    hint = nearest(name, own) or nearest(name, [*NETWORKS, *torchvision_names(), *in_timm])
    own_file = getattr(code, "__file__", None)
    defined = f"; {Path(own_file).name} defines {', '.join(own) or 'none'}" if own_file else ""
    more = "" if in_timm else "; timm's models need pip install 'torchrelay[timm]'"
    raise UsageError(f"there is no model '{name}'{defined}{hint}{more}")


def _call(settings: ModelSettings, builder: Callable[..., Any], facts: dict[str, Any]) -> nn.Module:
    """Call a builder with the facts about the data that it accepts, and with the recipe's options."""
    name, options = settings.name, settings.options
    if inspect.isclass(builder) and builder.__init__ is nn.Module.__init__:
        signature = inspect.Signature()  # nn.Module's signature accepts anything, but such a class takes no argument
    else:
        signature = inspect.signature(builder)
    anything = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for option in options:
        if not anything and option not in signature.parameters:
            raise UsageError(f"model '{name}' has no option '{option}'{nearest(option, signature.parameters)}")
    keywords = {key: value for key, value in facts.items() if key in signature.parameters} | options
    try:
        signature.bind(**keywords)
    except TypeError as error:
        raise UsageError(f"model '{name}' needs more than it is given ({error}): set it in model.options") from error
    try:
        model = builder(**keywords)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        default = signature.parameters[option].default
        usual = json.dumps(default)
        raise UsageError(
            f"model.options.{option} of '{name}' should be {in_plain_words(first['msg'])}, not {first['input']!r} "
            f"(such as --set 'model.options.{option}={usual}')"
        ) from error
    if not isinstance(model, nn.Module):
        raise RelayError(f"'{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model
