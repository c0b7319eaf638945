"""Loading torch.export's program without running code that somebody put into it.

`torch.export.load` unpickles some entries of a file without restriction, evaluates the expressions of sizes as Python
and looks its operators up in all of `torch`. So a file is read first, and refused unless it is as we write it: tensors
as bytes, operators of ATen, and sizes of names, numbers and arithmetic.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from torchrelay.errors import RelayError, intact

_LARGEST = 2**28  # bytes of JSON
_ENTRIES = (
    r"(data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|"
    r"data/sample_inputs/model\.pt|models/model\.json|archive_format|archive_version|\.data/(version|serialization_id)|"
    r"byteorder)"
)
_TARGET = re.compile(r"torch\.ops\.(aten|higher_order)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")
_FILES = re.compile(r"torch\.ops\.aten\.(from_file|save)\b")
_EXPRESSION = re.compile(
    r"Symbol\('[su]\d+', positive=True, integer=True\)|[su]\d+|\d+|[-+*/() ,]|"
    r"(Max|Min|Mod|FloorDiv|CleanDiv|Integer)(?=\()"
)
_SPEC = re.compile(r'"(type|context|children_spec|builtins\.(tuple|list|dict)|null|\[\])"|null|[\d\[\]{}:, ]')


def load_program(path: Path) -> Callable[..., Any]:
    """Return the module of torch.export's program.

    Raises:
        RelayError: the file is damaged, or loading it would run code.
    """
    with intact(path, "copy the export again"):
        try:
            check(path)
        except zipfile.BadZipFile as error:
            raise ValueError(str(error)) from error
        return torch.export.load(path).module()


def check(path: Path) -> None:
    """Check that a program holds nothing that its loading would run.

    Raises:
        RelayError: it does; the text names the entry.
        ValueError: it isn't a program.
    """
    with zipfile.ZipFile(path) as archive:
        for reason in _reasons(archive):
            raise RelayError(
                f"{path} could run code when it is loaded, by {reason}: don't load it unless you trust its author"
            )


def _reasons(archive: zipfile.ZipFile) -> Iterator[str]:
    """Yield what isn't as we write it."""
    names = archive.namelist()
    if len({*names}) < len(names):
        yield "two entries of one name, of which either may be read"
    top = names[0].partition("/")[0] if names else ""
    entries = {name.removeprefix(f"{top}/"): archive.getinfo(name) for name in names}
    yield from (f"its entry '{entry}'" for entry in entries if not re.fullmatch(_ENTRIES, entry))

    def parsed(entry: str) -> Any:
        if entries[entry].file_size > _LARGEST:
            raise ValueError(f"{entry} is too large")
        return json.loads(archive.read(entries[entry]))

    if entries["data/sample_inputs/model.pt"].file_size:
        yield "its sample inputs, which are pickled"
    for part in ("weights", "constants"):
        for name, payload in parsed(f"data/{part}/model_{part}_config.json")["config"].items():
            if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
                yield f"its {part} '{name}'"
    for key, value in _texts(parsed("models/model.json")):
        if (allowed := _ALLOWED.get(key)) is not None and not allowed(value):
            yield f"its {key} '{value[:80]}'"


_ALLOWED: dict[str, Callable[[str], bool]] = {
    "target": lambda text: bool(_TARGET.fullmatch(text)) and not _FILES.match(text),
    "expr_str": lambda text: not _EXPRESSION.sub("", text),
    "in_spec": lambda text: not _SPEC.sub("", text),
    "out_spec": lambda text: not _SPEC.sub("", text),
}


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a JSON tree with the key under which it stands."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _texts(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)
