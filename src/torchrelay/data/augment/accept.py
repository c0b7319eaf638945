"""What a user may give as augmentation from Python, and what it becomes."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from torchrelay.data.augment.pipeline import Augment, ImageTransform
from torchrelay.errors import UsageError
from torchrelay.settings import Settings

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
