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
from torchrelay.errors import RelayError, UsageError

if TYPE_CHECKING:
    from torchrelay.train.evaluation import Evaluation
    from torchrelay.train.trainer import Trainer

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
    parser.add_argument(
        "--samples",
        type=Path,
        metavar="FILE",
        help="write what was found of each sample of the part that selects the best checkpoint, as safetensors",
    )
    add_common(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print the metrics of each split."""
    if options.images is not None:
        if options.samples is not None:
            raise UsageError("--samples is of the run's own data: leave out IMAGES, or --samples")
        checkpoint, classes, evaluations = _on_images(options)
    else:
        recipe = recipe_of_run(options)
        if run_in_processes(options, recipe, options.folder):
            return
        trainer = trainer_of_run(options, recipe)
        checkpoint, classes = trainer.load(options.checkpoint), trainer.classes
        evaluations = {split: trainer.evaluate(split) for split in trainer.evaluator.parts}
        if options.samples is not None and process.rank() == 0:
            _write_samples(options.samples, trainer, int(checkpoint.resolve().name.removeprefix("step-")))
    if process.rank() > 0:
        return
    if options.json:
        tables = {split: evaluation.to_json(classes) for split, evaluation in evaluations.items()}
        print(json.dumps({"checkpoint": str(checkpoint), **tables}, ensure_ascii=False))
        return
    print(checkpoint)
    for split, evaluation in evaluations.items():
        _print(split, evaluation, classes)


def _write_samples(path: Path, trainer: "Trainer", step: int) -> None:
    evaluator = trainer.evaluator
    if evaluator.samples is None or not evaluator.samples.columns:
        why = "there is no data to evaluate on" if evaluator.samples is None else evaluator.samples.missing
        raise RelayError(f"{path} isn't written: {why or 'the task says nothing of a sample; see Task.per_sample'}")
    evaluator.samples.write(path, trainer.task, evaluator.selects_on, step, trainer.progress.epoch_of(step))


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
