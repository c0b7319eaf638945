"""Memory that is kept isn't touched for the first time again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from torchrelay.device.private import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(12):  # at first the heap grows
    torch.zeros(2**26, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str, **environment: str) -> list[str]:
    """Return what the function said, and how many pages were touched for the first time in ten blocks of 64 MiB."""
    command = [sys.executable, "-c", PROGRAM, what]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_kept():
    told, count = faults("keep")
    assert told == "True"
    assert int(count) < 100
    assert int(faults("as it comes")[1]) > 1000  # or this test shows nothing


@pytest.mark.parametrize(
    "tuned", [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_the_environment_has_the_last_word(tuned):
    told, count = faults("keep", **tuned)
    assert told == "False"
    assert int(count) > 1000
