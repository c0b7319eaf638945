"""The pipeline of transforms between the source and the model, and the names of transforms in a recipe."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, cast, get_args

import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from torchrelay.data.augment.color import ColorJitter, Normalize
from torchrelay.data.augment.draw import Draw
from torchrelay.data.augment.geometry import (
    AlternatingFlip,
    CenterCrop,
    Cutout,
    Flip,
    PaddedCrop,
    ProgressiveResize,
    RandomResizedCrop,
    Resize,
)
from torchrelay.data.augment.mixing import CutMix, Mixup
from torchrelay.data.augment.pixels import as_floats
from torchrelay.data.augment.policies import RandAugment, TrivialAugment
from torchrelay.data.order import Positions
from torchrelay.errors import UsageError, nearest, warn_renamed
from torchrelay.settings import RENAMED_TRANSFORMS, Settings

_Fixed = Resize | CenterCrop
_Any = (
    Flip
    | AlternatingFlip
    | PaddedCrop
    | RandomResizedCrop
    | Resize
    | ProgressiveResize
    | CenterCrop
    | Cutout
    | ColorJitter
    | TrivialAugment
    | RandAugment
    | Mixup
    | CutMix
)
_WithMasks = Flip | AlternatingFlip | PaddedCrop
_Moving = Flip | AlternatingFlip | PaddedCrop | RandomResizedCrop | TrivialAugment | RandAugment | Mixup | CutMix
# The random streams keep the names that they were released with, and so their numbers.
_STREAM_NAMES = {"color_jitter": "colour_jitter"}


def _names(union: Any) -> tuple[str, ...]:
    return tuple(member.model_fields["name"].default for member in get_args(union))


def _by_name(known: tuple[str, ...]) -> Callable[[Any], Any]:
    """Return the function that turns a transform in a recipe into the table by which pydantic chooses its class."""

    def table(value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            return value
        if "name" not in value:
            raise ValueError(f"a transform needs a name: one of {', '.join(known)}")
        name = str(value["name"])
        if name in RENAMED_TRANSFORMS:
            warn_renamed(f"transform '{name}'", f"'{RENAMED_TRANSFORMS[name]}'")
            name = RENAMED_TRANSFORMS[name]
        if name not in known:
            near = nearest(name, known) or f": choose one of {', '.join(known)}"
            raise ValueError(f"unknown transform '{name}'{near}")
        return {**value, "name": name}

    return table


# In a recipe, a transform is a name, or a table of the name and the options that differ from the defaults.
Augment = Annotated[
    _Any,
    Field(discriminator="name"),
    BeforeValidator(_by_name(_names(_Any)), json_schema_input_type=Literal[_names(_Any)] | _Any),
]
Prepare = Annotated[
    _Fixed,
    Field(discriminator="name"),
    BeforeValidator(_by_name(_names(_Fixed)), json_schema_input_type=Literal[_names(_Fixed)] | _Fixed),
]
ImageTransform = Callable[[Tensor, Draw], Tensor]  # a user's own transform


@dataclass(frozen=True)
class Pipeline:
    """Everything that happens to a batch between the source and the model.

    Training: `prepare`, `transforms` in their order, normalization. Evaluation: `prepare`, normalization.

    Raises:
        UsageError: `prepare` has a random transform, or `mean` and `std` can't be used.
    """

    transforms: Sequence[Augment | ImageTransform] = ()
    prepare: Sequence[Augment] = ()
    """Transforms with which both training and evaluation begin: resize and center_crop."""
    mean: Sequence[float] | None = None
    """Each channel's mean, of images in [0, 1]; None: images only become float32 in [0, 1]."""
    std: Sequence[float] | None = None
    """Each channel's standard deviation, likewise."""
    classes: int = 0
    """The number of classes, for transforms that mix targets."""

    def __post_init__(self) -> None:
        for transform in self.prepare:
            if not isinstance(transform, _Fixed):
                raise UsageError(
                    f"transform '{_name(transform)}' is random, and 'prepare' is for evaluation as well: "
                    "move it to 'augment'"
                )
        if (self.mean is None) != (self.std is None):
            raise UsageError("images are normalized by mean and std, and one of them is missing: give both or neither")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"std is {tuple(self.std)}, and images are divided by it: each must be above 0")

    @property
    def is_built_in(self) -> bool:
        """Whether all transforms are from this package and none is the user's own function."""
        return all(type(transform) in get_args(_Any) for transform in self.transforms)

    @cached_property
    def _normalize(self) -> Normalize | None:
        if self.mean is None or self.std is None:
            return None
        return Normalize(mean=tuple(self.mean), std=tuple(self.std))

    def train(
        self,
        inputs: Any,
        targets: Tensor,
        *,
        seed: int,
        epoch: int,
        position: int,
        indices: Positions | Tensor,
        replica_sizes: Sequence[int] | None = None,
    ) -> tuple[Any, Tensor]:
        """Return a batch for training.

        Args:
            inputs: (batch, channels, height, width) images, uint8 or floats in [0, 1]; anything else is returned
                unchanged if there are no transforms.
            targets: (batch,) int64 class indices, which transforms that mix turn into float32 (batch, classes); or
                masks of the images' height and width, which flips and crops move like the images.
            seed: the run's seed.
            epoch: counted from 0.
            position: the position in the epoch of the first sample.
            indices: (batch,) int64, each sample's index in the source.
            replica_sizes: sizes of the replicas' consecutive parts, within which mixing finds partners; None: one part.

        Returns:
            float32 images, and targets.

        Raises:
            UsageError: a transform doesn't apply to this data.
        """
        if not self._takes(inputs, [*self.prepare, *self.transforms]):
            return inputs, targets
        has_masks = isinstance(targets, Tensor) and targets.ndim > 2 and targets.shape[-2:] == inputs.shape[-2:]
        if has_masks:
            self._refuse_moving()
        images = self._prepared(inputs)
        positions = torch.arange(position, position + len(images))
        samples = torch.as_tensor(indices)
        for number, transform in enumerate(self.transforms):
            name = _name(transform)
            stream = f"augment.{number}.{_STREAM_NAMES.get(name, name)}"
            draw = Draw(seed, epoch, positions, samples, stream, images.device)
            if isinstance(transform, Mixup | CutMix):
                targets = _probabilities(targets, self.classes, transform.name)
                images, targets = transform(images, targets, draw, replica_sizes or (len(images),))
            else:
                images = transform(images, draw)
                if has_masks and isinstance(transform, _WithMasks):
                    targets = transform(targets.reshape(len(images), -1, *targets.shape[-2:]), draw).view(targets.shape)
        return self._finished(images, inputs), targets

    def evaluate(self, inputs: Any) -> Any:
        """Return the inputs of a batch for evaluation: prepared and normalized."""
        return self._finished(self._prepared(inputs), inputs) if self._takes(inputs, self.prepare) else inputs

    def _refuse_moving(self) -> None:
        """Raise a UsageError if a transform would move the pixels of images but not those of their masks."""
        for transform in self.transforms:
            pads = isinstance(transform, PaddedCrop) and transform.mode == "zeros"  # 0 is a class
            if isinstance(transform, _Moving) and (pads or not isinstance(transform, _WithMasks)):
                raise UsageError(
                    f"transform '{_name(transform)}' moves an image's pixels but not those of its target: leave it "
                    "out, or transform both in a Dataset; flips, and crop with mode reflect or edge, move both"
                )

    def _takes(self, inputs: Any, transforms: Sequence[Augment | ImageTransform]) -> bool:
        """Return whether the inputs are images; raise a UsageError if they aren't and a transform needs images."""
        if (
            isinstance(inputs, Tensor)
            and inputs.ndim == 4
            and (inputs.dtype == torch.uint8 or inputs.is_floating_point())
        ):
            return True
        names = [f"transform '{_name(transform)}'" for transform in transforms] + ["normalization"] * (
            self.mean is not None
        )
        if names:
            raise UsageError(
                f"{names[0]} is for images, uint8 or floats of shape (batch, channels, height, width), "
                f"and the inputs are {_described(inputs)}: leave it out, or do it in the dataset"
            )
        return False

    def _prepared(self, images: Tensor) -> Tensor:
        for transform in self.prepare:
            images = cast("_Fixed", transform)(images)
        return images

    def _finished(self, images: Tensor, inputs: Tensor) -> Tensor:
        """Return float32 images, normalized, in the memory format of the inputs."""
        images = as_floats(images) if self._normalize is None else self._normalize(images)
        channels_last = inputs.is_contiguous(memory_format=torch.channels_last) and not inputs.is_contiguous()
        return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _name(transform: Any) -> str:
    return str(getattr(transform, "name", None) or getattr(transform, "__name__", type(transform).__name__))


def _described(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"{str(inputs.dtype).removeprefix('torch.')} of shape {tuple(inputs.shape)}"
    return f"a {type(inputs).__name__}"


def _probabilities(targets: Tensor, classes: int, name: str) -> Tensor:
    """Return one-hot targets, float32 (batch, classes); targets that are floats are returned unchanged."""
    if targets.is_floating_point():
        return targets
    if targets.ndim != 1 or classes < 1:
        raise UsageError(
            f"transform '{name}' mixes classes; the targets are {_described(targets)}, of {classes} known classes: "
            "leave it out, or give one class index per sample and the names of the classes"
        )
    return F.one_hot(targets.long(), classes).to(torch.float32)


# ------------------------------------------------------------------------------------------------ what a user may give

AugmentLike = Augment | type[Augment] | ImageTransform | str | Mapping[str, Any]
_BY_NAME: TypeAdapter[Augment] = TypeAdapter(Augment)


def as_transforms(given: AugmentLike | Sequence[AugmentLike] | None, argument: str) -> tuple[Any, ...]:
    """Return the transforms that a user means: one, or several; each itself, its class, or as in a recipe.

    Args:
        given: the transforms.
        argument: "augment" or "prepare".

    Raises:
        UsageError: one of them can't transform batches.
    """
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return tuple(_as_transform(each, argument) for each in several if each is not None)


def _as_transform(given: Any, argument: str) -> Any:
    if isinstance(given, str | Mapping):
        try:
            return _BY_NAME.validate_python(given)
        except ValidationError as error:
            raise UsageError(f"{argument}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if isinstance(given, type):
        given = given()
    if isinstance(given, Settings):
        return given
    name = getattr(given, "__name__", type(given).__name__)
    if type(given).__module__.startswith("torchvision."):
        raise UsageError(
            f"{argument} has torchvision's {name}, which transforms one image at a time: leave it to the dataset "
            "(transform=...), where generators are seeded for each sample; or give a transform of tr.augment"
        )
    try:
        inspect.signature(given).bind("images", "draw")
    except TypeError:
        raise UsageError(
            f"{argument} has {name}, which can't be called with (images, draw): give a transform of tr.augment, or a "
            "function of a batch of images and of draw, whose uniform() gives random numbers"
        ) from None
    return given
