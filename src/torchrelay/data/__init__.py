"""Step 2: data: sources of samples, their order, their augmentation and their batches."""

from torchrelay.data import augment
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.data.builtin import cifar10, cifar100, digits, text
from torchrelay.data.folder import image_folder, image_parts
from torchrelay.data.settings import DataSettings, load
from torchrelay.data.sources import ArraySource, DatasetSource, Parts, Source, arrays, as_source, dataset, split

__all__ = [
    "ArraySource",
    "Batch",
    "Batches",
    "DataSettings",
    "DatasetSource",
    "Parts",
    "Source",
    "arrays",
    "as_source",
    "augment",
    "cifar10",
    "cifar100",
    "dataset",
    "digits",
    "image_folder",
    "image_parts",
    "load",
    "split",
    "text",
]
