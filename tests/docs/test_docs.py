"""The documentation is true: commands and code run, quotes equal the source, links are valid.

The blocks of a page run one after another in one folder, which holds some photographs. A comment before a block changes
that: `<!-- test: no, because … -->` only checks the block; `<!-- test: with OPTIONS -->` adds options, such as fewer
epochs, to each of its commands.
"""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from torchrelay import checkpoint
from torchrelay import cli as command_line
from torchrelay.recipe import recipe

ROOT = Path(__file__).parents[2]
CHINESE = ROOT / "README.zh-CN.md", ROOT / "docs" / "zh"
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "root")
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *DOCS,
]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)


def blocks(page: Path, *kinds: str) -> list[tuple[str, str, str]]:
    """The fenced blocks of these kinds: (kind, comment before it, text)."""
    found = [(m["kind"], m["mark"] or "", m["text"]) for m in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if block[0] in kinds]


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def translated(page: Path) -> bool:
    """Whether the page is a translation of an English page."""
    return any(page == part or part in page.parents for part in CHINESE)


LONG = ["clusters", "devices", "export", "fine-tune", "first-training", "own-data", "several-devices", "speed"]
TRANSLATIONS = [page for page in PAGES if translated(page)]
RUNNING = [page for page in PAGES if not translated(page) and blocks(page, "console", "python")]
IN_CI = [pytest.mark.ci, pytest.mark.slow]
MARKED = [pytest.param(page, marks=IN_CI) if page.stem in LONG else page for page in RUNNING]


@pytest.fixture
def photographs(tmp_path) -> None:
    """Two classes of small photographs, and one more image."""
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.random.default_rng([i, number]).integers(100 * i, 100 + 100 * i, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / name / f"{number}.jpg")
    Image.fromarray(pixels).save(tmp_path / "new.jpg")


@pytest.mark.usefixtures("photographs")
@pytest.mark.parametrize("page", MARKED, ids=ids)
def test_every_command_and_code_block_runs(page, tmp_path, start):
    for kind, mark, text in blocks(page, "console", "python"):
        runs = not mark.startswith("test: no")
        if kind == "python":
            compile(text, page.name, "exec")
            if runs:
                script = tmp_path / "block.py"
                script.write_text(text, encoding="utf-8")
                check(start(script=script).done(), text)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            command = shlex.split(line, comments=True)
            added = shlex.split(mark.removeprefix("test: with ")) if mark.startswith("test: with ") else []
            if not command:
                continue
            if command[0] == "torchrelay":
                check_arguments(command[1:])
                if runs:
                    check(start(*command[1:], *added).done(), line)
            elif command[0] == "make":
                assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            elif runs:
                environment = os.environ | {
                    "OMP_NUM_THREADS": "1",
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                }
                check(subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True), line)


def check(done: subprocess.CompletedProcess[str], what: str) -> None:
    assert done.returncode == 0, f"{what}\n{done.stdout}{done.stderr}"


def check_arguments(arguments: list[str]) -> None:
    """The command line takes these arguments, and the recipe these overrides."""
    options = command_line._parse(arguments)
    if options.command == "train" and not options.recipe.endswith(".toml"):
        recipe.load(options.recipe, options.overrides)


def test_the_tutorials_two_trainings_give_bit_equal_networks(tmp_path, start: Callable):
    page = ROOT / "docs" / "tutorial" / "first-training.md"
    (first, *_), (python, *_) = (
        [text for _, _, text in blocks(page, kind) if "runs/f" in text] for kind in ("console", "python")
    )
    (tmp_path / "block.py").write_text(python, encoding="utf-8")
    started = start(*shlex.split(first.splitlines()[0])[1:]), start(script=tmp_path / "block.py")
    for process in started:
        check(process.done(), page.name)
    weights = [
        (checkpoint.find(tmp_path / "runs" / name / "checkpoints", "last") / "model.safetensors").read_bytes()
        for name in ("first", "from-python")
    ]
    assert weights[0] == weights[1]


def original(chinese: Path) -> Path:
    """The English page of a Chinese one."""
    docs = ROOT / "docs"
    return ROOT / "README.md" if chinese.parent == ROOT else docs / chinese.relative_to(docs / "zh")


def without_comments(code: str) -> str:
    return re.sub(r'"""[^"]*"""|\s*#.*', "", code)


@pytest.mark.parametrize("chinese", TRANSLATIONS, ids=ids)
def test_a_chinese_page_has_the_structure_of_the_english_one(chinese):
    """The same code but for its comments, the same headings, tables, pictures and figures."""
    pages = original(chinese), chinese
    texts = [page.read_text(encoding="utf-8") for page in pages]
    for pattern in (r"^(#+) ", r"^\|", r"^!\[", r"^<!-- [^\n]*-->$", r"^- "):
        assert len({tuple(re.findall(pattern, text, re.MULTILINE)) for text in texts}) == 1, pattern
    english, translation = (
        [(kind, mark, without_comments(text)) for kind, mark, text in blocks(page, "console", "python", "py", "toml")]
        for page in pages
    )
    assert english == translation
    assert not set.symmetric_difference(*(set(re.findall(r"\d+(?:[.,]\d+)*", text)) for text in texts))


def test_every_translated_page_exists_and_is_linked():
    english = [ROOT / "README.md", ROOT / "docs" / "index.md"]
    english += [page for page in DOCS if page.parent in (ROOT / "docs" / "tutorial", ROOT / "docs" / "howto")]
    assert sorted(english) == sorted(map(original, TRANSLATIONS))
    for chinese in TRANSLATIONS:
        page = original(chinese)
        for start, name, end in ((page, "中文", chinese), (chinese, "English", page)):
            link = f"*[{name}]({os.path.relpath(end, start.parent)})*"
            assert start.read_text(encoding="utf-8").split("\n\n")[1] == link, start


HAN = "[一-龥]"
UNIDIOMATIC = {
    "继续得": "精确续训",
    "所见": "实测",
    "词元": "token",
    "下一个符号": "下一个 token",
    "各层的代价": "各层计算量",
    "[决定]": "设计决策",
    "双进程": "两个 worker",
    "分毫不差": "逐位一致",
}


@pytest.mark.parametrize("chinese", TRANSLATIONS, ids=ids)
def test_a_chinese_page_follows_the_typographic_conventions(chinese):
    """Spaces between Han and Latin only, full-width punctuation, established terms."""
    text = re.sub(r"^(?:<!--[^\n]*-->\n)?```.*?^```\n", "\n", chinese.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = re.findall(r"^(?![#|>]|- |\s*$).+\n(?![#|>]|- |\s*$).+", text, re.MULTILINE)
    assert not lines, "a line break inside a paragraph shows as a space"
    shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", text)).replace("*", "")
    for problem, pattern in {
        "a space within Chinese text": rf"(?:{HAN}|[，。；：、（）！？]) +(?:{HAN}|[，。；：、（）！？])",
        "no space between Han and Latin": rf"{HAN}[A-Za-z0-9]|[A-Za-z0-9%]{HAN}",
        "half-width punctuation": rf"{HAN}[,;:!?(]|[,;:!?)]{HAN}|{HAN}\.(?![A-Za-z])",
    }.items():
        found = [m[0] for m in re.finditer(f".{{0,6}}(?:{pattern}).{{0,6}}", shown)]
        assert not found, f"{problem}: {found}"
    assert not [f"{bad}: {good}" for bad, good in UNIDIOMATIC.items() if bad in text]


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_are_valid(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


def test_generated_parts_of_the_pages_are_up_to_date():
    """Quotes are the source; the tables of keys and commands and the schema are complete."""
    pages = runpy.run_path(str(ROOT / "tools" / "reference.py"))["pages"]()
    assert len(pages) > 10
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, "run `make docs`"


def test_the_readme_on_pypi_has_no_dead_link_or_picture():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hook = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / fragment["path"]).read_text(encoding="utf-8") for fragment in hook["fragments"])
    for step in hook["substitutions"]:
        text = re.sub(step["pattern"], step["replacement"], text)
    assert "make train" in text
    assert [target for target, _ in LINK.findall(text) if "://" not in target] == []
    assert "<!--" not in text


def test_the_step_shown_on_the_architecture_page_has_at_most_100_lines_in_3_files():
    page = ROOT / "docs" / "explanation" / "architecture.md"
    step = page.read_text(encoding="utf-8").partition("## One step")[2].partition("\n## ")[0]
    quotes = re.findall(r"<!-- quote: (\S+) \S+ -->\n```py\n(.*?)```", step, re.DOTALL)
    files = {path for path, _ in quotes} - {"src/torchrelay/train/trainer.py"}  # the loop around it
    assert len(files) == 3
    assert sum(len(text.splitlines()) for path, text in quotes if path in files) <= 100


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-n",
        "-q",
        "-b",
        "html",
        "docs",
        tmp_path / "site",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trainer" in (tmp_path / "site" / "searchindex.js").read_text(encoding="utf-8")


def test_each_program_named_on_a_page_exists():
    texts = [page.read_text(encoding="utf-8") for page in (*PAGES, ROOT / "Makefile")]
    modules = {name for text in texts for name in re.findall(r"-m ((?:benchmarks|tools)[.\w]*)", text)}
    assert len(modules) > 10
    for name in modules:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
