"""What clients send, as a batch for the network: image files decoded as for the training, numbers, or a text."""

import base64
import binascii
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from torchrelay.data.image_files import UnreadableImageError, center, channels_first, fitted, pixels_of, size_of
from torchrelay.errors import UsageError, intact
from torchrelay.report.export.formats import needed
from torchrelay.report.serve.heat import Box
from torchrelay.report.serve.http import RefusedError

_DTYPES = {str(each).removeprefix("torch."): each for each in (torch.uint8, torch.int64, torch.float32, torch.float64)}
_MOST_IMAGES, _MOST_ROWS = 32, 1024  # of a request
_MOST_PARTS, _LONGEST_NAME = 2 * _MOST_IMAGES, 200
_LONGEST_TEXT = 2**19  # bytes of a form's texts, which nobody reads, and of what is parsed at once
# A progressive JPEG of a few bytes may ask for thousands of passes over all its pixels; a camera's has about ten.
_SCAN, _MOST_SCANS = b"\xff\xda", 16
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
File = tuple[str, bytes]  # its name and its content


@dataclass(frozen=True)
class Batch:
    """What the network is given.

    Args:
        inputs: (samples, …).
        names: of the files; "" where a sample is none.
        boxes: the part of each upright picture that the network gets.
        at: for tokens, the position whose next token is asked for.
    """

    inputs: Tensor
    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    at: int = -1


class Inputs:
    """Makes batches for an export.

    Args:
        facts: what `export.json` says.
        pixels: the most that a picture may have.

    Attributes:
        shape: of a sample, such as (channels, height, width).
        takes_images: whether image files are decoded.
        takes_text: whether a text is: the classes are characters.

    Raises:
        UsageError: the export takes what this release can't send.
        RelayError: the facts are damaged.
    """

    def __init__(self, facts: Mapping[str, Any], pixels: int) -> None:
        with intact("export.json", "copy the export again"):
            given, self._kind = facts["input"], str(facts["kind"])
            self.shape = tuple(int(size) for size in given["shape"])
            self._classes = [str(name) for name in facts["classes"]]
            name, dtype = str(given["name"]), str(given["dtype"])
        if dtype not in _DTYPES:
            raise UsageError(f"the export takes {dtype}, which can't be sent here: call its model.onnx from Python")
        self._dtype, self.pixels = _DTYPES[dtype], pixels
        self.takes_images = name == "images" and len(self.shape) == 3 and self.shape[0] in (1, 3)
        self.takes_text = self._kind == "tokens" and len(self.shape) == 1 and {*map(len, self._classes)} == {1}
        self.most = _MOST_IMAGES if name == "images" else _MOST_ROWS

    # -------------------------------------------------------------------------------------------- pictures

    def of_files(self, files: Sequence[File]) -> Batch:
        """Decode image files as the training's and `torchrelay predict`'s are.

        Raises:
            RefusedError: one isn't an image that is read, or they are too many or too large.
        """
        if not self.takes_images:
            raise RefusedError(415, 'this network takes no pictures: send JSON, {"inputs": …}; see /model')
        if not files:
            raise RefusedError(400, "there is no picture in the request: send a file")
        self._count(len(files))
        found = [self._decoded(name[:_LONGEST_NAME] or "the picture", content) for name, content in files]
        images = torch.from_numpy(np.stack([pixels for pixels, _ in found]))
        inputs = images if self._dtype == torch.uint8 else images.to(self._dtype) / 255
        return Batch(inputs, tuple(name[:_LONGEST_NAME] for name, _ in files), tuple(box for _, box in found))

    def _decoded(self, name: str, content: bytes) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Box]:
        """Return the pixels (channels, height, width), and which part of the picture they are."""
        channels, height, width = self.shape
        most = f"{self.pixels / 1e6:g} million pixels, the most that is accepted"
        try:
            across, down = size_of(content, name)
            if across * down > self.pixels:
                raise RefusedError(413, f"{name} has {across} x {down} pixels, more than {most}")
            if content.count(_SCAN) * across * down > _MOST_SCANS * self.pixels:
                raise RefusedError(413, f"{name} is decoded in too many passes: save it anew")
            pixels = pixels_of(content, channels, name)
        except Image.DecompressionBombError as error:
            raise RefusedError(413, f"{name} has more than {most}") from error
        except UnreadableImageError as error:
            if isinstance(error.__cause__, UnidentifiedImageError):
                raise RefusedError(415, f"{name} isn't an image that is read: send JPEG, PNG, WebP or TIFF") from error
            raise RefusedError(422, str(error).partition("; ")[0]) from error
        tall, wide = pixels.shape[:2]
        top, left, rows, columns = center(tall, wide, width, height)
        box = left / wide, top / tall, (left + columns) / wide, (top + rows) / tall
        return channels_first(fitted(pixels, width, height)), box

    def of_multipart(self, body: bytes, boundary: str) -> Batch:
        """Read a form, whose files are pictures.

        Raises:
            RefusedError: it isn't one.
        """
        parsing, errors = needed("werkzeug.formparser"), needed("werkzeug.exceptions")
        parser = parsing.MultiPartParser(
            lambda *_, **__: io.BytesIO(), max_form_memory_size=_LONGEST_TEXT, max_form_parts=_MOST_PARTS
        )
        try:
            _, files = parser.parse(io.BytesIO(body), boundary.encode("latin-1", "replace"), len(body))
            sent = [(file.filename or "", file.read()) for _, file in files.items(multi=True)]
        except errors.HTTPException as error:
            raise RefusedError(413, "the form has too many parts or too long a text: send only files") from error
        except (ValueError, LookupError) as error:
            raise RefusedError(400, f"the form can't be parsed ({error}): send multipart/form-data") from error
        return self.of_files([each for each in sent if each != ("", b"")])  # a form without a choice sends that

    # -------------------------------------------------------------------------------------------- numbers and texts

    def of_json(self, body: bytes) -> Batch:
        """Read {"inputs": numbers}, {"images": base64 texts} or {"text": "…"}.

        Raises:
            RefusedError: it is something else.
        """
        try:
            found = json.loads(body, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise RefusedError(400, f"the body isn't JSON: {_reason(error)}") from error
        takes = {"inputs": True, "images": self.takes_images, "text": self.takes_text}
        accepted = [key for key, is_taken in takes.items() if is_taken]
        if not isinstance(found, dict) or len(found) != 1 or next(iter(found)) not in accepted:
            keys = " or ".join(f'{{"{key}": …}}' for key in accepted)
            raise RefusedError(422, f"the JSON must be {keys}; see /model")
        ((key, value),) = found.items()
        return {"inputs": self._numbers, "images": self._encoded, "text": self._text}[key](value)

    def _encoded(self, texts: Any) -> Batch:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RefusedError(422, '"images" must be a list of image files in base64')
        try:
            contents = [base64.b64decode(text, validate=True) for text in texts]
        except (binascii.Error, ValueError) as error:
            raise RefusedError(422, f'"images" must be in base64: {error}') from error
        return self.of_files([(f"picture {i + 1}" if len(texts) > 1 else "", each) for i, each in enumerate(contents)])

    def _text(self, text: Any) -> Batch:
        """Return the tokens of a text's end; what follows a short one doesn't change what a causal network says."""
        if not isinstance(text, str) or not text:
            raise RefusedError(422, '"text" must be a text of at least one character')
        (length,) = self.shape
        tokens = {name: i for i, name in enumerate(self._classes)}
        if unknown := sorted({*text[-length:]} - {*tokens}):
            raise RefusedError(422, f"the network doesn't know the character {unknown[0]!a}")
        found = [tokens[each] for each in text[-length:]]
        inputs = torch.tensor([found + [0] * (length - len(found))])
        return Batch(inputs, ("",), (), len(found) - 1)

    def _numbers(self, values: Any) -> Batch:
        wanted = f"(samples, {', '.join(map(str, self.shape))})"
        try:
            array = np.asarray(values)
        except (ValueError, OverflowError) as error:
            raise RefusedError(422, f'"inputs" must be {wanted} numbers, and its rows differ in length') from error
        if array.dtype.kind not in "iuf" or not array.size:
            raise RefusedError(422, f'"inputs" must be {wanted} numbers')
        array = array[None] if array.shape == self.shape else array
        if array.shape[1:] != self.shape:
            raise RefusedError(422, f'"inputs" has the shape {array.shape}, not {wanted}')
        self._count(len(array))
        if not self._dtype.is_floating_point:
            self._check_whole(array)
        with np.errstate(over="ignore"):
            inputs = torch.from_numpy(array.astype(str(self._dtype).removeprefix("torch.")))
        if self._dtype.is_floating_point and not inputs.isfinite().all():
            raise RefusedError(422, '"inputs" has a number that is too large')
        return Batch(inputs, ("",) * len(inputs), (WHOLE,) * len(inputs))

    def _check_whole(self, array: np.ndarray[Any, Any]) -> None:
        most = 255 if self._dtype == torch.uint8 else max(len(self._classes), 1) - 1 if self._kind == "tokens" else None
        highest = np.iinfo(np.int64).max if most is None else most
        least = np.iinfo(np.int64).min if most is None else 0
        if (array % 1 != 0).any() or array.min() < least or array.max() > highest:
            bounds = "" if most is None else f" from {least} to {most}"
            raise RefusedError(422, f'"inputs" must be whole numbers{bounds}')

    def _count(self, samples: int) -> None:
        if samples > self.most:
            raise RefusedError(413, f"{samples} samples are more than {self.most}, the most of a request: send several")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
