"""An audit: is a run what its receipt says? Random intervals of its steps are replayed and compared."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType

from torchrelay.checkpoint.format import WEIGHTS, Contents, read, read_manifest, step_of
from torchrelay.checkpoint.retention import complete
from torchrelay.data.files import Marks
from torchrelay.errors import RelayError
from torchrelay.recipe.recipe import Recipe, parse
from torchrelay.report.audit.replay import Replayed, Replayer, first_difference
from torchrelay.run.receipt import Account, Change, number, read_receipt


@dataclass(frozen=True, order=True)
class Interval:
    """Steps of one line of the receipt: those after `after` up to `last`, replayed from `start`."""

    start: int
    after: int
    last: int

    def __str__(self) -> str:
        return f"steps {self.after + 1:,} to {self.last:,}"


def draw(
    account: Account, starts: Sequence[int], sample: int, reach: int, seed: int
) -> tuple[list[Interval], list[Interval]]:
    """Draw the intervals to replay.

    Args:
        account: the receipt.
        starts: the steps of the checkpoints to start from; 0 is the beginning.
        sample: how many to draw.
        reach: how many steps may be replayed from a checkpoint.
        seed: of the draw.

    Returns:
        Those drawn, in order, and those that no checkpoint reaches.
    """
    intervals = []
    for after, last in account.spans:
        changes = [step for step in account.changed if step < last]
        # A changed recipe counts from its step on: what lies before it can't lead to what lies behind.
        usable = [each for each in starts if each <= after and not any(each < change for change in changes)]
        intervals.append(Interval(max(usable, default=-1), after, last))
    near = [each for each in intervals if each.start >= 0 and each.last - each.start <= reach]
    drawn = random.Random(seed).sample(near, min(sample, len(near)))
    return sorted(drawn), [each for each in intervals if each not in near]


class Audit:
    """Compares a run with its receipt.

    Args:
        run: its folder, in which nothing is written.
        recipe: the run's.
        code: the module of the user's own with which it was started.
        files: of its data, as they were.
        say: called with each line of what is found.
        reach: how many steps may be replayed from a checkpoint.

    Attributes:
        findings: what differs.
        steps: how many steps were replayed and are equal.

    Raises:
        RelayError: the run has no receipt.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        code: ModuleType | None = None,
        files: Marks | None = None,
        say: Callable[[str], None] = print,
        reach: int = 1000,
    ) -> None:
        self.account, self.findings, self.steps = read_receipt(run), list[str](), 0
        self._run, self._recipe, self._code, self._files = run, recipe, code, files or {}
        self._say, self._reach = say, reach
        self._checkpoints: dict[int, Contents] = {}
        self._changed: list[int] = []  # the steps of checkpoints whose weights aren't those of the receipt
        self._replayers: dict[str, Replayer] = {}
        self._noted: set[str] = set()

    def check_files(self) -> None:
        """Check the receipt's chain, and each checkpoint's checksums and weights against the receipt."""
        account = self.account
        if account.damage:
            self._find(f"the receipt was changed: {account.damage}")
        else:
            self._say(f"the chain of {len(account.losses):,} steps holds: {account.chain}")
        for begins in account.begins:
            if begins:
                self._say(f"there is no record of what led to step {begins:,}: an older release trained it")
        for path in complete(self._run / "checkpoints"):
            step = step_of(path)
            try:
                self._checkpoints[step] = read(path)
            except RelayError as error:
                self._find(str(error))
                continue
            written = _weights_of(path)
            if account.weights.get(step, written) != written:
                self._changed.append(step)
                self._find(f"the checkpoint of step {step:,} has other weights than the receipt says")
        if self._checkpoints and not self._changed:
            steps = ", ".join(f"{step:,}" for step in self._checkpoints)
            self._say(f"the checkpoints of step {steps} are whole, and their weights are those of the receipt")

    def replay(self, sample: int, seed: int) -> None:
        """Replay random intervals, and those that end in a checkpoint with other weights."""
        starts = sorted({0, *self._checkpoints} - set(self._changed))
        drawn, far = draw(self.account, starts, sample, self._reach, seed)
        every, _ = draw(self.account, starts, len(self.account.spans), self._reach, seed)
        wanted = sorted({*drawn, *(each for each in every if each.last in self._changed)})
        for start, intervals in groupby(wanted, key=lambda each: each.start):
            self._replay(start, list(intervals))
        if far:
            steps = sum(each.last - each.after for each in far)
            self._say(
                f"{steps:,} steps were out of reach: no checkpoint that is kept lies at most {self._reach:,} steps "
                "before them; --reach"
            )

    def _replay(self, start: int, intervals: Sequence[Interval]) -> None:
        last, begin = max(each.last for each in intervals), self._checkpoints.get(start) if start else None
        place = f"from the checkpoint of step {start:,}" if start else "from the beginning"
        found = self._replayed(start, last)
        wrong = self._first_wrong(found, start, last)
        for each in intervals:
            if wrong is None or each.last < wrong:
                self._say(f"{each}, {place}: equal")
                self.steps += each.last - each.after
            elif each.after < wrong:
                self._say(f"{each}, {place}: different from step {wrong:,} on")
            else:
                self._say(f"{each}, {place}: different, as is step {wrong:,} before them")
        end = self._checkpoints.get(last)
        apart = first_difference(found.end, end) if end is not None and self._main(start) else ""
        if wrong is not None and wrong in found.losses and (text := self._of_numbers(found, wrong)):
            self._find(f"{text}{self._of_start(start) if begin is not None else ''}")
        elif wrong is not None:
            self._find(f"the weights after step {wrong:,} aren't those of the receipt")
        elif apart:
            self._find(f"the checkpoint of step {last:,} isn't what the steps before it lead to: first in {apart}")
        elif end is not None:
            self._say(f"the checkpoint of step {last:,} is what the steps before it lead to, to the last bit")

    def _of_numbers(self, found: Replayed, step: int) -> str:
        """Return how a step's loss or gradient norm differs; "" if neither does."""
        for what, then, now in (
            ("loss", self.account.losses, found.losses),
            ("norm of the gradient", self.account.norms, found.norms),
        ):
            if step in then and step in now and then[step] != now[step]:
                return f"the {what} of step {step:,} was {number(then[step])} and is {number(now[step])}"
        return ""

    def _of_start(self, start: int) -> str:
        """Return whether the checkpoint from which steps differ is what the steps before it lead to."""
        before = max((each for each in {0, *self._checkpoints} if each < start), default=-1)
        if start - before > self._reach or any(before < step < start for step in self.account.changed):
            return ""
        found = self._replayed(before, start)
        if not self._main(start):
            return ""
        if self._first_wrong(found, before, start) is not None:
            return ", as do steps before its checkpoint"
        apart = first_difference(found.end, self._checkpoints[start])
        if apart:
            return f": the checkpoint of step {start:,} isn't what the steps before it lead to, first in {apart}"
        return (
            f": the checkpoint of step {start:,} is what the steps before it lead to, so the steps behind it were "
            "taken with other data, another recipe or another machine"
        )

    def _first_wrong(self, found: Replayed, start: int, last: int) -> int | None:
        """Return the first step whose loss, gradient norm or weights differ."""
        account, wrong = self.account, []
        for then, now in ((account.losses, found.losses), (account.norms, found.norms)):
            wrong += [step for step, bits in now.items() if then.get(step, bits) != bits]
        wrong += [step for step, bits in account.losses.items() if start < step <= last and step not in found.losses]
        wrong += [step for step, bits in found.weights.items() if account.weights.get(step, bits) != bits]
        return min(wrong, default=None)

    def _replayed(self, start: int, last: int) -> Replayed:
        replayer, contents = self._replayer(start), self._checkpoints.get(start) if start else None
        known = contents or next(iter(self._checkpoints.values()), None)
        for note in replayer.differences(known, self._files) if known is not None else ():
            if note not in self._noted:
                self._noted.add(note)
                self._say(f"not as it was: {note}")
        weighed = [step for step in self.account.weights if start <= step <= last and (step > start or not start)]
        return replayer.replay(contents, last, weighed, fresh_options=start in self.account.changed)

    def _replayer(self, start: int) -> Replayer:
        recipe = self._recipe
        for step, change in sorted(self.account.changed.items(), reverse=True):
            if step > start:
                recipe = undone(recipe, change)
        key = recipe.model_dump_json()
        if key not in self._replayers:
            self._replayers[key] = Replayer(recipe, self._code, self.account.skipped)
        return self._replayers[key]

    def _main(self, start: int) -> bool:
        return self._replayer(start).is_main

    def _find(self, text: str) -> None:
        self.findings.append(text)
        self._say(text)


def undone(recipe: Recipe, change: Change) -> Recipe:
    """Return a recipe with the values from before a change."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    for name, (before, _) in change.items():
        section, _, key = name.partition(".")
        table[section] = {**table.get(section, {}), key: before}
    return parse({section: dict(_given(values)) for section, values in table.items()}, "the receipt")


def _given(values: dict[str, object]) -> Iterator[tuple[str, object]]:
    return ((key, value) for key, value in values.items() if value is not None)


def _weights_of(path: Path) -> str:
    return read_manifest(path).files[WEIGHTS].sha256
