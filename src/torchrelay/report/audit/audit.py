"""An audit: is a run what its receipt says? Random intervals of its steps are replayed and compared."""

import random
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType

from torchrelay.checkpoint.format import WEIGHTS, Contents, read, read_manifest, step_of
from torchrelay.checkpoint.retention import complete
from torchrelay.data.files import Marks
from torchrelay.errors import RelayError, UsageError
from torchrelay.recipe.recipe import Recipe, parse
from torchrelay.report.audit.replay import Replayed, Replayer, first_difference, of_recipe
from torchrelay.run.receipt import Account, Change, number, read_receipt
from torchrelay.run.record import read_files
from torchrelay.run.terminal import Terminal
from torchrelay.train.trainer import Trainer


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
        replayers: what replays its steps.
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
        replayers: "ByRecipe | ByTrainer",
        files: Marks | None = None,
        say: Callable[[str], None] = print,
        reach: int = 1000,
    ) -> None:
        self.account, self.findings, self.steps = read_receipt(run), list[str](), 0
        self._run, self._replayers, self._files = run, replayers, files or {}
        self._say, self._reach = say, reach
        self._checkpoints: dict[int, Contents] = {}
        self._changed: list[int] = []  # the steps of checkpoints whose weights aren't those of the receipt
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
        oldest = 0 if self._replayers.undoes_changes else max(self.account.changed, default=0)
        starts = sorted(each for each in {0, *self._checkpoints} - set(self._changed) if each >= oldest)
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
        changes = [change for step, change in sorted(self.account.changed.items(), reverse=True) if step > start]
        return self._replayers.find(changes, self.account.skipped)

    def _main(self, start: int) -> bool:
        return self._replayer(start).is_main

    def conclude(self, seed: int, devices: int = 1) -> None:
        """Say how many steps are equal.

        Raises:
            RelayError: something differs.
        """
        if self.findings:
            more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
            raise RelayError(f"{self._run} isn't what its receipt says: {self.findings[0]}{more}")
        on = f"{devices} devices" if devices > 1 else "1 device"
        self._say(f"equal: {self.steps:,} of {len(self.account.losses):,} steps were replayed on {on} (--seed {seed})")

    def _find(self, text: str) -> None:
        self.findings.append(text)
        self._say(text)


class ByRecipe:
    """Replays the steps of a run that has a recipe, as it was then.

    Args:
        recipe: the run's.
        code: the module of the user's own with which it was started.
    """

    undoes_changes = True

    def __init__(self, recipe: Recipe, code: ModuleType | None = None) -> None:
        self._recipe, self._code = recipe, code
        self._made: dict[str, Replayer] = {}

    def find(self, changes: Sequence[Change], skipped: Collection[int]) -> Replayer:
        """Return what replays steps from before these changes of the recipe, the latest first."""
        recipe = self._recipe
        for change in changes:
            recipe = undone(recipe, change)
        key = recipe.model_dump_json()
        if key not in self._made:
            self._made[key] = of_recipe(recipe, self._code, skipped)
        return self._made[key]


class ByTrainer:
    """Replays the steps of a run that was started from Python; not those from before a change that was accepted.

    Args:
        build: returns a trainer like the run's, without its folder.
    """

    undoes_changes = False

    def __init__(self, build: Callable[[], Trainer]) -> None:
        self._build = build
        self._made: Replayer | None = None

    def find(self, changes: Sequence[Change], skipped: Collection[int]) -> Replayer:
        """Return what replays steps as the script takes them now."""
        if changes:
            raise RelayError("steps from before a change that was accepted can't be replayed by a trainer of today")
        if self._made is None:
            trainer = self._build()
            if trainer.session.folder is not None:
                raise UsageError(f"the trainer has run={str(trainer.session.folder)!r}: leave it out for an audit")
            trainer.session.terminal = Terminal(quiet=True)
            self._made = Replayer(trainer, skipped)
        return self._made


def audit(
    run: str | Path,
    build: Callable[[], Trainer],
    *,
    sample: int = 20,
    seed: int | None = None,
    reach: int = 1000,
    say: Callable[[str], None] = print,
) -> None:
    """Check a run that was started from Python, as `torchrelay audit` checks others.

    Args:
        run: the run's folder, in which nothing is written.
        build: returns a trainer like the run's, without `run`: the same data, model, seed and settings.
        sample: how many intervals of the receipt to replay.
        seed: of the draw; None: a random one.
        reach: how many steps may be replayed from a checkpoint.
        say: called with each line of what is found.

    Raises:
        RelayError: the run isn't what its receipt says, or has none.
        UsageError: the trainer has a run folder.
    """
    seed = secrets.randbelow(10**6) if seed is None else seed
    found = Audit(Path(run), ByTrainer(build), read_files(Path(run)), say, reach)
    found.check_files()
    found.replay(sample, seed)
    found.conclude(seed)


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
