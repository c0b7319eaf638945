"""A run that is killed, or whose call fails, at any of its file-system calls: a sample of them."""

import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="it needs Linux and a C compiler"
)


def crash(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.exactness.crash", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--errors",), ("--power", "--every", "90")])
def test_a_run_resumes_to_the_same_files_after_a_fault_at_every_thirtieth_call(options):
    done = crash("--every", "30", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "or ended without an explanation | 0 |" in done.stdout
