"""Step 2: augmentation of whole batches, on the device that holds them.

A transform is a frozen settings class that can be called, so Python (`augment.Flip(p=0.5)`) and a recipe
(`augment = ["flip", { name = "crop", padding = 2 }]`) share it. All random numbers come from a `Draw`: they follow from
a sample's position in the epoch and depend neither on the batch's size and other samples (except for the partners of
mixup and cutmix), nor on the worker or the device.

Images are (batch, channels, height, width), uint8 or floats in [0, 1]. They stay bytes until a transform needs floats,
which saves three quarters of the memory and the time; the last step converts them to float32.
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
