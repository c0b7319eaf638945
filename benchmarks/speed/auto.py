"""How close `auto` comes to the best precision, memory format and number of threads that could be set by hand.

    python -m benchmarks.speed.auto [--quick] [--out FILE]

For each recipe, `auto` decides; then training steps with each combination are timed in turns, those with the decided
one among them. Other kinds of processor are imitated by the caps of PyTorch and oneDNN on the instructions in use. The
images and the text are random: a step's time doesn't depend on what is in them, and nothing is downloaded.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import page
from benchmarks.measure import installed
from benchmarks.page import Goal, Spread, Table

TITLE = "auto, and the best setting by hand"
IMAGES = ("data.name=images", "data.batch_size=64")
RECIPES = {
    "cifar10-fast": IMAGES,
    "image-folder": IMAGES,
    "digits": (),
    "characters": ("data.root=text.txt", "data.batch_size=16"),
}
CAPS = {
    "no cap": {},
    "AVX-512 without bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "no AVX": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
}
CODE = """
import torch
from torchrelay.data import arrays

def images():
    drawn = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
    return [arrays(drawn, torch.arange(512) % 10, list("abcdefghij")) for _ in "12"]
"""
HOPELESS = 2.0  # times the fastest first steps, from which on a combination isn't timed further
Choice = tuple[str, bool, int]  # precision, channels last, threads


def tables(quick: bool) -> list[Table]:
    """Return a table: a row for each recipe and kind of processor."""
    rows: list[Sequence[str | Spread]] = []
    ratios, probes = [], []
    has_avx512 = "avx512f" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
    for recipe in list(RECIPES)[2 if quick else 0 :]:
        for cap, variables in CAPS.items():
            if "AVX-512" in cap and not has_avx512:
                continue
            found = measure_with(variables, recipe)
            ratio = found["auto"] / found["best"]
            ratios.append(ratio)
            probes.append(found["probe"])
            rows.append((recipe, cap, found["decided"], found["fastest"], f"{ratio:.3f}", f"{found['probe']:.1f} s"))
    heads = ("recipe", "processor", "`auto` decides", "the fastest", "its step, relative to that", "probe")
    goals = [
        Goal("the slowest of auto's steps, relative to the fastest", max(ratios), 1.05, None, "{:.3f}"),
        Goal("the longest probe, seconds", max(probes), 2.0, None, "{:.1f}"),
    ]
    note = "Steps of a training, in turns; combinations that take more than twice the fastest are left out after two."
    return [Table("Steps as `auto` decides, and by hand", heads, rows, note, goals)]


def measure_with(variables: dict[str, str], recipe: str) -> dict[str, Any]:
    """Measure in a process of its own, since the caps are read once."""
    command = [sys.executable, "-m", "benchmarks.speed.auto", "--child", recipe]
    done = subprocess.run(
        command, env=installed() | variables, stdout=subprocess.PIPE, check=True, text=True, cwd=Path.cwd()
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str) -> dict[str, Any]:
    """Return what `auto` decides for a recipe, the seconds of its steps and of the fastest ones, and of the probe."""
    from torchrelay.commands.tune import Timed, in_turns
    from torchrelay.recipe import recipe
    from torchrelay.recipe.code import load_code

    code = load_code(Path("images.py"))

    def timed(precision: str, last: bool | str, threads: int | str) -> Timed:
        device = {"name": "cpu", "precision": precision, "channels_last": str(last).lower(), "threads": threads}
        sets = [*RECIPES[name], *(f"device.{key}={value}" for key, value in device.items())]
        return Timed(recipe.load(name, sets), code)

    cores = len(os.sched_getaffinity(0))
    timed("float32", False, cores)  # imports what it needs
    began = time.perf_counter()
    own = timed("auto", "auto", "auto").trainer.device.settings
    with_probe = time.perf_counter() - began
    decided: Choice = (str(own.precision), bool(own.channels_last), int(own.threads or cores))
    places: dict[Choice, Timed] = {}
    choices: list[Choice] = list(itertools.product(("float32", "bf16"), (False, True), sorted({cores, 1})))
    took = {}
    for choice in choices:
        began = time.perf_counter()
        places[choice] = timed(*choice)
        took[choice] = time.perf_counter() - began
    hopeful = [each for each in choices if places[each].first <= HOPELESS * min(p.first for p in places.values())]
    hopeful = list(dict.fromkeys([decided, *hopeful]))
    turns = [in_turns([places[each] for each in hopeful]) for _ in range(3)]
    seconds = dict(zip(hopeful, (median(column) for column in zip(*turns, strict=True)), strict=True))
    fastest = min(seconds, key=lambda each: seconds[each])
    return {
        "decided": words(decided),
        "fastest": words(fastest),
        "auto": seconds[decided],
        "best": seconds[fastest],
        "probe": with_probe - took[decided],
        "all": {words(each): took for each, took in seconds.items()},
    }


def words(choice: Choice) -> str:
    """Return a combination in words."""
    precision, last, threads = choice
    return f"{precision}, channels {'last' if last else 'first'}, {threads} thread{'s' * (threads > 1)}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("images.py").write_text(CODE, encoding="utf-8")
            Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000, encoding="utf-8")
            print(json.dumps(measure(sys.argv[2])))
    else:
        page.main(__doc__ or "", TITLE, tables)
