"""JPEG files decoded without PIL have PIL's pixels, byte for byte; files that could differ go through PIL."""

import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from torchrelay.data import image_files
from torchrelay.data.image_files import open_image, read_pixels
from torchrelay.errors import RelayError


@pytest.fixture
def by_pil(monkeypatch):
    """The paths that PIL read."""
    asked = []

    def noted(path, channels):
        asked.append(path)
        return open_image(path, channels)

    monkeypatch.setattr(image_files, "open_image", noted)
    return asked


def scene(width: int, height: int, channels: int = 3) -> Image.Image:
    """Edges, gradients and noise, which reveal differences in chroma upsampling, the DCT and clipping."""
    rng = np.random.default_rng(width * 1000 + height)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    planes = [across, down, np.where(across > down, 255, 0)][:channels]
    pixels = np.stack(planes, axis=-1) + rng.normal(0, 20, (height, width, channels))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).squeeze())


def same(path: Path, channels: int) -> bool:
    found, expected = read_pixels(str(path), channels), np.asarray(open_image(str(path), channels))
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (32, 32), (201, 150)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 30, "progressive": True}, {"keep_rgb": True}])
def test_the_pixels_equal_pils(size, subsampling, options, tmp_path, by_pil):
    subsampling = "4:4:4" if "keep_rgb" in options else subsampling
    scene(*size).save(tmp_path / "x.jpg", subsampling=subsampling, **options)
    assert same(tmp_path / "x.jpg", 3)
    assert not by_pil


def test_a_gray_file_is_read_as_gray_and_as_color(tmp_path, by_pil):
    scene(33, 21, 1).save(tmp_path / "x.jpg")
    assert same(tmp_path / "x.jpg", 1)
    assert same(tmp_path / "x.jpg", 3)
    assert not by_pil


def test_pil_converts_a_color_file_to_gray(tmp_path, by_pil):
    scene(33, 21).save(tmp_path / "x.jpg")
    assert same(tmp_path / "x.jpg", 1)
    assert by_pil


def test_cmyk_files_go_through_pil(tmp_path, by_pil):
    scene(33, 21).convert("CMYK").save(tmp_path / "x.jpg")
    assert same(tmp_path / "x.jpg", 3)
    assert by_pil


@pytest.mark.parametrize(("orientation", "turned"), [(None, False), (1, False), (6, True)])
def test_pil_applies_exif_orientation(orientation, turned, tmp_path, by_pil):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    scene(30, 20).save(tmp_path / "x.jpg", exif=exif)
    assert read_pixels(str(tmp_path / "x.jpg"), 3).shape == ((30, 20, 3) if turned else (20, 30, 3))
    assert same(tmp_path / "x.jpg", 3)
    assert bool(by_pil) == turned


def test_a_png_named_jpg_goes_through_pil(tmp_path, by_pil):
    scene(30, 20).save(tmp_path / "x.jpg", format="png")
    assert same(tmp_path / "x.jpg", 3)
    assert by_pil


def test_bytes_after_the_image_are_ignored(tmp_path):
    scene(30, 20).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes() + b"more" * 1000)
    assert same(tmp_path / "x.jpg", 3)


def test_a_file_truncated_at_any_length_is_refused_or_read_as_pil_does(tmp_path):
    scene(30, 20).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    refused = 0
    for length in range(0, len(whole), 7):
        cut = tmp_path / "cut.jpg"
        cut.write_bytes(whole[:length])
        try:
            expected = np.asarray(open_image(str(cut), 3))
        except RelayError as error:
            refused += 1
            with pytest.raises(type(error), match=r"cut\.jpg can't be read as an image"):
                read_pixels(str(cut), 3)
        else:
            assert read_pixels(str(cut), 3).tobytes() == expected.tobytes()
    assert refused > 50


def test_changed_bytes_are_refused_or_read_as_pil_does(tmp_path):
    scene(64, 48).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    rng, read = np.random.default_rng(0), 0
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.integers(2, len(whole))] = rng.integers(256)
        damaged = tmp_path / "changed.jpg"
        damaged.write_bytes(changed)
        try:
            expected = np.asarray(open_image(str(damaged), 3))
        except RelayError:
            with pytest.raises(RelayError):
                read_pixels(str(damaged), 3)
        else:
            read += 1
            assert read_pixels(str(damaged), 3).tobytes() == expected.tobytes()
    assert read > 100


def test_an_image_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    scene(30, 20).save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(RelayError, match="600 pixels"):
        read_pixels(str(tmp_path / "x.jpg"), 3)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(RelayError, match=r"gone\.jpg can't be read: No such file or directory; restore it"):
        read_pixels(str(tmp_path / "gone.jpg"), 3)


# ------------------------------------------------------------------------------------------------ what a fuzzer found


def test_a_format_that_pil_reads_by_running_a_program_is_refused_whatever_its_suffix(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "EPS"  # PIL would start Ghostscript
    with pytest.raises(RelayError, match="it isn't an image"):
        open_image(str(tmp_path / "x.png"), 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_more_pixels_than_a_gigabyte_holds_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (8, 8)).save(path)
    content = path.read_bytes()
    header = b"IHDR" + (12_000).to_bytes(4, "big") * 2 + content[24:29]
    path.write_bytes(content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:])
    with pytest.raises(RelayError, match="it has more than 120 million pixels"):
        read_pixels(str(path), 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16"])
def test_an_image_converted_in_tiles_has_the_pixels_of_the_whole(tmp_path, monkeypatch, mode):
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    picture = scene(70, 45)
    if mode == "P":
        picture.quantize(16).save(path, transparency=3)
    elif mode == "I;16":
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        if mode in ("RGBA", "LA"):
            picture.putalpha(picture.convert("L").rotate(90))
        picture.convert(mode).save(path)
    for channels in (1, 3):
        at_once = read_pixels(str(path), channels)
        with monkeypatch.context() as patched:
            patched.setattr(image_files, "_TILE", 16)
            assert np.array_equal(read_pixels(str(path), channels), at_once)


@pytest.mark.skipif(".avif" not in image_files.SUFFIXES, reason="this Pillow reads no AVIF")
def test_a_damaged_avif_file_is_unreadable_and_nothing_else(tmp_path):
    scene(16, 16).save(tmp_path / "x.avif")
    content, ended = (tmp_path / "x.avif").read_bytes(), set()
    for at in range(0, len(content), 3):
        (tmp_path / "x.avif").write_bytes(content[:at] + b"\xff\xff" + content[at + 2 :])
        try:
            read_pixels(str(tmp_path / "x.avif"), 3)
        except image_files.UnreadableImageError as error:
            ended.add(type(error.__cause__))
    assert RuntimeError in ended
