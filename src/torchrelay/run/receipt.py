"""Step 1: the receipt: a hash chain over a run's losses and weights, by which anybody can check how it came about.

`receipt.jsonl` has a line wherever metrics.jsonl has one for steps, and one for each checkpoint: the losses of the
steps since the line before (and the gradient's norms, where they are computed), as the bits of big-endian float64
numbers in hexadecimal; the SHA-256 of the checkpoint's weights; and `chain`, the SHA-256 of the line without it and of
the chain before. With `run.receipt_every` the weights are hashed between checkpoints, too. No clock, no machine and no
number of devices is in it: a run that was interrupted has the bytes of one that wasn't. A line with `format` says that
the record begins after its step: at 0, or where an older run was resumed.
"""

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchrelay.errors import RelayError, explained

NAME = "receipt.jsonl"
FORMAT = 1
Change = Mapping[str, Sequence[Any]]  # by a recipe's key, the value before and after


@dataclass(frozen=True)
class Tail:
    """The last steps of a run.

    Attributes:
        losses: theirs.
        norms: of their gradients; none if they weren't computed.
        skipped: the steps of the run that were left out.
    """

    losses: Sequence[float]
    norms: Sequence[float] = ()
    skipped: Collection[int] = ()


class Receipt:
    """Writes a run's receipt; call `begin` or `rewind` first.

    The hash of a checkpoint's weights is known once it is on disk; the lines that follow wait for it in memory.

    Args:
        path: the file.
        fresh: whether to empty it.
    """

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self._file = path.open("w" if fresh else "a", encoding="utf-8")
        self._chain, self._step, self._weighed, self._changed = "", 0, -1, ""
        self._waiting: list[dict[str, Any]] = []
        self._hashes: dict[int, str] = {}  # by step; of checkpoints on disk

    def begin(self, step: int = 0) -> None:
        """Begin the record after a step."""
        if not step:
            self._cut([])
        self._put({"step": step, "format": FORMAT})

    def add(
        self,
        step: int,
        tail: Tail,
        *,
        weights: bool | str = False,
    ) -> None:
        """Add the steps since the line before.

        Args:
            step: the last one.
            tail: the last steps, which may be more than those since the line before.
            weights: the SHA-256 of this step's; or whether a checkpoint of them is being saved, whose hash `know` will
                be told.
        """
        left_out = sorted(each for each in tail.skipped if self._step < each <= step)
        count = step - self._step - len(left_out)
        if (weights and self._weighed == step) or not (count or weights):
            return
        body: dict[str, Any] = {"step": step, "losses": _packed(tail.losses, count)}
        if tail.norms:
            body["norms"] = _packed(tail.norms, count)
        if left_out:
            body["skipped"] = left_out
        self._put(body | ({"weights": weights if isinstance(weights, str) else None} if weights else {}))

    def know(self, step: int, weights: str) -> None:
        """Learn the SHA-256 of the weights of a checkpoint that is on disk; from any thread."""
        self._hashes[step] = weights

    def change(self, step: int, changed: Change) -> None:
        """Add what was changed in the recipe when the run was resumed after a step, to another result."""
        body = {"step": step, "changed": {name: list(values) for name, values in changed.items()}}
        if changed and self._changed != json.dumps(body):
            self._put(body)

    def rewind(self, step: int, tail: Tail, weights: str | None) -> None:
        """Return to a checkpoint: cut what follows its step.

        Args:
            step: the checkpoint's.
            tail: the last steps before it.
            weights: the SHA-256 of its weights; None if an undisturbed run has no such checkpoint.
        """
        with explained(f"read {self.path}"):
            texts = self.path.read_bytes().splitlines(keepends=True)
        kept: list[bytes] = []
        for text in texts:
            line = _parsed(text)
            if line is None or line["step"] > step:
                break
            kept.append(text)
        self._cut(kept)
        missing = step - self._step - sum(self._step < each <= step for each in tail.skipped)
        if not kept or missing > len(tail.losses):
            self.begin(step)
        if weights is not None:
            self.add(step, tail, weights=True)
            self.know(step, weights)
            self.settle()

    def settle(self) -> None:
        """Write the lines that no longer wait for a checkpoint."""
        while self._waiting:
            body = self._waiting[0]
            if "weights" in body and body["weights"] is None:
                if body["step"] not in self._hashes:
                    return
                body["weights"] = self._hashes.pop(body["step"])
            self._waiting.pop(0)
            self._chain = chained(self._chain, body)
            with explained(
                f"write {self.path}"
            ):  # a line that fails stays in the file's buffer: not to be written twice
                self._file.write(json.dumps(body | {"chain": self._chain}) + "\n")
                self._file.flush()

    def flush(self) -> None:
        """Wait until it is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what can be written, and close the file."""
        try:
            with contextlib.suppress(RelayError):
                self.settle()
            self.settle()  # what is left, if the disk failed once
        finally:
            self._file.close()

    def _put(self, body: dict[str, Any]) -> None:
        self._note(body)
        self._waiting.append(body)
        self.settle()

    def _note(self, body: Mapping[str, Any]) -> None:
        self._step = body["step"]
        if "weights" in body:
            self._weighed = body["step"]
        self._changed = json.dumps({"step": body["step"], "changed": body["changed"]}) if "changed" in body else ""

    def _cut(self, kept: Sequence[bytes]) -> None:
        with explained(f"cut {self.path} to the checkpoint's lines"):
            os.truncate(self.path, sum(map(len, kept)))
            self._file.seek(0, os.SEEK_END)
        self._chain, self._step, self._weighed, self._changed = "", 0, -1, ""
        self._waiting.clear()
        self._hashes.clear()
        for text in kept:
            line = json.loads(text)
            self._chain = line["chain"]
            self._note(line)


def chained(before: str, body: Mapping[str, Any]) -> str:
    """Return the chain after a line."""
    return hashlib.sha256((before + json.dumps(body)).encode()).hexdigest()


def _packed(numbers: Sequence[float], count: int) -> str:
    last = numbers[len(numbers) - count :]
    return struct.pack(f">{len(last)}d", *last).hex()


def _parsed(text: bytes) -> dict[str, Any] | None:
    """Return a line, or None if it isn't whole."""
    try:
        line = json.loads(text)
        _ = line["chain"] + str(line["step"] + 0)
    except (ValueError, TypeError, KeyError):
        return None
    return line if text.endswith(b"\n") else None


# ------------------------------------------------------------------------------------------------ reading


@dataclass
class Account:
    """What a receipt says.

    Attributes:
        losses: the bits of each step's loss, as 16 hexadecimal digits.
        norms: those of the gradient's norm, where it was computed.
        skipped: the steps that were left out.
        weights: the SHA-256 of each checkpoint's weights, by its step.
        spans: the steps of each line that has some, as (the step before, the last one).
        begins: the steps after which the record begins.
        changed: what was changed in the recipe after a step.
        damage: what is wrong with the chain; "" if it holds.
        chain: its end, which stands for the whole run.
    """

    losses: dict[int, str] = field(default_factory=dict)
    norms: dict[int, str] = field(default_factory=dict)
    skipped: set[int] = field(default_factory=set)
    weights: dict[int, str] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    changed: dict[int, Change] = field(default_factory=dict)
    damage: str = ""
    chain: str = ""

    @property
    def last(self) -> int:
        """The last step on record."""
        return max([*self.losses, *self.weights, 0])


def read_receipt(run: Path) -> Account:
    """Read a run's receipt and check its chain; what follows a damaged line is read as well.

    Raises:
        RelayError: there is none.
    """
    path = run / NAME
    if not path.is_file():
        raise RelayError(f"{run} has no {NAME}: an earlier release trained it; a resume begins one")
    account, before = Account(), 0
    with explained(f"read {path}"):
        texts = path.read_bytes().splitlines(keepends=True)
    for number, text in enumerate(texts, start=1):
        line = _parsed(text)
        if line is None:
            # A process that was killed may have left half a line at the end.
            if number < len(texts) or text.endswith(b"\n"):
                account.damage = account.damage or f"line {number} isn't one of a receipt"
            continue
        given = line.pop("chain")
        where = f"line {number}, of steps {before + 1:,} to {line['step']:,}," if line["step"] > before else ""
        if chained(account.chain, line) != given and not account.damage:
            account.damage = f"{where or f'line {number}, of step {before:,},'} doesn't match the chain"
        account.chain = given
        try:
            _take(account, line, before)
        except (ValueError, TypeError) as error:
            account.damage = account.damage or f"line {number} can't be read ({error})"
        before = line["step"]
    return account


def _take(account: Account, line: Mapping[str, Any], before: int) -> None:
    step, skipped = line["step"], line.get("skipped", ())
    account.skipped.update(skipped)
    if "format" in line:
        account.begins.append(step)
    if "changed" in line:
        account.changed[step] = line["changed"]
    if line.get("losses"):
        steps = [each for each in range(before + 1, step + 1) if each not in skipped]
        for name, into in (("losses", account.losses), ("norms", account.norms)):
            bits = line.get(name, "")
            into.update(
                zip(steps, [bits[i : i + 16] for i in range(0, len(bits), 16)], strict=bool(bits) or name == "losses")
            )
        account.spans.append((before, step))
    if "weights" in line:
        account.weights[step] = line["weights"]


def number(bits: str) -> float:
    """Return the number whose bits these are."""
    value: float = struct.unpack(">d", bytes.fromhex(bits))[0]
    return value
