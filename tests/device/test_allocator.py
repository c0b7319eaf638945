"""Freed memory that the allocator keeps causes no new page faults."""

import sys
from collections.abc import Callable

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


@pytest.fixture
def faults(start, tmp_path) -> Callable[..., list[str]]:
    """Return the function's result, and the page faults of ten blocks of 64 MiB."""

    def count(what: str, **environment: str) -> list[str]:
        (tmp_path / "program.py").write_text(PROGRAM)
        done = start(what, script=tmp_path / "program.py", environment=environment).done()
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_reused_without_page_faults(faults):
    told, count = faults("keep")
    assert told == "True"
    assert int(count) < 100
    assert int(faults("as it comes")[1]) > 1000  # or this test shows nothing


@pytest.mark.parametrize(
    "tuned", [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_environment_variables_override_the_allocator_settings(faults, tuned):
    told, count = faults("keep", **tuned)
    assert told == "False"
    assert int(count) > 1000
