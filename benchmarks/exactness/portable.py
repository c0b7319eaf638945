"""Compare a table of operations over threads, kernels and emulated processors with a portable run's bits.

    python -m benchmarks.exactness.portable [--quick] [--emulate MODEL…] [--out docs/evidence/portable.md]

Each setting is a process of its own. Models of processors, such as Haswell and EPYC-Milan, are emulated by QEMU
(Debian: apt install qemu-user), which has no AVX-512; emulated, a part of the table takes minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import machine
from benchmarks.page import markdown
from torchrelay.run.pins import PINS

Table = dict[str, str]  # the hash of each operation's result
# What a portable run fixes, changed one at a time: a head for the column, variables and threads.
SETTINGS: Mapping[str, tuple[Mapping[str, str | None], int]] = {
    "2 threads": ({}, 2),
    "8 threads": ({}, 8),
    "PyTorch: no AVX": ({"ATEN_CPU_CAPABILITY": "default"}, 1),
    "oneDNN: SSE4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, 1),
    "MKL unpinned": ({"MKL_CBWR": None}, 1),
}
# On a processor with AVX-512, what each library computes there if it isn't pinned.
WITH_AVX512: Mapping[str, tuple[Mapping[str, str | None], int]] = {
    "PyTorch: AVX-512": ({"ATEN_CPU_CAPABILITY": "avx512"}, 1),
    "oneDNN: AVX-512": ({"ONEDNN_MAX_CPU_ISA": None}, 1),
    "nothing pinned": (dict.fromkeys(PINS), 1),
}
COST = ("recipe", "as usual", "portable", "times")
_AT_ONCE = 6  # processes


def table(changes: Mapping[str, str | None], threads: int, quick: bool, start: Sequence[str] = (), *more: str) -> Table:
    """Return the hashes of a process with the pins, but for some changes; `start` is a command that starts Python."""
    wanted: dict[str, str | None] = {**os.environ, **PINS, **changes}
    environment = {name: value for name, value in wanted.items() if value is not None}
    command = [*start, sys.executable, "-m", "benchmarks.exactness.operations", f"--threads={threads}", *more]
    done = subprocess.run(
        [*command, *["--quick"] * quick], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    found: Table = {}
    for line in done.stdout.splitlines():
        name, _, results = line.partition(": ")
        if results:  # else it crashed there
            found |= {f"{name}, {part}".removesuffix(", "): mark for part, mark in json.loads(results).items()}
    return found


def compared(found: Table, reference: Table, name: str) -> str:
    if name not in found:
        return "not run"
    return "same" if found[name] == reference[name] else "**other**"


def has_avx512() -> bool:
    """Return whether this processor has AVX-512."""
    import torch

    return bool(torch.cpu.get_capabilities().get("avx512_f"))


def emulated(pinned: Table, plain: Table, reference: Table) -> Iterator[str]:
    """Yield how much of the table an emulated processor has in common with this one, with the pins and without."""
    for found in (pinned, plain):
        differing = [name for name in found if found[name] != reference[name]]
        yield f"{len(found) - len(differing)} of {len(found)}"
        yield ", ".join(differing) or "none"


STEPS = """\
import sys, time
from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer
from torchrelay.run.terminal import Terminal
name, *overrides = sys.argv[1:]
trainer = build_trainer(recipe.load(name, overrides), terminal=Terminal(quiet=True))
trainer.model.train()
batches = [batch for batch, _ in zip(trainer.batches.epoch(0), range(20))]
times = []
for step, batch in enumerate(batches):
    began = time.process_time()
    trainer.train_step.step(batch, step)
    times.append(time.process_time() - began)
print(min(times))
"""


def cost(name: str, *overrides: str) -> tuple[str, ...]:
    """Return a row with the milliseconds of the processor that a step takes at best: as usual, and portable."""
    found = []
    for changes, more in ((dict.fromkeys(PINS), ["device.threads=1"]), (PINS, ["run.portable=true"])):
        environment = {key: value for key, value in {**os.environ, **changes}.items() if value is not None}
        command = [sys.executable, "-c", STEPS, name, *overrides, *more]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found.append(1000 * float(done.stdout.split()[-1]))
    return (" ".join([name, *overrides]), *(f"{each:.1f} ms" for each in found), f"{found[1] / found[0]:.2f}")


PAGE = """\
# Portable bits

Which operations have the same bits, compared with a portable run's: the pins of `run.portable`, one thread, and its own
square root. Columns change one thing at a time; "other" names a kernel that the setting chooses.

Made by `{command}` on {machine}.

{table}

What a step costs on one thread, in the processor's time, the best of 20 steps:

{costs}

{emulated}"""
EMULATED = """\
The first operations of the table on processors that QEMU emulates on the same machine; Haswell and Skylake-Server are
Intel's. QEMU has no AVX-512, so its Skylake-Server has none either. No real processor of Intel's was tried.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer operations: only to check that it runs")
    parser.add_argument("--emulate", nargs="+", default=[], metavar="MODEL", help="processors that QEMU emulates")
    parser.add_argument("--out", type=Path, help="write the page to this file")
    options = parser.parse_args()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        settings = {**SETTINGS, **(WITH_AVX512 if has_avx512() else {})}
        found = {name: pool.submit(table, *setting, options.quick, (), "--roots") for name, setting in settings.items()}
        found |= {"PyTorch's root": pool.submit(table, {}, 1, options.quick)}
        here = pool.submit(table, {}, 1, options.quick, (), "--roots")
        starts = {model: ("qemu-x86_64", "-cpu", model) for model in options.emulate}
        there = {
            model: (
                pool.submit(table, {}, 1, True, start, "--roots"),
                pool.submit(table, dict.fromkeys(PINS), 1, True, start),
            )
            for model, start in starts.items()
        }
    costs = [cost("digits"), cost("digits", "model.name=mlp"), cost("digits", "optimizer.name=adamw")]
    reference = here.result()
    columns = {name: each.result() for name, each in found.items()}
    rows = [(name, *(compared(column, reference, name) for column in columns.values())) for name in reference]
    lines = [(model, *emulated(pinned.result(), plain.result(), reference)) for model, (pinned, plain) in there.items()]
    heads = ("processor", "portable: same", "other", "without pins: same", "other")
    others = EMULATED.format(table=markdown(heads, lines)) if lines else ""
    command = " ".join(["python -m benchmarks.exactness.portable", *["--quick"] * options.quick])
    command += " --emulate " * bool(options.emulate) + " ".join(options.emulate)
    text = PAGE.format(
        costs=markdown(COST, costs),
        command=command,
        machine=machine(),
        table=markdown(("", *columns), rows),
        emulated=others,
    )
    print(text)
    if options.out is not None:
        options.out.write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
