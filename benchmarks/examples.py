"""Run each example, and compare its length with the corresponding program of other repositories.

    python -m benchmarks.examples [--out docs/evidence/examples.md]

Each example runs in its own process and folder, on one thread. The table shows its CPU time, which other programs on
the machine change little, for everything: imports, data, training, evaluation, checkpoints and plots. The lines of the
other programs were counted at the commits below; blank lines and comments count.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.page import circumstances

EXAMPLES = Path(__file__).parents[1] / "examples"
COMMITS = {
    "pytorch/examples": "77f55b912142e11fcfdf5b530231fb9c52f181e8",
    "karpathy/nanoGPT": "3adf61e154c3fe3fca428ad6bc3818b27a3b8291",
}
Lines = dict[str, int]
# The beginnings of the line in which an example reports its result.
SAID = "best |accuracy of|mean squared|the mean image|test p"
# Each example, what it shows, and the files of the corresponding program with their lines.
SHOWN: dict[str, tuple[str, Lines]] = {
    "mnist": ("two convolutions", {"mnist/main.py": 141}),
    "vae": ("a loss of two parts, without targets", {"vae/main.py": 139}),
    "siamese": ("two inputs", {"siamese_network/main.py": 302}),
    "gan": ("two updates a step", {"dcgan/main.py": 277}),
    "word_language_model": (
        "words, an LSTM",
        {"word_language_model/main.py": 290, "word_language_model/model.py": 144, "word_language_model/data.py": 48},
    ),
    "time_series": (
        "L-BFGS",
        {"time_sequence_prediction/train.py": 90, "time_sequence_prediction/generate_sine_wave.py": 13},
    ),
    "gpt": ("characters, a transformer", {"train.py": 336, "model.py": 330, "data/shakespeare_char/prepare.py": 68}),
    "segmentation": ("a class per pixel", {}),
    "detection": ("lists of images and boxes", {}),
    "distillation": ("a teacher in the task", {}),
    "contrastive": ("a loss over a batch, without labels", {}),
    "masked": ("random masks", {}),
    "tables": ("dicts of numbers and categories", {}),
    "audio": ("a spectrogram in the model", {}),
}
TEXT = """# Examples

{circumstances} Made by `python -m benchmarks.examples`.

Each example is one file that needs no download. Besides its result, each leaves a run folder: metrics, curves, TensorBoard
events, and checkpoints without pickle. A test stops ten of them in their first epoch, resumes them, and compares the bytes with an
uninterrupted run. The result is that of the best epoch on the test data, or what the example computes after its last epoch.

| example | what it shows | lines | lines of the corresponding program | CPU seconds | result |
| --- | --- | ---: | ---: | ---: | --- |
{rows}

The seconds are CPU time of the whole process on one thread, including its start and its plots; the machine ran other work
meanwhile. The other programs come from
{commits}.
Most of them train larger networks on more data, and some of their lines parse command-line options; they were not run here.
Only nanoGPT's `train.py` can resume a stopped training, and it doesn't save the state of the random number generators.
"""  # noqa: E501 - the lines of a page


def lines(name: str) -> int:
    """Return the number of lines of an example."""
    return len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines())


def others(files: Lines) -> str:
    """Return the number of lines of another program, and its files."""
    return f"{sum(files.values())} ({', '.join(f'`{file}`' for file in files)})" if files else ""


def run(name: str) -> tuple[float, str]:
    """Run an example on one thread; return its CPU seconds and the line in which it reports its result."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command, environment = [sys.executable, str(EXAMPLES / f"{name}.py")], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = [line for line in done.stdout.splitlines() if re.match(SAID, line)]
    return seconds, re.sub(r"^best | \(.*\)$", "", said[-1])


def row(name: str) -> str:
    """Run an example and return its row."""
    what, files = SHOWN[name]
    seconds, result = run(name)
    return f"| `{name}.py` | {what} | {lines(name)} | {others(files)} | {seconds:.0f} | {result} |"


def main() -> None:
    """Run all examples and print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the page to this file")
    out = parser.parse_args().out
    commits = " and ".join(f"{repository} at commit {commit[:12]}" for repository, commit in COMMITS.items())
    rows, before = [], circumstances()
    for name in SHOWN:
        rows.append(row(name))
        print(rows[-1], flush=True)
    if out:
        out.write_text(TEXT.format(circumstances=before, rows="\n".join(rows), commits=commits), encoding="utf-8")


if __name__ == "__main__":
    main()
