"""Draw what each transform does: one row per transform, with the same eight images in each.

python -m tools.augmentations --out docs/pictures/augmentations.png

The images are parts of the two photographs that come with scikit-learn; nothing is downloaded.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor

from torchrelay.data import augment
from torchrelay.data.augment import Augment, Draw

TILE, GAP, APART = 80, 6, 26  # pixels: an image's side, between the images of a row, between rows
MARGIN, LEFT, TOP = 40, 300, 140  # pixels: around it all, beside the rows, above them
INK, GREY = "#16181d", "#6b7280"
# Parts of the photographs (427 rows, 640 columns): (photograph, top, left, side).
PARTS = (
    (0, 15, 35, 340),
    (1, 60, 145, 320),
    (0, 25, 85, 180),
    (1, 215, 220, 212),
    (0, 205, 330, 222),
    (1, 125, 210, 180),
    (0, 220, 60, 190),
    (1, 70, 270, 210),
)
SHOWN: tuple[tuple[Augment, str], ...] = (
    (augment.Flip(), "mirrored or not"),
    (augment.AlternatingFlip(), "the other way in the next epoch"),
    (augment.PaddedCrop(padding=12), "shifted by up to 12 pixels"),
    (augment.RandomResizedCrop(size=TILE, scale=(0.2, 1.0)), "a part, brought to full size"),
    (augment.Cutout(size=32), "a square of the mean colour"),
    (augment.ColorJitter(hue=0.1), "brightness, contrast, saturation, hue"),
    (augment.TrivialAugment(), "one of 14 operations, at any strength"),
    (augment.RandAugment(n=2, magnitude=15), "two of 14 operations, at one strength"),
    (augment.Mixup(alpha=1.0), "blended; below: its own share"),
    (augment.CutMix(alpha=1.0), "cut; below: its own share"),
)


@dataclass(frozen=True)
class Row:
    """A row of the picture."""

    title: str
    note: str
    images: Tensor  # (8, 3, TILE, TILE) uint8
    captions: Sequence[str] = ()  # under the images


def tiles() -> Tensor:
    """Return (8, 3, TILE, TILE) uint8: parts of the two photographs."""
    photographs = [torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] for photo in load_sample_images().images]
    resize = augment.Resize(size=TILE)
    return torch.cat(
        [resize(photographs[k][:, :, top : top + side, left : left + side]) for k, top, left, side in PARTS]
    )


def rows(images: Tensor, seed: int = 18) -> list[Row]:
    """Return the original images, then a row per transform."""
    batch = len(images)
    found = [Row("Original", "eight images", images)]
    for number, (transform, note) in enumerate(SHOWN):
        places = torch.arange(batch)
        draw = Draw(seed, 0, places, places, f"augment.{number}.{transform.name}")
        captions: list[str] = []
        if isinstance(transform, augment.Mixup | augment.CutMix):
            changed, targets = transform(images, torch.eye(batch), draw, (batch,))
            captions = [f"{100 * float(share):.0f}%" for share in targets.diagonal()]
        else:
            changed = transform(images, draw)
        if changed.is_floating_point():
            changed = (changed * 255).round().to(torch.uint8)
        found.append(Row(written(transform), note, changed, captions))
    return found


def written(transform: Augment) -> str:
    """Return a transform as a Python call, with the arguments that differ from the defaults."""
    fields = type(transform).model_fields
    given = [(name, value) for name, value in transform if name != "name" and value != fields[name].default]
    return f"{type(transform).__name__}({', '.join(f'{name}={value}' for name, value in given)})"


def row_top(row: int) -> int:
    """Return the distance in pixels from the picture's upper edge to a row."""
    return TOP + row * (TILE + APART) + (APART if row else 0)  # extra space below the originals


def draw_picture(shown: Sequence[Row], path: Path) -> None:
    """Write the picture, a pixel for each pixel of the images."""
    width = LEFT + len(PARTS) * (TILE + GAP) - GAP + MARGIN
    height = row_top(len(shown)) + MARGIN
    dpi = 100
    with mpl.rc_context({"font.family": "DejaVu Sans", "savefig.facecolor": "white"}):
        figure = Figure((width / dpi, height / dpi), dpi=dpi)

        def say(x: float, y: float, text: str, **style: object) -> None:
            figure.text(x / width, 1 - y / height, text, **({"color": INK, "va": "center"} | style))  # type: ignore[arg-type]

        say(MARGIN, MARGIN + 12, "Augmentation", fontsize=19, fontweight="bold")
        say(
            MARGIN,
            MARGIN + 46,
            "The same eight images through each transform; what happens to an image is drawn for it alone.",
            fontsize=11,
            color=GREY,
        )
        for number, row in enumerate(shown):
            top, middle = row_top(number), row_top(number) + TILE / 2
            title, _, arguments = row.title.removesuffix(")").partition("(")
            say(MARGIN, middle - 14, title, fontsize=12.5, fontweight="bold")
            say(MARGIN, middle + 8, row.note, fontsize=9)
            if arguments:
                say(MARGIN, middle + 26, arguments, fontsize=8.5, color=GREY, family="DejaVu Sans Mono")
            for column, image in enumerate(row.images):
                left = LEFT + column * (TILE + GAP)
                axes = figure.add_axes((left / width, 1 - (top + TILE) / height, TILE / width, TILE / height))
                axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="none")
                axes.set_axis_off()
                if row.captions:
                    say(left + TILE / 2, top + TILE + 10, row.captions[column], fontsize=8, color=GREY, ha="center")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi, metadata={"Software": None}, pil_kwargs={"optimize": True})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw what each transform does to eight images.")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/augmentations.png"))
    options = parser.parse_args(arguments)
    draw_picture(rows(tiles()), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
