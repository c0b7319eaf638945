"""How the code is laid out: imports point one way, files and functions stay small, nothing of one machine is kept.

A newcomer may read `LAYERS` as the map of the package, from the ground up. Whoever adds a module gives it a place here.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrelay as tr

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"

# A module, or a package as a whole, may import what stands in an earlier line, and nothing else of ours; those of one
# line know nothing of each other.
LAYERS = (
    ("errors", "settings", "heap", "backward", "counts", "rng", "processor"),
    ("terminal", "pictures", "slurm", "meeting"),
    ("duration", "identity", "signals", "report", "device", "parallel", "models", "faults", "world", "launched"),
    ("trackers", "checkpoint", "data", "optim", "task", "views", "exchange", "unsharded", "shardable", "reports"),
    ("beside", "drawing"),
    ("evaluation", "spikes", "writer", "callbacks", "doctor", "sharded", "tree_exchange", "stock_exchange", "launch"),
    ("run", "sharing", "graph"),
    ("session", "recipe"),
    ("trainer",),  # joins all seven steps
    ("profiling",),
    ("assemble",),  # from a recipe to a trainer
    ("tuning",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
# Inside `data`, where the order matters most: a step of preparing data knows only the earlier ones.
DATA_LAYERS = (
    ("order", "cache", "files", "image_files", "ahead"),
    ("augment", "sources"),
    ("folder", "named", "loader"),
    ("batches",),
    ("settings",),
    ("__init__",),
)

# Lines of a module. Raise one knowingly, or split the module.
LINES, MORE_LINES = 300, {
    "trainer": 690,
    "report": 450,
    "checkpoint": 440,
    "data.folder": 400,
    "task": 370,
    "terminal": 340,
    "optim.optimizers": 310,
}  # fmt: skip

# Lines of a function, its docstring aside.
FUNCTION, LONGER_FUNCTIONS = 60, {"trainer.Trainer.__init__": 138}


def modules() -> dict[str, Path]:
    """Our modules by name, without the package's own."""
    found = {}
    for path in sorted((SOURCE / "torchrelay").rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE / "torchrelay").with_suffix("").parts)
        if name != "__init__":
            found[name] = path
    return found


def only_for_types(tree: ast.Module) -> set[int]:
    """The nodes under `if TYPE_CHECKING:`, which never run."""
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    return {id(node) for block in guarded for node in ast.walk(block)}


def imports(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, at its top or in a function, without those for types alone."""
    tree = ast.parse(path.read_text())
    skipped = only_for_types(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively: name the module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "torchrelay":
                yield rest


def layer_of(layers: tuple[tuple[str, ...], ...], name: str) -> int:
    places = [number for number, layer in enumerate(layers) if name in layer]
    assert len(places) == 1, f"'{name}' has no place in the layers of {Path(__file__).name}: give it one"
    return places[0]


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name):
    own = name.partition(".")[0]
    for imported in imports(modules()[name]):
        other = imported.partition(".")[0]
        if other in ("__version__", own):
            continue
        assert layer_of(LAYERS, other) < layer_of(LAYERS, own), f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("data.")])
def test_imports_inside_data_point_one_way(name):
    own = name.split(".")[1]
    for imported in imports(modules()[name]):
        package, _, rest = imported.partition(".")
        other = rest.partition(".")[0]
        if package == "data" and other != own:
            assert layer_of(DATA_LAYERS, other) < layer_of(DATA_LAYERS, own), f"{name} imports {imported}"


def test_randomness_and_order_stand_on_nothing():
    assert set(imports(modules()["rng"])) == set()
    assert {name.partition(".")[0] for name in imports(modules()["data.order"])} == {"rng"}


def test_no_layer_names_what_is_gone():
    there = {name.partition(".")[0] for name in modules()}
    assert {name for layer in LAYERS for name in layer} == there


@pytest.mark.parametrize("name", modules())
def test_a_module_stays_small(name):
    lines, allowed = len(modules()[name].read_text().splitlines()), MORE_LINES.get(name, LINES)
    assert lines <= allowed, f"{name} has {lines} lines, more than {allowed}: split it, or raise its budget knowingly"


def functions(tree: ast.AST, place: str) -> Iterator[tuple[str, int]]:
    """Each function with its length in lines, its docstring aside."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{place}.{node.name}"
            if not isinstance(node, ast.ClassDef):
                first = node.body[0]
                has_docstring = ast.get_docstring(node) is not None
                docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
                yield name, (node.end_lineno or 0) - node.lineno + 1 - docstring
            yield from functions(node, name)


@pytest.mark.parametrize("name", modules())
def test_a_function_fits_a_screen(name):
    for function, lines in functions(ast.parse(modules()[name].read_text()), name):
        allowed = LONGER_FUNCTIONS.get(function, FUNCTION)
        assert lines <= allowed, f"{function} has {lines} lines, more than {allowed}: divide it"


def test_there_are_few_public_names():
    names = set(tr.__all__) - {"__version__"}
    assert len(names) <= 15
    assert all(not name.startswith("_") for name in names)


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


def test_no_tracked_file_holds_traces_of_a_machine():
    for path in tracked():
        text = path.read_bytes().decode("utf-8", "ignore")
        if path.suffix != ".png" and (found := _TRACES.search(text)):
            line = text[: found.start()].count("\n") + 1
            pytest.fail(f"{path.relative_to(ROOT)}:{line} names '{found[0]}'")


def test_the_search_for_traces_finds_them():
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
    """A test file beneath a folder belongs to the package of that name; `faults` holds the faults that cross them."""
    folders = {path.name for path in (SOURCE / "torchrelay").iterdir() if path.is_dir()} | {"faults", "benchmarks"}
    assert {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")} <= folders
    assert not list((ROOT / "tests").rglob("__init__.py"))
