"""Image folders with a folder per class: what is found, how it is decoded, what is refused."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from torchrelay.data import ArraySource, DatasetSource, folder, image_folder
from torchrelay.data.folder import decode_images
from torchrelay.errors import RelayError, UsageError


def picture(number: int, size=(8, 8), mode="RGB") -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def save(path: Path, number: int = 0, **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, **how).save(path)
    return path


@pytest.fixture
def parted(tmp_path) -> Path:
    """Three cats and three dogs for training, and two of each for the test."""
    root = tmp_path / "pets"
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(root / part / name / f"{i}.png", 100 * count + 10 * label + i)
    return root


@pytest.fixture
def single(tmp_path) -> Path:
    root = tmp_path / "single"
    for label, name in enumerate(("a", "b", "c")):
        for i in range(10):
            save(root / name / f"{i}.png", 10 * label + i)
    return root


def read(root: Path, **how):
    """Decode into memory without logging."""
    return image_folder(root, **{"cache": False, "log": lambda _: None, **how})


def names(source) -> list[str]:
    return ["/".join(Path(path).parts[-2:]) for path in source.files.paths]


# ------------------------------------------------------------------------------------------------ what is found


def test_train_and_test_folders_are_the_two_parts(parted):
    train, test = read(parted)
    assert (train.classes, train.name) == (("cat", "dog"), "pets")
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert names(test) == ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"]
    assert train.inputs.shape == (6, 3, 8, 8)
    assert np.array_equal(train.inputs[4].permute(1, 2, 0), picture(311))


def test_the_test_part_may_be_called_val(parted):
    (parted / "test").rename(parted / "val")
    assert len(read(parted)[1]) == 4


def test_a_training_part_without_a_test_part_is_refused(parted):
    shutil.rmtree(parted / "test")
    with pytest.raises(RelayError, match="none named test, val"):
        read(parted)


def test_a_single_folder_is_split_by_class(single):
    train, test = read(single, test_share=0.2)
    assert torch.bincount(train.targets).tolist() == [8, 8, 8]
    assert torch.bincount(test.targets).tolist() == [2, 2, 2]
    assert not set(train.files.paths) & set(test.files.paths)


def test_the_split_does_not_depend_on_the_folders_path_or_file_times(single, tmp_path):
    other = tmp_path / "elsewhere"
    for path in sorted(single.rglob("*.png"), reverse=True):  # the listing follows the order of creation
        target = other / path.relative_to(single)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (1, 1))
    assert names(read(single)[1]) == names(read(other)[1])
    assert read(single)[1].fingerprint() == read(other)[1].fingerprint()


def test_spaces_unicode_and_newlines_in_names_work(tmp_path):
    for name in ("a b", "ünï – 猫", "new\nline"):
        for i in range(2):
            save(tmp_path / "my data" / name / f"an image\n{i} ä.png", i)
    train, test = image_folder(
        tmp_path / "my data", cache_dir=tmp_path / "a\ncache", log=lambda _: None, test_share=0.5
    )
    assert train.classes == ("a b", "new\nline", "ünï – 猫")
    assert (len(train), len(test)) == (3, 3)


def test_a_name_that_is_not_unicode_works(tmp_path):
    for i in range(4):
        path = save(tmp_path / "d" / "ab"[i % 2] / f"{i}.png", i)
        path.rename(path.parent / os.fsdecode(b"\xff\xfe%d.png" % i))
    assert len(image_folder(tmp_path / "d", cache_dir=tmp_path / "c", test_share=0.5, log=lambda _: None)[0]) == 2


def test_uppercase_suffixes_and_subfolders_of_a_class_are_read(parted):
    save(parted / "train" / "cat" / "more" / "still more" / "X.PNG", 1)
    assert "still more/X.PNG" in names(read(parted)[0])


def test_hidden_files_and_other_files_are_skipped(parted):
    save(parted / "train" / ".git" / "0.png")
    save(parted / "train" / "cat" / ".ipynb_checkpoints" / "0.png")
    save(parted / "train" / "cat" / ".hidden.png")
    (parted / "train" / "cat" / "notes.txt").write_text("no image")
    (parted / "train" / "README.md").write_text("no class")
    assert names(read(parted)[0]) == [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)]


def test_links_are_followed_without_cycles(parted, tmp_path):
    save(tmp_path / "elsewhere" / "x.png", 1)
    (parted / "train" / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (parted / "train" / "cat" / "3.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (parted / "train" / "cat" / "circle").symlink_to(parted / "train" / "cat")
    (parted / "train" / "cow").symlink_to(tmp_path / "elsewhere")
    (parted / "test" / "cow").symlink_to(tmp_path / "elsewhere")
    train, _ = read(parted)
    assert train.classes == ("cat", "cow", "dog")
    assert names(train)[:5] == ["cat/0.png", "cat/1.png", "cat/2.png", "cat/3.png", "linked/x.png"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_broken_link_is_reported(parted, on_error):
    (parted / "train" / "cat" / "gone.png").symlink_to(parted / "nowhere")
    with pytest.raises(RelayError, match=r"cat/gone\.png can't be read: No such file"):
        read(parted, on_error=on_error)


@pytest.mark.parametrize("link", ["loop", "cat/loop", "cat/loop.png"])
def test_a_link_to_itself_is_reported(parted, link):
    (parted / "train" / link).symlink_to(Path(link).name)
    with pytest.raises(RelayError, match=f"train/{link} can't be read: Too many levels of symbolic links"):
        read(parted)


@pytest.mark.timeout(30)
def test_a_named_pipe_with_an_image_suffix_is_skipped(parted):
    os.mkfifo(parted / "train" / "cat" / "0.jpg")
    assert names(read(parted)[0])[:3] == ["cat/0.png", "cat/1.png", "cat/2.png"]


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(UsageError, match="there is no such folder"):
        read(tmp_path / "nowhere")


def test_a_folder_without_classes_is_reported(tmp_path):
    save(tmp_path / "0.png")
    with pytest.raises(RelayError, match=f"{tmp_path} has no class folders"):
        read(tmp_path)


def test_an_empty_class_folder_is_reported(parted):
    (parted / "train" / "ant").mkdir()
    with pytest.raises(RelayError, match="train/ant has no images"):
        read(parted)


def test_a_class_without_test_images_is_reported(parted):
    for path in (parted / "test" / "dog").iterdir():
        path.unlink()
    with pytest.raises(RelayError, match="test/dog has no images"):
        read(parted)


@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("test", "train")])
def test_a_class_missing_in_one_part_is_reported_with_its_folder(parted, part, other):
    save(parted / part / "cow" / "0.png")
    with pytest.raises(RelayError, match=f"pets/{other} has no class 'cow'"):
        read(parted)


def test_images_of_different_sizes_are_refused_with_both_names_and_the_setting(parted):
    save(parted / "train" / "dog" / "1.png", size=(9, 7))
    with pytest.raises(UsageError, match=r"dog/1\.png has 9x7 pixels, .*cat/0\.png has 8x8: set data\.size"):
        read(parted)


def test_parts_of_different_sizes_are_refused(parted):
    for path in (parted / "test").rglob("*.png"):
        save(path, size=(9, 7))
    with pytest.raises(UsageError, match=r"test/cat/0\.png has 9x7 pixels, .*train/cat/0\.png has 8x8: set data\.size"):
        read(parted)


# ------------------------------------------------------------------------------------------------ how it is decoded


def decoded(path: Path, channels=3, size=None) -> np.ndarray:
    """The first pixels of a file, (height, width) of each channel."""
    with Image.open(path) as image:
        width, height = size or image.size
    return decode_images([path], (channels, height, width))[0].numpy()


def test_images_are_resized_by_the_shorter_side_and_center_cropped(parted):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 8:22] = 200  # the middle square, and what its edge is blended with
    Image.fromarray(wide).save(parted / "train" / "cat" / "0.png")
    train, test = read(parted, size=5)
    assert train.inputs.shape == (6, 3, 5, 5)
    assert test.inputs.shape == (4, 3, 5, 5)
    assert (train.inputs[0] == 200).all()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 5), (64, 64), (40, 90), (500, 400)])
@pytest.mark.parametrize("made", [(100, 60), (60, 101), (7, 300), (1, 1)])
def test_downscaling_averages_pixels_as_pil_does(made, size, channels, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (made[1], made[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB" if channels == 3 else "L").save(tmp_path / "x.png")
    found = decoded(tmp_path / "x.png", channels, size).astype(int)
    with Image.open(tmp_path / "x.png") as image:
        width, height = (
            min(made[0], round(made[1] * size[0] / size[1])),
            min(made[1], round(made[0] * size[1] / size[0])),
        )
        left, top = (made[0] - max(1, width)) // 2, (made[1] - max(1, height)) // 2
        middle = image.crop((left, top, left + max(1, width), top + max(1, height)))
        there = np.asarray(middle.resize(size, Image.Resampling.BILINEAR)).reshape(size[1], size[0], channels)
    assert np.abs(found - there.transpose(2, 0, 1)).max() <= 2  # the rounding of the weights, down and across


def test_pixels_differ_from_pils_by_at_most_two(tmp_path):
    rows = bytes.fromhex("fd81c4e11072 cf08eb1393d1 813e47a75bc7 7464e857a595 3226923629ba da0f5561a9bd")
    Image.fromarray(np.frombuffer(rows, np.uint8).reshape(6, 6)).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        there = image.resize((1, 1), Image.Resampling.BILINEAR).getpixel((0, 0))
    assert (decoded(tmp_path / "x.png", 1, (1, 1)).item(), there) == (126, 124)


MADE = ((100, 77), (4, 330))
RESIZED = [(made, size) for made in MADE for size in ((30, 30), (1, 50), (50, 1), (1, 1))]  # widths and heights
ELSEWHERE = f"""
import sys
from pathlib import Path

import torch

from torchrelay.data.folder import decode_images

found = [decode_images([Path("{{}}x{{}}.png".format(*made))], (3, *size[::-1])) for made, size in {RESIZED}]
torch.save(found, "found.pt")
"""


@pytest.fixture(scope="module", params=["default", pytest.param("avx2", marks=pytest.mark.slow)])
def elsewhere(request, tmp_path_factory) -> tuple[Path, list[torch.Tensor]]:
    """A folder of images, and what a processor with fewer instructions makes of them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for made in MADE:
        save(folder / "{}x{}.png".format(*made), size=made)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": request.param}
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=folder, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder, torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="there is one kind of instructions")
@pytest.mark.parametrize(("made", "size"), RESIZED)
def test_resized_pixels_are_the_same_on_other_processors(elsewhere, made, size):
    folder, found = elsewhere
    here = decoded(folder / "{}x{}.png".format(*made), size=size)
    assert np.array_equal(found[RESIZED.index((made, size))].squeeze(0).numpy(), here)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_mode_becomes_uint8_with_the_requested_channels(mode, channels, tmp_path):
    suffix = {"CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    pixels = decoded(save(tmp_path / f"x.{suffix}", mode=mode), channels)
    assert pixels.shape == (channels, 8, 8)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 20


def test_a_palette_image_is_resized_by_color_and_not_by_index(tmp_path):
    image = Image.fromarray(np.array([[0, 255], [0, 255]], dtype=np.uint8)).convert("P")
    image.putpalette([0, 0, 0] + [77, 88, 99] * 254 + [100, 100, 100])
    image.save(tmp_path / "x.png")
    assert decoded(tmp_path / "x.png", size=(1, 1)).flatten().tolist() == [50, 50, 50]


def test_transparent_pixels_become_white(tmp_path):
    values = np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert decoded(tmp_path / "x.png")[:, 0].T.tolist() == [[255, 255, 255], [255, 0, 0]]


def test_16_bit_images_keep_their_brightness(tmp_path):
    Image.fromarray(np.array([[0, 256, 25_600, 32_768]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert decoded(tmp_path / "x.png", 1).flatten().tolist() == [0, 1, 100, 128]


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(RelayError, match=r"x\.tif can't be read as an image: its pixels are floating-point"):
        decoded(tmp_path / "x.tif")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.paste((255, 255, 255), (0, 0, 3, 4))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: the left half moves to the top
    image.save(tmp_path / "x.png", exif=exif)
    pixels = decoded(tmp_path / "x.png", size=(4, 6))
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, 3:] == 0).all()


def test_several_threads_decode_large_files_into_the_same_array(tmp_path):
    for i in range(150):
        save(tmp_path / "ab"[i % 2] / f"{i:03}.png", i, size=(50, 50))
    train, test = read(tmp_path)
    for source in (train, test):
        for image, path in zip(source.inputs, source.files.paths, strict=True):
            assert np.array_equal(image.permute(1, 2, 0), picture(int(Path(path).stem), size=(50, 50)))


def test_long_decoding_reports_its_progress(parted, monkeypatch):
    monkeypatch.setattr(folder, "_LOG_SECONDS", 0.0)
    said = []
    image_folder(parted, cache=False, log=said.append)
    assert [line for line in said if line.startswith("decod")] == [
        "decoding 6 images, once",
        "decoded 6 of 6 images",
        "decoding 4 images, once",
        "decoded 4 of 4 images",
    ]


# ------------------------------------------------------------------------------------------------ damaged images


def truncated_jpeg(path: Path) -> None:
    picture(0, size=(64, 64)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:900])


def tiff_whose_offset_is_a_text(path: Path) -> None:
    """Damage the offset of a TIFF's pixels, for which PIL raises a TypeError."""
    picture(0).save(path, "TIFF")
    content, strip_offsets, number, text = path.read_bytes(), 273, 4, 2
    entry = struct.pack("<HH", strip_offsets, number)
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<HH", strip_offsets, text)))


DAMAGES = {
    "truncated": truncated_jpeg,
    "a text for a number": tiff_whose_offset_is_a_text,
    "a text": lambda path: path.write_text("no image at all"),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("size", [None, 8])
def test_a_damaged_image_raises_an_error_with_its_path(parted, damage, size):
    damage(parted / "train" / "dog" / "1.png")
    with pytest.raises(RelayError, match=r"train/dog/1\.png can't be read as an image.*data\.on_error=skip") as found:
        read(parted, size=size)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("damaged", ["cat/0.png", "dog/1.png"])
def test_a_damaged_image_is_skipped_reproducibly_and_reported(parted, tmp_path, damage, damaged):
    damage(parted / "train" / damaged)
    said = []
    how = {"on_error": "skip", "log": said.append, "cache": True, "cache_dir": tmp_path / "cache"}
    first, second = image_folder(parted, **how)[0], image_folder(parted, **how)[0]
    assert damaged not in names(first)
    assert len(first) == len(first.inputs) == len(first.targets) == 5
    assert torch.equal(first.inputs, second.inputs)
    assert first.fingerprint() == second.fingerprint() == read(parted, on_error="skip")[0].fingerprint()
    left_out = [line for line in said if "left out" in line]
    assert len(left_out) == 2
    assert all(line.startswith(f"{parted}/train: 1 unreadable") and line.endswith(damaged) for line in left_out)


def test_no_more_images_are_skipped_than_allowed(parted, tmp_path):
    for i in range(2):
        (parted / "train" / "cat" / f"{i}.png").write_bytes(b"")
    how = {"on_error": "skip", "cache": True, "cache_dir": tmp_path / "cache"}
    assert len(read(parted, max_errors=2, **how)[0]) == 4
    for allowed in (how | {"cache": False}, how):  # while decoding; and from the cache of a run that allowed more
        with pytest.raises(RelayError, match=r"2 images can't be read and 1 may be .*cat/0\.png.*data\.max_errors"):
            read(parted, max_errors=1, **allowed)


def test_a_cache_with_skipped_images_is_refused_by_a_run_that_stops_at_errors(parted, tmp_path):
    (parted / "train" / "cat" / "0.png").write_bytes(b"")
    read(parted, on_error="skip", cache=True, cache_dir=tmp_path)
    with pytest.raises(RelayError, match=r"cat/0\.png"):
        read(parted, on_error="stop", cache=True, cache_dir=tmp_path)


def test_a_folder_of_only_damaged_images_is_refused(parted):
    for path in (parted / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(RelayError, match="none of the 6 images can be read"):
        read(parted, on_error="skip")


# ------------------------------------------------------------------------------------------------ fingerprints


def test_the_fingerprint_depends_only_on_names_and_pixels(parted):
    before = read(parted)[0].fingerprint()
    changed = parted / "train" / "cat" / "1.png"
    os.utime(changed, (1, 1))
    assert read(parted)[0].fingerprint() == before
    content = changed.read_bytes()
    save(changed, 999)
    assert read(parted)[0].fingerprint() != before
    changed.write_bytes(content)
    assert read(parted)[0].fingerprint() == before
    changed.rename(changed.with_name("10.png"))  # which still is the second
    assert read(parted)[0].fingerprint() != before


@pytest.mark.parametrize("change", ["add", "remove"])
def test_the_fingerprint_changes_with_the_files(parted, change):
    before = read(parted)[0].fingerprint()
    if change == "add":
        save(parted / "train" / "cat" / "9.png", 9)
    else:
        (parted / "train" / "cat" / "2.png").unlink()
    assert read(parted)[0].fingerprint() != before


def test_the_cache_does_not_change_the_data(parted, tmp_path):
    one, other = read(parted), read(parted, cache=True, cache_dir=tmp_path / "cache")
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert a.fingerprint() == b.fingerprint()


# ------------------------------------------------------------------------------------------------ custom transforms


TRANSFORM = v2.Compose([v2.ToImage(), v2.Resize((4, 4)), v2.ToDtype(torch.float32, scale=True)])


def test_a_custom_transform_makes_a_dataset(parted):
    save(parted / "train" / "cat" / "0.png", size=(9, 7), mode="L")
    train, test = read(parted, transform=TRANSFORM)
    assert isinstance(train, DatasetSource)
    assert (len(train), len(test), train.classes) == (6, 4, ("cat", "dog"))
    image, label = train.dataset[5]
    assert (image.shape, image.dtype, label) == ((3, 4, 4), torch.float32, 1)


def test_a_transform_gets_gray_images_on_request(parted):
    assert read(parted, transform=TRANSFORM, channels=1)[0].dataset[0][0].shape == (1, 4, 4)


def test_a_transform_does_not_change_the_split_of_a_single_folder(single):
    arrays, files = read(single), read(single, transform=TRANSFORM)
    for a, b in zip(arrays, files, strict=True):
        assert isinstance(a, ArraySource)
        assert list(a.files.paths) == b.dataset.paths
        assert a.targets.tolist() == b.dataset.labels


def test_the_fingerprint_of_files_changes_with_one_of_them(parted):
    before = read(parted, transform=TRANSFORM)[0].fingerprint()
    assert read(parted, transform=TRANSFORM)[0].fingerprint() == before
    save(parted / "train" / "cat" / "1.png", 999, size=(9, 9))
    assert read(parted, transform=TRANSFORM)[0].fingerprint() != before


def test_a_damaged_image_read_for_a_transform_is_reported(parted):
    (parted / "train" / "cat" / "1.png").write_bytes(b"")
    train, _ = read(parted, transform=TRANSFORM)
    with pytest.raises(RelayError, match=r"cat/1\.png can't be read as an image"):
        train.dataset[1]


def test_skipping_images_is_refused_with_a_transform(parted):
    with pytest.raises(UsageError, match="on_error='skip'"):
        read(parted, transform=TRANSFORM, on_error="skip")
