"""The table of all recipe keys in docs/recipes.md, from the settings classes.

    python -m tools.reference --out docs/recipes.md

replaces what stands between the two `keys` comments of that file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrelay import optim
from torchrelay.recipe.recipe import Recipe
from torchrelay.settings import Settings

START, END = "<!-- keys: begin -->\n", "<!-- keys: end -->\n"
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


def sections() -> Iterator[str]:
    for section, meaning in Recipe.meanings().items():
        yield f"### `[{section}]`\n\n{meaning}\n"
        if section in VARIANTS:
            for variant in VARIANTS[section]:
                yield f'`name = "{variant.model_fields["name"].default}"`: {(variant.__doc__ or "").splitlines()[0]}\n'
                yield table(variant)
        else:
            yield table(type(getattr(Recipe(), section)))


def table(settings: type[Settings]) -> str:
    rows, meanings = ["| key | default | meaning |", "| --- | --- | --- |"], settings.meanings()
    for key, info in sorted(settings.model_fields.items(), key=lambda item: item[0] != "name"):
        default = shown(info.get_default(call_default_factory=True))
        rows.append(f"| `{key}` | {default} | {cell(meanings.get(key))} |")
    return "\n".join(rows) + "\n"


def shown(value: Any) -> str:
    if value is None:
        return "unset"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the page whose table is replaced")
    page = parser.parse_args().out
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(before + START + "\n" + "\n".join(sections()) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
