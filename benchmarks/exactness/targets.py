"""The readers that `fuzz.py` gives damaged inputs, each with valid ones: files of a run, recipes, data."""

import argparse
import gzip
import hashlib
import io
import json
import struct
import tomllib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from PIL import Image
from torch import nn

import torchrelay as tr
from benchmarks.exactness.fuzz import Target
from benchmarks.exactness.mutations import Form, Tree, write_json, write_toml
from torchrelay import cli
from torchrelay.checkpoint import retention
from torchrelay.checkpoint.format import Manifest, read
from torchrelay.commands.options import recipe_of_run
from torchrelay.data import cache as image_cache
from torchrelay.data import folder as image_folder
from torchrelay.data import image_files
from torchrelay.data.builtin import read_idx
from torchrelay.data.files import differences
from torchrelay.data.image_files import fitted, looks_like_image, read_pixels
from torchrelay.data.listing import find
from torchrelay.errors import RelayError
from torchrelay.models.weights import read_weights
from torchrelay.recipe import recipe, shipped
from torchrelay.run import identity
from torchrelay.run.folder import RunFolder, check_free
from torchrelay.run.metrics import read_metrics
from torchrelay.run.plots import PlotProcess
from torchrelay.run.terminal import Terminal
from torchrelay.settings import _keys

JSON = Form(json.loads, write_json)
TOML = Form(lambda data: tomllib.loads(data.decode()), write_toml)
QUIET = Terminal(quiet=True)


def _nothing(*_: object) -> None:
    """Ignore a message."""


def _refuse(message: str) -> None:
    raise RelayError(message)


# ------------------------------------------------------------------------------------------------ checkpoints


def _trained(folder: Path) -> tr.Trainer:
    """Return the trainer of a short run, whose folder has two checkpoints."""
    PlotProcess.start = lambda *_, **__: None  # type: ignore[method-assign]
    PlotProcess.prepare = lambda *_, **__: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(24, 4, generator=draw), torch.arange(24) % 2
    trainer = tr.Trainer(
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        tr.data.arrays(images, labels, ("a", "b")),
        tr.data.arrays(images, labels, ("a", "b")),
        optimizer=tr.optim.AdamW(lr=0.01),
        schedule=tr.optim.OneCycle(),
        settings=tr.RunSettings(patience=5, epochs=2, spike_threshold=100),
        batch_size=8,
        ema=0.9,
        run=folder,
        device=tr.DeviceSettings(name="cpu"),
        terminal=QUIET,
    )
    trainer.fit()
    return trainer


def _sign(tree: Tree) -> Tree:
    """Give a manifest the checksum that a forger would."""
    try:
        return tree | {"checksum": Manifest.model_validate(tree).own_checksum()}
    except (ValueError, TypeError):
        return tree


def manifest(folder: Path) -> Target:
    """Return the manifest of a checkpoint; its structure is changed under a right checksum."""
    _trained(folder)
    checkpoints = folder / "checkpoints"
    path = retention.complete(checkpoints)[-1]
    corpus = [(path / "manifest.json").read_bytes()]

    def feed(data: bytes) -> object:
        (path / "manifest.json").write_bytes(data)
        retention.find(checkpoints, "best")
        retention.prune(checkpoints, 9, 9)
        return retention.newest(checkpoints, _refuse)  # rather than read the intact one before it

    return Target(feed, corpus, Form(json.loads, lambda tree: write_json(_sign(tree))))


def state(folder: Path) -> Target:
    """Return a checkpoint's state as JSON, under a right manifest; it is restored to a run."""
    form = Form(lambda data: json.loads(data[1:]), lambda tree: b"0" + write_json(tree))
    return _in_checkpoint(folder, ["state.json"], form)


def tensors(folder: Path) -> Target:
    """Return a checkpoint's files of tensors, under a right manifest; their headers are changed, and their bytes."""

    def decode(data: bytes) -> Tree:
        (length,) = struct.unpack("<Q", data[1:9])
        return [data[0], json.loads(data[9 : 9 + length]), data[9 + length :].hex()]

    def encode(tree: Tree) -> bytes:
        which, header, content = tree
        text = write_json(header)
        return bytes((which,)) + struct.pack("<Q", len(text)) + text + bytes.fromhex(content)

    return _in_checkpoint(folder, ["model.safetensors", "ema.safetensors", "state.safetensors"], Form(decode, encode))


def _in_checkpoint(folder: Path, names: Sequence[str], form: Form) -> Target:
    """Return files of a checkpoint; the first byte of an input says which of them it replaces."""
    session = _trained(folder).session
    path = retention.complete(folder / "checkpoints")[-1]
    intact = [(path / name).read_bytes() for name in names]
    before = json.loads((path / "manifest.json").read_text())

    def feed(data: bytes) -> object:
        for name, content in zip(names, intact, strict=True):
            (path / name).write_bytes(content)
        name, content = names[data[0] % len(names) if data else 0], data[1:]
        (path / name).write_bytes(content)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        forged = _sign(before | {"files": before["files"] | {name: entry}})
        (path / "manifest.json").write_text(json.dumps(forged))
        contents = read(path)
        session._restore(contents, accept_changes=True)
        return contents.step

    bomb = b"0" + b"[" + b"[]," * (10 * 2**20) + b"[]]"
    marked = [bytes((number,)) + content for number, content in enumerate(intact)]
    return Target(feed, marked, form, [bomb] if names == ["state.json"] else [])


# ------------------------------------------------------------------------------------------------ recipes


def recipes(folder: Path) -> Target:
    """Return the shipped recipes; what is read is written and read again, to the same recipe."""
    folder.mkdir()
    corpus = [Path(str(shipped.path(name))).read_bytes() for name in shipped.headers()]
    corpus += [recipe.load(name).to_toml().encode() for name in shipped.headers()]
    path = folder / "x.toml"

    def feed(data: bytes) -> object:
        path.write_bytes(data)
        found = recipe.load(str(path))
        second = recipe.parse(tomllib.loads(found.to_toml()), "again")
        if repr(second) != repr(found):  # as texts, since nan isn't equal to itself
            raise AssertionError(f"{second} isn't {found}")
        return found

    return Target(feed, corpus, TOML)


def run_recipe(folder: Path) -> Target:
    """Return the recipe in a run's folder, as a resume reads it and compares it with its own."""
    _trained(folder)
    record = recipe.load("digits").model_dump(mode="json", exclude_none=True)
    corpus = [(folder / "recipe.toml").read_bytes()]
    corpus += [tomli_w.dumps(record | {"environment": {"torch": "2.15.0", "code": "mine.py"}}).encode()]
    options = argparse.Namespace(folder=folder, overrides=["run.epochs=3"], code="mine.py")
    run = RunFolder(folder, QUIET, resume=True)

    def feed(data: bytes) -> object:
        (folder / "recipe.toml").write_bytes(data)
        for reader in (lambda: check_free(folder), lambda: recipe_of_run(options)):
            try:
                reader()
            except RelayError:
                continue
        return identity.compare_recipes(run.read_recipe(), record, accept_changes=False)

    return Target(feed, corpus, TOML, close=run.close)


def overrides(folder: Path) -> Target:
    """Return texts of `--set`; an input may hold several, one a line."""
    folder.mkdir()
    values = [
        *("0.02", "true", '"10 steps"', "10 steps", '["flip", {name = "crop", padding = 2}]', "{widths = [4, 8]}"),
        *("sgd", "muon", "one_cycle", "[0.1, 0.2]", "1979-05-27T07:32:00Z", "nan", "inf", "-1", "", "0x10", "'''a'''"),
    ]
    keys = [f"{section}.{key}" for section in recipe.Recipe.model_fields for key in _keys(recipe.Recipe, [section])]
    corpus = [f"{key}={values[number % len(values)]}".encode() for number, key in enumerate(keys)]
    corpus += [f"optimizer.name={name}\noptimizer.lr=0.1".encode() for name in ("sgd", "adamw", "muon", "adafactor")]

    def decode(data: bytes) -> Tree:
        return [list(line.partition("=")[::2]) for line in data.decode().splitlines()]

    def encode(tree: Tree) -> bytes:
        pairs = [[part if isinstance(part, str) else json.dumps(part) for part in pair] for pair in tree]
        return "\n".join("=".join(pair) for pair in pairs).encode("utf-8", "surrogatepass")

    def feed(data: bytes) -> object:
        return recipe.load("digits", data.decode("utf-8", "surrogateescape").split("\n"))

    return Target(feed, corpus, Form(decode, encode))


# ------------------------------------------------------------------------------------------------ a run's files


def files_list(folder: Path) -> Target:
    """Return the compressed list of a run's files."""
    run = RunFolder(folder, QUIET)
    marks = {f"cat/{number}.png": f"{number:016x}" for number in range(20)}
    run.write_files(marks)
    path = folder / "files.json.gz"

    def feed(data: bytes) -> object:
        path.write_bytes(data)
        return differences(run.read_files(), marks)

    form = Form(lambda data: json.loads(gzip.decompress(data)), lambda tree: gzip.compress(write_json(tree), 1))
    bomb = gzip.compress(b'{"a":"') + gzip.compress(b" " * 2**24) * 64
    return Target(feed, [path.read_bytes()], form, [bomb], run.close)


def metrics(folder: Path) -> Target:
    """Return a run's metrics, of which a resume keeps the first lines, byte for byte."""
    _trained(folder)
    run = RunFolder(folder, QUIET, resume=True)
    run.note = _nothing  # type: ignore[assignment, method-assign]
    path = folder / "metrics.jsonl"
    corpus = [path.read_bytes()]

    def decode(data: bytes) -> Tree:
        return [json.loads(line) for line in data.splitlines()]

    def feed(data: bytes) -> object:
        path.write_bytes(data)
        lines = len(data) % 9
        try:
            run.rewind(lines)
        finally:
            run.tensorboard.close()
            if (kept := path.read_bytes()) != b"".join(data.splitlines(keepends=True)[:lines]):
                raise AssertionError(f"{kept!r} isn't the first {lines} lines of {data!r}")
        return read_metrics(folder)

    form = Form(decode, lambda tree: b"\n".join(write_json(line) for line in tree) + b"\n")
    return Target(feed, corpus, form, close=run.close)


# ------------------------------------------------------------------------------------------------ data


def cache(folder: Path) -> Target:
    """Return the facts and the marks of an image cache; a damaged cache is made again, to the same images."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(_pixels(number, "RGB", 4)).save(folder / name / f"{number}.png")
    caches, images = folder.parent / "files-caches", find(folder).for_training()[0]
    decode_images = image_folder.decoder((4, 4), 3, True, caches, "stop", 0, _nothing)
    # A damaged cache is made again; starting threads would take most of the time.
    for module in (image_cache, image_folder):
        setattr(module, "ThreadPoolExecutor", _AtOnce)  # noqa: B010 - the modules don't export it
    whole = decode_images(images)
    built = next(path for path in caches.iterdir() if path.is_dir())
    names = ("facts.json", "marks.txt")
    corpus = [bytes((number,)) + (built / name).read_bytes() for number, name in enumerate(names)]

    def encode(tree: Tree) -> bytes:
        if isinstance(tree, dict) and "shape" in tree:
            facts = {key: value for key, value in tree.items() if key != "checksum"}
            tree = facts | {"checksum": image_cache.key_of(facts)}
        return b"\0" + write_json(tree)

    def decode(data: bytes) -> Tree:
        return json.loads(data[1:]) if data[0] == 0 else data[1:].decode().split()

    def feed(data: bytes) -> object:
        (built / names[data[0] % 2 if data else 0]).write_bytes(data[1:])
        source = decode_images(images)
        if not torch.equal(source.inputs, whole.inputs) or not torch.equal(source.targets, whole.targets):
            raise AssertionError("other images")
        return source

    return Target(feed, corpus, Form(decode, encode))


class _AtOnce(ThreadPoolExecutor):
    """An executor that does what it is given at once, without a thread."""

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], **_: Any) -> Iterator[Any]:
        return map(fn, *iterables)


def _pixels(seed: int, mode: str, side: int) -> np.ndarray[Any, Any]:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4, "LA": 2}[mode]
    drawn = np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8)
    return drawn[:, :, 0] if channels == 1 else drawn


_FORMATS = {
    "jpg": ("RGB", "L", "CMYK"),
    "png": ("RGB", "L", "RGBA", "LA", "RGB-P"),
    "gif": ("RGB-P", "L"),
    "tiff": ("RGB", "L", "CMYK", "RGBA"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L"),
    "ppm": ("RGB", "L"),
    "avif": ("RGB", "RGBA"),
    "heic": ("RGB", "RGBA"),
}


def image(folder: Path) -> Target:
    """Return small images in all formats and modes, some of them turned; an input's content says what it is."""
    folder.mkdir()
    image_files._register_heif()
    formats = {name: modes for name, modes in _FORMATS.items() if f".{name}" in image_files.SUFFIXES}
    corpus = [each for name, modes in formats.items() for mode in modes for each in _saved(name, mode)]
    path, bare = folder / "x.jpg", folder / "bare"

    def feed(data: bytes) -> object:
        path.write_bytes(data)
        bare.write_bytes(data)
        looks_like_image(str(bare))
        return fitted(read_pixels(str(path), 1 if data[-1:] < b"\x40" else 3), 4, 4).sum()

    return Target(feed, corpus, None, [_bomb(10_900), _bomb(13_000)])


def _saved(suffix: str, mode: str) -> Iterator[bytes]:
    """Yield a small image in a format, as it is and, where the format can say so, lying on its side."""
    mode, _, palette = mode.partition("-")
    picture = Image.fromarray(_pixels(0, mode, 8), mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    for more in [{}, {"exif": exif}] if suffix in ("jpg", "png", "webp", "avif", "heic", "tiff") else [{}]:
        buffer = io.BytesIO()
        (picture.quantize(4) if palette else picture).save(buffer, Image.registered_extensions()[f".{suffix}"], **more)
        yield buffer.getvalue()


def _bomb(side: int) -> bytes:
    """Return a PNG of so many transparent pixels, squared, in a small file."""
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    row = bytes(4 * side + 1)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(row) + packer.flush(zlib.Z_FULL_FLUSH)  # which can be repeated
    # Adler-32 of so many zeros
    content = b"\x78\x01" + packed * side + b"\x03\0" + struct.pack(">HH", len(row) * side % 65521, 1)
    parts = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def idx(folder: Path) -> Target:
    """Return idx files, compressed or not; the first byte of an input says which."""
    folder.mkdir()
    head = bytes((0, 0, 8, 3)) + np.array((4, 3, 3), dtype=">u4").tobytes()
    plain = head + bytes(range(36))
    paths = (folder / "x", folder / "x.gz")

    def feed(data: bytes) -> object:
        path = paths[data[0] % 2 if data else 0]
        path.write_bytes(data[1:])
        return read_idx(path).shape

    def bomb(images: int) -> bytes:
        sizes = np.array((images, 32, 32), dtype=">u4").tobytes()
        return b"\1" + gzip.compress(head[:4] + sizes) + gzip.compress(bytes(2**24)) * (images // 2**14)

    return Target(feed, [b"\0" + plain, b"\1" + gzip.compress(plain)], None, [bomb(700 * 2**10), bomb(2**21)])


def weights(folder: Path) -> Target:
    """Return files of pretrained weights: safetensors, and pickles as PyTorch writes them."""
    folder.mkdir()
    net = nn.Linear(2, 2)
    paths = (folder / "x.safetensors", folder / "x.pt")
    from safetensors.torch import save_file

    save_file(net.state_dict(), paths[0])
    torch.save(net.state_dict(), paths[1])
    corpus = [bytes((number,)) + path.read_bytes() for number, path in enumerate(paths)]

    def feed(data: bytes) -> object:
        path = paths[data[0] % 2 if data else 0]
        path.write_bytes(data[1:])
        return list(read_weights(path))

    return Target(feed, corpus)


def arguments(folder: Path) -> Target:
    """Return command lines of `torchrelay train` and `recipe`, a word a line."""
    folder.mkdir()
    lines = (
        *("train digits --set optimizer.lr=0.1 --devices 2", "resume runs/a --restarts 1", "recipe digits"),
        *("evaluate runs/a --checkpoint best --json", "train x.toml --epochs 3 lr=0.1", "profile digits --quiet"),
    )

    def feed(data: bytes) -> object:
        words = data.decode("utf-8", "surrogateescape").split("\n")
        try:
            return cli._parse(words)
        except SystemExit as end:
            if end.code not in (0, 2):
                raise
            raise RelayError("refused") from None

    return Target(feed, [line.replace(" ", "\n").encode() for line in lines])


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": manifest,
    "state": state,
    "tensors": tensors,
    "recipe": recipes,
    "run-recipe": run_recipe,
    "set": overrides,
    "arguments": arguments,
    "files-list": files_list,
    "metrics": metrics,
    "cache": cache,
    "image": image,
    "idx": idx,
    "weights": weights,
}
