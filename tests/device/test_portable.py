"""Portable runs: the same bytes whatever the processor, the threads and the environment."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchrelay as tr
from torchrelay.device import device as devices
from torchrelay.device.device import DeviceSettings, has_only_avx2, identity_of, set_up
from torchrelay.errors import UsageError
from torchrelay.recipe import recipe
from torchrelay.run.identity import compare
from torchrelay.run.pins import PINS, needs_pins

CPU = torch.device("cpu")
capable = torch.backends.mkl.is_available() and torch.cpu.get_capabilities().get("avx2")
needs_avx2 = pytest.mark.skipif(not capable, reason="portable runs need AVX2 and MKL")
# Everything that the environment could say about kernels and threads, and a portable run must not follow.
OTHER = {
    "OMP_NUM_THREADS": "2",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "AUTO",
}
# What `arithmetic` is on every processor, by the version of torch.
ARITHMETIC = {"2.15.0": "155268096861c3de"}

# The SHA-256 of a checkpoint's tensors after three steps of digits, by the version of torch and the changed keys.
VARIANTS = {
    "small-cnn": (),
    "mlp": ("model.name=mlp", "optimizer.name=adamw"),
}
CHECKPOINTS = {
    ("2.15.0", "small-cnn"): "9244d10b97322a5719519de364a019ee4516ea3c235e2eaff68c96c50da91789",
    ("2.15.0", "mlp"): "52e60cebb080c15cf8e4b10bdd7c89323dbdc6801ce3379f07288cd55342c8d4",
}


def started(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """Start a new interpreter: the pins come before torch."""
    plain = {name: value for name, value in os.environ.items() if name not in OTHER}
    command = [sys.executable, "-m", "torchrelay", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=plain | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen) -> str:
    with process:
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def trained(folder: Path, name: str, *overrides: str, **environment: str) -> subprocess.Popen:
    sets = [f"--set={each}" for each in ("run.epochs=1", "run.max_steps=3", "checkpoint.keep=3", *overrides)]
    return started(folder, "train", "digits", "--run", name, *sets, **environment)


@pytest.mark.ci
@pytest.mark.slow
@needs_avx2
def test_a_portable_run_has_the_same_bytes_whatever_the_environment_says(tmp_path, same_runs):
    runs = [
        trained(tmp_path, "one", "run.portable=true", OMP_NUM_THREADS="1"),
        trained(tmp_path, "other", "run.portable=true", **OTHER),
    ]
    said = [ended(run) for run in runs]
    same_runs(tmp_path / "one", tmp_path / "other")
    (arithmetic,) = {re.search(r"cpu, float32, 1 thread, portable \(arithmetic (\w+)\)", text)[1] for text in said}
    assert arithmetic == ARITHMETIC.get(torch.__version__.partition("+")[0], arithmetic)


@pytest.mark.ci
@pytest.mark.slow
@needs_avx2
@pytest.mark.parametrize("name", VARIANTS)
def test_a_portable_run_ends_in_the_bytes_that_other_processors_have_ended_in(tmp_path, name):
    expected = CHECKPOINTS.get((torch.__version__.partition("+")[0], name))
    if expected is None:
        pytest.skip(f"nothing is recorded for torch {torch.__version__}")
    ended(trained(tmp_path, "run", "run.portable=true", *VARIANTS[name], **OTHER))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    digest = hashlib.sha256()
    for file in ("model.safetensors", "state.safetensors"):
        digest.update((checkpoint / file).read_bytes())
    assert digest.hexdigest() == expected


@needs_avx2
@pytest.mark.slow
def test_other_runs_have_other_bytes_there(tmp_path, same_runs):
    for run in [trained(tmp_path, "one", OMP_NUM_THREADS="1"), trained(tmp_path, "other", **OTHER)]:
        ended(run)
    with pytest.raises(AssertionError, match="differs"):
        same_runs(tmp_path / "one", tmp_path / "other")


@needs_avx2
@pytest.mark.slow
def test_a_portable_run_is_the_same_on_two_processes_and_can_be_resumed_evaluated_and_audited(tmp_path, cli):
    sets = ("run.portable=true", "parallel.replicas=2", "run.epochs=1", "checkpoint.keep=3")
    commands = [
        ("train", "digits", "--run", "one", "--set=run.max_steps=3", *(f"--set={each}" for each in sets)),
        (
            "train",
            "digits",
            "--run",
            "two",
            "--devices=2",
            "--set=run.max_steps=2",
            *(f"--set={each}" for each in sets),
        ),
        ("resume", "two", "--set=run.max_steps=3"),
        ("evaluate", "two"),
        ("audit", "two"),
    ]
    said = []
    for command in commands:
        done = cli(*command, environment=PINS)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert torch.equal(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert "resuming after step 2" in said[2]
    assert "warning" not in said[2]
    assert "equal: 3 of 3 steps" in said[4]


def weights(run: Path) -> torch.Tensor:
    from torchrelay.checkpoint import complete, read

    return torch.cat([tensor.flatten().double() for tensor in read(complete(run / "checkpoints")[-1]).model.values()])


@needs_avx2
@pytest.mark.slow
def test_no_operation_depends_on_the_environment_s_threads_and_the_pins_choose_its_kernels():
    command = [sys.executable, "-m", "benchmarks.exactness.operations"]
    pinned = os.environ | PINS

    def table(environment: dict[str, str], *more: str) -> list[str]:
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    found = table(pinned)
    assert len(found) > 40
    assert table(pinned | {"OMP_NUM_THREADS": "8"}) == found
    # The table can tell kernels apart: other ones give other bits.
    changed = {line for line in table(pinned | OTHER, "--threads", "2") if line not in found}
    assert {"linear", "convolution 3x3", "softmax", "sum of 10^6"} <= {line.partition(":")[0] for line in changed}


@needs_avx2
def test_the_root_of_a_portable_run_is_the_nearest_number_for_all_callers(cli):
    done = cli(
        program="""
        import torch
        from torchrelay.device import portable
        numbers = (torch.arange(1, 40_001) * 7_919 % 16_777_213).float()
        nearest = torch.tensor([number**0.5 for number in numbers.tolist()], dtype=torch.float64).float()
        assert not torch.equal(numbers.sqrt(), nearest), "MKL's root is right here: nothing has to replace it"
        portable.replace_roots()
        into = torch.empty(0)
        torch.sqrt(numbers, out=into)
        for root in (numbers.sqrt(), numbers.clone().sqrt_(), into, *torch._foreach_sqrt([numbers])):
            assert torch.equal(root, nearest)
        assert str(torch.tensor([0.0, -0.0, float("inf"), -1.0]).sqrt()) == "tensor([0., -0., inf, nan])"
        assert torch.tensor([4, 9]).sqrt().tolist() == [2.0, 3.0]
        weight = torch.tensor([4.0], requires_grad=True)
        weight.sqrt().backward()
        assert weight.grad == 0.25
        """
    )
    assert done.returncode == 0, done.stderr


@needs_avx2
@pytest.mark.slow
def test_the_page_of_portable_bits_names_the_operations_that_depend_on_threads(tmp_path):
    command = [sys.executable, "-m", "benchmarks.exactness.portable", "--quick", "--out", tmp_path / "page.md"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (tmp_path / "page.md").read_text().splitlines()
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in lines if row.startswith("| ")}
    assert rows["sum of 10^6"][0] == "**other**"
    assert rows["linear, forward"][0] == "same"


# ------------------------------------------------------------------------------------------------ another processor


def on_other_processor(monkeypatch) -> None:
    other = {**torch.cpu.get_capabilities(), "cpu_name": "Another Processor", "avx512_f": True, "amx_bf16": True}
    monkeypatch.setattr(devices, "_capabilities", lambda: other)


def test_a_portable_run_goes_on_on_another_processor_without_a_warning(monkeypatch):
    before = [identity_of(CPU, is_portable=portable) for portable in (True, False)]
    on_other_processor(monkeypatch)
    after = [identity_of(CPU, is_portable=portable) for portable in (True, False)]
    assert compare(before[0], after[0], accept_changes=False) == []
    (named, _) = compare(before[1], after[1], accept_changes=False)
    assert "Another Processor" in named


def test_a_processor_whose_arithmetic_differs_is_named_at_a_resume():
    here = identity_of(CPU, is_portable=True)
    (warning,) = compare(here | {"arithmetic": "0123456789abcdef"}, here, accept_changes=False)
    assert "arithmetic was 0123456789abcdef and is " in warning


def test_the_pins_bring_the_kernel_that_corrupts_memory_to_processors_with_avx512(monkeypatch):
    on_other_processor(monkeypatch)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert not has_only_avx2()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", PINS["ONEDNN_MAX_CPU_ISA"])
    assert has_only_avx2() == bool(torch.cpu.get_capabilities().get("avx2"))


# ------------------------------------------------------------------------------------------------ what is refused


@needs_avx2
def test_from_python_a_portable_run_without_the_pins_says_which_to_set(monkeypatch, digits, quiet):
    monkeypatch.delenv("MKL_CBWR", raising=False)
    with pytest.raises(UsageError, match="ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=AVX2 python"):
        tr.Trainer(nn.Flatten(), *digits, settings=tr.RunSettings(portable=True), terminal=quiet)


@needs_avx2
def test_pins_that_come_after_the_first_product_are_refused(monkeypatch):
    torch.ones(64, 64) @ torch.ones(64, 64)
    for name, value in PINS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="before torch is imported"):
        set_up(DeviceSettings(), exact=True, is_portable=True)


def test_a_device_that_is_set_up_for_other_bits_is_refused(digits, quiet):
    settings = tr.RunSettings(portable=True)
    with pytest.raises(UsageError, match="no Device"):
        tr.Trainer(nn.Flatten(), *digits, settings=settings, terminal=quiet, device=set_up(DeviceSettings(), True))


@pytest.mark.parametrize(
    ("settings", "exact", "says"),
    [
        ({}, False, "set run.exact=true"),
        ({"precision": "bf16"}, True, "set device.precision=float32"),
        ({"threads": 2}, True, r"set device.threads=1 \(more cores are used by --devices\)"),
        ({"compile": True}, True, "set device.compile=false"),
    ],
)
def test_settings_by_which_bits_depend_on_the_machine_are_refused(settings, exact, says):
    with pytest.raises(UsageError, match=says):
        set_up(DeviceSettings(name="cpu", **settings), exact, is_portable=True)


def test_on_the_command_line_a_refusal_is_a_usage_error(cli, one_line):
    sets = ("run.portable=true", "device.precision=bf16")
    done = cli("train", "digits", sets=sets)
    one_line(done, "run.portable can't hold with these settings: set device.precision=float32", code=2)


# ------------------------------------------------------------------------------------------------ recipes


def test_a_recipe_that_is_not_portable_has_no_such_key_in_its_record():
    for overrides in ((), ("run.portable=false",)):
        table = recipe.load("digits", overrides).model_dump(mode="json", exclude_none=True)
        assert "portable" not in table["run"]
    assert recipe.load("digits", ["run.portable=true"]).model_dump(exclude_none=True)["run"]["portable"] is True


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("[run]\nportable = true", (), True),
        ("[run]\nportable = true", ("run.portable=false",), False),
        ("[run]\nportable = false", ("run.portable = True",), True),
        ("[run]\nseed = 1", ("run.seed=2",), False),
        ("run = 3", (), False),
        ("[run", (), False),
        ("[run]\nportable = 'true'", (), False),
        (None, ("run.portable=true",), True),
        (None, (), False),
    ],
)
def test_whether_pins_are_needed_is_known_without_torch(tmp_path, text, overrides, expected):
    file = tmp_path / "recipe.toml"
    if text is not None:
        file.write_text(text)
    assert needs_pins(file, overrides) is expected
