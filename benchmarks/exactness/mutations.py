"""Inputs for `fuzz.py`: valid ones, changed in their structure (JSON, TOML) or in their bytes, by a seed."""

import json
import random
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

Tree = Any  # what JSON and TOML hold

# Texts that no value can stand for: a tree has their names, and writing it puts them in.
_RAW = {
    "@deep-lists@": "[" * 5_000 + "]" * 5_000,
    "@deep-tables@": '{"a":' * 5_000 + "0" + "}" * 5_000,
    "@digits@": "9" * 5_000,
    "@exponent@": "1e999999999",
    "@many@": "[" + "[]," * 20_000 + "[]]",
}
_MARKERS = ("$tensor", "$float", "$tuple", "$items", "name", "step", "checksum", "bytes", "__class__", "")
_NUMBERS = (0, -1, 1, 2**31, 2**32, 2**63, -(2**63) - 1, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"))
_TEXTS = (
    *("", "0", "nan", "-1", "1e9", "true", "\0", "\n", "\x1b[2J", "\ud800", "\U0001f600", "e\u0301", "A" * 100_000),
    *("../../etc/passwd", "/dev/zero", "~", "10 steps", "1 epoch", "10 min", "5%", "9" * 400 + " steps", "0 steps"),
    *("__import__('os').system('true')", "{0.__class__}", "%s%n", "$(true)", "sgd", "flip", "balanced", "auto"),
    *_RAW,
)
_EMPTY: Sequence[Callable[[], Tree]] = (list, dict, lambda: [[]], lambda: {"": 0}, lambda: None, lambda: True)
_BYTES = (b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xed\xa0\x80", b"\xff\xfe", b'"', b"[", b"{", b"\n")


@dataclass(frozen=True)
class Form:
    """How a target's inputs become trees and bytes again.

    Args:
        decode: returns the tree of a valid input.
        encode: returns the bytes of a tree.
    """

    decode: Callable[[bytes], Tree]
    encode: Callable[[Tree], bytes]


def write_json(tree: Tree) -> bytes:
    return _with_raw(json.dumps(tree))


def write_toml(tree: Tree) -> bytes:
    return _with_raw(tomli_w.dumps(_without_none(tree)))


def _with_raw(text: str) -> bytes:
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def _without_none(tree: Tree) -> Tree:
    if isinstance(tree, dict):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return [_without_none(value) for value in tree if value is not None] if isinstance(tree, list) else tree


def mutated(chance: random.Random, corpus: list[bytes], form: Form | None) -> bytes:
    """Return a valid input with one to three changes; one in fifty is a valid input as it is."""
    data = chance.choice(corpus)
    way = chance.random()
    if form is not None and way < 0.65:
        tree = form.decode(data)
        for _ in range(chance.randint(1, 3)):
            tree = change_tree(chance, tree)
        try:
            data = form.encode(tree)
        except (TypeError, ValueError, OverflowError, UnicodeError):
            return data  # this form has no such value
    if 0.6 < way < 0.98:
        for _ in range(chance.randint(1, 3)):
            data = change_bytes(chance, data, chance.choice(corpus))
    return data


def change_bytes(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """Return bytes with one change: a bit, a byte, an odd value, a part removed, doubled or taken from elsewhere."""
    # Headers stand at the start.
    at = chance.randrange(min(len(data), chance.choice((16, 64, 512, 1 << 30))) + 1)
    length = chance.choice((1, 2, 4, 8, 64))
    match chance.randrange(8):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + data[at : at + length] * chance.choice((2, 3, 50)) + data[at + length :]
        case 3:
            start = chance.randrange(len(other) + 1)
            return data[:at] + other[start : start + length] + data[at:]
        case 4:
            odd = chance.choice(_BYTES)
            return data[:at] + odd + data[at + len(odd) * chance.randrange(2) :]
        case 5:
            return data[:at] + chance.randbytes(length) + data[at + length :]
    flipped = bytes((data[at] ^ 1 << chance.randrange(8),)) if at < len(data) else b"\0"
    return data[:at] + flipped + data[at + 1 :]


def change_tree(chance: random.Random, tree: Tree) -> Tree:
    """Return a tree with one change: a value of another type or size, a key removed, renamed or added, a list grown."""
    places = [*_places(tree)]
    if not places:
        return odd_value(chance)
    holder, key = chance.choice(places)
    match chance.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice((*_MARKERS, f"{key}s", *_TEXTS[:13]))] = holder.pop(key)
        case 2 if isinstance(holder, dict):
            holder[chance.choice(_MARKERS)] = odd_value(chance)
        case 2 if isinstance(holder, list):
            holder.extend([holder[key]] * chance.choice((1, 7, 1000 if len(repr(holder[key])) < 1000 else 1)))
        case 3:
            other, name = chance.choice(places)
            holder[key] = json.loads(json.dumps(other[name], default=str)) if name in _keys(other) else None
        case _:
            holder[key] = odd_value(chance)
    return tree


def odd_value(chance: random.Random) -> Tree:
    """Return a value that a reader may not expect."""
    match chance.randrange(4):
        case 0:
            return chance.choice(_NUMBERS)
        case 1:
            return {chance.choice(_MARKERS): chance.choice((*_NUMBERS, *_TEXTS))}
        case 2:
            return chance.choice(_EMPTY)()
    return chance.choice(_TEXTS)


def _keys(holder: Any) -> Any:
    return holder if isinstance(holder, dict) else range(len(holder))


def _places(tree: Tree) -> Iterator[tuple[MutableMapping[Any, Any] | MutableSequence[Any], Any]]:
    """Yield where each value of a tree stands: its holder and its key or number."""
    if isinstance(tree, dict | list):
        for key in _keys(tree):
            yield tree, key
            yield from _places(tree[key])
