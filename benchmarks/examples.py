"""The examples: how long each is, beside the program that people start from elsewhere, what it takes and learns.

    python -m benchmarks.examples [--out docs/evidence/examples.md]

Each example runs as its reader starts it, but on one thread, in a process and a folder of its own. Its seconds are of
CPU time, which others on the machine change little, of all that it does: imports, data, training, evaluation,
checkpoints and plots. The lines of other programs were counted at the commits
below; a line is a line of the file, blank lines and comments included.
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
# How the line begins in which an example says how well it did.
SAID = "best |accuracy of|mean squared|the mean image|test perplexity"
# Each example, what it shows, and the files that the other program consists of, with their lines.
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

Each example is one file that needs no download. Beside its result, each leaves a run's folder: metrics, curves, TensorBoard's
events, checkpoints without pickle. A test stops ten of them in their first epoch and resumes them to the bytes of an undisturbed
run. A result is that of the epoch which is best on the test data, or what the example computes after its last epoch.

| example | what it shows | lines | lines of the other program | CPU seconds | result |
| --- | --- | ---: | ---: | ---: | --- |
{rows}

The seconds are CPU time, on one thread, of the whole process, its start and its plots included; the machine had other work
meanwhile. The other programs are of
{commits}.
Most train larger networks on more data, and have options on the command line, for which some of their lines are; they were not
run here. Of them, nanoGPT's `train.py` alone continues a training that was stopped, and it saves no state of random numbers.
"""  # noqa: E501 - the lines of a page


def lines(name: str) -> int:
    """Return the number of an example's lines."""
    return len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines())


def others(files: Lines) -> str:
    """Return the lines of another program, with the file that most of them are in."""
    return f"{sum(files.values())} ({', '.join(f'`{file}`' for file in files)})" if files else ""


def run(name: str) -> tuple[float, str]:
    """Run an example on one thread; return its seconds of CPU time, and the line in which it says how well it did."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command, environment = [sys.executable, str(EXAMPLES / f"{name}.py")], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = [
        line
        for line in done.stdout.splitlines()
        if re.match(r"best |accuracy of|mean squared|the mean image|test p", line)
    ]
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
