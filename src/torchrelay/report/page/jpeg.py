"""Pictures as addresses that hold them, as JPEG."""

import base64
import io

from PIL import Image

_WIDEST = 900  # pixels of a picture of several samples


def address(picture: Image.Image) -> str:
    """Return a picture as an address that holds it."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def batch_address(png: bytes) -> str:
    """Return the picture of a batch, not wider than a page."""
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        picture.thumbnail((_WIDEST, 2 * _WIDEST))
        return address(picture)
