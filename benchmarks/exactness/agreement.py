"""Compare the recipes with a plain loop: losses and final weights, bit by bit.

    python -m benchmarks.exactness.agreement [--data FOLDER] [--out docs/evidence/agreement.md]

trains each recipe with torchrelay and records the batches, then runs `twin.py`, a hand-written loop that doesn't import
torchrelay, on the same batches from the same seed. FOLDER is an image folder with CIFAR-10's photographs;
without it only the digits run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import torchrelay as tr
from torchrelay.data.batch import Batch
from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer
from torchrelay.run.terminal import Terminal

TWIN = Path(__file__).with_name("twin.py")


@dataclass(frozen=True)
class Case:
    """A recipe to compare, and the overrides to apply to it."""

    recipe: str
    overrides: tuple[str, ...]
    what: str
    photographs: bool = True


CASES = (
    Case("digits", (), "all 20 epochs", photographs=False),
    Case("cifar10-small", ("run.epochs=2",), "2 whole epochs at 32x32"),
    Case("cifar10-reference", ("run.max_steps=20",), "20 steps at 112x112"),
)


class Recorder(tr.Callback):
    """Keeps the losses and writes each batch to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses: list[Tensor] = []
        self.seconds = 0.0

    def on_step(self, trainer: Any, batch: Batch, loss: Tensor) -> None:
        self.losses.append(loss.clone())
        path = self.folder / f"batch-{trainer.step:06d}.safetensors"
        save_file({"inputs": batch.inputs.contiguous(), "targets": batch.targets}, path)


def compare(case: Case, data: Path | None, epochs: int | None = None) -> str:
    """Train both ways and return a row of the table."""
    folder = Path(tempfile.mkdtemp(prefix="agreement-"))
    where = (f"data.root={data}", "data.name=image-folder") if case.photographs else ()
    shorter = () if epochs is None else (f"run.epochs={epochs}",)
    loaded = recipe.load(case.recipe, (*where, *case.overrides, *shorter))
    written = Recorder(folder)
    trainer = build_trainer(loaded, callbacks=[written], terminal=Terminal(quiet=True))
    started = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - started
    (folder / "case.json").write_text(json.dumps(parameters(loaded, trainer)))
    subprocess.run([sys.executable, TWIN, folder], check=True)
    twin = load_file(folder / "twin.safetensors")
    same_losses = torch.equal(torch.stack(written.losses), twin.pop("losses"))
    weights = trainer.model.state_dict()
    same_weights = all(torch.equal(weights[name.removeprefix("model.")], tensor) for name, tensor in twin.items())
    same_weights = same_weights and len(twin) == len(weights)
    last = written.losses[-1].item()
    shutil.rmtree(folder)
    print(f"{case.recipe}: losses equal: {same_losses}, weights equal: {same_weights} ({seconds:.0f} s)", flush=True)
    shown = {True: "equal", False: "**differ**"}
    return (
        f"| `{case.recipe}` | {case.what} | {len(written.losses)} | {last:.8f} | "
        f"{shown[same_losses]} | {shown[same_weights]} ({len(weights)} tensors) |"
    )


def parameters(loaded: recipe.Recipe, trainer: tr.Trainer) -> dict[str, Any]:
    """Return the parameters of the hand-written loop."""
    optimizer, schedule = loaded.optimizer, loaded.schedule
    return {
        "model": loaded.model.name,
        "seed": loaded.run.seed,
        "lr": optimizer.lr,
        "momentum": getattr(optimizer, "momentum", 0.0),
        "weight_decay": optimizer.weight_decay,
        "schedule": schedule.name,
        "final_lr": getattr(schedule, "final_lr", 0.0),
        "epochs": loaded.run.epochs,
        "steps_per_epoch": len(trainer.batches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an image folder with CIFAR-10's photographs")
    parser.add_argument("--epochs", type=int, help="train fewer epochs: only to check that it runs")
    parser.add_argument("--out", type=Path, help="where to write the table")
    options = parser.parse_args()
    rows = [compare(case, options.data, options.epochs) for case in CASES if options.data or not case.photographs]
    heading = "| recipe | what ran | steps | last loss | losses | weights |\n| --- | --- | ---: | ---: | --- | --- |\n"
    note = (
        f"float32 on the CPU, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"made by `python -m benchmarks.exactness.agreement{' --data FOLDER' if options.data else ''}`.\n"
    )
    text = f"# The recipes and a hand-written loop, bit by bit\n\n{note}\n{heading}" + "\n".join(rows) + "\n"
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    if "**differ**" in text:
        sys.exit(1)


if __name__ == "__main__":
    main()
