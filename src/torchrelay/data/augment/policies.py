"""Policies: random operations for each image, from a list of fourteen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from torchrelay.data.augment import color
from torchrelay.data.augment.draw import Draw
from torchrelay.data.augment.geometry import warp
from torchrelay.data.augment.pixels import as_floats, like
from torchrelay.settings import Settings

_LEVELS = 31  # of strength, from none to full, as published
_GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_BLENDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": color.adjust_brightness,
    "saturation": color.adjust_saturation,
    "contrast": color.adjust_contrast,
    "sharpness": color.adjust_sharpness,
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "auto_contrast": color.auto_contrast,
    "equalize": color.equalize,
}
OPERATIONS = ("identity", *_GEOMETRIC, *_BLENDED, "posterize", "solarize", *_PLAIN)


@dataclass(frozen=True, slots=True)
class Reach:
    """The operations' extent at full strength."""

    shear: float  # pixels sideways per pixel upwards
    translate: tuple[float, float]  # pixels (right, down)
    rotate: float  # degrees
    blend: float  # the difference of a factor from 1
    bits: int  # that posterize removes


@dataclass(frozen=True, slots=True)
class Choice:
    """An operation on one image."""

    operation: str
    strength: float  # from 0 to 1
    sign: int  # 1 or -1: the direction, for operations that have two


class TrivialAugment(Settings):
    """Apply one of fourteen operations to each image, with a random strength.

    The wide variant of Müller and Hutter, "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation"
    (ICCV 2021, arXiv 2103.10158).
    """

    name: Literal["trivial_augment"] = "trivial_augment"

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images of the same type."""
        reach = Reach(shear=0.99, translate=(32.0, 32.0), rotate=135.0, blend=0.99, bits=6)
        return apply(images, self.choose(draw), reach)

    def choose(self, draw: Draw) -> list[Choice]:
        """Return each image's operation."""
        return [
            Choice(_pick(which), int(level * _LEVELS) / (_LEVELS - 1), 1 if side < 0.5 else -1)
            for which, level, side in draw.uniform(3, cpu=True).tolist()
        ]


class RandAugment(Settings):
    """Apply `n` of fourteen operations to each image, one after another, all with the same strength.

    As Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space" (NeurIPS 2020).
    """

    name: Literal["rand_augment"] = "rand_augment"
    n: Annotated[int, Field(ge=1)] = 2
    """Operations per image."""
    magnitude: Annotated[int, Field(ge=0, lt=_LEVELS)] = 9
    """Their strength, from 0 to 30."""

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """Return (batch, channels, height, width) images of the same type."""
        height, width = images.shape[2:]
        translate = (width * 150 / 331, height * 150 / 331)  # published for images of 331 pixels
        reach = Reach(shear=0.3, translate=translate, rotate=30.0, blend=0.9, bits=4)
        strength = self.magnitude / (_LEVELS - 1)
        numbers = draw.uniform(2 * self.n, cpu=True).tolist()
        for step in range(0, 2 * self.n, 2):
            choices = [Choice(_pick(row[step]), strength, 1 if row[step + 1] < 0.5 else -1) for row in numbers]
            images = apply(images, choices, reach)
        return images


def _pick(number: float) -> str:
    return OPERATIONS[int(number * len(OPERATIONS))]


def apply(images: Tensor, choices: Sequence[Choice], reach: Reach) -> Tensor:
    """Apply each image's operation; images with the same operation are processed together."""
    members: dict[str, list[int]] = {}
    for i, choice in enumerate(choices):
        group = "geometric" if choice.operation in _GEOMETRIC else choice.operation
        members.setdefault(group, []).append(i)
    members.pop("identity", None)
    out = images.clone()
    for group, images_of_group in members.items():
        index = torch.tensor(images_of_group).to(images.device, non_blocking=True)
        out[index] = _operate(group, images[index], [choices[i] for i in images_of_group], reach)
    return out


def _operate(group: str, images: Tensor, choices: Sequence[Choice], reach: Reach) -> Tensor:
    """Apply one operation (or any geometric ones) to all images."""
    if group == "geometric":
        maps = [affine_map(choice, reach, *images.shape[2:]) for choice in choices]
        return warp(images, torch.tensor(maps).to(images.device, non_blocking=True))
    if group in _PLAIN:
        return like(_PLAIN[group](as_floats(images)), images)
    if group in _BLENDED:
        amounts = [1 + choice.sign * choice.strength * reach.blend for choice in choices]
        operation = _BLENDED[group]
    elif group == "posterize":
        amounts = [8.0 - round(choice.strength * reach.bits) for choice in choices]
        operation = color.posterize
    else:
        amounts = [1 - choice.strength for choice in choices]
        operation = color.solarize
    amount = torch.tensor(amounts).view(-1, 1, 1, 1).to(images.device, non_blocking=True)
    return like(operation(as_floats(images), amount), images)


def affine_map(choice: Choice, reach: Reach, height: int, width: int) -> tuple[float, ...]:
    """Return the map (a, b, c, d, e, f) of `warp`. Images are sheared about their upper left corner."""
    strength = choice.sign * choice.strength
    if choice.operation == "shear_x":
        return 1.0, strength * reach.shear, 0.0, 0.0, 1.0, 0.0
    if choice.operation == "shear_y":
        return 1.0, 0.0, 0.0, strength * reach.shear, 1.0, 0.0
    if choice.operation == "translate_x":
        return 1.0, 0.0, float(-int(strength * reach.translate[0])), 0.0, 1.0, 0.0
    if choice.operation == "translate_y":
        return 1.0, 0.0, 0.0, 0.0, 1.0, float(-int(strength * reach.translate[1]))
    angle = math.radians(strength * reach.rotate)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2  # images are rotated about their center
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y
