"""Step 3: models from the libraries: torchvision's classification models by name, and timm's.

Both are imported only here and only when needed. Pretrained weights come from the library's URL or its cache; if the
number of classes or channels differs from theirs, the last or first layer is replaced, and the log says so.
"""

import http.client
import importlib.util
import re
import socket
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrelay.errors import RelayError, UsageError, nearest
from torchrelay.models.weights import Log, find_head, read_weights

_CONNECT = 10.0  # seconds to wait for the Hugging Face Hub's first answer
_SILENCE = 30.0  # seconds without data after which a download has failed
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
_OWN_KEYWORDS = ("num_classes", "weights", "progress", "in_chans", "pretrained")  # which model.options can't hold


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification models."""
    from torchvision import models

    return list(models.list_models(module=models))


def timm_names() -> list[str]:
    """Return the names of timm's models without their weights' tags; none if timm isn't installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    import timm

    return list(timm.list_models())


# ------------------------------------------------------------------------------------------------ torchvision


def build_torchvision(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int | None,
    pretrained: bool | str,
    new_head: bool,
    options: dict[str, Any],
    log: Log,
) -> nn.Module:
    """Build one of torchvision's classification models.

    Args:
        name: one of `torchvision_names()`.
        classes: outputs.
        channels: of the images; if not 3, the first convolution is replaced.
        image_size: used by the transformers (vit, maxvit), which are built for one size.
        pretrained: True for the library's default weights, or their name, such as "IMAGENET1K_V2".
        new_head: replace the last layer even if its number of classes fits.
        options: further keywords of the model's class.
        log: receives a line for everything loaded or replaced.
    """
    from torchvision import models

    _refuse_own_keywords(options)
    weights = _torchvision_weights(name, pretrained)
    keywords = {"weights": weights, **_torchvision_defaults(name, image_size, weights is not None), **options}
    if weights is None:
        keywords["num_classes"] = classes
    try:
        model: nn.Module = models.get_model(name, **keywords)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"model '{name}' can't be built with these model.options and data: {error}") from error
    if "aux_logits" not in options:
        _drop_auxiliary_heads(model)
    if weights is not None:
        log(f"loaded {name}'s weights {weights.name}")
        trained = len(weights.meta["categories"])
        if new_head or classes != trained:
            log(f"the head '{_replace_head(model, classes)}' is new: {classes} classes, {trained} in the weights")
    if channels != 3:
        log(_replace_stem(name, model, channels, keep=weights is not None))
    return model


def _torchvision_defaults(name: str, image_size: int | None, pretrained: bool) -> dict[str, Any]:
    """Return the keywords by which some models fit the image size and don't warn."""
    keywords: dict[str, Any] = {}
    if name in _WITH_AUXILIARY_HEADS and not pretrained:
        keywords["init_weights"] = True  # they warn if it isn't set
    if image_size is not None and name.startswith("vit_"):
        keywords["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit"):
        keywords["input_size"] = (image_size, image_size)
    return keywords


def _drop_auxiliary_heads(model: nn.Module) -> None:
    """Remove the auxiliary heads of GoogLeNet and Inception, which make them return a tuple in training."""
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)
            model.aux_logits = False  # type: ignore[assignment]


def _torchvision_weights(name: str, pretrained: bool | str) -> Any:
    """Return the library's entry for the weights, once their file is cached and known to hold no code."""
    if not pretrained:
        return None
    from torchvision import models

    known = models.get_model_weights(name).__members__
    if not known:
        raise UsageError(f"torchvision has no pretrained weights for '{name}': leave model.pretrained out")
    if isinstance(pretrained, str) and pretrained not in known:
        hint = nearest(pretrained, known)
        raise UsageError(f"'{name}' has no weights '{pretrained}' but {', '.join(known)}{hint}")
    weights = known[pretrained] if isinstance(pretrained, str) else models.get_model_weights(name).DEFAULT
    # The library unpickles its cache without restriction; reading it first with the restricted reader refuses code.
    read_weights(_download(name, weights.url))
    return weights


def _download(name: str, url: str) -> Path:
    """Return the cached file of a URL in PyTorch's cache, downloading it if needed."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if path.exists():
        return path
    hash_prefix = re.search(r"-([a-f0-9]{8,})\.", path.name)
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE)  # the library sets none and would wait forever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix and hash_prefix[1], progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise RelayError(
            f"the pretrained weights of '{name}' can't be fetched from {url} ({error}): "
            f"fetch that file elsewhere and put it at {path}, or leave model.pretrained out"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return path


def _refuse_own_keywords(options: dict[str, Any]) -> None:
    for key in options:
        if key in _OWN_KEYWORDS:
            raise UsageError(f"model.options.{key} isn't yours to set: it follows from the data and model.pretrained")


def _replace_head(model: nn.Module, classes: int) -> str:
    """Replace the last layer by a new one with PyTorch's initial weights, and return its name."""
    name = find_head(model)
    old = model.get_submodule(name) if name else None
    if name and isinstance(old, nn.Linear):
        model.set_submodule(name, nn.Linear(old.in_features, classes, bias=old.bias is not None))
    elif name and isinstance(old, nn.Conv2d):
        model.set_submodule(name, _conv_like(old, old.in_channels, classes))
    else:
        raise RelayError(f"{type(model).__name__} has no last layer that could be replaced for {classes} classes")
    return name


def _replace_stem(name: str, model: nn.Module, channels: int, keep: bool) -> str:
    """Replace the first convolution by one of other channels, and return a line for the log.

    Args:
        name: the model's, for messages.
        model: it is changed in place.
        channels: of the images.
        keep: give every channel the mean of the old filters, scaled so that the output for a gray image stays the same.
    """
    stem, old = next((where, part) for where, part in model.named_modules() if isinstance(part, nn.Conv2d))
    if getattr(model, "transform_input", False):
        raise UsageError(f"the weights of '{name}' need 3 channels, not {channels}: leave model.pretrained out")
    new = _conv_like(old, channels, old.out_channels)
    if keep:
        with torch.no_grad():
            new.weight.copy_(old.weight.sum(1, keepdim=True) / channels)
            if new.bias is not None and old.bias is not None:
                new.bias.copy_(old.bias)
    model.set_submodule(stem, new)
    how = "the mean of its old filters" if keep else "initial weights"
    return f"the first convolution '{stem}' of '{name}' now takes {channels} channels, with {how}"


def _conv_like(old: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    """Build a convolution of the same geometry, with torchvision's usual initial weights (He et al., 2015)."""
    new = nn.Conv2d(inputs, outputs, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    return new


# ------------------------------------------------------------------------------------------------ timm


def build_timm(
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int | None,
    pretrained: bool | str,
    new_head: bool,
    options: dict[str, Any],
    log: Log,
) -> nn.Module:
    """Build one of timm's models; the arguments are `build_torchvision`'s.

    timm itself replaces the head and the first convolution; its weights are named within the model's name, as in
    "resnet18.a1_in1k".
    """
    import timm

    _refuse_own_keywords(options)
    if isinstance(pretrained, str):
        raise UsageError(f"timm's weights are named in the model's name: set model.name = \"timm/{name}.{pretrained}\"")
    keywords = {"num_classes": classes, "in_chans": channels, **options}
    config = timm.get_pretrained_cfg(name)
    if image_size is not None and config is not None and config.fixed_input_size:
        keywords.setdefault("img_size", image_size)
    try:  # without weights first, to tell a wrong option from a failed download
        model: nn.Module = timm.create_model(name, pretrained=False, **keywords)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"model 'timm/{name}' can't be built with these model.options and data: {error}") from error
    if not pretrained:
        return model
    online = _hub_answers()
    try:
        with nullcontext() if online else _offline():
            model = timm.create_model(name, pretrained=True, **keywords)
    except Exception as error:  # each of its download backends raises its own errors
        cause = (str(error).strip() or type(error).__name__).splitlines()[0] if online else "no connection to the Hub"
        raise RelayError(
            f"the pretrained weights of 'timm/{name}' can't be had ({cause}): "
            "fetch the file elsewhere and set model.pretrained to its path, or leave it out"
        ) from error
    log(f"loaded timm's weights of {name}")
    if new_head:
        model.reset_classifier(classes)  # type: ignore[operator]  # every model of timm has it
    if new_head or config is None or config.num_classes != classes:
        log(f"the head '{find_head(model)}' is new: {classes} classes")
    return model


def _hub_answers() -> bool:
    """Return whether the Hugging Face Hub can be reached: its library retries for a minute, with a line each time."""
    from huggingface_hub import constants

    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310 - the library's own address
        urllib.request.urlopen(request, timeout=_CONNECT).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """Let the Hub's library look in its cache only."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
