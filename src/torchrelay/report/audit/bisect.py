"""Why two runs part: their first different step, and which of their differences causes it, by trial."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torchrelay.checkpoint.format import Contents, read, step_of
from torchrelay.checkpoint.retention import complete
from torchrelay.data.files import differences
from torchrelay.errors import RelayError
from torchrelay.recipe.recipe import Recipe, parse
from torchrelay.report.audit.audit import undone
from torchrelay.report.audit.replay import Replayed, of_recipe
from torchrelay.run.identity import differing
from torchrelay.run.receipt import Account, number, read_receipt
from torchrelay.run.record import read_files, read_record

# Sections whose other keys depend on the name, so that they can only be tried together with it.
_WHOLE = ("optimizer", "schedule", "data", "model", "loss")
# Keys that a replay doesn't follow, and that change no step.
_IDLE = (
    "checkpoint.",
    "run.max_steps",
    "run.log_every",
    "run.receipt",
    "run.patience",
    "run.evaluate",
    "parallel.timeout",
)
# From how many points the runs are replayed before only the beginning is left.
_TRIED = 4


@dataclass(frozen=True)
class Side:
    """One of the two runs.

    Attributes:
        name: as the user gave it.
        recipe: the newest.
        account: its receipt.
        files: of its data.
        versions: of packages and code.
        identity: of its newest checkpoint; empty if it has none.
        checkpoints: by step.
        code: the module of the user's own with which it was started.
    """

    name: str
    recipe: Recipe
    account: Account
    files: Mapping[str, str]
    versions: Mapping[str, Any]
    identity: Mapping[str, Any]
    checkpoints: Mapping[int, Path]
    code: ModuleType | None = None

    def recipe_at(self, step: int) -> Recipe:
        """Return the recipe of the steps that follow one, before what resumes changed later."""
        recipe = self.recipe
        for changed_at, change in sorted(self.account.changed.items(), reverse=True):
            if changed_at > step:
                recipe = undone(recipe, change)
        return recipe


def read_side(run: Path, recipe: Recipe, code: ModuleType | None = None) -> Side:
    """Read one of the runs.

    Raises:
        RelayError: it has no receipt.
    """
    checkpoints = {step_of(path): path for path in complete(run / "checkpoints")}
    versions = read_record(run).get("environment", {})
    identity = read(checkpoints[max(checkpoints)]).state["identity"] if checkpoints else {}
    return Side(str(run), recipe, read_receipt(run), read_files(run), versions, identity, checkpoints, code)


@dataclass
class Bisection:
    """Finds what makes two runs part.

    Attributes:
        good: a run.
        bad: another one, which should be like it.
        say: called with each line of what is found.
    """

    good: Side
    bad: Side
    say: Callable[[str], None]
    _starts: dict[int, Contents | None] = field(default_factory=dict)

    def run(self) -> str:
        """Compare the runs, try their differences, and return the verdict."""
        self._show_differences()
        step = parting(self.good.account, self.bad.account)
        if step is None:
            common = len(self.good.account.losses.keys() & self.bad.account.losses.keys())
            return (
                f"the runs agree in all {common:,} steps that both recorded" if common else "no step is on record twice"
            )
        one, other = (side.account.losses.get(step) for side in (self.good, self.bad))
        if one is None or other is None or one == other:
            self.say(f"they part after step {step:,}: the weights differ, the losses up to it don't")
        else:
            self.say(f"they part at step {step:,}: its loss is {number(one)} in GOOD and {number(other)} in BAD")
        return self._cause(step)

    def _show_differences(self) -> None:
        rows = dict(differing(_table(self.good), _table(self.bad)))
        rows |= self._facts()
        width = max([len(name) for name in rows], default=0)
        for name, (good, bad) in rows.items():
            self.say(f"{name:<{width}}  {_shown(good)} in GOOD, {_shown(bad)} in BAD")
        if files := differences(self.good.files, self.bad.files):
            self.say(f"files of the data: {files}")
        if not rows and not files:
            self.say("recipes, data, code and versions are the same")

    def _facts(self) -> dict[str, tuple[Any, Any]]:
        """Return the versions and what else isn't in a recipe, where they differ."""
        found = dict[str, tuple[Any, Any]]()
        for one, other in ((self.good.versions, self.bad.versions), (self.good.identity, self.bad.identity)):
            if one and other:
                found |= {name: (one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other])}
        return {name: pair for name, pair in found.items() if pair[0] != pair[1]}

    def _cause(self, step: int) -> str:
        """Try the differences: from the newest point from which both runs can be replayed."""
        good = bad = False
        for start in self._candidates(step):
            items = self._items(start)
            good = self._leads_to(self.good, (), start, step)
            bad = self._leads_to(self.bad, items, start, step)
            if good and bad:
                self.say(f"both can be replayed here; each trial takes the steps {start + 1:,} to {step:,}")
                found = smallest(list(items), partial(self._tried, start=start, step=step))
                names = " and ".join(f"{name} ({self._pair(name, start)})" for name in found)
                return f"{names} make{'s' * (len(found) == 1)} them part at step {step:,}"
        return self._beyond(good, bad)

    def _candidates(self, step: int) -> list[int]:
        changes = {*self.good.account.changed, *self.bad.account.changed}
        kept = {each for each in self.good.checkpoints if self._is_shared(each)}
        newest = sorted({each for each in {*changes, *kept} if 0 < each < step}, reverse=True)
        return [*newest[:_TRIED], 0]

    def _is_shared(self, step: int) -> bool:
        weights = self.good.account.weights
        return step in weights and weights[step] == self.bad.account.weights.get(step)

    def _items(self, start: int) -> tuple[str, ...]:
        """Return the names of what can be tried: keys of the recipe, a section as a whole, the code."""
        keys = [name for name in self._differing(start) if not name.startswith(_IDLE)]
        whole = [section for section in _WHOLE if f"{section}.name" in keys]
        keys = [key for key in keys if key.partition(".")[0] not in whole or key.endswith(".name")]
        code = [side.versions.get("code_sha256") for side in (self.good, self.bad)]
        return (*keys, *(["--code"] if code[0] != code[1] else []))

    def _differing(self, start: int) -> dict[str, tuple[Any, Any]]:
        return differing(*(_table_of(side.recipe_at(start)) for side in (self.good, self.bad)))

    def _pair(self, name: str, start: int) -> str:
        if name == "--code":
            return "another file"
        good, bad = self._differing(start)[name]
        return f"{_shown(good)} in GOOD, {_shown(bad)} in BAD"

    def _tried(self, items: Sequence[str], start: int, step: int) -> bool:
        found = self._leads_to(self.bad, items, start, step)
        self.say(f"GOOD with BAD's {', '.join(items)}: {'parts as BAD does' if found else 'does not part as BAD does'}")
        return found

    def _leads_to(self, side: Side, items: Sequence[str], start: int, step: int) -> bool:
        """Return whether GOOD with these items of BAD's leads to what a side recorded."""
        try:
            found = self._replay(items, start, step)
        except RelayError:
            return False
        account = side.account
        pairs = [(account.losses, found.losses), (account.weights, found.weights)]
        same = all(then[each] == bits for then, now in pairs for each, bits in now.items() if each in then)
        return same and all(each in found.losses for each in account.losses if start < each <= step)

    def _replay(self, items: Sequence[str], start: int, step: int) -> Replayed:
        table, other = (_table_of(side.recipe_at(start)) for side in (self.good, self.bad))
        for name in items:
            section, _, key = name.partition(".")
            if key == "name" and section in _WHOLE:
                table[section] = other[section]
            elif key:
                table[section] = {**table.get(section, {}), key: other.get(section, {}).get(key)}
        table = {name: {k: v for k, v in values.items() if v is not None} for name, values in table.items()}
        side = self.bad if items else self.good
        code = (self.bad if "--code" in items else self.good).code
        contents = self._start(start)
        replayer = of_recipe(parse(table, "a trial"), code, side.account.skipped, fresh=contents is None)
        if contents is not None:
            replayer.trainer.state.train_step.device.keep_threads(contents.state["identity"]["threads"])
        weighed = [each for each in side.account.weights if start <= each <= step]
        return replayer.replay(contents, step, weighed, fresh_options=bool(items))

    def _start(self, step: int) -> Contents | None:
        """Return GOOD's state after a step: a checkpoint's, or one that is made again from an earlier one."""
        if step not in self._starts:
            if step == 0:
                self._starts[0] = None
            elif step in self.good.checkpoints and self._is_shared(step):
                self._starts[step] = read(self.good.checkpoints[step])
            else:
                before = max(
                    (each for each in self.good.checkpoints if each < step and self._is_shared(each)), default=0
                )
                self._starts[step] = self._replay((), before, step).end
        return self._starts[step]

    def _beyond(self, good: bool, bad: bool) -> str:
        """Return the verdict where no trial can tell: what else differs."""
        files = differences(self.good.files, self.bad.files)
        others = [files] if files else [name for name in self._facts() if not name.startswith("code")]
        hint = f": what differs beside the recipe is {', '.join(others)}" if others else ""
        if good or bad:
            here, gone = ("GOOD", self.bad.name) if good else ("BAD", self.good.name)
            hint = hint or f": see 'torchrelay audit {gone}'"
            return f"only {here} can be replayed here, so the cause isn't in the recipe{hint}"
        return f"neither run can be replayed here, so no difference can be tried{hint}"


def parting(one: Account, other: Account) -> int | None:
    """Return the first step in whose loss two runs differ, or after which their weights do; None if they agree."""
    reached = min(one.last, other.last)
    found = [
        step
        for mine, others in ((one.losses, other.losses), (one.weights, other.weights))
        for step in mine.keys() & others.keys()
        if mine[step] != others[step]
    ]
    found += [step for step in one.skipped ^ other.skipped if step <= reached]
    return min(found, default=None)


def smallest(items: list[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return a smallest part of the items for which something holds, as it does for all of them.

    Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input", 2002: by halves, then by finer parts.
    """
    parts = 2
    while len(items) > 1:
        size = math.ceil(len(items) / parts)
        chunks = [items[i : i + size] for i in range(0, len(items), size)]
        rests = [[item for item in items if item not in chunk] for chunk in chunks] if len(chunks) > 2 else []
        for some in (*chunks, *rests):
            if holds(some):
                parts = 2 if some in chunks else max(parts - 1, 2)
                items = some
                break
        else:
            if parts >= len(items):
                break
            parts = min(2 * parts, len(items))
    return items


def _table(side: Side) -> dict[str, Any]:
    return _table_of(side.recipe)


def _table_of(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True)


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)
