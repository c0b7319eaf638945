"""`torchrelay predict FOLDER PATH…`: classify image files with a trained run. The training data isn't needed."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torchrelay.commands.options import add_checkpoint, add_common, add_folder, count, trained_of_run
from torchrelay.errors import RelayError, UsageError

if TYPE_CHECKING:
    from torchrelay.recipe.trained import Trained

HELP = "classify image files with a trained run"
Row = dict[str, float]  # the most probable classes, the first one first


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_folder(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="image files, or folders of them")
    parser.add_argument("--top", type=count, default=3, metavar="N", help="show the N most probable classes (3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV: path, class, probability, class_2, …")
    add_checkpoint(parser)
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Print the most probable classes of each image; name the files that can't be read, and fail at the end."""
    trained = trained_of_run(options)
    paths = [path for given in options.paths for path in _images(given)]
    top = min(options.top, len(trained.classes))
    unreadable: list[Path] = []
    rows = _rows(trained, paths, top, unreadable)
    if options.json:
        entries = [{"path": str(path), "classes": row} for path, row in rows]
        print(json.dumps(entries, indent=1, ensure_ascii=False))
    elif options.csv:
        _print_csv(rows, top)
    else:
        width = max(len(str(path)) for path in paths)
        for path, row in rows:
            print(f"{path!s:<{width}}  " + "   ".join(f"{name} {p:.1%}" for name, p in row.items()))
    if unreadable:
        raise RelayError(
            f"{len(unreadable)} of {len(paths)} files can't be read as images, such as {unreadable[0]}; the others are "
            "classified above"
        )


def _rows(trained: "Trained", paths: list[Path], top: int, unreadable: list[Path]) -> Iterator[tuple[Path, Row]]:
    """Yield the most probable classes of each image; say which can't be read, and collect them."""
    for path, found in zip(paths, trained.predict_files(paths), strict=True):
        if isinstance(found, RelayError):
            print(f"left out: {str(found).partition('; ')[0]}".replace("\n", "\\n"), file=sys.stderr)
            unreadable.append(path)
            continue
        values, indices = (part.tolist() for part in found.topk(top))
        yield path, {str(trained.classes[c]): round(p, 6) for p, c in zip(values, indices, strict=True)}


def _print_csv(rows: Iterator[tuple[Path, Row]], top: int) -> None:
    """Print a line for each image, as spreadsheets read it."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    more = (name for rank in range(2, top + 1) for name in (f"class_{rank}", f"probability_{rank}"))
    writer.writerow(["path", "class", "probability", *more])
    for path, row in rows:
        writer.writerow([path, *(value for pair in row.items() for value in pair)])


def _images(path: Path) -> list[Path]:
    """Return an image's path, or the paths of all images below a folder; name what isn't an image there."""
    from torchrelay.data.listing import images_below, left_out

    if path.is_dir():
        images, others = images_below(path)
        if not images:
            raise UsageError(f"{path} has no images in it" + (f", only {left_out(others)}" if others else ""))
        if others:
            print(f"left out, since they aren't images: {left_out(others)}", file=sys.stderr)
        return images
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    return [path]
