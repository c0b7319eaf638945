"""Processes started by torchrelay and torchrun: which one prints, where the others log, what is refused."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from torchrelay import checkpoint
from torchrelay.distributed import launch, process
from torchrelay.distributed.failures import LaunchError
from torchrelay.errors import UsageError

NARROW = "model.options.widths=[4,8]"  # the recipe's network, with fewer channels
TWO = ("device.name=cpu", "parallel.replicas=2", "run.epochs=2", NARROW)
TORCHRUN = ["--standalone", "--nproc-per-node=2"]

CODE = """
import os
import sys

from torchrelay.models.small import small_cnn


def own(classes, channels=1, image_size=8):
    return small_cnn(classes, channels, widths=(4, 8))


print("rank", os.environ.get("RANK", "none"), "speaks")
print("and is heard", file=sys.stderr)
"""

JOINS = """
import sys

import torch
import torch.distributed as dist

import torchrelay as tr

dist.init_process_group("gloo", init_method=sys.argv[2], rank=int(sys.argv[3]), world_size=2)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Dropout(0.1))
tr.Trainer(net, *tr.data.digits(), epochs=2, device="cpu", run=sys.argv[1]).fit()
"""

SCRIPT = """
import sys

import torch

import torchrelay as tr
from torchrelay.distributed.replicas import ParallelSettings

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.Dropout(0.1))
train, test = tr.data.digits()
found = tr.Trainer(
    net, train, test, epochs=2, device="cpu", parallel=ParallelSettings(replicas=2), run=sys.argv[1]
).fit()
assert set(found) >= {"loss", "accuracy"}
"""


@pytest.fixture(scope="module")
def alone(_server, tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    done = _server.start("train", "digits", "--run", folder / "run", folder=folder, sets=TWO).done()
    assert done.returncode == 0, done.stderr
    return folder / "run"


def pair(start, *arguments, environment=None, **options) -> list:
    """Two processes with a rendezvous from the environment, as any launcher may start them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    own = [(environment or {}) | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [start(*arguments, environment=each, **options) for each in own]


# ------------------------------------------------------------------------------------------------ --devices


@pytest.mark.parametrize("forks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_only_rank_0_prints(cli, tmp_path, alone, same_runs, forks):
    """In a folder that the launcher names, with a shell-safe name; nothing is left behind."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    sets = (*TWO, "data.root=a ${rank} $HOME")  # torch would fill in such names
    done = cli("train", "digits", "--devices=2", sets=sets, forks=forks, environment={"TMPDIR": str(temporary)})
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "train accuracy" in line] == [
        "epoch 1",
        "epoch 2",
    ]
    assert done.stdout.count("the run is in") == 1
    assert not (run / "logs").exists()  # no rank printed anything
    same_runs(run, alone)
    assert not list(temporary.glob("torchrelay-*"))


def test_other_ranks_log_to_files_and_one_process_resumes_and_evaluates(cli, tmp_path, alone, same_runs):
    (tmp_path / "own.py").write_text(CODE)
    sets = ("device.name=cpu", "parallel.replicas=2", "model.name=own", "run.epochs=2", "run.max_steps=30")
    command = ("--code=own.py", "--devices=2")
    done = cli("train", "digits", "--run=run", *command, sets=sets)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("speaks"), done.stderr) == (1, "and is heard\n")
    assert done.stdout.startswith("rank 0 speaks\n")
    assert sorted(path.name for path in (tmp_path / "run/logs").iterdir()) == ["rank-1.log"]
    assert sorted((tmp_path / "run/logs/rank-1.log").read_text().splitlines()) == ["and is heard", "rank 1 speaks"]

    done = cli("resume", "run", *command, sets=["run.max_steps=46"])
    assert done.returncode == 0, done.stderr
    assert "resuming after step 30 of 46" in done.stdout
    weights = [checkpoint.find(run / "checkpoints", "last") / "model.safetensors" for run in (tmp_path / "run", alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    found = [cli("evaluate", "run", "--code=own.py", "--json", *more) for more in ((), ("--devices=2",))]
    assert [done.returncode for done in found] == [0, 0], found[1].stderr
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in found)
    assert one == two
    assert one["test"]["samples"] == 359


def test_quiet_prints_nothing_and_a_slow_shutdown_is_cut_short(start, tmp_path, one_line):
    run = tmp_path / "run"
    more = ("--quiet", "--shutdown-timeout=0.5")
    launcher = start("train", "digits", "--run", run, "--devices=2", *more, sets=(*TWO, "run.epochs=400"))
    launcher.until(lambda: len(checkpoint.complete(run / "checkpoints")) > 1)
    children = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    # A rank has a session of its own; another child forks them, and process ids may have started again from 1.
    os.kill(next(pid for pid in children if os.getsid(pid) == pid), signal.SIGSTOP)
    launcher.send(signal.SIGTERM)
    asked = time.monotonic()
    done = launcher.done(20)
    assert time.monotonic() - asked < 10
    assert done.stdout == ""
    one_line(done, "had not ended 0.5 s after SIGTERM and were killed", "--shutdown-timeout gives them longer")


def test_a_traceback_is_shown_on_request(cli, tmp_path):
    sets = ("device.name=cpu", "parallel.replicas=2", "model.name=squeezenet1_1", "model.pretrained=true")
    done = cli("train", "digits", "--run=run", "--devices=2", "--debug", sets=sets)
    assert done.returncode in (1, 2)
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("error: ")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "settings", "environment", "says"),
    [
        (["--devices=2"], TWO, {"RANK": "0", "WORLD_SIZE": "4"}, "--devices 2: this is one of 4 processes already"),
        (["--devices=0"], TWO, {}, "'0' isn't a whole number of at least 1"),
        (["--devices=two"], TWO, {}, "'two' isn't a whole number of at least 1"),
        (["--devices=2", "--restarts=-1"], TWO, {}, "'-1' isn't a whole number of at least 0"),
        (["--devices=2", "--port=70000"], TWO, {}, "--port 70000: a port is a number from 1 to 65535"),
        (["--devices=3"], TWO, {}, "3 devices can't share a run of 2 replicas: resume it with 1 or 2"),
        (["--devices=3"], ["device.name=cpu"], {}, "over 3 devices: use 2 or 4, or --set run.exact=false"),
        (["--devices=2"], ["device.name=mps"], {}, "--devices 2: device.name 'mps' is one device"),
    ],
)
def test_an_impossible_launch_is_refused(cli, tmp_path, one_line, arguments, settings, environment, says):
    done = cli("train", "digits", "--run=run", *arguments, sets=settings, environment=environment)
    one_line(done, says, code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "visible"), [("cuda", 2), ("auto", 2), ("cuda", 0)])
def test_more_devices_than_available_are_refused(monkeypatch, name, visible):
    """PyTorch counts the devices in CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if visible:
        launch.check_devices(name, 2)
    with pytest.raises(UsageError, match=f"--devices 4: PyTorch sees {visible} CUDA devices here: ask for fewer, or"):
        launch.check_devices(name, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_hidden_devices_do_not_count(cli, one_line):
    done = cli("train", "digits", "--devices=1000", environment={"CUDA_VISIBLE_DEVICES": "0"})
    one_line(done, "PyTorch sees 1 CUDA device here", code=2)
    done = cli("train", "digits", "--devices=2", environment={"CUDA_VISIBLE_DEVICES": ""}, sets=["device.name=cuda"])
    one_line(done, "PyTorch sees 0 CUDA devices here", code=2)


# ------------------------------------------------------------------------------------------------ other launchers


def test_a_user_script_runs_on_two_processes(start, tmp_path, same_runs):
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    assert start("one", script=script).done().returncode == 0
    first, second = (process.done() for process in pair(start, "two", script=script))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "epoch 2" in first.stdout
    assert (second.stdout, second.stderr) == ("", "")
    same_runs(tmp_path / "one", tmp_path / "two")


def test_a_script_may_initialize_the_process_group_itself(start, tmp_path, same_runs):
    (tmp_path / "own.py").write_text(SCRIPT)
    (tmp_path / "joins.py").write_text(JOINS)
    assert start("one", script=tmp_path / "own.py").done().returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    both = [start("two", meeting, str(rank), script=tmp_path / "joins.py") for rank in range(2)]
    first, second = (process.done() for process in both)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "in 2 replicas: it can continue on 1 or 2 devices" in first.stdout
    assert second.stdout == ""
    same_runs(tmp_path / "one", tmp_path / "two")


def test_a_restart_on_fewer_devices_keeps_the_number_of_replicas(start, tmp_path, alone, same_runs):
    command, sets = ("train", "digits", "--run=run"), ("device.name=cpu", "run.epochs=2", NARROW)
    launch = {"TORCHELASTIC_RUN_ID": "mine"}
    both = pair(start, *command, sets=(*sets, "run.max_steps=30"), environment=launch)
    assert [process.done().returncode for process in both] == [0, 0]
    done = start(*command, sets=sets, environment=launch).done()
    assert done.returncode == 0, done.stderr
    assert "resuming after step 30 of 46" in done.stdout
    last = [checkpoint.find(run / "checkpoints", "last") / "model.safetensors" for run in (tmp_path / "run", alone)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_torch_distributed_launch_starts_a_training(start):
    former = ("--nproc_per_node=2", "-m", "torchrelay", "train", "digits", "--set=run.max_steps=3", f"--set={NARROW}")
    done = start(*former, module="torch.distributed.launch", forks=True).done()
    assert done.returncode == 0, done.stderr
    assert "in 2 replicas" in done.stdout


@pytest.mark.parametrize("which", ["module", pytest.param("script", marks=pytest.mark.slow)])
def test_torchrun_starts_a_script_and_the_command(start, tmp_path, alone, same_runs, which):
    """`--run` needs `--` before torchrelay, since torchrun would parse it."""
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    sets = [f"--set={setting}" for setting in TWO]
    what = ["-m", "torchrelay", "train", "digits", *sets] if which == "module" else [str(script), "run"]
    done = start(*TORCHRUN, *what, module="torch.distributed.run", forks=which == "module").done()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train accuracy") == 2
    assert done.stderr == ""
    if which == "module":
        (run,) = (tmp_path / "runs").iterdir()
        same_runs(run, alone)


# ------------------------------------------------------------------------------------------------ started again


@pytest.fixture
def environment(monkeypatch):
    """Set a launcher's variables, and remove those of others."""
    for name in [*os.environ]:
        if name.startswith(("TORCHELASTIC", "SLURM", "RANK", "TORCHRELAY")):
            monkeypatch.delenv(name)

    def change(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("first", "again", "other"),
    [
        ({"TORCHELASTIC_RUN_ID": "mine"}, {}, {"TORCHELASTIC_RUN_ID": "other"}),
        ({"TORCHELASTIC_RUN_ID": "none"}, {"TORCHELASTIC_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "0"}),
        ({"SLURM_JOB_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_RESTART_COUNT": "0"}),
        ({"SLURM_JOB_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "2", "SLURM_RESTART_COUNT": "1"}),
    ],
)
def test_a_relaunch_recognizes_its_run(environment, tmp_path, first, again, other):
    environment(**first)
    assert not process.is_restart(tmp_path)
    process.record_launch(tmp_path)
    assert not process.is_restart(tmp_path)  # there is no run yet
    (tmp_path / "recipe.toml").touch()
    environment(**again)
    assert process.is_restart(tmp_path)
    environment(**other)
    assert not process.is_restart(tmp_path)


def test_a_run_without_a_launcher_belongs_to_no_launch(environment, tmp_path):
    process.record_launch(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "recipe.toml").touch()
    environment(TORCHELASTIC_RUN_ID="mine")
    process.record_launch(tmp_path)  # too late: the folder holds a run
    assert not process.is_restart(tmp_path)
    for text in ("", "no JSON", '{"run_id": 3}'):
        (tmp_path / "elastic.json").write_text(text)
        assert not process.is_restart(tmp_path)


def test_a_signal_that_comes_before_the_processes_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "_run_agent", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(LaunchError, match="stopped by SIGTERM before training began") as found:
        launch.start(["train", "digits"], 2, tmp_path / "run")
    assert found.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "run").exists()
