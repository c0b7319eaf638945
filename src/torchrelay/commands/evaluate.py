"""`torchrelay evaluate FOLDER`: evaluate a run's checkpoint on the validation and test data."""

import argparse
import json
from typing import TYPE_CHECKING

from torchrelay.commands.options import (
    add_checkpoint,
    add_common,
    add_folder,
    add_processes,
    recipe_of_run,
    run_in_processes,
    trainer_of_run,
)
from torchrelay.distributed import process

if TYPE_CHECKING:
    from torchrelay.train.evaluation import Evaluation

HELP = "evaluate a run's best checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_folder(parser)
    add_checkpoint(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_common(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the metrics of each split."""
    recipe = recipe_of_run(options)
    if run_in_processes(options, recipe, options.folder):
        return
    trainer = trainer_of_run(options, recipe)
    checkpoint = trainer.load(options.checkpoint)
    evaluations = {split: trainer.evaluate(split) for split in trainer.evaluator.parts}
    if process.rank() > 0:
        return
    if options.json:
        tables = {split: evaluation.to_json(trainer.classes) for split, evaluation in evaluations.items()}
        print(json.dumps({"checkpoint": str(checkpoint), **tables}, ensure_ascii=False))
        return
    print(checkpoint)
    for split, evaluation in evaluations.items():
        _print(split, evaluation, trainer.classes)


def _print(split: str, evaluation: "Evaluation", classes: tuple[str, ...]) -> None:
    values = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in evaluation.values.items())
    print("   ".join([f"{split} ({evaluation.samples:,} samples)", *values]))
    for name, row in evaluation.tables.items():
        print(f"  {name.replace('_', ' ')}")
        by_class = evaluation.by_class(row, classes)
        width = max(map(len, by_class))
        for label, value in by_class.items():
            print(f"    {label:<{width}}  {value:.4f}")
