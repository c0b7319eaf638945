"""What a check has found: samples by name, findings with examples, and the parts of the data that they are in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrelay.data.sources import ArraySource

Indices = npt.NDArray[np.int64]
Pairs = npt.NDArray[np.int64]  # (pairs, 2) positions in a pool
SHOWN = 24  # examples that a finding keeps
# The words of a title that change where it is about one case: the first that is found in its subject, and in the rest.
_SUBJECTS = {"images": "image", "rows": "row", "pairs": "pair", "files": "file", "classes": "class"}
_VERBS = {"are exact copies of others": "is an exact copy of another", "are": "is", "have": "has"}


@dataclass(frozen=True)
class Example:
    """One case: the samples that it is about, by their positions in the pool, or a file that can't be shown."""

    samples: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that would spoil a training.

    Args:
        title: what it is, after the count: "test images are in the training data as well".
        count: how many there are.
        examples: the first of them.
        advice: what to do.
        serious: whether results would be wrong, or the training would stop.
    """

    title: str
    count: int
    examples: tuple[Example, ...]
    advice: str
    serious: bool = False

    @property
    def heading(self) -> str:
        """The title in the number of `count`: "test image is in the training data as well" for one."""
        verb = re.search(r"\b(are|have|can't)\b", self.title)
        if self.count != 1 or verb is None:
            return self.title
        subject, rest = self.title[: verb.start()], self.title[verb.start() :]
        return _one(subject, _SUBJECTS) + _one(rest, _VERBS)


def _one(words: str, singular: dict[str, str]) -> str:
    found = re.search("|".join(rf"\b{word}\b" for word in singular), words)
    return words if found is None else words[: found.start()] + singular[found[0]] + words[found.end() :]


@dataclass(frozen=True)
class Pool:
    """The samples of all parts behind one another, the training part first.

    Args:
        parts: train, and validation and test if there are any, in this order; their samples have one form.
    """

    parts: dict[str, ArraySource] = field(repr=False)

    @cached_property
    def part(self) -> Indices:
        """The number of the part of each sample; 0 is the training part."""
        return np.repeat(np.arange(len(self.parts)), [len(source) for source in self.parts.values()])

    @cached_property
    def labels(self) -> Indices | None:
        """The class of each sample; None if the targets aren't classes."""
        targets = [source.targets for source in self.parts.values()]
        if any(each.ndim != 1 or each.is_floating_point() for each in targets):
            return None
        return np.concatenate([each.numpy() for each in targets]).astype(np.int64)

    @property
    def classes(self) -> Sequence[str]:
        """The classes' names."""
        named = self.parts["train"].classes
        if named or self.labels is None:
            return named
        return [str(label) for label in range(int(self.labels.max()) + 1)]

    @property
    def has_images(self) -> bool:
        """Whether the samples are images with one or three channels."""
        inputs = self.parts["train"].inputs
        return inputs.ndim == 4 and inputs.shape[1] in (1, 3)

    @property
    def unit(self) -> str:
        """What a sample is called."""
        return "images" if self.has_images else "rows"

    def place(self, sample: int) -> tuple[str, ArraySource, int]:
        """Return a sample's part, the part's source and the sample's index in it."""
        for name, source in self.parts.items():
            if sample < len(source):
                return name, source, sample
            sample -= len(source)
        raise IndexError(sample)

    def name(self, sample: int) -> str:
        """Return a sample's file, such as "train/cat/3.jpg", or its part and index, such as "train 17"."""
        part, source, index = self.place(sample)
        if source.files is None:
            return f"{part} {index}"
        return f"{Path(source.files.folder).name}/{source.files.names[index]}"

    def class_of(self, sample: int) -> str:
        """Return the name of a sample's class; "" if it has none."""
        return "" if self.labels is None else self.classes[int(self.labels[sample])]


def of_samples(samples: Indices, note: Sequence[str] = ()) -> tuple[Example, ...]:
    """Return the first samples as examples, each with its note."""
    shown = samples[:SHOWN].tolist()
    return tuple(Example((sample,), note[i] if note else "") for i, sample in enumerate(shown))


def of_pairs(pairs: Pairs, note: Sequence[str] = ()) -> tuple[Example, ...]:
    """Return the first pairs as examples, each with its note."""
    shown = pairs[:SHOWN].tolist()
    return tuple(Example((one, other), note[i] if note else "") for i, (one, other) in enumerate(shown))
