"""Step 2: data: sources of samples, their order, their augmentation and their batches."""

from torchrelay.data import augment
from torchrelay.data.accept import as_source
from torchrelay.data.batch import Batch
from torchrelay.data.batches import Batches
from torchrelay.data.builtin import breast_cancer, cifar10, cifar100, digits, fashion_mnist, mnist, text, wine
from torchrelay.data.folder import image_folder, image_parts
from torchrelay.data.settings import DataSettings, load
from torchrelay.data.sources import ArraySource, DatasetSource, Parts, Source, arrays, dataset, split
from torchrelay.data.stream import StreamSource, stream

__all__ = [
    "ArraySource",
    "Batch",
    "Batches",
    "DataSettings",
    "DatasetSource",
    "Parts",
    "Source",
    "StreamSource",
    "arrays",
    "as_source",
    "augment",
    "breast_cancer",
    "cifar10",
    "cifar100",
    "dataset",
    "digits",
    "fashion_mnist",
    "image_folder",
    "image_parts",
    "load",
    "mnist",
    "split",
    "stream",
    "text",
    "wine",
]
