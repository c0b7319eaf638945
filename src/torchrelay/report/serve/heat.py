"""Why a network answers as it does: Grad-CAM on torch.export's program, by captum."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from torchrelay.errors import UsageError
from torchrelay.report.export.formats import needed
from torchrelay.report.export.program import load_program

_CONVOLUTIONS = ("conv2d", "convolution", "_convolution")
_LEAST = 4  # places of a map, across and down, if the network has a convolution with so many
_MAP = "heat_map"  # the name of the module that is put into the graph
Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of an image's width and height


class _Map(nn.Module):
    """Stands in the graph where the last map is computed; the gradient begins here, not at the network's inputs."""

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps as a leaf that wants a gradient."""
        return maps.detach().requires_grad_()


@dataclass(frozen=True)
class Heat:
    """How much each place of an image speaks for a class.

    Args:
        values: (height, width) of the network's last map, from 0 to 1, which the place that says most has.
        box: the part of the network's input that the map covers.
    """

    values: Tensor
    box: Box


class HeatMaps:
    """Grad-CAM of an exported network that has a convolution.

    Selvaraju et al., "Grad-CAM" (ICCV 2017), at the last map of the size of the last convolution's: after the
    normalization, activation and residual that belong to it.

    Args:
        program: the file of torch.export's program.

    Attributes:
        box: as in `Heat`.

    Raises:
        UsageError: captum isn't installed, or the network has no map to show; the text says why.
        RelayError: the file is damaged, or loading it would run code.
    """

    def __init__(self, program: Path) -> None:
        attribution = needed("captum.attr", "pip install 'torchrelay[serve]'")
        module: Any = load_program(program)
        assert isinstance(module, fx.GraphModule)  # noqa: S101 - what torch.export gives
        nodes = [*module.graph.nodes]
        node = _last_map(nodes)
        self.box = _seen(nodes)
        module.add_module(_MAP, _Map())
        with module.graph.inserting_after(node):
            put = module.graph.call_module(_MAP, (node,))
        node.replace_all_uses_with(put, delete_user_cb=lambda user: user is not put)
        module.recompile()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self._module, self._lock = module, threading.Lock()
        self._method = attribution.LayerGradCam(self._logits, getattr(module, _MAP))

    def _logits(self, inputs: Tensor) -> Tensor:
        """Return (batch, classes); of one logit a sample, (batch, 1)."""
        outputs = self._module(inputs)
        logits: Tensor = outputs[-1] if isinstance(outputs, tuple | list) else outputs
        return logits.flatten(1) if logits.ndim > 1 else logits[:, None]

    def of(self, inputs: Tensor, classes: Sequence[int]) -> list[Heat]:
        """Return what speaks for a class in each sample.

        Args:
            inputs: (samples, channels, height, width), as the export takes them.
            classes: of each sample, the class that is asked about.
        """
        with self._lock:  # captum's hooks belong to the module
            found = self._method.attribute(inputs, list(classes), relu_attributions=True)
        maps = found.detach()[:, 0].double()
        most = maps.amax((1, 2), keepdim=True)
        scaled = torch.where(most > 0, maps / most, torch.zeros_like(maps)).nan_to_num(0)
        return [Heat(each, self.box) for each in scaled]


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Return the shape of a node's tensor; () if it is none."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _operator(node: fx.Node) -> str:
    """Return an operator's name, such as "conv2d"; "" if a node calls none."""
    return str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""


def _last_map(nodes: Sequence[fx.Node]) -> fx.Node:
    """Return the last node with a map of the size of the last convolution's that says where something is.

    Raises:
        UsageError: there is none, or what follows doesn't leave the places of a map where they are.
    """
    convolved = [_shape(node)[2:] for node in nodes if _operator(node) in _CONVOLUTIONS and len(_shape(node)) == 4]
    sizes = [size for size in convolved if min(size) >= _LEAST] or [size for size in convolved if max(size) > 1]
    found, begun = None, False
    for node in nodes:
        begun = begun or (_operator(node) in _CONVOLUTIONS and _shape(node)[2:] == sizes[-1])
        shape = _shape(node)
        if begun and len(shape) == 4 and shape[2:] == sizes[-1] and node.meta["val"].is_floating_point():
            found = node
    if found is None:
        raise UsageError("the network has no convolution whose map could be shown")
    for node in nodes[nodes.index(found) + 1 :]:
        if "attention" in _operator(node) or ("softmax" in _operator(node) and len(_shape(node)) == 4):
            raise UsageError("the network mixes all places of the picture by attention after its last convolution")
    return found


def _seen(nodes: Sequence[fx.Node]) -> Box:
    """Return the part of the input that is left when the first convolution sees it: a crop is a slice of the graph."""
    left, top, right, bottom = 0.0, 0.0, 1.0, 1.0
    for node in nodes:
        if _operator(node) in _CONVOLUTIONS:
            break
        if _operator(node) != "slice" or len(node.args) < 4 or not isinstance(node.args[0], fx.Node):
            continue
        before, (_, axis, start, end) = _shape(node.args[0]), node.args[:4]
        # Only the last two dimensions: the batch's is a symbol, and a comparison would settle it.
        if len(before) != 4 or axis not in (2, 3) or not isinstance(start, int) or not isinstance(end, int):
            continue
        size = int(before[2] if axis == 2 else before[3])
        low, high = max(0, start) / size, min(end, size) / size
        if axis == 2:
            top, bottom = top + low * (bottom - top), top + high * (bottom - top)
        else:
            left, right = left + low * (right - left), left + high * (right - left)
    return left, top, right, bottom
