"""SLURM's variables translated to torch's, and the cluster scripts, run with a substitute for `srun`."""

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from torchrelay import checkpoint
from torchrelay.distributed.process import expand_hosts, from_slurm

SCRIPTS = Path(__file__).parents[2] / "examples" / "clusters"
TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SETTINGS = (
    *("device.name=cpu", "parallel.replicas=2", "run.epochs=4", 'checkpoint.every="3 steps"'),
    "model.options.widths=[4,8]",
)

# Like SLURM's `srun`: it starts the tasks with their variables and exits with their highest exit code.
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys

command = [word for word in sys.argv[1:]]
while command[0].startswith("-"):
    del command[0]
tasks = []
for number in range(int(os.environ["TASKS"])):
    own = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_STEP_ID": "0"}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
for name in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(name, lambda got, frame: [task.send_signal(got) for task in tasks])
open("tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(code if code >= 0 else 128 - code for code in (task.wait() for task in tasks)))
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) echo localhost ;;
*) echo "$@" >>scontrol ;;
esac
"""


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
        ("a-1.example.org,b-[9-10]-ib", ["a-1.example.org", "b-9-ib", "b-10-ib"]),
    ],
)
def test_slurm_host_lists_are_expanded(text, hosts):
    assert expand_hosts(text) == hosts


def test_a_task_gets_its_rank_and_world_size():
    found = from_slurm(TASK)
    assert found.pop("MASTER_PORT") == str(10_000 + 31 * 1234 % 20_000)
    places = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert found == {**places, "MASTER_ADDR": "gpu07"}


def test_steps_of_one_job_use_different_ports():
    ports = {from_slurm({**TASK, "SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(20)}
    assert len(ports) == 20
    assert all(10_000 <= int(port) < 30_000 for port in ports)


def test_the_step_and_not_the_job_sets_the_world_size():
    """`srun -n2 -w gpu09` in a job of eight."""
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "gpu09",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
    }
    found = from_slurm({**TASK, **step})
    assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("2", "2", "gpu09")


def test_user_settings_of_the_rendezvous_are_kept():
    found = from_slurm({**TASK, "MASTER_ADDR": "head.example.org", "MASTER_PORT": "29500"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("head.example.org", "29500")


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0"},  # torchrun, started by srun
        {"SLURM_NTASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": None, "ENVIRONMENT": "BATCH"},  # the batch script itself
        {"SLURM_PROCID": None},
    ],
)
def test_single_tasks_and_existing_settings_are_left_alone(changes):
    changed = {key: value for key, value in (TASK | changes).items() if value is not None}
    assert from_slurm(changed) == {}


# ------------------------------------------------------------------------------------------------ whole jobs


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.complete(run / "checkpoints")]


def test_a_requeued_job_resumes_to_the_same_bytes(start, cli, tmp_path, same_runs, one_line):
    """Two tasks; SIGUSR1 reaches one of them."""
    run = tmp_path / "run"
    job = {name: TASK[name] for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")}
    job |= {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "localhost", "SLURM_TASKS_PER_NODE": "2"}
    command = ("train", "digits", "--run", run)

    def tasks(**more: str) -> list:
        return [
            start(
                *command,
                sets=SETTINGS,
                environment=job | more | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            )
            for rank in range(2)
        ]

    first = tasks()
    first[0].until(lambda: max(steps(run), default=0) >= 6)
    first[1].send(signal.SIGUSR1)
    assert [task.done().returncode for task in first] == [75, 75]
    stopped = steps(run)[-1]
    refused = [task.done() for task in tasks()]  # the same job may not start it twice
    one_line(refused[0], f"{run} holds a run already", code=2)
    second = [task.done() for task in tasks(SLURM_RESTART_COUNT="1")]
    assert [task.returncode for task in second] == [0, 0], second[0].stderr + second[1].stderr
    assert f"resuming after step {stopped} of 92" in second[0].stdout
    assert second[1].stdout == ""
    assert cli("train", "digits", "--run", "undisturbed", sets=SETTINGS).returncode == 0
    same_runs(run, tmp_path / "undisturbed")


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a batch script on a cluster of one host."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "torchrelay",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
    }
    return {**os.environ, **job, "PATH": path, "OMP_NUM_THREADS": "1", "RUN_FOLDER": "run"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "tasks", "asked", "code"),
    [("slurm-srun.sbatch", 2, signal.SIGUSR1, 75), ("slurm-torchrun.sbatch", 1, signal.SIGUSR1, 1)],
)
def test_the_scripts_stop_requeue_and_resume(cluster, cli, tmp_path, same_runs, script, tasks, asked, code):
    run = tmp_path / "run"
    cluster |= {"TASKS": str(tasks), "SLURM_NTASKS": str(tasks), "DEVICES": "2", "SLURM_TASKS_PER_NODE": str(tasks)}
    more = [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["bash", SCRIPTS / script, "digits", *more]
    with subprocess.Popen(command, cwd=tmp_path, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        while max(steps(run), default=0) < 6:
            assert job.poll() is None, job.communicate()
        if script == "slurm-srun.sbatch":  # SLURM signals the tasks, and `B:` the script
            os.kill(int((tmp_path / "tasks").read_text().split()[1]), asked)
        else:
            job.send_signal(asked)
        errors = job.communicate(timeout=60)[1].decode()
    assert job.returncode == code, errors
    assert (tmp_path / "scontrol").read_text() == "requeue 1234\n"
    stopped = re.search(r"stopped by [\w ]+ after step (\d+), saved", errors)
    assert stopped, errors
    again = cluster | {"SLURM_RESTART_COUNT": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=again, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {stopped[1]} of 92" in done.stdout
    assert cli("train", "digits", "--run", "undisturbed", sets=SETTINGS).returncode == 0
    same_runs(run, tmp_path / "undisturbed")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.name)
def test_the_scripts_have_valid_bash_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
