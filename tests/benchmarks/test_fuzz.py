"""Readers take damaged inputs or refuse them with a line; and the program that checks it catches planted defects."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited as Linux does it")
if sys.platform.startswith("linux"):
    from benchmarks.exactness import fuzz
    from benchmarks.exactness.targets import TARGETS
    from torchrelay.errors import RelayError

INPUTS = 80


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_input_is_taken_or_refused_with_a_line(name, tmp_path):
    target = TARGETS[name](tmp_path / "files")
    first = len(target.corpus) + len(target.whole)  # the bombs take seconds
    ended = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of decoders
        for number in (*range(len(target.corpus)), *range(first, first + INPUTS)):
            found, where = fuzz.try_one(target, fuzz.input_of(name, target, 1, number))
            assert found in ("taken", "refused"), f"{found} in {where}: --only {name} --seed 1 --input {number}"
            ended.add(found)
    target.close()
    # A damaged cache is made again.
    assert ended == {"taken"} | ({"refused"} if name != "cache" else set()), (
        "the inputs don't reach the reader, or never harm it"
    )


def crash() -> None:
    faulthandler.disable()  # pytest's would print the stack
    os.kill(os.getpid(), signal.SIGSEGV)


PLANTED = {
    "KeyError": lambda folder: {}["step"],
    "more than 0.3 s": lambda folder: time.sleep(5),
    "more than 0.3 s, in a loop": lambda folder: all(True for _ in iter(int, 1)),
    "memory": lambda folder: b"1" * (2**31 + 2**28),
    "Forbidden: an input ran code": lambda folder: subprocess.run(["true"], check=True),
    "Forbidden: an input ran code: eval": lambda folder: eval("[].append(1)", {}),  # noqa: S307
    "Forbidden: an input wrote a file": lambda folder: (folder / ".." / ".." / "elsewhere").write_text("x"),
    "the process ended with -11": lambda folder: crash(),
    "an unprintable message": lambda folder: (_ for _ in ()).throw(RelayError("")),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_defect_is_caught_with_its_input(what, monkeypatch):
    if "0.3" in what:
        monkeypatch.setattr(fuzz, "SECONDS", 0.3)

    def make(folder: Path) -> fuzz.Target:
        folder.mkdir()

        def feed(data: bytes) -> object:
            return PLANTED[what](folder) if data == b"bad" else data

        return fuzz.Target(feed, [b"good", b"good"], whole=[b"bad"])

    outcome = fuzz.fuzz(make, "planted", 6)
    (finding,) = outcome.findings
    assert finding.number == 2
    assert finding.what.startswith(what.partition(", in")[0].partition(": eval")[0])
    assert outcome.taken + outcome.refused == 5
    assert f"--only planted --seed 0 --input {finding.number}" in fuzz.page([outcome], 0, "…")


def test_an_input_follows_from_the_seed_and_its_number(tmp_path):
    target = TARGETS["set"](tmp_path / "files")
    target.close()
    inputs = [fuzz.input_of("set", target, 3, number) for number in range(200)]
    assert inputs == [fuzz.input_of("set", target, 3, number) for number in range(200)]
    assert inputs[150:] != [fuzz.input_of("set", target, 4, number) for number in range(150, 200)]
