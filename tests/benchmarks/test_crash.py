"""A run that is killed, or whose call fails, at any of its file-system calls: a sample of them."""

import shutil
import subprocess
import sys

import pytest

from benchmarks.exactness.crash import Attack, Point
from benchmarks.exactness.subjects import Subject

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="it needs Linux and a C compiler"
)


def crash(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.exactness.crash", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


@pytest.mark.slow
def test_files_are_the_same_after_a_fault_at_every_sixtieth_call_and_each_error_has_a_reason():
    done = crash("--every", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| run |", "| cache |", "| export |"))]
    assert len(rows) == 9
    assert all(row.endswith("| 0 |") for row in rows)


@pytest.mark.parametrize(
    ("said", "ended", "is_explained"),
    [
        ("error: can't write /tmp/run/log.txt: Input/output error\n", 1, True),
        ("error: Input/output error\n", 1, False),
        ("Traceback\nOSError: /tmp/run/log.txt\n", 1, False),
        ("", 0, False),
        ("warning: /tmp/run/model.txt can't be written\n", 0, True),
    ],
)
def test_an_error_counts_as_explained_with_one_line_that_names_the_file(said, ended, is_explained, tmp_path):
    subject = Subject(lambda _: 0, lambda *_: [], "mkdir /logs")
    attack = Attack(subject, "error", tmp_path / "run")
    assert attack._is_explained(Point("open64 /log.txt", ended, said, [])) is is_explained
    assert attack._is_explained(Point("mkdir /logs", 0, "", []))
