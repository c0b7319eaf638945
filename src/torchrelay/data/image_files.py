"""Step 2: one image file as pixels, whatever its format, colours and orientation; errors name the file."""

import io
import struct
from typing import cast

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from torchrelay.errors import RelayError

Pixels = NDArray[np.uint8]
FITTING = 2  # raised when `fitted` makes other pixels of the same
_DAMAGE = (OSError, SyntaxError, TypeError, ValueError, EOFError, struct.error)  # of PIL's readers

# The markers of a JPEG file (ITU-T T.81, table B.1)
_JPEG = b"\xff\xd8\xff"  # the start of an image and of the next marker
_EXIF_OR_XMP = 0xE1
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive: height, width and number of components


class UnreadableImageError(RelayError):
    """What `on_error = "skip"` leaves out."""


def out_of_reach(path: str, error: OSError) -> RelayError:
    """Return the error of a file that isn't given out, which says nothing of its content: it is never left out."""
    return RelayError(f"{path} can't be read: {error.strerror}; restore it or its permissions, or remove it")


def open_image(path: str, channels: int) -> Image.Image:
    """Return a picture, upright, as RGB (3 channels) or grey (1).

    Raises:
        RelayError: it can't be read; the text names it.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
            return _converted(ImageOps.exif_transpose(picture), "RGB" if channels == 3 else "L")
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not the decoder's
            raise out_of_reach(path, error) from error
        cause = "its content is no image" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(
            f"{path} can't be read as an image: {cause}; repair or remove it, or set data.on_error=skip"
        ) from error


def read_pixels(path: str, channels: int) -> Pixels:
    """Return the pixels of `open_image` as (height, width, 3), or (height, width) if grey.

    Plain JPEG files don't go through PIL, but straight to the same decoder, libjpeg-turbo: the same pixels, without the
    Python and the copies around it, in a fifth of the time for the smallest and in half of it for photographs.

    Args:
        path: the file.
        channels: 3 for colour, 1 for grey.

    Raises:
        RelayError: it can't be read; the text names it.
    """
    pixels = _plain_jpeg(path, channels)
    return np.array(open_image(path, channels)) if pixels is None else pixels


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """Return the middle of pixels (height, width, …), cut to the shape that is asked for, and resized to it.

    Each new pixel averages over what falls into it. PyTorch does so in a quarter of PIL's time, in whole numbers: the
    same bytes with and without a processor's vector instructions, where PIL's differ by one at most.
    """
    there, along = pixels.shape[:2]
    if (there, along) == (height, width):
        return pixels
    rows = max(1, min(there, round(along * height / width)))
    columns = max(1, min(along, round(there * width / height)))
    top, left = (there - rows) // 2, (along - columns) // 2
    middle = torch.from_numpy(np.atleast_3d(pixels[top : top + rows, left : left + columns])).permute(2, 0, 1)
    # A copy is quicker than a view, and its strides say what it is: otherwise, without AVX2, PyTorch 2.15 takes the
    # columns of an image that becomes one wide for its channels.
    middle = middle[None].clone(memory_format=torch.channels_last)
    resized = interpolate(middle, size=(height, width), mode="bilinear", antialias=True)[0]
    return cast(Pixels, resized.permute(1, 2, 0).numpy()).reshape(height, width, *pixels.shape[2:])


def channels_first(pixels: Pixels) -> Pixels:
    """Return (channels, height, width) of (height, width, channels) or (height, width)."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    """Return a picture of any kind as RGB or L, before anything resizes it: a palette's numbers can't be averaged."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range it doesn't say")
    if picture.mode.startswith("I"):  # 16 bits a pixel; the upper eight are what PIL keeps of 16-bit colour as well
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:  # is shown on white
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == mode else picture.convert(mode)


# ------------------------------------------------------------------------------------------------ JPEG


def _plain_jpeg(path: str, channels: int) -> Pixels | None:
    """Return the pixels of a JPEG file that PIL would read the same way; None of any other, and of damaged ones."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a Path takes as long as the smallest images
            data = file.read(len(_JPEG))
            if data != _JPEG:
                return None
            data += file.read()
    except OSError as error:
        raise out_of_reach(path, error) from error
    if not _is_plain(data, channels):
        return None
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # PIL says what is wrong with it, or reads it all the same
        return None
    return pixels if channels == 3 else pixels[:, :, 0]


def _is_plain(data: bytes, channels: int) -> bool:
    """Return whether a JPEG stands upright and needs no change of colours that PIL and libjpeg make differently."""
    at, upright = 2, True  # behind the start of the image
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
