"""Draw training runs at random, interrupt and move each between devices, and compare it with an undisturbed one.

    python -m benchmarks.exactness.properties --configurations 200 [--seed 0] [--precision bf16] [--out PAGE]

A configuration is a recipe (data, model, optimizer, schedule, augmentation, replicas, averaging, clipping, evaluations,
checkpoints) and a plan: on how many processes it starts, and one to three signals, each followed by a resume on another
number of processes. In the end all checkpoints, `evaluation.json`, `recipe.toml` and `model.txt` must equal, byte for
byte, those of the same recipe on one process without a signal; metrics and charts without their clock fields. A
configuration that fails prints its seed: `--seed SEED --configurations 1` repeats it.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.exactness.kill import differences
from benchmarks.exactness.same_bytes import draw_images, write_text

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds that a command may take
IMAGES = (
    *("flip", "alternating_flip", "trivial_augment", "rand_augment", "mixup", "cutmix"),
    *({"name": "crop", "padding": 1}, {"name": "cutout", "size": 3}, {"name": "random_resized_crop", "size": 8}),
    *({"name": "color_jitter", "brightness": 0.3, "contrast": 0.2}, {"name": "progressive_resize", "sizes": [6, 8]}),
)
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    *({"name": "sgd", "lr": 0.05}, {"name": "sgd", "lr": 0.05, "nesterov": True, "momentum": 0.8}),
    *({"name": "adamw"}, {"name": "muon", "dtype": "float32"}, {"name": "muon", "other": "sgd", "other_lr": 0.01}),
    *(
        {"name": name}
        for name in ("RMSprop", "NAdam", "Adagrad", "Adadelta", "Adamax", "RAdam", "ASGD", "Rprop", "Adam")
    ),
    *({"name": name} for name in ("Adafactor", "SGD")),
)
SCHEDULES: tuple[dict[str, Any], ...] = (
    *({"name": "constant"}, {"name": "step", "every": "5 steps"}, {"name": "multistep"}, {"name": "one_cycle"}),
    *({"name": "cosine"}, {"name": "cosine", "per": "epoch"}, {"name": "linear"}, {"name": "plateau", "patience": 0}),
)


_NAMED, _KINDS = ("optimizer", "schedule", "data"), ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class Stop:
    """An interruption.

    Attributes:
        number: the signal's.
        lines: of metrics that the run has when it comes, as a share of the undisturbed run's.
        delay: seconds after that.
        devices: on which the run continues.
    """

    number: signal.Signals
    lines: float
    delay: float
    devices: int


@dataclass(frozen=True)
class Configuration:
    """What is run and how it is disturbed."""

    seed: int
    recipe: dict[str, dict[str, Any]]
    devices: int
    stops: tuple[Stop, ...]

    def __str__(self) -> str:
        stops = ", ".join(f"{stop.number.name} at {stop.lines:.0%}, then on {stop.devices}" for stop in self.stops)
        return f"{json.dumps(self.recipe)}: on {self.devices}, {stops}"


@dataclass
class Verdict:
    """What became of a configuration: "equal", "refused", "diverged", or what is wrong."""

    configuration: Configuration
    what: str
    signals: list[str] = field(default_factory=list)  # those that met the run


# ------------------------------------------------------------------------------------------------ what is drawn


def draw(seed: int, folder: Path) -> Configuration:
    """Draw a configuration; its data is in a folder."""
    chance = random.Random(seed)
    recipe = _task(chance, folder)
    replicas = chance.choice((1, 2, 2, 4))
    recipe["run"] |= {
        "seed": chance.randrange(2**32),
        "epochs": chance.randint(1, 3),
        "log_every": chance.randint(1, 6),
    }
    recipe["run"] |= chance.choice(({}, {"evaluate_every": "5 steps"}, {"evaluate_every": 2}, {"patience": 1}))
    recipe["run"] |= chance.choice(({}, {}, {"evaluate_batches": 2}, {"train_metrics": False}))
    recipe["data"] |= {"drop_last": chance.random() < 0.3}
    balanced = {"sampling": "shuffle" if recipe["data"]["name"] == "text" else "balanced"}
    recipe["data"] |= chance.choice(({}, {}, balanced, {"sampling": "sequential"}, {"validation": 0.2}))
    recipe["model"] |= chance.choice(({}, {"ema": 0.9}))
    kinds = _KINDS if replicas > 1 else ("none",)
    recipe["parallel"] = {"replicas": replicas, "kind": chance.choice(kinds)}
    # An exact fsdp has these two.
    optimizers = OPTIMIZERS[:3] if recipe["parallel"]["kind"] == "fsdp" else OPTIMIZERS
    recipe["optimizer"] = chance.choice(optimizers) | chance.choice(({}, {"clip_norm": 0.5}, {"weight_decay": 0.01}))
    recipe["schedule"] = chance.choice(SCHEDULES) | chance.choice(({}, {"warmup": "3 steps"}))
    every = chance.choice(("1 epoch", "1 steps", "3 steps", "5 steps", "7 steps", "40%"))
    recipe["checkpoint"] = {"every": every, "keep": chance.randint(1, 3), "keep_best": chance.randint(0, 2)}
    recipe["device"] = {"name": "cpu", "threads": 1, "precision": "bf16" if chance.random() < 0.1 else "float32"}
    counts = [count for count in (1, 2, 4) if count <= replicas]
    stops = tuple(
        Stop(
            chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)),
            chance.random(),
            chance.choice((0.0, chance.uniform(0, 0.05))),
            chance.choice(counts),
        )
        for _ in range(chance.randint(1, 3))
    )
    return Configuration(seed, recipe, chance.choice(counts), stops)


def _task(chance: random.Random, folder: Path) -> dict[str, dict[str, Any]]:
    """Draw data and a model for it."""
    batch = {"batch_size": chance.choice((8, 13, 20, 32))}
    images = {"augment": chance.sample(IMAGES, chance.choice((0, 1, 1, 2, 3)))}
    widths = {"widths": chance.choice(([4], [4, 8]))}
    smooth = {"name": "cross_entropy", "label_smoothing": chance.choice((0.0, 0.1))}
    match chance.choice(("digits", "photographs", "table", "text")):
        case "digits":
            data = {"name": "digits", "batch_size": chance.choice((100, 256, 333)), **images}
            return {"run": {}, "data": data, "model": {"name": "small-cnn", "options": widths}, "loss": smooth}
        case "photographs":
            data = {"name": "image-folder", "root": str(folder / "photographs"), "size": 8, **batch, **images}
            data |= {"cache_dir": str(folder / "caches"), "channels": chance.choice((1, 3))}
            views = {"test_views": chance.choice((1, 2))}
            return {"run": views, "data": data, "model": {"name": "small-cnn", "options": widths}, "loss": smooth}
        case "table":
            data = {"name": chance.choice(("wine", "breast-cancer")), **batch}
            return {"run": {}, "data": data, "model": {"name": "mlp", "options": widths}, "loss": smooth}
    data = {"name": "text", "root": str(folder / "text.txt"), "length": 32, **batch}
    options = {"width": 16, "heads": 2, "layers": 1, "dropout": chance.choice((0.0, 0.1))}
    return {"run": {}, "data": data, "model": {"name": "char-lm", "options": options}, "loss": {"name": "next_token"}}


def write_data(folder: Path) -> None:
    """Write a few photographs and a text."""
    draw_images(folder / "photographs", 12, ".png")
    write_text(folder / "text.txt")


# ------------------------------------------------------------------------------------------------ how it is run


class Commands:
    """Runs commands in forks of a process that has imported torch: the server of the tests.

    Args:
        folder: for its socket and the commands' output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(folder / "socket")]
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        self._environment = kept | {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(command, env=self._environment, start_new_session=True, cwd=ROOT)
        self._socket = socket.socket(socket.AF_UNIX)
        while self._socket.connect_ex(str(folder / "socket")):
            if self._server.poll() is not None:
                sys.exit("the server of processes doesn't start")
            time.sleep(0.05)
        self._lines = self._socket.makefile("rw", encoding="utf-8")

    def start(self, *arguments: str) -> int:
        """Start `torchrelay …` and return the process's id."""
        for name in ("out", "err"):
            (self.folder / name).write_text("")
        process: int = self._ask(
            do="start",
            argv=["torchrelay", *arguments],
            script=None,
            module="torchrelay",
            folder=str(self.folder),
            stdout=str(self.folder / "out"),
            stderr=str(self.folder / "err"),
            terminal=None,
            environment=self._environment,
            plots=False,
            network=None,
            forks="--devices" in arguments,
        )
        return process

    def wait(self, process: int, timeout: float = PATIENCE) -> int | None:
        """Return an exit code, negative for a signal; None if it still runs after so many seconds."""
        code: int | None = self._ask(do="wait", pid=process, timeout=timeout)
        return code

    @property
    def errors(self) -> str:
        """What the last command said on standard error."""
        return (self.folder / "err").read_text().strip()

    def _ask(self, **request: Any) -> Any:
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        return json.loads(self._lines.readline())

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self._server.kill()
        self._server.wait()


def check(configuration: Configuration, commands: Commands, folder: Path) -> Verdict:
    """Run a configuration undisturbed and disturbed, and compare the two."""
    recipe, undisturbed, run = folder / "recipe.toml", folder / "undisturbed", folder / "disturbed"
    for old in (undisturbed, run):
        shutil.rmtree(old, ignore_errors=True)
    recipe.write_text(tomli_w.dumps(configuration.recipe))
    code = commands.wait(commands.start("train", str(recipe), "--run", str(undisturbed), "--quiet"))
    if code == 2:
        return Verdict(configuration, f"refused: {commands.errors}")
    if code == 1 and any(sign in commands.errors for sign in ("not finite", " is nan", " is inf")):
        return Verdict(configuration, "diverged")
    if code != 0:
        return Verdict(configuration, f"the undisturbed run ended with {code}: {commands.errors}")
    verdict = Verdict(configuration, "equal")
    _disturb(verdict, commands, recipe, run, _lines(undisturbed))
    found = differences(undisturbed, run) if verdict.what == "equal" else []
    if configuration.recipe["parallel"]["kind"] == "fsdp":  # which on several processes has no summary of the model
        found = [name for name in found if name != "model.txt"]
    if found:
        verdict.what = f"different: {', '.join(found)}"
    return verdict


def _disturb(verdict: Verdict, commands: Commands, recipe: Path, run: Path, total: int) -> None:
    """Run to the end with the planned interruptions, and note what goes wrong."""
    devices = verdict.configuration.devices
    for stop in (*verdict.configuration.stops, None):
        code = _stretch(commands, recipe, run, devices, stop, total)
        if code == 2 and not (run / "recipe.toml").exists():
            verdict.what = f"refused: {commands.errors}"
            return
        # 128 and the number: the launcher was stopped before training began.
        ends = {0} if stop is None else {0, -stop.number, 128 + stop.number, 75}
        if stop is not None and "stopped by" in commands.errors:
            ends.add(1)  # before there was anything to save
        if code not in ends:
            verdict.what = f"a command on {devices} processes ended with {code}: {commands.errors}"
            return
        if stop is not None:
            verdict.signals += [] if code == 0 else [stop.number.name]
            devices = stop.devices


def _stretch(commands: Commands, recipe: Path, run: Path, devices: int, stop: Stop | None, total: int) -> int | None:
    """Start or resume the run, stop it as planned, and return its exit code."""
    begun = (run / "recipe.toml").exists()
    arguments = ["resume", str(run)] if begun else ["train", str(recipe), "--run", str(run)]
    count = ["--devices", str(devices)] if devices > 1 else []
    end = time.monotonic() + PATIENCE
    while True:
        process = commands.start(*arguments, *count, "--quiet")
        if stop is not None:
            while (code := commands.wait(process, 0)) is None and _lines(run) < stop.lines * total:
                time.sleep(0.01)
            if code is None:
                time.sleep(stop.delay)
                os.kill(process, stop.number)
                code = commands.wait(process)
        else:
            code = commands.wait(process)
        # The other processes of one that was killed take a moment to notice.
        if "is in use by" not in commands.errors or time.monotonic() > end:
            return code
        time.sleep(0.2)


def _lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ------------------------------------------------------------------------------------------------ the page


def verdicts(configurations: int, seed: int, precision: str | None = None) -> Iterator[Verdict]:
    """Yield what became of so many configurations that weren't refused and didn't diverge, and of those that did.

    Args:
        configurations: how many.
        seed: of the first.
        precision: in place of those drawn.
    """
    with tempfile.TemporaryDirectory(prefix="properties-") as temporary:
        folder = Path(temporary)
        write_data(folder)
        commands = Commands(folder)
        done = 0
        try:
            while done < configurations:
                drawn = draw(seed, folder)
                drawn.recipe["device"] |= {} if precision is None else {"precision": precision}
                verdict = check(drawn, commands, folder)
                done += not verdict.what.startswith(("refused", "diverged"))
                seed += 1
                yield verdict
        finally:
            commands.close()


def page(found: list[Verdict], command: str) -> str:
    """Return the page of results."""
    from benchmarks.measure import machine
    from benchmarks.page import markdown

    compared = [verdict for verdict in found if not verdict.what.startswith(("refused", "diverged"))]
    wrong = [verdict for verdict in compared if verdict.what != "equal"]
    signals = Counter(name for verdict in compared for name in verdict.signals)
    moved = sum(len({v.configuration.devices, *(s.devices for s in v.configuration.stops)}) > 1 for v in compared)
    used = [v.configuration.recipe for v in compared]
    refused = sum(verdict.what.startswith("refused") for verdict in found)
    rows = [
        ("configurations compared", len(compared)),
        ("of them with different numbers of processes", moved),
        *((f"interruptions by {name}", count) for name, count in sorted(signals.items())),
        *((f"different names of {key}", len({each[key]["name"] for each in used})) for key in _NAMED),
        *((f"with {n} replicas", sum(each["parallel"]["replicas"] == n for each in used)) for n in (1, 2, 4)),
        ("in bf16", sum(each["device"]["precision"] == "bf16" for each in used)),
        *((f"with `parallel.kind` {k}", sum(each["parallel"]["kind"] == k for each in used)) for k in _KINDS),
        ("drawn as well, but refused with a line, since they combine what can't be", refused),
        ("drawn as well, but their loss diverged", sum(verdict.what == "diverged" for verdict in found)),
        ("ended in other bytes, or in an error", len(wrong)),
    ]
    text = (
        "# Random runs, interrupted and moved\n\nEach configuration is trained on one process without a signal, and "
        "again with signals at\nrandom moments and resumes on other numbers of processes; then checkpoints, metrics "
        f"and charts are\ncompared. {machine()}; made by\n`{command}`.\n\n"
        + markdown(("", ""), [(name, f"{count:,}") for name, count in rows])
        + "\n"
    )
    return text + "".join(f"\n- seed {v.configuration.seed}: {v.what}\n" for v in wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=200, help="how many to compare (200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first (0); the next one's is one more")
    parser.add_argument("--precision", choices=("float32", "bf16"), help="in place of those drawn: one in ten is bf16")
    parser.add_argument("--out", type=Path, help="where to write the page")
    options = parser.parse_args()
    found = []
    for verdict in verdicts(options.configurations, options.seed, options.precision):
        found.append(verdict)
        if verdict.what not in ("equal", "diverged"):
            print(f"seed {verdict.configuration.seed}: {verdict.what}", flush=True)
            if not verdict.what.startswith("refused"):
                print(f"  {verdict.configuration}", flush=True)
        elif len(found) % 20 == 0:
            print(f"{len(found)} drawn", flush=True)
    more = f" --seed {options.seed}" * bool(options.seed)
    more += f" --precision {options.precision}" * bool(options.precision)
    text = page(found, f"python -m benchmarks.exactness.properties --configurations {options.configurations}{more}")
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    if any(verdict.what not in ("equal", "diverged") and not verdict.what.startswith("refused") for verdict in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
