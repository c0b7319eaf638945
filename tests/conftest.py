"""Fixtures of several test files: small real data, and comparing runs byte for byte.

Functions import torch: xdist's controller, which runs no test, also loads this file, before its workers start.
"""

import atexit
import contextlib
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fork_server import draw_nothing
from processes import (  # noqa: F401 - fixtures
    SHARED,
    _namespace,
    _server,
    cli,
    listening,
    namespace,
    one_line,
    server,
    start,
    terminal,
)

CLOCK = ("time", "seconds", "samples_per_second")  # fields of metrics.jsonl that depend on the wall clock


def pytest_configure(config: pytest.Config) -> None:
    """Start the server for processes, if xdist's workers will share it."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput") and not config.option.collectonly:
        stack = contextlib.ExitStack()
        os.environ[SHARED] = str(stack.enter_context(listening()))
        config.add_cleanup(stack.close)


@pytest.fixture(scope="session", autouse=True)
def _draw():
    """Shared fixtures draw no pictures of a run."""
    return draw_nothing()


@pytest.fixture(autouse=True)
def _pictures(request, _draw):
    """Only tests marked `plots` draw them."""
    if "plots" in request.keywords:
        _draw()
    yield
    if "plots" in request.keywords:
        draw_nothing()


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread: tests of two processes don't compete for cores, and bits don't depend on the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quiet():
    from torchrelay.run.terminal import Terminal

    return Terminal(quiet=True)


@pytest.fixture(scope="session")
def digits():
    import torchrelay as tr

    return tr.data.digits()


def forge_manifest(saved: Path, manifest: dict) -> None:
    """Write a manifest with a correct checksum, as a forger would."""
    from torchrelay.checkpoint.format import Manifest

    forged = Manifest.model_validate(manifest)
    forged.checksum = forged.own_checksum()
    (saved / "manifest.json").write_text(forged.model_dump_json())


@pytest.fixture
def forge() -> Callable[[Path, dict], None]:
    return forge_manifest


def metrics_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the clock fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def assert_same_runs(one: Path, other: Path) -> None:
    """Assert that two runs are equal: checkpoints and receipts byte for byte, metrics except for the clock fields."""
    from torchrelay import checkpoint

    mine, others = checkpoint.complete(one / "checkpoints"), checkpoint.complete(other / "checkpoints")
    assert [path.name for path in mine] == [path.name for path in others]
    assert mine
    for a, b in zip(mine, others, strict=True):
        assert {file.name for file in a.iterdir()} == {file.name for file in b.iterdir()}
        for file in sorted(a.iterdir()):
            assert file.read_bytes() == (b / file.name).read_bytes(), f"{file} differs"
    assert metrics_of(one) == metrics_of(other)
    assert (one / "receipt.jsonl").read_bytes() == (other / "receipt.jsonl").read_bytes()


@pytest.fixture
def same_runs() -> Callable[[Path, Path], None]:
    return assert_same_runs


# The files that take longest, as a first come first served order of theirs keeps two workers busy to the end.
LONGEST = (
    "faults/test_processes.py",
    "docs/test_docs.py",
    "test_examples.py",
    "train/test_trainer.py",
    "test_cli.py",
    "faults/test_stops.py",
    "distributed/test_launch.py",
    "report/test_plots.py",
    "benchmarks/test_gpu.py",
    "distributed/test_fsdp.py",
    "distributed/test_fsdp_runs.py",
    "faults/test_input.py",
    "run/test_tensorboard_page.py",
    "faults/test_checkpoints.py",
    "train/test_callbacks.py",
    "distributed/test_exact_runs.py",
    "train/test_any_training.py",
    "faults/test_data.py",
    "train/test_streams.py",
    "faults/test_disk.py",
    "benchmarks/test_benchmarks.py",
    "commands/test_tune.py",
    "commands/test_export.py",
    "report/export/test_export.py",
    "run/test_terminal.py",
    "run/test_plots.py",
    "data/test_folder.py",
    "benchmarks/test_scale.py",
    "distributed/test_process.py",
    "faults/test_hangs.py",
    "benchmarks/test_agreement.py",
    "data/test_batches.py",
    "faults/test_files.py",
    "tasks/test_task.py",
    "data/test_order.py",
    "train/test_recovery.py",
    "models/test_build.py",
    "data/test_cache.py",
    "distributed/test_hosts.py",
    "models/test_convolution.py",
    "commands/test_profile.py",
    "run/test_trackers.py",
    "test_startup.py",
    "models/test_small.py",
    "device/test_allocator.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what has been imported, until the interpreter ends."""
    gc.freeze()
    atexit.register(gc.unfreeze)
