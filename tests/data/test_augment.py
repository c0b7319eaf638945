"""Augmentation: each transform equals a plain version of it, and a sample's result doesn't depend on its batch."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import Field, ValidationError
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from torchrelay.data import augment
from torchrelay.data.augment import Augment, Draw, Pipeline, Prepare, color, geometry, mixing, policies
from torchrelay.errors import UsageError
from torchrelay.settings import Settings

SIZE = 16
IMAGE_TRANSFORMS = [
    augment.Flip(),
    augment.AlternatingFlip(),
    augment.PaddedCrop(padding=3),
    augment.PaddedCrop(padding=3, mode="edge"),
    augment.PaddedCrop(padding=3, mode="zeros"),
    augment.RandomResizedCrop(size=12),
    augment.RandomResizedCrop(size=20, interpolation="bicubic"),
    augment.Resize(size=11),
    augment.Resize(size=24),
    augment.ProgressiveResize(sizes=(9,)),
    augment.CenterCrop(size=9),
    augment.Cutout(size=5, p=0.7),
    augment.ColorJitter(hue=0.2),
    augment.TrivialAugment(),
    augment.RandAugment(n=2, magnitude=20),
]
MIXING_TRANSFORMS = [augment.Mixup(alpha=0.4), augment.CutMix(p=0.8)]


def label(transform):
    return " ".join(map(str, transform.model_dump().values())) if isinstance(transform, Settings) else None


def photos(batch: int, height: int = SIZE, width: int = SIZE, channels: int = 3) -> torch.Tensor:
    """Return uint8 images with smooth colors and some noise."""
    generator = torch.Generator().manual_seed(batch + 7 * height + 31 * width)
    coarse = torch.rand(batch, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noise = torch.randint(0, 30, (batch, channels, height, width), generator=generator)
    return (smooth * 225 + noise).to(torch.uint8)


def draw(batch: int, *, epoch: int = 0, stream: str = "augment.0.x", position: int = 0, seed: int = 0) -> Draw:
    positions = torch.arange(position, position + batch)
    return Draw(seed, epoch, positions, positions * 7 % 1009, stream)


def part(whole: Draw, where: slice) -> Draw:
    return replace(whole, positions=whole.positions[where], indices=whole.indices[where])


def as_kind(images: torch.Tensor, kind: str) -> torch.Tensor:
    return images if kind == "bytes" else images.to(torch.float32) / 255


# ---------------------------------------------------------------------------------- independence of the batch


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("transform", IMAGE_TRANSFORMS, ids=label)
@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 1, 8), (0, 3, 5, 8)], ids=str)
def test_a_batch_gives_the_bits_of_its_parts(transform, kind, cuts):
    images, whole = as_kind(photos(8), kind), draw(8)
    together = transform(images, whole)
    for start, end in pairwise(cuts):
        where = slice(start, end)
        assert torch.equal(transform(images[where], part(whole, where)), together[where])


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("transform", IMAGE_TRANSFORMS, ids=label)
def test_each_image_alone_gives_the_bits_it_has_in_a_batch(transform, kind):
    """Odd sizes and 301 images: every image is once in the partial tail of a vector instruction."""
    images, whole = as_kind(photos(301, 13, 13), kind), draw(301)
    together = transform(images, whole)
    for position in range(0, 301, 7):
        where = slice(position, position + 1)
        assert torch.equal(transform(images[where], part(whole, where)), together[where]), position


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("transform", MIXING_TRANSFORMS, ids=label)
def test_a_mixed_batch_gives_the_bits_of_its_blocks(transform, kind):
    images, targets, whole = as_kind(photos(11), kind), torch.eye(11), draw(11)
    mixed, mixed_targets = transform(images, targets, whole, (4, 4, 3, 0))
    for start, end in pairwise((0, 4, 8, 11)):
        where = slice(start, end)
        own, own_targets = transform(images[where], targets[where], part(whole, where), (end - start,))
        assert torch.equal(own, mixed[where])
        assert torch.equal(own_targets, mixed_targets[where])


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("transform", IMAGE_TRANSFORMS, ids=label)
def test_memory_format_and_threads_change_no_bit(transform, kind):
    images, whole = as_kind(photos(64), kind), draw(64)
    expected = transform(images, whole)
    assert torch.equal(transform(images.to(memory_format=torch.channels_last), whole), expected)
    threads = torch.get_num_threads()
    try:
        for other in (1, 2):
            torch.set_num_threads(other)
            assert torch.equal(transform(images, whole), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("transform", IMAGE_TRANSFORMS, ids=label)
def test_a_transform_keeps_type_and_input(transform, kind):
    images = as_kind(photos(8), kind)
    before = images.clone()
    found = transform(images, draw(8))
    assert found.dtype == images.dtype
    assert torch.equal(images, before)
    assert not torch.equal(found, images) if found.shape == images.shape else True
    if kind == "floats":
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("transform", [*IMAGE_TRANSFORMS[:7], *IMAGE_TRANSFORMS[11:]], ids=label)
def test_each_epoch_and_seed_draws_differently(transform):
    images = photos(32)
    first = transform(images, draw(32))
    assert not torch.equal(transform(images, draw(32, epoch=1)), first)
    assert not torch.equal(transform(images, draw(32, seed=1)), first)


@pytest.mark.gpu
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transform", IMAGE_TRANSFORMS, ids=label)
def test_a_gpu_gives_the_same_augmentation(transform):
    images, whole = photos(64), draw(64)
    there = transform(images.cuda(), replace(whole, device=torch.device("cuda"))).cpu()
    difference = (there.int() - transform(images, whole).int()).abs()
    assert float((difference > 1).double().mean()) < 0.01  # bytes are resized from floats there


# ----------------------------------------------------------------------------------------------- flips and crops


def test_a_flip_mirrors_the_drawn_images():
    images, whole = photos(50), draw(50)
    for image, found, number in zip(images, augment.Flip(p=0.3)(images, whole), whole.uniform()[:, 0], strict=True):
        assert torch.equal(found, V.horizontal_flip(image) if number < 0.3 else image)


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0])
def test_a_flip_has_its_probability(p):
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(20_000, 1, 1, 2)
    share = float((augment.Flip(p=p)(images, draw(20_000))[:, 0, 0, 0] == 255).double().mean())
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / 20_000)


def test_an_alternating_flip_alternates_from_a_random_start_per_sample():
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(10_000, 1, 1, 2)

    def mirrored(epoch: int, order: torch.Tensor) -> torch.Tensor:
        """Return for each sample whether it is mirrored, in an epoch of this order."""
        shown = Draw(0, epoch, torch.arange(10_000), order, "augment.0.alternating_flip")
        found = augment.AlternatingFlip()(images, shown)[:, 0, 0, 0] == 255
        return torch.zeros(10_000, dtype=torch.bool).scatter(0, order, found)

    orders = [torch.randperm(10_000, generator=torch.Generator().manual_seed(epoch)) for epoch in range(4)]
    first, second, third, fourth = (mirrored(epoch, order) for epoch, order in enumerate(orders))
    assert abs(float(first.double().mean()) - 0.5) < 0.02
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    assert torch.equal(fourth, ~first)


@pytest.mark.parametrize(("mode", "numpy_mode"), [("reflect", "reflect"), ("edge", "edge"), ("zeros", "constant")])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_a_crop_is_a_window_of_the_padded_image(mode, numpy_mode, padding):
    images, whole = photos(40, 9, 14), draw(40)
    found = augment.PaddedCrop(padding=padding, mode=mode)(images, whole)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)), mode=numpy_mode)
    for image, window, (down, right) in zip(found, padded, whole.uniform(2).tolist(), strict=True):
        top, left = int(down * (2 * padding + 1)), int(right * (2 * padding + 1))
        assert np.array_equal(image.numpy(), window[:, top : top + 9, left : left + 14])


def test_crop_offsets_are_uniform():
    from scipy import stats

    positions = torch.arange(81, dtype=torch.uint8).view(1, 1, 9, 9).expand(20_000, 1, 9, 9)
    found = augment.PaddedCrop(padding=4, mode="zeros")(positions, draw(20_000))
    middle = torch.bincount(found[:, 0, 4, 4].long(), minlength=81)  # the pixel that came to the middle
    assert stats.chisquare(middle.numpy()).pvalue > 1e-3


def test_a_reflection_longer_than_the_image_is_refused():
    with pytest.raises(UsageError, match="can't reflect 4 pixels of an image of 9x4: choose a padding below 4"):
        augment.PaddedCrop(padding=4)(photos(2, 4, 9), draw(2))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 24])
def test_resize_equals_torchvisions_antialiased_resize(interpolation, size):
    images = photos(4, 15, 22)
    found = augment.Resize(size=size, interpolation=interpolation)(images)
    expected = V.resize(images, [size, size], V.InterpolationMode(interpolation), antialias=True)
    assert torch.equal(found, expected)


def test_a_progressive_resize_grows_with_the_epochs_and_stays_at_the_last_size():
    images, grows = photos(4, 16, 16), augment.ProgressiveResize(sizes=(8, 12, 16))
    sides = [grows(images, replace(draw(4), epoch=epoch)).shape[-1] for epoch in range(5)]
    assert sides == [8, 12, 16, 16, 16]
    early = grows(images, replace(draw(4), epoch=1))
    assert torch.equal(early, augment.Resize(size=12)(images))


def test_resizing_floats_is_close_to_resizing_bytes():
    images = photos(4, 15, 22)
    floats = augment.Resize(size=9)(images / 255.0)
    assert torch.allclose(floats * 255, augment.Resize(size=9)(images).float(), atol=1.01)


def test_nearest_takes_the_central_pixel():
    images = torch.arange(9, dtype=torch.uint8).view(1, 1, 1, 9).expand(1, 1, 9, 9)
    found = augment.Resize(size=3, interpolation="nearest")(images)
    assert found[0, 0, 0].tolist() == [1, 4, 7]


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 8), (15, 22, 7), (15, 22, 15)])
def test_a_center_crop_equals_torchvisions(height, width, size):
    images = photos(2, height, width)
    assert torch.equal(augment.CenterCrop(size=size)(images), V.center_crop(images, [size, size]))


def test_a_center_crop_larger_than_the_image_is_refused():
    with pytest.raises(UsageError, match="can't cut 17 pixels out of an image of 22x15: choose a size up to 15"):
        augment.CenterCrop(size=17)(photos(1, 15, 22))


@pytest.mark.parametrize("size", [8, 32])
def test_a_random_resized_crop_equals_torchvisions_resized_crop(size):
    images, whole = photos(20, 24, 17), draw(20)
    transform = augment.RandomResizedCrop(size=size)
    found = transform(images, whole)
    for image, crop, numbers in zip(images, found, whole.uniform(4).tolist(), strict=True):
        top, left, height, width = transform.box(numbers, 24, 17)
        assert 0 <= top <= 24 - height
        assert 0 <= left <= 17 - width
        assert torch.equal(crop, V.resized_crop(image, top, left, height, width, [size, size], antialias=True))


def test_random_crops_have_the_given_scale_and_ratio():
    from scipy import stats

    transform = augment.RandomResizedCrop(size=8, scale=(0.2, 0.4), ratio=(0.5, 2.0))
    boxes = torch.tensor([transform.box(numbers, 1000, 1000) for numbers in draw(5000).uniform(4).tolist()]).double()
    top, left, height, width = boxes.unbind(1)
    area, ratio = height * width / 1e6, (width / height).log2()
    assert stats.kstest(area.numpy(), stats.uniform(0.2, 0.2).cdf).pvalue > 1e-3
    assert stats.kstest(ratio.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    for start, free in ((top, 1000 - height), (left, 1000 - width)):
        assert stats.kstest((start / free).numpy(), "uniform").pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------- cutout


@pytest.mark.parametrize("size", [1, 4, 5])
def test_cutout_fills_a_square_with_the_mean_color(size):
    images, whole = photos(60), draw(60)
    found = augment.Cutout(size=size)(images, whole)
    for image, cut, (down, right, _) in zip(images, found, whole.uniform(3).tolist(), strict=True):
        top, left = int(down * SIZE) - size // 2, int(right * SIZE) - size // 2
        expected = image.clone()
        mean = (image.double().mean((1, 2), keepdim=True)).round().to(torch.uint8)
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = mean
        assert torch.equal(cut, expected)


def test_cutout_has_its_probability_and_size():
    images = torch.zeros(20_000, 1, SIZE, SIZE)
    images[:, :, ::2] = 1.0  # so that the mean differs from every pixel
    holes = (augment.Cutout(size=4, p=0.3)(images, draw(20_000)) == 0.5).flatten(1)
    area = holes.sum(1)
    assert abs(float((area > 0).double().mean()) - 0.3) < 0.015
    assert int(area.max()) == 16
    share = holes[area > 0].double().mean(0).view(SIZE, SIZE)
    middle = share[4:-4, 4:-4] * SIZE**2 / 16  # away from the border every pixel is covered alike
    assert float((middle - 1).abs().max()) < 0.25


# ----------------------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (color.adjust_brightness, V.adjust_brightness),
        (color.adjust_contrast, V.adjust_contrast),
        (color.adjust_saturation, V.adjust_saturation),
        (color.adjust_sharpness, V.adjust_sharpness),
    ],
)
def test_blending_equals_torchvisions(ours, theirs, factor):
    images = photos(5) / 255.0
    found = ours(images, torch.full((5, 1, 1, 1), factor))
    assert torch.allclose(found, theirs(images, factor), atol=2e-6)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.13, 0.5])
def test_adjusting_the_hue_equals_torchvisions(turn):
    images = photos(5) / 255.0
    images[0, :, :2] = 0.5  # gray
    images[0, 0, 2:4] = 1.0
    found = color.adjust_hue(images, torch.full((5, 1, 1, 1), turn))
    assert torch.allclose(found, V.adjust_hue(images, turn), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_posterize_equals_torchvisions(bits):
    images = photos(5)
    found = color.posterize(images / 255.0, torch.full((5, 1, 1, 1), float(bits)))
    assert torch.equal((found * 255).round().to(torch.uint8), V.posterize(images, bits))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_solarize_equals_torchvisions(threshold):
    images = photos(5) / 255.0
    found = color.solarize(images, torch.full((5, 1, 1, 1), threshold))
    assert torch.allclose(found, V.solarize(images, threshold), atol=1e-6)


def test_auto_contrast_equals_torchvisions():
    images = photos(5) / 255.0
    images[0, 1] = 0.25  # a constant channel does not change
    assert torch.allclose(color.auto_contrast(images), V.autocontrast(images), atol=1e-6)


@pytest.mark.parametrize("size", [16, 40])
def test_equalize_equals_torchvisions(size):
    images = photos(5, size, size)
    images[0, 1] = 77
    images[1, :, 1:] = 77
    found = color.equalize(images / 255.0)
    assert torch.equal((found * 255).round().to(torch.uint8), V.equalize(images))


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_color_jitter_applies_its_four_operations(kind):
    images, whole = as_kind(photos(20), kind), draw(20)
    found = augment.ColorJitter(brightness=0.3, contrast=0.5, saturation=0.7, hue=0.1)(images, whole)
    for image, jittered, numbers in zip(images, found, whole.uniform(4).tolist(), strict=True):
        bright, contrast, saturation, hue = (2 * number - 1 for number in numbers)
        expected = V.adjust_brightness(image / (255.0 if kind == "bytes" else 1.0), 1 + 0.3 * bright)
        expected = V.adjust_contrast(expected, 1 + 0.5 * contrast)
        expected = V.adjust_saturation(expected, 1 + 0.7 * saturation)
        expected = V.adjust_hue(expected, 0.1 * hue)
        if kind == "bytes":
            assert int((jittered.int() - (expected * 255).round().int()).abs().max()) <= 1
        else:
            assert torch.allclose(jittered, expected, atol=1e-5)


def test_one_channel_is_gray_and_two_channels_have_no_colors():
    gray = photos(3, channels=1)
    assert augment.ColorJitter(hue=0.1)(gray, draw(3)).shape == gray.shape
    assert augment.TrivialAugment()(gray, draw(3)).shape == gray.shape
    with pytest.raises(UsageError, match="images have 2 channels"):
        augment.ColorJitter()(photos(3, channels=2), draw(3))


# ------------------------------------------------------------------------------------------- policies and maps

REACH = policies.Reach(shear=0.9, translate=(6.0, 5.0), rotate=90.0, blend=0.9, bits=4)


def theirs_affine(images: torch.Tensor, operation: str, strength: float) -> torch.Tensor:
    """Apply torchvision's operation; images are sheared about their upper left corner."""
    angle, moved, shear, centre = 0.0, [0, 0], [0.0, 0.0], None
    if operation.startswith("shear"):
        shear[operation == "shear_y"] = math.degrees(math.atan(0.9 * strength))
        centre = [0.0, 0.0]
    elif operation.startswith("translate"):
        across = operation == "translate_x"
        moved[not across] = int((6 if across else 5) * strength)
    else:
        return V.rotate(images, 90 * strength)
    return V.affine(images, angle, moved, 1.0, shear, center=centre)


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 0.37, 1.0])
@pytest.mark.parametrize("operation", ["shear_x", "shear_y", "translate_x", "translate_y", "rotate"])
def test_affine_operations_equal_torchvisions(operation, strength):
    images = photos(5, 20, 30)
    choice = policies.Choice(operation, abs(strength), -1 if strength < 0 else 1)
    found = policies.apply(images, [choice] * 5, REACH)
    differing = (found != theirs_affine(images, operation, strength)).double().mean()
    assert float(differing) < 0.01  # a pixel midway between two may go either way


def test_a_sampling_grid_moves_pixels():
    image = torch.zeros(1, 1, 5, 7, dtype=torch.uint8)
    image[0, 0, 1, 2] = 200
    moved = geometry.warp(image, torch.tensor([[1.0, 0.0, -3.0, 0.0, 1.0, -2.0]]))
    assert moved.nonzero().tolist() == [[0, 0, 3, 5]]
    assert int(moved.max()) == 200


@pytest.mark.parametrize("operation", policies.OPERATIONS)
def test_a_policy_applies_the_chosen_operation_to_each_image(operation):
    images = photos(6)
    chosen = policies.Choice(operation, 0.5, 1)
    other = policies.Choice("solarize", 1.0, 1)
    mixed = policies.apply(images, [chosen, other, chosen, other, other, chosen], REACH)
    alone = policies.apply(images, [chosen] * 6, REACH)
    inverted = policies.apply(images, [other] * 6, REACH)
    for position, expected in enumerate((alone, inverted, alone, inverted, inverted, alone)):
        assert torch.equal(mixed[position], expected[position])
    assert torch.equal(alone, images) == (operation == "identity")


def test_trivial_augment_draws_operations_and_strengths_uniformly():
    from scipy import stats

    choices = augment.TrivialAugment().choose(draw(20_000))
    for values, count in (
        ([policies.OPERATIONS.index(choice.operation) for choice in choices], 14),
        ([round(choice.strength * 30) for choice in choices], 31),
        ([(choice.sign + 1) // 2 for choice in choices], 2),
    ):
        assert stats.chisquare(np.bincount(values, minlength=count)).pvalue > 1e-3


def test_rand_augment_changes_more_with_its_magnitude():
    images = photos(64)
    weak = augment.RandAugment(magnitude=0)(images, draw(64))
    strong = augment.RandAugment(magnitude=30)(images, draw(64))
    assert float((strong.float() - images).abs().mean()) > 2 * float((weak.float() - images).abs().mean())


# ------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("alpha", [0.2, 0.4, 1.0, 2.0])
def test_mixing_ratios_have_the_beta_distribution(alpha):
    from scipy import stats

    u = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:-1]
    found = mixing.beta_quantile(alpha, u).numpy()
    assert np.abs(found - stats.beta(alpha, alpha).ppf(u.numpy())).max() < 2e-6


@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0, 8.0, 64.0])
def test_mixing_ratios_are_between_0_and_1_and_grow_with_u(alpha):
    u = torch.cat((torch.arange(1000), 2**23 + torch.arange(-500, 500), 2**24 - 1 - torch.arange(1000).flip(0)))
    found = mixing.beta_quantile(alpha, u.double() / 2**24)
    assert bool(found.isfinite().all())
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert bool((found.diff() >= 0).all())


def test_partners_are_found_inside_a_block():
    assert mixing.partners((3, 2, 1, 0)).tolist() == [1, 2, 0, 4, 3, 5]


@pytest.mark.parametrize("transform", MIXING_TRANSFORMS, ids=label)
def test_blocks_do_not_mix(transform):
    blocks = (5, 3, 1)
    images = torch.repeat_interleave(torch.tensor([10, 100, 200], dtype=torch.uint8), torch.tensor(blocks))
    images = images.view(-1, 1, 1, 1).expand(9, 3, SIZE, SIZE)
    found, targets = transform(images, torch.eye(9), draw(9), blocks)
    if found.dtype == torch.uint8:
        found = found / 255
    assert torch.allclose(found, images / 255, atol=1e-6)
    start = 0
    for size in blocks:
        outside = targets[start : start + size].clone()
        outside[:, start : start + size] = 0
        assert int(outside.count_nonzero()) == 0
        start += size


@pytest.mark.parametrize("transform", MIXING_TRANSFORMS, ids=label)
def test_mixed_targets_sum_to_one(transform):
    targets = F.one_hot(torch.arange(200) % 10, 10).float()
    _, mixed = transform(photos(200), targets, draw(200), (200,))
    assert torch.allclose(mixed.sum(1), torch.ones(200), atol=1e-6)
    assert int((mixed.count_nonzero(1) == 2).sum()) > 50
    assert float(mixed.min()) >= 0


def test_mixup_blends_images_and_targets_by_each_samples_ratio():
    from scipy import stats

    images, whole = photos(12), draw(12)
    found, targets = augment.Mixup(alpha=0.7)(images, torch.eye(12), whole, (12,))
    shares = stats.beta(0.7, 0.7).ppf(whole.uniform(2)[:, 0].double().numpy())
    assert len(set(shares.round(6))) == 12
    for position, share in enumerate(shares):
        partner = (position + 1) % 12
        expected = (share * images[position].double() + (1 - share) * images[partner].double()) / 255
        assert torch.allclose(found[position].double(), expected, atol=1e-5)
        assert abs(float(targets[position, position]) - share) < 1e-5
        assert abs(float(targets[position, partner]) - (1 - share)) < 1e-5


def test_cutmix_pastes_a_rectangle_and_weighs_targets_by_its_area():
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 1, 12, 20)
    whole = draw(40)
    found, targets = augment.CutMix()(images, torch.eye(40), whole, (40,))
    for position, (u, _, down, right) in enumerate(whole.uniform(4).tolist()):
        side = math.sqrt(1 - u)  # Beta(1, 1) is uniform
        expected = torch.full((12, 20), position, dtype=torch.uint8)
        top, left = int(down * 12) - int(side * 12) // 2, int(right * 20) - int(side * 20) // 2
        bottom, edge = top + int(side * 12) // 2 * 2, left + int(side * 20) // 2 * 2
        expected[max(top, 0) : max(bottom, 0), max(left, 0) : max(edge, 0)] = (position + 1) % 40
        assert torch.equal(found[position, 0], expected)
        assert abs(float(targets[position, position]) - float((expected == position).double().mean())) < 1e-6


def test_mixing_with_a_probability_leaves_other_samples_alone():
    images = photos(2000, 4, 4)
    _, targets = augment.Mixup(alpha=1.0, p=0.25)(images, torch.eye(2000), draw(2000), (2000,))
    assert abs(float((targets.diagonal() < 1).double().mean()) - 0.25) < 0.05


def test_a_lone_sample_pairs_with_itself():
    images = photos(1)
    found, targets = augment.Mixup(alpha=1.0)(images, torch.tensor([[0.0, 1.0]]), draw(1), (1,))
    assert torch.allclose(found, images / 255, atol=1e-6)
    assert torch.allclose(targets, torch.tensor([[0.0, 1.0]]))


# ------------------------------------------------------------------------------------------------------ recipes


class Listing(Settings):
    augment: list[Augment] = Field(default_factory=list)
    prepare: list[Prepare] = Field(default_factory=list)


def test_a_recipe_gives_transforms_as_names_or_tables():
    given = ["flip", {"name": "crop", "padding": 2}, augment.Cutout(size=3), {"name": "color_jitter", "hue": 0.1}]
    found = Listing.model_validate({"augment": given, "prepare": [{"name": "center_crop", "size": 5}]})
    assert found.augment == [
        augment.Flip(),
        augment.PaddedCrop(padding=2),
        augment.Cutout(size=3),
        augment.ColorJitter(hue=0.1),
    ]
    assert found.prepare == [augment.CenterCrop(size=5)]
    assert Listing.model_validate(found.model_dump()) == found


@pytest.mark.parametrize(
    ("value", "position", "text"),
    [
        (["flip", "crp"], ("augment", 1), "unknown transform 'crp'; did you mean 'crop'?"),
        (["colour-jitter"], ("augment", 0), "did you mean 'color_jitter'?"),
        (["zzz"], ("augment", 0), "choose one of flip, "),
        ([{"padding": 3}], ("augment", 0), "a transform needs a name"),
        ([{"name": "crop", "paddin": 3}], ("augment", 0, "crop", "paddin"), "Extra inputs are not permitted"),
        ([{"name": "flip", "p": 1.5}], ("augment", 0, "flip", "p"), "less than or equal to 1"),
        (["random_resized_crop"], ("augment", 0, "random_resized_crop", "size"), "Field required"),
        ([{"name": ["flip"]}], ("augment", 0), "unknown transform"),
        ([7], ("augment", 0), ""),
    ],
    ids=str,
)
def test_a_wrong_transform_is_reported_with_its_position(value, position, text):
    with pytest.raises(ValidationError) as caught:
        Listing.model_validate({"augment": value})
    (error,) = caught.value.errors()
    assert error["loc"] == position
    assert text in error["msg"]


@pytest.mark.parametrize(
    ("field", "old", "new"), [("augment", "colour_jitter", "color_jitter"), ("prepare", "centre_crop", "center_crop")]
)
def test_an_old_transform_name_in_a_recipe_warns(field, old, new):
    options = {"size": 5} if new == "center_crop" else {}
    with pytest.warns(FutureWarning, match=f"transform '{old}' has been renamed to '{new}'"):
        found = Listing.model_validate({field: [{"name": old, **options}]})
    assert getattr(found, field)[0].name == new


@pytest.mark.parametrize(("old", "new"), [("ColourJitter", "ColorJitter"), ("Normalise", "Normalize")])
def test_an_old_class_name_works_and_warns(old, new):
    with pytest.warns(FutureWarning, match=rf"augment\.{old} has been renamed to .*augment\.{new}") as caught:
        assert getattr(augment, old) is getattr(augment, new)
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'ColurJitter'"):
        _ = augment.ColurJitter


def test_prepare_refuses_random_transforms():
    with pytest.raises(ValidationError, match=r"unknown transform 'flip': choose one of resize, center_crop"):
        Listing.model_validate({"prepare": ["flip"]})
    with pytest.raises(UsageError, match="'flip' is random, and 'prepare' is for evaluation as well"):
        Pipeline(prepare=[augment.Flip()])


def test_the_schema_accepts_names_and_tables():
    schema = Listing.model_json_schema()
    choices = schema["properties"]["augment"]["items"]["anyOf"]
    names = next(choice["enum"] for choice in choices if "enum" in choice)
    assert set(names) == {transform.name for transform in [*IMAGE_TRANSFORMS, *MIXING_TRANSFORMS]}
    assert len(choices) == 1 + len(names)


# ----------------------------------------------------------------------------------------------------- pipeline

MEAN, STD = (0.49, 0.48, 0.44), (0.2, 0.19, 0.21)


def run(pipeline, images, targets=None, *, epoch=2, position=0, replica_sizes=None, indices=None):
    """Return a batch for training."""
    targets = torch.arange(len(images)) % 3 if targets is None else targets
    indices = np.arange(position, position + len(images)) if indices is None else indices
    return pipeline.train(
        images, targets, seed=0, epoch=epoch, position=position, indices=indices, replica_sizes=replica_sizes
    )


@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_normalization_equals_torchvisions(kind):
    images = photos(8)
    found = Pipeline(mean=MEAN, std=STD).evaluate(as_kind(images, kind))
    expected = V.normalize(V.to_dtype(images, torch.float32, scale=True), list(MEAN), list(STD))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)


def test_without_statistics_images_are_scaled_to_0_to_1():
    images = photos(8)
    assert torch.equal(Pipeline().evaluate(images), images / 255)
    assert torch.equal(Pipeline().evaluate(images.double() / 255), images / 255)


def test_statistics_of_another_number_of_channels_are_refused():
    with pytest.raises(UsageError, match="images have 1 channels, and mean and std have 3 and 3 numbers"):
        Pipeline(mean=MEAN, std=STD).evaluate(photos(2, channels=1))
    with pytest.raises(UsageError, match="give both or neither"):
        Pipeline(mean=MEAN)
    with pytest.raises(UsageError, match="each must be above 0"):
        Pipeline(mean=MEAN, std=(0.1, 0.0, 0.1))


def test_a_pipeline_applies_its_transforms_in_order_each_with_its_own_stream():
    images = photos(8, 20, 20)
    transforms = [augment.PaddedCrop(padding=2), augment.Flip(), augment.PaddedCrop(padding=2)]
    pipeline = Pipeline(transforms, [augment.Resize(size=SIZE)], MEAN, STD)
    found, _ = run(pipeline, images, epoch=3, position=40)
    expected = augment.Resize(size=SIZE)(images)
    for number, transform in enumerate(transforms):
        stream = f"augment.{number}.{transform.name}"
        shown = Draw(0, 3, torch.arange(40, 48), torch.arange(40, 48), stream)
        expected = transform(expected, shown)
    assert torch.equal(found, augment.Normalize(mean=MEAN, std=STD)(expected))


def test_a_renamed_transform_keeps_its_random_numbers():
    """The hash was recorded at the tag `house-before`, where the class was called ColourJitter."""
    images = (torch.arange(12 * 3 * 8 * 8) * 2654435761 % 256).to(torch.uint8).view(12, 3, 8, 8)
    pipeline = Pipeline((augment.Flip(), augment.ColorJitter(hue=0.1)))
    found, _ = pipeline.train(images, torch.zeros(12), seed=3, epoch=2, position=5, indices=torch.arange(12))
    expected = "de692008b5795e8bca69d095f3665bbfc0fc1974ad24479087005648ac8f3159"
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == expected


def test_equal_transforms_draw_differently():
    ramp = torch.arange(SIZE, dtype=torch.uint8).expand(500, 1, SIZE, SIZE)
    once, _ = run(Pipeline([augment.PaddedCrop(mode="edge")]), ramp)
    twice, _ = run(Pipeline([augment.PaddedCrop(mode="edge")] * 2), ramp)
    first = (once[:, 0, 8, 8] * 255).round().long() - 8  # how far right the first crop has moved
    second = (twice[:, 0, 8, 8] * 255).round().long() - 8 - first
    assert abs(np.corrcoef(first.numpy(), second.numpy())[0, 1]) < 0.2


def test_evaluation_images_are_prepared_but_not_augmented():
    images = photos(8, 20, 20)
    pipeline = Pipeline([augment.Flip(p=1.0)], [augment.Resize(size=18), augment.CenterCrop(size=16)])
    expected = augment.CenterCrop(size=16)(augment.Resize(size=18)(images)) / 255
    assert torch.equal(pipeline.evaluate(images), expected)
    assert torch.equal(run(pipeline, images)[0], expected.flip(-1))


@pytest.mark.parametrize(
    "transforms", [IMAGE_TRANSFORMS[:4], [augment.TrivialAugment(), augment.Mixup()]], ids=["a", "b"]
)
def test_an_epoch_has_the_same_bits_in_batches_of_any_size(transforms):
    images, targets = photos(24), torch.arange(24) % 3
    pipeline = Pipeline(transforms, mean=MEAN, std=STD, classes=3)
    whole, whole_targets = run(pipeline, images, targets, replica_sizes=(8, 8, 8))
    for position in range(0, 24, 8):
        where = slice(position, position + 8)
        found, found_targets = run(pipeline, images[where], targets[where], position=position)
        assert torch.equal(found, whole[where])
        assert torch.equal(found_targets, whole_targets[where])


def test_targets_become_probabilities_only_with_a_mixing_transform():
    images, targets = photos(6), torch.tensor([0, 1, 2, 0, 1, 2])
    assert run(Pipeline([augment.Flip()], classes=3), images, targets)[1] is targets
    _, mixed = run(Pipeline([augment.Mixup(), augment.CutMix()], classes=4), images, targets)
    assert mixed.shape == (6, 4)
    assert mixed.dtype == torch.float32
    assert torch.allclose(mixed.sum(1), torch.ones(6))


def test_mixing_blends_float_targets_directly():
    _, targets = run(Pipeline([augment.Mixup(alpha=8.0)]), photos(4), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert targets.shape == (4,)
    assert bool(((targets > 0) & (targets < 1)).all())


def test_mixing_without_classes_is_refused():
    with pytest.raises(UsageError, match="transform 'mixup' mixes classes; the targets are int64 of shape"):
        run(Pipeline([augment.Mixup()]), photos(4))


@pytest.mark.parametrize("transforms", [[], [augment.Flip()]], ids=["plain", "augmented"])
def test_the_memory_format_is_preserved(transforms):
    images = photos(4).to(memory_format=torch.channels_last)
    found, _ = run(Pipeline(transforms, mean=MEAN, std=STD), images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert run(Pipeline(transforms, mean=MEAN, std=STD), photos(4))[0].is_contiguous()


def test_a_user_function_is_a_transform():
    def darker(images, shown):
        return (images * (shown.uniform()[:, :, None, None] > 0.5)).to(images.dtype)

    found, _ = run(Pipeline([darker]), photos(50))
    assert 10 < int((found.amax((1, 2, 3)) == 0).sum()) < 40


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(4, 7), torch.zeros(4, 9, dtype=torch.int64), {"a": torch.zeros(4)}, (torch.zeros(4, 3, 8, 8),)],
    ids=["features", "tokens", "a dict", "a tuple"],
)
def test_other_inputs_pass_unchanged_or_are_refused(inputs):
    targets = torch.arange(4)
    assert run(Pipeline(), inputs, targets)[0] is inputs
    assert Pipeline([augment.Flip()]).evaluate(inputs) is inputs
    with pytest.raises(UsageError, match="transform 'flip' is for images"):
        run(Pipeline([augment.Flip()]), inputs, targets)
    with pytest.raises(UsageError, match="transform 'resize' is for images"):
        Pipeline(prepare=[augment.Resize(size=8)]).evaluate(inputs)
    with pytest.raises(UsageError, match="normalization is for images"):
        Pipeline(mean=MEAN, std=STD).evaluate(inputs)


# --------------------------------------------------------------------------------------------------------- draw


def test_draws_depend_on_position_and_epoch_or_on_the_sample():
    one = Draw(0, 0, torch.tensor([3, 4, 5]), torch.tensor([30, 40, 50]), "augment.0.x")
    other = Draw(0, 1, torch.tensor([5, 4, 3]), torch.tensor([40, 50, 30]), "augment.0.x")
    assert torch.equal(other.by_sample(2), one.by_sample(2)[[1, 2, 0]])
    assert not torch.equal(other.uniform(), one.uniform().flip(0))
    assert torch.equal(replace(other, epoch=0).uniform(3), one.uniform(3).flip(0))


def test_draws_by_position_and_by_sample_differ():
    same = draw(1000)
    same = replace(same, indices=same.positions)
    assert abs(np.corrcoef(same.uniform()[:, 0].numpy(), same.by_sample()[:, 0].numpy())[0, 1]) < 0.15


def test_the_largest_random_number_stays_below_every_limit():
    largest = torch.tensor(1 - 2.0**-24)
    limits = torch.cat((torch.arange(1, 100_000), 2 ** torch.arange(25), 2 ** torch.arange(2, 25) - 1))
    assert bool(((largest * limits).long() < limits).all())


@pytest.mark.parametrize("moving", [augment.PaddedCrop(mode="zeros"), augment.RandAugment(), augment.CutMix()])
def test_transforms_that_move_pixels_are_refused_for_image_targets(moving):
    images, masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8, dtype=torch.int64)
    given = {"seed": 0, "epoch": 0, "position": 0, "indices": torch.arange(2)}
    with pytest.raises(UsageError, match="moves an image's pixels but not those of its target"):
        Pipeline((moving,), classes=2).train(images, masks, **given)
    Pipeline((augment.ColorJitter(brightness=0.5),)).train(images, masks, **given)


@pytest.mark.parametrize("of_classes", [True, False])
def test_flips_and_crops_move_masks_like_their_images(of_classes):
    images = torch.randint(0, 256, (64, 1, 9, 7), dtype=torch.uint8)
    masks = images[:, 0].long() if of_classes else images.float()
    given = {"seed": 3, "epoch": 1, "position": 5, "indices": torch.arange(64)}
    moving = (augment.Flip(), augment.AlternatingFlip(), augment.PaddedCrop(padding=3), augment.PaddedCrop(mode="edge"))
    found, moved = Pipeline(moving).train(images, masks, **given)
    alone, _ = Pipeline(moving).train(images, torch.zeros(64, dtype=torch.int64), **given)
    assert torch.equal(found, alone), "masks change nothing of the images"
    assert (moved.dtype, moved.shape) == (masks.dtype, masks.shape)
    assert torch.equal((found * 255).round(), moved.reshape(found.shape).float())
    assert not torch.equal(moved, masks)
