"""Lazy imports: the command line starts fast, and no unused library is loaded."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

OPTIONAL = ("torchvision", "timm", "tensorboard", "matplotlib", "torchmetrics", "sklearn", "scipy", "pandas")
DISTRIBUTED = ("torch.distributed.fsdp", "torch.distributed.tensor")


def loaded_by(statements: str) -> set[str]:
    """Return the modules that a new process has loaded after some statements."""
    script = f"{statements}\nimport sys\nprint('loaded:', *sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    return set(found.stdout.rpartition("loaded: ")[2].split())


@pytest.fixture
def newly_loaded(cli) -> Callable[[str], set[str]]:
    """Return the modules of a process that has imported torch, and no library of `OPTIONAL`, after some statements."""

    def loaded(statements: str) -> set[str]:
        forgotten = ("torchrelay", *OPTIONAL, *DISTRIBUTED)
        start = f"import sys; from forked import forget; forget(*{forgotten})"
        done = cli(program=f"{start}\n{statements}\nprint('loaded:', *sys.modules)")
        assert done.returncode == 0, done.stderr
        return set(done.stdout.rpartition("loaded: ")[2].split())

    return loaded


@pytest.mark.parametrize("arguments", ["--help", "--version", "recipes", "train --help", "tune --help"])
def test_help_and_recipes_do_not_import_torch_pydantic_or_rich(arguments):
    command = f"from torchrelay.cli import main\ntry:\n    main({arguments.split()})\nexcept SystemExit:\n    pass"
    assert loaded_by(command) & {"torch", "numpy", "pydantic", "rich", *OPTIONAL} == set()


def test_a_usage_error_does_not_import_torch():
    command = "from torchrelay.cli import main\ntry:\n    main(['trian'])\nexcept SystemExit:\n    pass"
    assert "torch" not in loaded_by(command)


def test_importing_torchrelay_loads_no_library():
    assert "torch" not in loaded_by("import torchrelay")


def test_the_trainer_loads_no_optional_library(newly_loaded):
    loaded = newly_loaded(
        "import torchrelay as tr\ntr.Trainer, tr.Recipe, tr.data, tr.optim, tr.models, tr.augment\n"
        "import torchrelay.recipe.trained"
    )
    assert "torch" in loaded
    assert loaded & {*OPTIONAL, *DISTRIBUTED} == set()


def test_training_does_not_load_torchmetrics(newly_loaded):
    trainings = [
        f"data = torch.randn(9, 3), {targets}\n"
        f"tr.Trainer(torch.nn.Linear(3, 2), data, data, task={task}, epochs=1).fit()"
        for task, targets in (
            ("None", "torch.arange(9) % 2"),
            ("tr.MultiLabel(labels=2)", "torch.eye(2)[torch.arange(9) % 2]"),
        )
    ]
    assert "torchmetrics" not in newly_loaded("\n".join(["import torch, torchrelay as tr", *trainings]))


def test_each_public_name_exists():
    import torchrelay as tr

    for name in tr.__all__:
        assert getattr(tr, name) is not None
        assert name in dir(tr)
    with pytest.raises(AttributeError, match="module 'torchrelay' has no attribute 'Trainr'"):
        tr.Trainr  # noqa: B018


def test_no_module_imports_posix_modules_at_the_top():
    import torchrelay as tr

    only_posix = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    for path in Path(tr.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not only_posix & set(names), f"{path}:{node.lineno}"
