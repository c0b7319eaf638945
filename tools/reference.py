"""Update the parts of the documentation that come from the code, in place.

    python -m tools.reference

- A Python block after `<!-- quote: FILE NAME -->` becomes the source of that function, class or method, without its
  docstring; `<!-- quote: FILE -->` quotes a whole file after its docstring. Translated comments stay.
- The text between `<!-- keys: begin -->` and `<!-- keys: end -->` becomes the tables of all recipe keys, and between
  `<!-- commands: begin -->` and `<!-- commands: end -->` the options of all commands.
- `reference/recipe.schema.json` becomes the JSON schema of recipes.

A test compares the committed pages with the result of this module.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torchrelay import cli, optim
from torchrelay.recipe import recipe
from torchrelay.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
QUOTE = re.compile(r"(?<=<!-- quote: )(?P<path>\S+)(?: (?P<name>\S+))? -->\n```py\n.*?```", re.DOTALL)
FOR_TOOLS = re.compile(r"  # (type: ignore|fmt: skip|noqa).*")
COMMENT = re.compile(r'"""[^"]*"""|# [^\n]*')
VARIANTS: dict[str, tuple[type[Settings], ...]] = {
    "optimizer": (optim.SGD, optim.AdamW, optim.Muon),
    "schedule": (
        optim.Constant,
        optim.Step,
        optim.MultiStep,
        optim.Cosine,
        optim.OneCycle,
        optim.Linear,
        optim.Plateau,
    ),
}


def pages() -> dict[Path, str]:
    """Return the up-to-date text of each page, and of the schema."""
    texts = {page: quoted(page.read_text(encoding="utf-8")) for page in (ROOT / "README.md", *DOCS.rglob("*.md"))}
    for page, text in texts.items():
        for part, content in (("keys", keys), ("commands", commands)):
            begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
            if begin in text:
                before, _, rest = text.partition(begin)
                texts[page] = text = before + begin + "\n" + "\n".join(content()) + "\n" + end + rest.partition(end)[2]
    return texts | {DOCS / "reference" / "recipe.schema.json": recipe.schema()}


def quoted(text: str) -> str:
    """Return a page with updated quotes; a Chinese page keeps its comments unless their number changes."""

    def renew(match: re.Match[str]) -> str:
        before, _, block = match[0].partition("```")
        code, comments = source(match["path"], match["name"]), COMMENT.findall(block)
        if re.search("[一-龥]", block) and len(comments) == len(COMMENT.findall(code)):
            code = COMMENT.sub(lambda _: comments.pop(0), code)
        return f"{before}```py\n{code}\n```"

    return QUOTE.sub(renew, text)


def source(path: str, name: str | None) -> str:
    """Return the source of a file or of a name in it, without docstring, indentation and tool comments."""
    text = (ROOT / path).read_text(encoding="utf-8")
    node: Any = ast.parse(text)
    for part in name.split(".") if name else ():
        node = next(child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part)
    lines = [FOR_TOOLS.sub("", line) for line in text.splitlines()]
    first, last, indentation = 1, len(lines), 0
    if name:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        last, indentation = node.end_lineno, node.col_offset
    docstring = range(0)
    if ast.get_docstring(node) is not None:
        end = node.body[0].end_lineno
        docstring = range(node.body[0].lineno, end + 1 + (lines[end : end + 1] == [""]))
    return "\n".join(lines[i - 1][indentation:] for i in range(first, last + 1) if i not in docstring).strip()


def keys() -> Iterator[str]:
    """Yield the sections of a recipe with the tables of their keys."""
    for section, meaning in recipe.Recipe.meanings().items():
        number, _, text = meaning.partition(". ")
        yield f"## `[{section}]`\n\nStep {number}: {text}\n"
        if section in VARIANTS:
            for variant in VARIANTS[section]:
                yield f'### `{section}.name = "{variant.model_fields["name"].default}"`\n'
                yield f"{(variant.__doc__ or '').splitlines()[0]}\n"
                yield key_table(variant)
        else:
            yield key_table(type(getattr(recipe.Recipe(), section)))


def key_table(settings: type[Settings]) -> str:
    """Return the table of a settings class, with the key `name` first."""
    meanings = settings.meanings()
    fields = sorted(settings.model_fields.items(), key=lambda item: item[0] != "name")
    return table(
        ("key", "default", "meaning"),
        ((f"`{key}`", shown(info.get_default(call_default_factory=True)), meanings.get(key)) for key, info in fields),
    )


def commands() -> Iterator[str]:
    """Yield the commands with the tables of their arguments and options."""
    for name in cli.COMMANDS:
        module = import_module(f"torchrelay.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(add_help=False)
        module.add_options(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        positional = " ".join(argument(action) for action in parser._actions if not action.option_strings)
        yield f"## `torchrelay {name}`\n\n{module.HELP[0].upper()}{module.HELP[1:]}.\n"
        yield f"```text\ntorchrelay {name} {positional}".rstrip() + " [options]\n```\n"
        yield table(
            ("argument or option", "meaning"), ((f"`{argument(action)}`", action.help) for action in parser._actions)
        )


def argument(action: argparse.Action) -> str:
    """Return an option with its value, or the placeholder of an argument."""
    value = "" if action.nargs == 0 else str(action.metavar or action.dest)
    if action.option_strings:
        return f"{action.option_strings[-1]} {value}".strip()
    return {"?": f"[{value}]", "+": f"{value} [{value} ...]"}.get(str(action.nargs), value)


def shown(value: Any) -> str:
    """Return a default as a recipe spells it."""
    if value is None:
        return "unset"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def table(heads: tuple[str, ...], rows: Iterator[tuple[str | None, ...]]) -> str:
    """Return a Markdown table."""
    cells = [heads, ("---",) * len(heads), *((escape(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def escape(text: str | None) -> str:
    """Return a cell's text with escaped bars, and with options as code."""
    return re.sub(r"(?<![`\w-])--[a-z][a-z-]*", r"`\g<0>`", text or "").replace("|", "\\|")


def main() -> None:
    """Write the pages that are out of date."""
    for page, text in pages().items():
        if page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
