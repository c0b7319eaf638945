"""Figures of the code's layout: `python -m tools.house` (or `make house`) prints them beside earlier ones.

The code is only parsed, never run. An import under `TYPE_CHECKING` counts: a reader has to know the other module too.
"""

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "torchrelay"

# Each figure at the tag `house-before`, and its bound.
BEFORE = {
    "lines": (14_133, "fewer"),
    "entries at the package's top": (54, "18"),
    "modules": (82, ""),
    "circles of imports": (2, "0"),
    "lines of the largest module": (689, "350"),
    "lines of the longest function": (138, "50"),
    "lines of a function, median": (6, "8"),
    "lines of the class Trainer": (613, "330"),
    "attributes of the class Trainer": (47, "16"),
    "modules of ours that the trainer imports": (26, "13"),
    "uses of a trainer's members elsewhere": (237, "79"),
    "writes to a trainer's members elsewhere": (11, "0"),
}


@dataclass(frozen=True)
class Module:
    """A source file.

    Args:
        name: its dotted name inside the package; a folder's `__init__` has the folder's name, the top's is empty.
        path: path of the file.
    """

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def lines(self) -> int:
        """How many lines the file has."""
        return len(self.path.read_text(encoding="utf-8").splitlines())

    @property
    def folder(self) -> str:
        """The top-level folder that holds the module, or the module's own name at the top level."""
        return self.name.partition(".")[0]

    def functions(self) -> Iterator[tuple[str, int]]:
        """Yield the name of each function and its number of lines without the docstring."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                documented = ast.get_docstring(node, clean=False) is not None
                docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
                yield f"{self.name}.{node.name}", length(node) - docstring

    def imports(self) -> Iterator[str]:
        """Yield the names it imports from the package, such as `data.batches.Batch` or `data.batches`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                if node.level:
                    raise ValueError(f"{self.path}:{node.lineno} imports relatively: name the module in full")
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            yield from (name.partition(".")[2] for name in names if name.partition(".")[0] == "torchrelay")


def length(node: ast.stmt) -> int:
    """Return the number of lines of a statement."""
    return (node.end_lineno or 0) - node.lineno + 1


def read_modules(source: Path = SOURCE) -> dict[str, Module]:
    """Return the modules of the package by name."""
    modules = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name, path)
    return modules


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return which modules each one imports, except the package's own `__init__`, which imports for users."""

    def resolve(imported: str) -> str:
        return imported if imported in modules else imported.rpartition(".")[0]

    return {
        name: {resolve(imported) for imported in module.imports()} - {"", name}
        for name, module in modules.items()
        if name
    }


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or indirectly."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        front = [start]
        while front:
            new = graph.get(front.pop(), set()) - seen
            seen |= new
            front.extend(new)
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached.get(b, set())) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def find_trainer(modules: dict[str, Module]) -> tuple[Module, ast.ClassDef]:
    """Return the class `Trainer` and its module."""
    return next(
        (module, node)
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef) and node.name == "Trainer"
    )


def attributes(node: ast.ClassDef) -> set[str]:
    """Return the attributes that a class assigns on `self`."""
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def uses_of_a_trainer(modules: dict[str, Module]) -> tuple[int, int]:
    """Return how often other modules use `trainer.<member>`, and how often they assign it."""
    own, _ = find_trainer(modules)
    members = [
        node
        for module in modules.values()
        if module is not own
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trainer"
    ]
    return len(members), sum(isinstance(node.ctx, ast.Store) for node in members)


def figures(source: Path = SOURCE) -> dict[str, float]:
    """Return the figures of the layout by name, in the order of `BEFORE`."""
    modules = read_modules(source)
    graph = import_graph(modules)
    functions = [lines for module in modules.values() for _, lines in module.functions()]
    own, trainer = find_trainer(modules)
    uses, writes = uses_of_a_trainer(modules)
    values = (
        sum(module.lines for module in modules.values()),
        len({module.folder for module in modules.values()} - {""}),
        len(graph),
        len(circles(graph)),
        max(module.lines for module in modules.values()),
        max(functions),
        statistics.median(functions),
        length(trainer),
        len(attributes(trainer)),
        len(graph[own.name]),
        uses,
        writes,
    )
    return dict(zip(BEFORE, values, strict=True))


def main() -> None:
    """Print each figure: before, now, bound."""
    print(f"{'':42}{'before':>10}{'now':>10}{'at most':>10}")
    for name, now in figures().items():
        before, bound = BEFORE[name]
        print(f"{name:42}{before:>10,}{now:>10,g}{bound:>10}")


if __name__ == "__main__":
    main()
