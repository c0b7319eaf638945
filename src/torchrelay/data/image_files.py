"""Step 2: one image file as pixels, whatever its format, color mode and orientation; errors name the file."""

import io
import struct
import warnings
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features
from torch.nn.functional import interpolate

from torchrelay.errors import RelayError

Pixels = NDArray[np.uint8]
FITTING = 2  # incremented when `fitted` returns different pixels for the same input
# What PIL raises for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    EOFError,
    LookupError,
    RuntimeError,
    ArithmeticError,
    struct.error,
)

_HEIF = {".heic", ".heif", ".hif"}  # which the extra `heif` reads
_HAS_HEIF, _HAS_AVIF = find_spec("pillow_heif") is not None, "avif" in features.modules and features.check("avif")
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
SUFFIXES |= _HEIF if _HAS_HEIF else set()
SUFFIXES |= {".avif"} if _HAS_AVIF else set()
# What a file with a suffix may be, whatever the suffix says. PIL knows more formats, and runs a program to read some.
_READ = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", *["AVIF"] * bool(_HAS_AVIF))
_READ += ("HEIF",) * _HAS_HEIF
_MOST_PIXELS = 120 * 10**6  # which take less than 1 GiB; cameras have 102 million, and phones 108
_TILE = 2048  # pixels, as high as wide, that are converted at a time where that takes more memory than the result
# What a file without a suffix may be. The other formats begin as a text may.
_FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", *["AVIF"] * bool(_HAS_AVIF))

# The markers of a JPEG file (ITU-T T.81, table B.1)
_JPEG = b"\xff\xd8\xff"  # start of image, and the first byte of the next marker
_EXIF_OR_XMP = 0xE1
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: height, width and number of components


class UnreadableImageError(RelayError):
    """An image that `on_error = "skip"` leaves out."""


def is_image(path: Path) -> bool:
    """Return whether a path is a file that isn't hidden and has an image's suffix, or the content without a suffix."""
    if path.name.startswith(".") or not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES if path.suffix else looks_like_image(str(path))


def looks_like_image(path: str) -> bool:
    """Return whether a file's content begins as an image does."""
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except (*_DAMAGE, Image.DecompressionBombError):
        return False


def remedy_for(suffixes: Iterable[str]) -> str:
    """Return what would read files that were left out, for the end of a line; "" if nothing would."""
    if not _HAS_HEIF and _HEIF.intersection(suffixes):
        return " (HEIC needs pillow-heif, the extra 'heif')"
    return " (a newer Pillow reads AVIF)" if not _HAS_AVIF and ".avif" in suffixes else ""


def out_of_reach(path: str, error: OSError) -> RelayError:
    """Return the error for a file that the system doesn't let us read. Such a file is never left out."""
    return RelayError(f"{path} can't be read: {error.strerror}; restore it or its permissions, or remove it")


def open_image(path: str, channels: int, content: bytes | None = None) -> Image.Image:
    """Return an image, upright, as RGB (3 channels) or grayscale (1).

    Args:
        path: the file, or what a content is called.
        channels: 3 for color, 1 for grayscale.
        content: of a file that isn't on the disk.

    Raises:
        RelayError: it can't be read; the text names it.
    """
    _register_heif()
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=_READ) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"it has more than {_MOST_PIXELS // 10**6} million pixels")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)  # a copy would double the memory
        return _in_mode(picture, "RGB" if channels == 3 else "L")
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the system, not from the decoder
            raise out_of_reach(path, error) from error
        cause = "it isn't an image" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(
            f"{path} can't be read as an image: {cause}; repair or remove it, or set data.on_error=skip"
        ) from error


@cache
def _register_heif() -> None:
    if _HAS_HEIF:
        from pillow_heif import register_heif_opener

        register_heif_opener()


def read_pixels(path: str, channels: int) -> Pixels:
    """Return the pixels of `open_image` as (height, width, 3), or (height, width) for grayscale.

    Plain JPEG files bypass PIL and go straight to the same decoder, libjpeg-turbo: the same pixels in a fifth of the
    time for the smallest files and in half of it for photographs, without PIL's Python code and copies.

    Args:
        path: the file.
        channels: 3 for color, 1 for grayscale.

    Raises:
        RelayError: it can't be read; the text names it.
    """
    pixels = _plain_jpeg(path, channels)
    return np.array(open_image(path, channels)) if pixels is None else pixels


def pixels_of(content: bytes, channels: int, name: str) -> Pixels:
    """Return what `read_pixels` returns of a file with this content; errors call it by the name."""
    pixels = _decoded(content, channels) if content.startswith(_JPEG) else None
    return np.array(open_image(name, channels, content)) if pixels is None else pixels


def size_of(content: bytes, name: str) -> tuple[int, int]:
    """Return the (width, height) that an image's header states, before it is turned upright; no pixel is decoded.

    Raises:
        UnreadableImageError: it isn't an image that `open_image` reads.
        Image.DecompressionBombError: it has more pixels than PIL opens.
    """
    _register_heif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller judges the size
            with Image.open(io.BytesIO(content), formats=_READ) as picture:
                return picture.size
    except _DAMAGE as error:
        cause = "it isn't an image" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(f"{name} can't be read as an image: {cause}; send another") from error


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """Return pixels (height, width, …) center-cropped to the target's aspect ratio and resized to its size.

    Resizing is antialiased. PyTorch takes a quarter of PIL's time and computes in integers, which gives the same bytes
    with and without a processor's vector instructions; they differ from PIL's by 2 at most.
    """
    tall, wide = pixels.shape[:2]
    if (tall, wide) == (height, width):
        return pixels
    top, left, rows, columns = center(tall, wide, width, height)
    middle = torch.from_numpy(np.atleast_3d(pixels[top : top + rows, left : left + columns])).permute(2, 0, 1)
    # A copy is faster than a view, and its strides are unambiguous: without AVX2, PyTorch 2.15 otherwise mistakes the
    # columns for the channels if the resized image is one pixel wide.
    middle = middle[None].clone(memory_format=torch.channels_last)
    resized = interpolate(middle, size=(height, width), mode="bilinear", antialias=True)[0]
    return cast(Pixels, resized.permute(1, 2, 0).numpy()).reshape(height, width, *pixels.shape[2:])


def center(tall: int, wide: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the part of an image that `fitted` keeps, in pixels: (top, left, rows, columns)."""
    rows = max(1, min(tall, round(wide * height / width)))
    columns = max(1, min(wide, round(tall * width / height)))
    return (tall - rows) // 2, (wide - columns) // 2, rows, columns


def channels_first(pixels: Pixels) -> Pixels:
    """Return (channels, height, width) from (height, width, channels) or (height, width)."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """Return an image of any mode as RGB or L, a tile at a time."""
    if max(picture.size) <= _TILE or (picture.mode == mode and "transparency" not in picture.info):
        return _converted(picture, mode)
    whole = Image.new(mode, picture.size)
    for top in range(0, picture.height, _TILE):
        for left in range(0, picture.width, _TILE):
            box = (left, top, min(left + _TILE, picture.width), min(top + _TILE, picture.height))
            whole.paste(_converted(picture.crop(box), mode), box)
    return whole


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    """Return an image of any mode as RGB or L, before it is resized: palette indices can't be averaged."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if picture.mode.startswith("I"):  # 16 bits per pixel, of which we keep the upper 8, as PIL does for 16-bit color
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:  # show it on white
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


# ------------------------------------------------------------------------------------------------ JPEG


def _plain_jpeg(path: str, channels: int) -> Pixels | None:
    """Return the pixels of a JPEG file that PIL would decode identically; None for any other or damaged file."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a Path takes as long as the smallest images
            data = file.read(len(_JPEG))
            if data != _JPEG:
                return None
            data += file.read()
    except OSError as error:
        raise out_of_reach(path, error) from error
    return _decoded(data, channels)


def _decoded(data: bytes, channels: int) -> Pixels | None:
    """Return the pixels of a JPEG's content, likewise."""
    if not _is_plain(data, channels):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # PIL gives the reason, or can read it nevertheless
        return None
    return pixels if channels == 3 else pixels[:, :, 0]


def _is_plain(data: bytes, channels: int) -> bool:
    """Return whether a JPEG is upright and needs no color conversion in which PIL and libjpeg differ."""
    at, upright = 2, True  # after the start-of-image marker
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker in _FRAMES:
            height, width, components = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8], data[at + 9]
            small = height * width <= (Image.MAX_IMAGE_PIXELS or 0)
            return components in (1, channels) and small and (upright or _is_upright(data))
        upright = upright and marker != _EXIF_OR_XMP
        at += 2 + length
    return False


def _is_upright(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return bool(picture.getexif().get(ExifTags.Base.Orientation, 1) == 1)
    except _DAMAGE:
        return False
