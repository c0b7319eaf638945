"""The documentation's site, which `make docs` builds into build/docs, offline and with warnings as errors.

The pages are Markdown that also reads well on a code host, where links lead to files of the repository. In the site,
links to modules lead to their reference instead, and links to the pages in the repository's root to copies of these.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

import torchrelay

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "torchrelay"
ROOT_PAGES = ("README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

project = "torchrelay"
author = "The torchrelay authors"
project_copyright = "The torchrelay authors"
version = release = torchrelay.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"torchrelay {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {
    "members": True,
    "exclude-members": "model_config",
    "ignore-module-all": True,
    "show-inheritance": True,
}
autodoc_preserve_defaults = True
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"
default_role = "code"  # of our docstrings, which are Markdown in this
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = True
# What other libraries document isn't at hand offline; private names and aliases have no page.
nitpick_ignore_regex = [("py:.*", r"(?!torchrelay\.).*"), ("py:.*", r".*(\._|Annotated|\.Words$|\.Result$).*")]


def reference() -> None:
    """Write reference/api/FOLDER.rst for each folder of the package: its modules, by their docstrings."""
    folders = {path.name: sorted(path.rglob("*.py")) for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    folders["torchrelay"] = sorted(path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__"))
    (DOCS / "reference" / "api").mkdir(exist_ok=True)
    for folder, paths in folders.items():
        parts = [folder if folder == "torchrelay" else f"torchrelay.{folder}", "=" * 40, ""]
        for path in sorted(paths, key=lambda path: (path.stem != "__init__", path)):
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
            if path.stem != "__init__":
                parts += [module.removeprefix("torchrelay."), "-" * 60, ""]
            parts += [f".. automodule:: {module}", ""]
        (DOCS / "reference" / "api" / f"{folder}.rst").write_text("\n".join(parts), encoding="utf-8")


def root_pages() -> None:
    """Write root/NAME.md for each page in the repository's root."""
    (DOCS / "root").mkdir(exist_ok=True)
    for name in ROOT_PAGES:
        text = (DOCS.parent / name).read_text(encoding="utf-8").replace("](docs/", "](../")
        text = re.sub(r"\[([^]]*)\]\(LICENSE\)", r"\1", text)
        front = "---\norphan: true\n---\n\n" if name.startswith("README") else ""
        (DOCS / "root" / name).write_text(front + text, encoding="utf-8")


def lead_into_the_site(_app: Sphinx, page: str, source: list[str]) -> None:
    """Let a page's links to modules and to the root's pages lead to what the site has of them."""
    up = "../" * page.count("/")
    modules = r"\]\((?:\.\./)+src/torchrelay/(?:(\w+)/[\w/]+|\w+)\.py\)"
    source[0] = re.sub(modules, lambda m: f"]({up}reference/api/{m[1] or 'torchrelay'}.rst)", source[0])
    source[0] = re.sub(rf"\]\((?:\.\./)+({'|'.join(map(re.escape, ROOT_PAGES))})", rf"]({up}root/\1", source[0])


def keep_colons(_app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Begin an attribute's docstring with an empty comment: napoleon reads what precedes a first colon as its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> None:
    """Connect to Sphinx."""
    reference()
    root_pages()
    app.connect("source-read", lead_into_the_site)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
