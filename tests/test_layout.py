"""The layout of the code: imports point down, modules and functions stay small, no file holds a machine's paths.

`FOLDERS` is the map of the package. A folder has one subject; modules outside folders are on the ground, the last line.
"""

import functools
import re
import subprocess
from pathlib import Path

import pytest

import torchrelay as tr
from tools import house

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"

# A folder imports only from the lines below it. Imports under TYPE_CHECKING count.
FOLDERS = (
    ("__main__", "cli"),
    ("commands",),
    ("report",),
    ("recipe",),
    ("train",),
    ("tasks",),
    ("optim",),
    ("distributed",),
    ("checkpoint",),
    ("models",),
    ("data",),
    ("device",),
    ("run",),
    ("duration", "errors", "rng", "settings"),
)
LEVELS = {folder: level for level, line in enumerate(FOLDERS) for folder in line}
MODULES = house.read_modules()


@functools.cache
def graph() -> dict[str, set[str]]:
    return house.import_graph(MODULES)


@functools.cache
def circles() -> list[list[str]]:
    return house.circles(graph())


@functools.cache
def figures() -> dict[str, float]:
    return house.figures()


def test_the_package_has_at_most_18_entries():
    assert len({module.folder for module in MODULES.values()} - {""}) <= 18


def test_every_folder_has_a_level():
    assert {module.folder for module in MODULES.values()} - {""} == set(LEVELS)


@pytest.mark.parametrize("folder", LEVELS)
def test_a_folder_imports_only_from_levels_below_it(folder):
    for name, imported in graph().items():
        for other in imported if MODULES[name].folder == folder else ():
            assert LEVELS[folder] <= LEVELS[MODULES[other].folder], f"{name} imports {other}, which stands above it"


@pytest.mark.parametrize("folder", LEVELS)
def test_no_modules_import_each_other(folder):
    assert [circle for circle in circles() if folder in {MODULES[name].folder for name in circle}] == []


@pytest.mark.parametrize("folder", LEVELS)
def test_a_module_has_at_most_350_lines(folder):
    lines = {name: module.lines for name, module in MODULES.items() if module.folder == folder}
    assert {name: count for name, count in lines.items() if count > 350} == {}


@pytest.mark.parametrize("folder", LEVELS)
def test_a_function_has_at_most_50_lines(folder):
    functions = [pair for module in MODULES.values() if module.folder == folder for pair in module.functions()]
    assert {name: lines for name, lines in functions if lines > 50} == {}


AT_MOST = {
    "lines of the class Trainer": 300,
    "attributes of the class Trainer": 15,
    "modules of ours that the trainer imports": 12,
    "uses of a trainer's members elsewhere": 79,
    "writes to a trainer's members elsewhere": 0,
}


@pytest.mark.parametrize("figure", AT_MOST)
def test_the_trainer_stays_within_its_size_bounds(figure):
    assert figures()[figure] <= AT_MOST[figure]


def test_the_order_module_imports_only_rng():
    assert graph()["rng"] == set()
    assert graph()["data.order"] == {"rng"}


def test_there_are_few_public_names():
    names = set(tr.__all__) - {"__version__"}
    settings = {name for name in names if name.endswith("Settings")}
    assert len(names - settings) <= 17
    assert all(not name.startswith("_") for name in names)


def test_the_settings_of_each_recipe_section_are_public():
    """Those of the optimizer and the schedule are in `optim`, one class each."""
    for section, field in tr.Recipe.model_fields.items():
        if section not in ("optimizer", "schedule"):
            assert getattr(tr, f"{section.capitalize()}Settings") is field.annotation


# ------------------------------------------------------------------------------------------------ what is tracked

_TRACES = re.compile(
    "|".join(
        (
            r"(?<![\w.<{])/(?:wo)rk/",  # the folders of machines on which this was written (and not this line)
            r"(?<![\w.])/(?:ro)ot/",
            r"(?<![\w.])/(?:ho)me/[a-z]+/",
            r"(?<![\w.])/(?:Us)ers/[a-z]+/",
            r"art(?:i)factory|jf(?:r)og|dev(?:p)i",
            r"(?:extra-)?ind(?:e)x-url",
            r"\b(?:192\.(?:1)68|10\.(?:\d+)\.\d+|172\.(?:1[6-9]|2\d|3[01]))\.\d+\b",
        )
    )
)


def tracked() -> list[Path]:
    try:
        found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [path for name in found.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_no_tracked_file_contains_paths_of_a_machine():
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "ignore")
        if path.suffix != ".png" and (found := _TRACES.search(text)):
            line = text[: found.start()].count("\n") + 1
            pytest.fail(f"{path.relative_to(ROOT)}:{line} names '{found[0]}'")


def test_the_search_finds_paths_of_a_machine():
    for trace in (
        "/wor" + "k/main",
        "see /hom" + "e/ann/x",
        "jfr" + "og.example",
        "192.1" + "68.0.1",
        "--ind" + "ex-url",
    ):
        assert _TRACES.search(trace), trace
    for harmless in ("my/work/here", "https://example.org/home/page", "torch 10.2.1", "127.0.0.1", "run.workers"):
        assert not _TRACES.search(harmless), harmless


def test_tests_mirror_the_source():
    """A test folder has the name of the folder that it tests; `faults` holds tests of several folders."""
    folders = {path.name for path in (SOURCE / "torchrelay").iterdir() if path.is_dir()}
    assert {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")} <= {
        *folders,
        "benchmarks",
        "docs",
        "faults",
        "tools",
    }
    assert not list((ROOT / "tests").rglob("__init__.py"))
