"""The documentation's site: `make docs` builds it into build/docs, with warnings as errors and nothing from elsewhere.

The pages are Markdown that also reads well on a code host: links are relative, to files of the repository. Here those
to our modules become links to their reference.
"""

from pathlib import Path

import torchrelay

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "torchrelay"

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
autodoc_default_options = {"members": True, "ignore-module-all": True, "show-inheritance": True}
autodoc_preserve_defaults = True
python_display_short_literal_types = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!torchrelay\.).*")]  # what PyTorch and others document isn't at hand offline


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


reference()
