"""A check's findings as one HTML page that needs no other file: names, thumbnails, and what to do."""

import base64
import io
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment
from PIL import Image

from torchrelay import __version__
from torchrelay.report.check.check import Report
from torchrelay.report.check.findings import Example, Pool

_SIDE = 96  # pixels of a thumbnail at most
_MOST = 1_600_000  # bytes of all thumbnails; the page then has less than 2 MB


def page(report: Report, title: str) -> str:
    """Return the page.

    Args:
        report: what was found.
        title: names the data.
    """
    pictures = _Pictures(report.pool)
    findings = [
        {"finding": finding, "examples": [_shown(example, pictures) for example in finding.examples]}
        for finding in report.findings
    ]
    parts = ", ".join(f"{len(source):,} {name}" for name, source in report.pool.parts.items())
    # Names of files and classes come from the data, so everything is escaped.
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    return template.render(
        title=title, parts=parts, unit=report.pool.unit, findings=findings, report=report, version=__version__
    )


def _shown(example: Example, pictures: "_Pictures") -> dict[str, object]:
    pool = pictures.pool
    samples = [
        {"name": pool.name(sample), "label": pool.class_of(sample), "picture": pictures.of(sample)}
        for sample in example.samples
    ]
    return {"samples": samples, "note": example.note}


class _Pictures:
    """Thumbnails as data of the page, until there are too many bytes of them."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._left = _MOST

    def of(self, sample: int) -> str:
        """Return the address of a sample's thumbnail; "" if it isn't an image, or the page is full."""
        if not self.pool.has_images or self._left <= 0:
            return ""
        _, source, index = self.pool.place(sample)
        pixels = source.inputs[index]
        if pixels.dtype != torch.uint8:
            low, high = pixels.min(), pixels.max()
            pixels = ((pixels - low) / (high - low).clamp(min=1e-6) * 255).byte()
        picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).squeeze(2).numpy()))
        picture.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        is_small = max(picture.size) <= _SIDE // 2  # whose every pixel is to be seen
        picture.save(file, *(("PNG",) if is_small else ("JPEG",)))
        address = f"data:image/{'png' if is_small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
        self._left -= len(address)
        return address if self._left >= 0 else ""
