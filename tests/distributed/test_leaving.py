"""How the processes of a group exit."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from torchrelay.distributed.process_group import init_process_group

torch.set_num_threads(1)
group = init_process_group(torch.device("cpu"))
for _ in range(20):
    group.barrier("nothing")
"""


@pytest.mark.slow
def test_processes_on_one_core_exit_without_an_abort(tmp_path):
    """Gloo's threads finish late there: without an ordered exit, most such runs abort."""
    (tmp_path / "script.py").write_text(SCRIPT)
    core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, core),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
