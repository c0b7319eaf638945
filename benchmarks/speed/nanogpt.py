"""Measure how long our recipe takes to reach the loss of nanoGPT's CPU configuration, side by side.

    python -m benchmarks.speed.nanogpt --script FOLDER --text FILE [--seeds 5] [--out docs/evidence/nanogpt.md]

FOLDER is a checkout of github.com/karpathy/nanoGPT, and FILE the text, such as data/tinyshakespeare/input.txt of
github.com/karpathy/char-rnn (Shakespeare, in the public domain). Fetch them yourself. The script runs in a copy of that
folder, on the text as its own `prepare.py` divides it, by the command that its README gives for a CPU; only the seed,
which it has as a constant, is replaced. Both are timed from the start of the process to its end. Both results are then
evaluated alike: the mean loss of the next character over the whole validation part, in windows of 64 characters.
"""

import argparse
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure, page
from benchmarks.page import Goal, Spread, Table
from torchrelay.data import text
from torchrelay.recipe import trained

TITLE = "Beside nanoGPT, on a CPU"
SCRIPTS = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
PREPARE = "data/shakespeare_char/prepare.py"
README = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SEED = "1337"  # the script's constant
LENGTH = 64  # characters of a context, for both
RECIPE = "characters-fast"
FIRST = 100  # seed; lower ones may have been used where settings were chosen


@dataclass(frozen=True)
class Run:
    """The validation loss of a training, and its seconds."""

    loss: float
    seconds: float


# ------------------------------------------------------------------------------------------------ theirs


def prepared(checkout: Path, corpus: Path, folder: Path) -> None:
    """Copy the script's files and the text into a folder, and let it prepare the text there."""
    for name in (*SCRIPTS, PREPARE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout / name, folder / name)
    shutil.copyfile(corpus, (folder / PREPARE).parent / "input.txt")  # which it would download otherwise
    subprocess.run([sys.executable, PREPARE], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def theirs(folder: Path, seed: int, validation: Tensor) -> Run:
    """Run the script with a seed; evaluate the checkpoint that it leaves."""
    source = (folder / "train.py").read_text()
    if source.count(SEED) != 1:
        raise SystemExit(f"train.py has the seed {SEED} {source.count(SEED)} times, not once: it has changed")
    (folder / "seeded.py").write_text(source.replace(SEED, str(seed)))
    began = time.perf_counter()
    command = [sys.executable, "seeded.py", *README.split()]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, env=measure.installed())
    seconds = time.perf_counter() - began
    saved = torch.load(folder / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    names = runpy.run_path(str(folder / "model.py"))
    model = names["GPT"](names["GPTConfig"](**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    # It gives all logits only where it is given targets.
    return Run(mean_loss(lambda inputs: model(inputs, inputs)[0], validation), seconds)


# ------------------------------------------------------------------------------------------------ ours


def ours(corpus: Path, share: float, seed: int, folder: Path, validation: Tensor) -> Run:
    """Train our recipe with a seed; evaluate its last checkpoint."""
    run = folder / f"{RECIPE}-{seed}"
    sets = [f"data.root={corpus}", f"data.test_share={share}", f"data.length={LENGTH}", f"run.seed={seed}"]
    seconds = measure.train(RECIPE, sets, run)
    model = trained.load(run, "last").model
    return Run(mean_loss(model, validation), seconds)


# ------------------------------------------------------------------------------------------------ both


@torch.no_grad()
def mean_loss(logits_of: Callable[[Tensor], Tensor], part: Tensor) -> float:
    """Return the mean loss of the next character over a part of the text.

    Args:
        logits_of: maps characters (windows, length) to logits (windows, length, vocabulary).
        part: the characters' numbers (characters,).
    """
    count = (len(part) - 1) // LENGTH
    inputs, targets = part[: count * LENGTH], part[1 : count * LENGTH + 1]
    losses = [
        F.cross_entropy(logits_of(x).flatten(0, 1), y.flatten(), reduction="sum")
        for x, y in zip(inputs.view(count, LENGTH).chunk(8), targets.view(count, LENGTH).chunk(8), strict=True)
    ]
    return float(torch.stack(losses).double().sum()) / (count * LENGTH)


def held_out(corpus: Path) -> tuple[Tensor, float]:
    """Return the characters of nanoGPT's validation part, and the share of the text that divides it alike for us."""
    content = corpus.read_text(encoding="utf-8")
    cut = int(len(content) * 0.9)  # as its prepare.py does
    numbers = {character: number for number, character in enumerate(sorted(set(content)))}
    share = 1 - cut / len(content)
    parts = text(corpus, 1, share)
    if len(parts[0].inputs) != cut - 1:  # the last character has no next one
        raise SystemExit(f"{corpus} can't be divided as nanoGPT divides it")
    return torch.tensor([numbers[character] for character in content[cut:]]), share


def table(pairs: list[tuple[Run, Run]]) -> Table:
    """Return the table of the pairs of both trainings."""
    rows: list[tuple[str | Spread, ...]] = []
    for number, (a, b) in enumerate(pairs):
        figures = f"{a.loss:.4f}", f"{a.seconds:.1f}", f"{b.loss:.4f}", f"{b.seconds:.1f}"
        rows.append((f"seed {FIRST + number}", *figures, f"{b.seconds / a.seconds:.3f}"))
    losses = [mean(pair[side].loss for pair in pairs) for side in (0, 1)]
    seconds = [Spread(tuple(pair[side].seconds for pair in pairs)) for side in (0, 1)]
    ratios = [b.seconds / a.seconds for a, b in pairs]
    last = (f"**{losses[0]:.4f}**", seconds[0], f"**{losses[1]:.4f}**", seconds[1], f"**{median(ratios):.3f}**")
    rows.append(("**mean losses, median times**", *last))
    goals = [
        Goal("our loss less theirs, mean", losses[1] - losses[0], 0.0, None, "{:+.4f}"),
        Goal("our loss less theirs, worst of the seeds", max(b.loss - a.loss for a, b in pairs), 0.0, None, "{:+.4f}"),
        Goal("our time relative to theirs, median", median(ratios), 1 / 3, None, "{:.3f}"),
    ]
    heads = ("", "nanoGPT: loss", "seconds", f"`{RECIPE}`: loss", "seconds", "time, relative")
    return Table(TITLE, heads, rows, goals=goals)


def main() -> None:
    """Measure, print the page, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="the text")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    corpus, before, pairs = options.text.resolve(), page.circumstances(), []
    validation, share = held_out(corpus)
    with tempfile.TemporaryDirectory() as folder:
        prepared(options.script, corpus, Path(folder))
        for seed in range(FIRST, FIRST + options.seeds):
            pair = theirs(Path(folder), seed, validation), ours(corpus, share, seed, Path(folder), validation)
            pairs.append(pair)
            print(f"seed {seed}: nanoGPT {pair[0]}, ours {pair[1]}", flush=True)
            text_ = document(before, options.seeds, pairs)
            if options.out is not None:  # after each pair, since all of them take long
                options.out.write_text(text_)
    print(text_)


def document(before: str, seeds: int, pairs: list[tuple[Run, Run]]) -> str:
    """Return the page."""
    made = f"Made by `python -m benchmarks.speed.nanogpt --script FOLDER --text FILE`, {seeds} seeds, in turns."
    return (
        f"# {TITLE}\n\n{before}\n{made}\n\n"
        "The text is tinyshakespeare, 1,115,394 characters. nanoGPT runs by the command that its README gives for a "
        f"CPU, `python train.py {README}`, unchanged but for the seed; ours by `torchrelay train {RECIPE}`, on "
        "the same first 90% of the text. Seconds are from the start of each process to its end. Losses are the mean "
        f"over the whole validation part, the last 10% of the text, in windows of {LENGTH} characters: of the "
        "checkpoint that nanoGPT keeps, which is the best that it saw, and of our last one.\n\n"
        f"{table(pairs).text()}\n"
    )


if __name__ == "__main__":
    main()
