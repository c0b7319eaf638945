"""Step 2: find the images below a folder, a folder for each class, and say what was found and what was left out."""

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchrelay.data.image_files import SUFFIXES, is_image, looks_like_image, out_of_reach, remedy_for
from torchrelay.errors import RelayError, UsageError

_PARTS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
_HIDDEN = (".", "__MACOSX")  # how names begin that belong to the system or to an archive
_NAMED = 8  # classes that a line lists
_DEPTH = 3  # levels below a folder at which images are looked for to make a suggestion


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in an order that depends on their names only."""

    name: str
    folder: Path
    classes: tuple[str, ...]
    labels: list[int]
    files: list[tuple[str, int, int]]  # path relative to the folder, bytes, modification time in ns

    @property
    def paths(self) -> list[str]:
        """The files' paths."""
        return [f"{self.folder}/{file}" for file, _, _ in self.files]

    def take(self, positions: Sequence[int]) -> "Listing":
        """Return the images at some positions."""
        labels, files = [self.labels[i] for i in positions], [self.files[i] for i in positions]
        return Listing(self.name, self.folder, self.classes, labels, files)

    def of(self, classes: Sequence[str]) -> "Listing":
        """Return the images of these classes, with the labels that the classes have here."""
        here = {name: label for label, name in enumerate(classes)}
        known = self.take([i for i, label in enumerate(self.labels) if self.classes[label] in here])
        labels = [here[self.classes[label]] for label in known.labels]
        return Listing(self.name, self.folder, tuple(classes), labels, known.files)

    def counts(self) -> str:
        """Return how many images there are, and of each class: "5 images (cat 3, dog 2)"."""
        numbers = Counter(self.labels)
        by_class = [f"{name} {numbers[label]:,}" for label, name in enumerate(self.classes)]
        text = ", ".join(by_class)
        if len(by_class) > _NAMED:
            (most, high), *_, (least, low) = numbers.most_common()
            text = f"{low:,} of {self.classes[least]} to {high:,} of {self.classes[most]}"
        return f"{len(self.labels):,} images ({text})"


@dataclass(frozen=True)
class Found:
    """What a folder holds."""

    base: Path
    parts: dict[str, Listing]  # "train", "validation", "test"; or "all" alone
    others: Counter[str] = field(default_factory=Counter)  # files that aren't images, by suffix
    folders: list[str] = field(default_factory=list)  # those beside the parts

    def report(self) -> Iterator[str]:
        """Yield the lines that say what was found: classes, images of each part and class, and what was left out."""
        classes = next(iter(self.parts.values())).classes
        more = f", … ({len(classes) - _NAMED:,} more)" if len(classes) > _NAMED else ""
        yield f"{self.base}: {len(classes):,} classes: {', '.join(classes[:_NAMED])}{more}"
        for part, listing in self.parts.items():
            yield f"{'images' if part == 'all' else listing.folder}: {listing.counts()}"
        if self.folders:
            yield f"left out, since they aren't part of the data: the folders {', '.join(self.folders)}"
        if self.others:
            yield f"left out, since they aren't images: {left_out(self.others)}"

    def for_training(self) -> tuple[Listing, Listing | None, Listing | None]:
        """Return the training, validation and test images; without a part for the test, validation stands in for it.

        Raises:
            RelayError: a part is missing, or there is nothing to tell apart.
        """
        train = self.parts.get("train") or self.parts.get("all")
        if train is None:
            (other, *_) = self.parts.values()
            raise RelayError(f"{self.base} has a folder '{other.folder.name}' but none named train: add one")
        self._check_classes(train)
        if "all" in self.parts:
            return train, None, None
        validation, test = self.parts.get("validation"), self.parts.get("test")
        if validation is None and test is None:
            known = ", ".join(name for name in _PARTS if name != "train")
            raise RelayError(
                f"{self.base} has a folder '{train.folder.name}' but none named {known}: add one with the same classes"
            )
        return (train, None, validation) if test is None else (train, validation, test)

    def _check_classes(self, train: Listing) -> None:
        """Refuse a single class, which any model predicts without an error."""
        for other in self.parts.values():
            for one, two in ((train, other), (other, train)):
                if missing := [name for name in one.classes if name not in two.classes]:
                    raise RelayError(
                        f"{two.folder} has no class '{missing[0]}', unlike {one.folder}: give both the same classes"
                    )
        if len(train.classes) > 1:
            return
        nested = nested_folder(train.folder)
        unread = "; labels in a .csv file aren't read" if self.others[".csv"] else ""
        raise RelayError(
            f"{train.folder} has a single class, '{train.classes[0]}', which leaves nothing to learn: "
            + (f"did you mean {nested}?" if nested else f"put each class's images into a folder of its own{unread}")
        )


def find(base: Path) -> Found:
    """Find the images below a folder, in PART/CLASS or in CLASS.

    The parts are called train, test, and val, valid or validation, in any case of letters.

    Raises:
        UsageError: the folder doesn't exist, or has two folders for one part.
        RelayError: there are no images, a class is empty, folders hold the same classes, or a file is out of reach; the
            text names it.
    """
    if not base.is_dir():
        raise UsageError(f"data.root {base}: there is no such folder")
    others: Counter[str] = Counter()
    folders = _folders(base, others)
    known = [name.lower() in _PARTS for name in folders]
    if not any(name.lower() == "train" for name in folders) and not (folders and all(known)):
        _refuse_groups(base, folders)
        return Found(base, {"all": _scan(base, base.name, folders, others)}, others)
    named: dict[str, str] = {}
    for name in folders:
        part = _PARTS.get(name.lower())
        if part in named:
            raise UsageError(f"{base} has '{named[part]}' and '{name}', which name the same part: rename one of them")
        if part is not None:
            named[part] = name
    parts = {}
    for part in ("train", "validation", "test"):
        if part in named:
            folder = base / named[part]
            parts[part] = _scan(folder, base.name, _folders(folder, others), others)
    return Found(base, parts, others, [name for name, is_part in zip(folders, known, strict=True) if not is_part])


def _refuse_groups(base: Path, folders: list[str]) -> None:
    """Refuse folders that all hold the same folders: classes within years, for example, or parts within classes."""
    inside = {name: _folders(base / name, Counter()) for name in folders}
    shared = set.intersection(*map(set, inside.values())) if len(inside) > 1 else set()
    if len(shared) < 2:
        return
    first, second, names = base / folders[0], base / folders[1], sorted(shared)
    if all(name.lower() in _PARTS for name in names):
        remedy = f"put the classes into the parts: {base / names[0] / folders[0]}"
    else:
        remedy = (
            f"if {names[0]} and {names[1]} are classes, join the images of each in one folder ({base / names[0]}), or "
            f"give one of the folders ({first}); if not, move the images up into {first} and so on"
        )
    raise RelayError(
        f"{first} and {second} both have the folders {', '.join(names[:_NAMED])}, so {folders[0]} and {folders[1]} "
        f"would be the classes: {remedy}"
    )


def images_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Return the images in a folder and below it by name, and how many other files there are by suffix."""
    others: Counter[str] = Counter()
    return sorted(Path(name) for name, _, _ in _images(str(folder), str(folder), frozenset(), others)), others


def left_out(others: Counter[str]) -> str:
    """Return how many files of which suffix were left out, and what would read them."""
    named = [f"{count:,} {suffix or 'without a suffix'}" for suffix, count in others.most_common()]
    return ", ".join(named) + remedy_for(others)


def _scan(folder: Path, name: str, classes: list[str], others: Counter[str]) -> Listing:
    """List a part's images; count its other files."""
    if not classes:
        raise RelayError(f"{folder} has no class folders in it: put each class's images into a folder of its own")
    files, labels = [], []
    for label, class_name in enumerate(classes):
        beside: Counter[str] = Counter()
        try:
            members = sorted(_images(f"{folder}/{class_name}", class_name, frozenset(), beside))
        except OSError as error:  # no permission, or a link to itself or to a missing file
            raise out_of_reach(str(error.filename), error) from error
        if not members:
            only = f", only {left_out(beside)}" if beside else ""
            raise RelayError(
                f"{folder / class_name} has no images in it{only}: add some, or move the folder out of {folder}"
            )
        others += beside
        files += members
        labels += [label] * len(members)
    return Listing(name, folder, tuple(classes), labels, files)


def _folders(folder: Path, others: Counter[str]) -> list[str]:
    """Return the names of the folders in a folder, sorted; count the files beside them."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(_HIDDEN)]
            folders = [entry.name for entry in visible if entry.is_dir()]
            others.update(_suffix(entry.name) for entry in visible if entry.is_file())
    except OSError as error:
        raise out_of_reach(str(error.filename), error) from error
    return sorted(folders)


def _images(folder: str, name: str, above: frozenset[str], others: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (path relative to the listing, bytes, modification time) of the images in a folder and below it.

    Each file takes one `stat`, which is most of the time of opening a folder with a cache.
    """
    real = os.path.realpath(folder)
    if real in above:
        return  # a link to a parent folder
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(_HIDDEN):
                continue
            suffix = _suffix(entry.name)
            if entry.is_dir():
                yield from _images(entry.path, f"{name}/{entry.name}", above | {real}, others)
            elif suffix in SUFFIXES or (not suffix and entry.is_file() and looks_like_image(entry.path)):
                facts = entry.stat()
                if stat.S_ISREG(facts.st_mode):  # reading a pipe would block forever
                    yield f"{name}/{entry.name}", facts.st_size, facts.st_mtime_ns
            elif entry.is_file():
                others[suffix] += 1


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path takes ten times as long


def nested_folder(folder: Path) -> Path | None:
    """Return the nearest folder below one that looks as if it was meant: with a training part, or with two classes."""
    level = [folder]
    for _ in range(_DEPTH):
        level = [above / name for above in level for name in _folders(above, Counter())]
        for candidate in level:
            inside = _folders(candidate, Counter())
            classes = sum(any(is_image(path) for path in (candidate / name).iterdir()) for name in inside)
            if "train" in inside or classes > 1:
                return candidate
    return None
