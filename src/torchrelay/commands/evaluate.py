"""`torchrelay evaluate FOLDER [IMAGES]`: evaluate a run's checkpoint on its validation and test data, or on others."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchrelay.commands.options import (
    add_checkpoint,
    add_common,
    add_folder,
    add_processes,
    recipe_of_run,
    run_in_processes,
    terminal_of,
    trained_of_run,
    trainer_of_run,
)
from torchrelay.distributed import process
from torchrelay.errors import UsageError

if TYPE_CHECKING:
    from torchrelay.train.evaluation import Evaluation

HELP = "evaluate a run's best checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_folder(parser)
    parser.add_argument(
        "images",
        type=Path,
        nargs="?",
        metavar="IMAGES",
        help="a folder of images, a folder for each class, to evaluate on instead of the run's own data",
    )
    add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_common(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the metrics of each split."""
    if options.images is not None:
        checkpoint, classes, evaluations = _on_images(options)
    else:
        recipe = recipe_of_run(options)
        if run_in_processes(options, recipe, options.folder):
            return
        trainer = trainer_of_run(options, recipe)
        checkpoint, classes = trainer.load(options.checkpoint), trainer.classes
        evaluations = {split: trainer.evaluate(split) for split in trainer.evaluator.parts}
    if process.rank() > 0:
        return
    if options.json:
        tables = {split: evaluation.to_json(classes) for split, evaluation in evaluations.items()}
        print(json.dumps({"checkpoint": str(checkpoint), **tables}, ensure_ascii=False))
        return
    print(checkpoint)
    for split, evaluation in evaluations.items():
        _print(split, evaluation, classes)


def _on_images(options: argparse.Namespace) -> tuple[Path, Sequence[str], dict[str, "Evaluation"]]:
    """Evaluate on a folder of images, for which the run's own data isn't needed."""
    from torchrelay.checkpoint.retention import find

    if options.devices > 1:
        raise UsageError("a folder of images is evaluated on one device: leave out --devices")
    trained = trained_of_run(options)
    evaluations = trained.evaluate(options.images, terminal_of(options).say)
    return find(options.folder / "checkpoints", options.checkpoint), trained.classes, evaluations


def _print(split: str, evaluation: "Evaluation", classes: Sequence[str]) -> None:
    values = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in evaluation.values.items())
    print("   ".join([f"{split} ({evaluation.samples:,} samples)", *values]))
    for name, row in evaluation.tables.items():
        print(f"  {name.replace('_', ' ')}")
        by_class = evaluation.by_class(row, classes)
        width = max(map(len, by_class))
        for label, value in by_class.items():
            print(f"    {label:<{width}}  {'no samples' if value is None else f'{value:.4f}'}")
