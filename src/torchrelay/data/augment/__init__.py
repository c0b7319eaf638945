"""Step 2: augmentation of whole batches, on whatever device they are.

A transform is a frozen settings class that can be called, so that Python (`augment.Flip(p=0.5)`) and a recipe
(`augment = ["flip", { name = "crop", padding = 2 }]`) share it. All randomness comes from a `Draw`: what happens to a
sample follows from its place in the epoch, and neither the batch's size nor its other samples, the worker or the device
matter (the partner of mixup and cutmix aside).

Images are (batch, channels, height, width), uint8 or floats in [0, 1]. They stay bytes until something needs
fractions, for a quarter of the memory is a quarter of the time; the last step makes float32 of them.
"""

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
from torchrelay.data.augment.pipeline import Augment, ImageTransform, Pipeline, Prepare
from torchrelay.data.augment.policies import RandAugment, TrivialAugment
from torchrelay.errors import renamed

__all__ = [
    "AlternatingFlip",
    "Augment",
    "CenterCrop",
    "ColorJitter",
    "CutMix",
    "Cutout",
    "Draw",
    "Flip",
    "ImageTransform",
    "Mixup",
    "Normalize",
    "PaddedCrop",
    "Pipeline",
    "Prepare",
    "ProgressiveResize",
    "RandAugment",
    "RandomResizedCrop",
    "Resize",
    "TrivialAugment",
]

__getattr__ = renamed(__name__, {"ColourJitter": "ColorJitter", "Normalise": "Normalize"})
