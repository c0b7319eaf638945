"""`torchrelay predict FOLDER PATH…`: classify image files with a trained run. The training data isn't needed."""

import argparse
import json
from pathlib import Path

from torchrelay.commands.options import add_checkpoint, add_common, add_folder, code_of, count, recipe_of_run
from torchrelay.errors import UsageError

HELP = "classify image files with a trained run"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_folder(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="image files, or folders of them")
    parser.add_argument("--top", type=count, default=3, metavar="N", help="show the N most probable classes (3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_checkpoint(parser)
    add_common(parser)


def run(options: argparse.Namespace) -> None:
    """Print the most probable classes of each image."""
    from torchrelay.recipe.predictor import load_predictor

    recipe, code = recipe_of_run(options), code_of(options)
    paths = [path for given in options.paths for path in _images(given)]
    predictor = load_predictor(recipe, options.folder, options.checkpoint, code=code)
    probabilities = predictor.images(paths)
    ranked = probabilities.topk(min(options.top, probabilities.shape[1]))
    rows = [
        {str(predictor.classes[c]): round(p, 6) for p, c in zip(values, indices, strict=True)}
        for values, indices in zip(ranked.values.tolist(), ranked.indices.tolist(), strict=True)
    ]
    if options.json:
        entries = [{"path": str(path), "classes": row} for path, row in zip(paths, rows, strict=True)]
        print(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    width = max(len(str(path)) for path in paths)
    for path, row in zip(paths, rows, strict=True):
        print(f"{path!s:<{width}}  " + "   ".join(f"{name} {p:.1%}" for name, p in row.items()))


def _images(path: Path) -> list[Path]:
    """Return an image's path, or the paths of all images below a folder."""
    from torchrelay.data.image_files import is_image

    if path.is_dir():
        images = sorted(p for p in path.rglob("*") if is_image(p))
        if not images:
            raise UsageError(f"{path} has no images in it")
        return images
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    return [path]
