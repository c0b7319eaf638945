"""The documentation does what it says: commands and code run, quotes are the source, links lead somewhere."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchrelay import checkpoint, cli
from torchrelay.recipe import recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(page: Path, *kinds: str) -> list[tuple[str, str, str]]:
    """The fenced blocks of these kinds: (kind, what the comment before it says, text)."""
    found = [(m["kind"], m["mark"] or "", m["text"]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block[0] in kinds]


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUNNING = [page for page in PAGES if page.name != "README.zh-CN.md"]  # whose blocks are the README's, see below


LONG = ("clusters.md", "devices.md", "speed.md")
MARKED = [pytest.param(page, marks=pytest.mark.slow) if page.name in LONG else page for page in RUNNING]


@pytest.mark.parametrize("page", MARKED, ids=ids)
def test_every_command_and_code_block_runs(page, tmp_path):
    """The blocks of a page run one after another in one folder; a block marked `test: no` is only checked."""
    for kind, mark, text in blocks(page, "console", "python"):
        if kind == "python":
            compile(text, page.name, "exec")
            if not mark.startswith("test: no"):
                run([sys.executable, "-c", text], tmp_path)
            continue
        for line in text.splitlines():
            command = shlex.split(line, comments=True)
            if not command:
                continue
            if command[0] == "torchrelay":
                check_arguments(command[1:])
            if command[0] == "make":
                assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            elif not mark.startswith("test: no"):
                run(command, tmp_path)


def check_arguments(arguments: list[str]) -> None:
    """The command line takes these arguments, and the recipe these overrides."""
    parser, *_ = cli._parser()
    options = parser.parse_args(arguments)
    if options.command == "train" and not options.recipe.endswith(".toml"):
        recipe.load(options.recipe, options.overrides)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def test_the_readmes_two_trainings_give_the_same_network_to_the_last_bit(tmp_path):
    (first, *_), (python, *_) = (
        [text for _, mark, text in blocks(ROOT / "README.md", kind) if "runs/f" in text]
        for kind in ("console", "python")
    )
    run(shlex.split(first.splitlines()[0]), tmp_path)
    run([sys.executable, "-c", python], tmp_path)
    weights = [
        (checkpoint.find(tmp_path / "runs" / name / "checkpoints", "last") / "model.safetensors").read_bytes()
        for name in ("first", "from-python")
    ]
    assert weights[0] == weights[1]


def test_the_two_readmes_are_in_step():
    english, chinese = ((ROOT / name) for name in ("README.md", "README.zh-CN.md"))
    code = [[text for _, _, text in blocks(page, "console", "python", "text")] for page in (english, chinese)]
    assert code[0] == code[1]
    headings = [re.findall(r"^(#+) ", page.read_text(encoding="utf-8"), re.MULTILINE) for page in (english, chinese)]
    assert headings[0] == headings[1]
    rows = [len(re.findall(r"^\|", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in (english, chinese)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_links_to_headings_meet_headings():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#([\w-]+)\)", page.read_text(encoding="utf-8")):
            text = ((page.parent / target) if target else page).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


def source_of(path: str, name: str) -> str:
    """The source of a function, a class or a method, without its docstring and indentation."""
    text = (ROOT / path).read_text()
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = next(n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part)
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    return "\n".join(line[node.col_offset :] for line in lines)


def without_docstring(text: str) -> str:
    return re.sub(r'^ +""".*?"""\n', "", text, count=1, flags=re.DOTALL | re.MULTILINE)


def test_quotes_are_the_source():
    """A block after `<!-- quote: FILE NAME -->` is that function's source, without its docstring."""
    quotes = 0
    for page in PAGES:
        for _, mark, text in blocks(page, "py"):
            _, path, name = mark.split()
            assert text.strip() == without_docstring(source_of(path, name)).strip(), f"{page.name}: {name}"
            quotes += 1
    assert quotes >= 3


def test_the_schema_and_the_table_of_keys_are_in_step(tmp_path):
    assert json.loads((ROOT / "docs" / "recipe.schema.json").read_text()) == json.loads(recipe.schema())
    out = tmp_path / "recipes.md"
    shutil.copy(ROOT / "docs" / "recipes.md", out)
    subprocess.run([sys.executable, "-m", "tools.reference", "--out", out], cwd=ROOT, check=True)
    assert out.read_text() == (ROOT / "docs" / "recipes.md").read_text(), "run `make docs`"
