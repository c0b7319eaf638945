"""A sweep's folder, which several processes and hosts share: its lock, who trains which trial, and Optuna's journal.

An Optuna trial that is pruned is closed for ever, so a trial that pauses at a rung stays "running" there, with its
metric at each rung as an intermediate value (Optuna's step is the rung's number). Optuna's samplers see a copy in which
it is pruned. A claim is a lock that the operating system releases when its holder ends, so a dead worker's trial is
free at once, and no clock decides.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from portalocker import AlreadyLocked, LockException

from torchrelay import rng
from torchrelay.errors import RelayError, UsageError, explained, intact
from torchrelay.report.sweep import space
from torchrelay.report.sweep.plan import Plan
from torchrelay.report.sweep.rungs import Trial
from torchrelay.run.lock import is_locked, lock

if TYPE_CHECKING:
    import optuna

_STUDY = "sweep"
_TARGET, _ATTEMPTS, _FROM, _REASON, _STOP = "target", "attempts", "from", "reason", "stop-"


def need_optuna() -> None:
    """Import Optuna, without its lines about each trial.

    Raises:
        UsageError: it isn't installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError("torchrelay sweep needs Optuna: pip install 'torchrelay[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class Claim:
    """The right to train a trial, until it is released or the process ends.

    Args:
        file: the open lock file.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def release(self) -> None:
        """Let others train it."""
        self._file.close()


class Journal:
    """The trials of a sweep, in Optuna's journal in its folder; all but `hold` is called while it is held.

    Args:
        folder: the sweep's.
        plan: what it does.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        need_optuna()
        self.folder, self._plan = folder, plan
        self._file, self._claims = folder / "journal", folder / "claims"
        with explained(f"make {self._claims}"):
            self._claims.mkdir(parents=True, exist_ok=True)
        with self.hold():
            self._study = self._open()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the sweep's lock: what is read in this context is true until its end.

        Raises:
            RelayError: the file system has no locks.
        """
        with hold(self.folder):
            self._cut_torn_line()
            yield

    def trials(self) -> list[Trial]:
        """Return the trials by number.

        Raises:
            RelayError: the journal is damaged.
        """
        with self._intact():
            return [_trial(each, self._plan.rungs) for each in self._study.get_trials(deepcopy=False)]

    def claim(self, number: int) -> Claim | None:
        """Return the claim of a trial; None if somebody else trains it."""
        path = self._claims / f"{number:03d}"
        if is_locked(self.folder / f"trial-{number:03d}" / "lock"):
            return None  # by hand: torchrelay resume
        with explained(f"write {path}"):
            file = path.open("a+", encoding="utf-8")
        try:
            lock(file, wait=False)
        except AlreadyLocked:
            file.close()
            return None
        return Claim(file)

    def begin(self, values: Mapping[str, space.Value]) -> int:
        """Add a trial, and return its number."""
        import optuna

        distributions = _distributions(self._plan.vary)
        state = optuna.trial.TrialState.RUNNING
        attributes = {_TARGET: 1, _ATTEMPTS: 0}
        self._study.add_trial(
            optuna.create_trial(state=state, params=dict(values), distributions=distributions, user_attrs=attributes)
        )
        return len(self._study.get_trials(deepcopy=False)) - 1

    def assign(self, trial: Trial, rung: int, step: int) -> None:
        """Write down that a trial is trained to a rung, from a checkpoint of so many steps."""
        again = trial.target == rung and trial.begun_at == step
        self._set(trial.number, {_TARGET: rung, _FROM: step, _ATTEMPTS: trial.attempts + 1 if again else 1})

    def put_back(self, number: int) -> None:
        """Write down that a trial was stopped by a signal, which is no failed attempt."""
        self._set(number, {_ATTEMPTS: 0})

    def report(self, number: int, rung: int, metric: float, stop: Mapping[str, Any]) -> None:
        """Write down a trial's metric at a rung; at the last one, the trial is done."""
        import optuna

        identity = self._identity(number)
        # The attribute first: a rung with a metric has one.
        self._set(number, {f"{_STOP}{rung}": dict(stop), _ATTEMPTS: 0})
        storage = self._study._storage
        storage.set_trial_intermediate_value(identity, rung, metric)
        if rung == self._plan.rungs:
            storage.set_trial_state_values(identity, optuna.trial.TrialState.COMPLETE, [metric])

    def fail(self, number: int, reason: str) -> None:
        """Write down that a trial has failed, and why."""
        import optuna

        self._set(number, {_REASON: reason})
        self._study._storage.set_trial_state_values(self._identity(number), optuna.trial.TrialState.FAIL)

    def draw(self, trials: Sequence[Trial]) -> dict[str, space.Value] | None:
        """Return the values of the next trial: a function of the seed, its number and what is known of the others.

        Args:
            trials: all there are.

        Returns:
            None if a grid has no more.
        """
        import optuna

        plan, number = self._plan, len(trials)
        if plan.sampler == "grid":
            combinations = space.grid(plan.vary)
            return combinations[number] if number < len(combinations) else None
        seed = rng.seed_for(plan.seed, "sweep", number) % 2**32
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if plan.sampler == "random"
            else optuna.samplers.TPESampler(seed=seed)
        )
        study = self.seen_by_optuna(trials, sampler)
        drawn = study.ask(_distributions(plan.vary)).params
        return {each.key: drawn[each.key] for each in plan.vary}

    def seen_by_optuna(
        self, trials: Sequence[Trial], sampler: "optuna.samplers.BaseSampler | None" = None
    ) -> "optuna.Study":
        """Return a study in memory with trials as Optuna's algorithms understand them.

        A trial that pauses at a rung is pruned there; one that failed is pruned before the first, the worst of all.
        """
        import optuna

        states, distributions = optuna.trial.TrialState, _distributions(self._plan.vary)
        study = optuna.create_study(direction=self._plan.direction, sampler=sampler)
        for each in trials:
            state = states.COMPLETE if each.state == "done" else states.PRUNED
            if each.state == "open" and not each.reached:
                state = states.RUNNING
            study.add_trial(
                optuna.create_trial(
                    state=state,
                    value=each.metric if each.state == "done" else None,
                    params=dict(each.values),
                    distributions=distributions,
                    intermediate_values={} if each.state == "failed" else dict(each.reached),
                )
            )
        return study

    def _open(self) -> "optuna.Study":
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        class Held(JournalFileOpenLock):
            """Nothing to do: the sweep's lock is held wherever the journal is written."""

            def acquire(self) -> bool:
                return True

            def release(self) -> None:
                return

        with self._intact():
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(self._file), Held(str(self._file))))
            if _STUDY in optuna.get_all_study_names(storage):  # `load_if_exists` would write a line each time
                return optuna.load_study(study_name=_STUDY, storage=storage)
            return optuna.create_study(storage=storage, study_name=_STUDY, direction=self._plan.direction)

    @contextmanager
    def _intact(self) -> Iterator[None]:
        with (
            explained(f"read {self._file}"),
            intact(self._file, "restore it from a copy; the trials' folders are runs of their own"),
        ):
            yield

    def _cut_torn_line(self) -> None:
        """Remove a last line that a process which was killed, or a full disk, has left half written."""
        if not self._file.exists():
            return
        with explained(f"repair {self._file}"), self._file.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**16))
            tail = file.read()
            if tail and not tail.endswith(b"\n"):
                file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)

    def _identity(self, number: int) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _set(self, number: int, values: Mapping[str, Any]) -> None:
        identity = self._identity(number)
        with explained(f"write {self._file}"):
            for key, value in values.items():
                self._study._storage.set_trial_user_attr(identity, key, value)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder.

    Raises:
        RelayError: the file can't be written, or the file system has no locks.
    """
    path = folder / "sweep.lock"
    with ExitStack() as stack:
        with explained(f"write {path}", "choose another folder by --run"):
            file = stack.enter_context(path.open("a+", encoding="utf-8"))
        try:
            lock(file, wait=True)
        except LockException as error:
            raise RelayError(f"can't lock {path}: {error}; put the sweep on a file system with locks") from error
        yield


def _distributions(vary: Sequence[space.Parameter]) -> "dict[str, optuna.distributions.BaseDistribution]":
    from optuna import distributions

    found: dict[str, distributions.BaseDistribution] = {}
    for each in vary:
        if each.choices:
            found[each.key] = distributions.CategoricalDistribution(each.choices)
        elif isinstance(each.low, int) and isinstance(each.high, int):
            found[each.key] = distributions.IntDistribution(each.low, each.high, log=each.log)
        elif each.low is not None and each.high is not None:
            found[each.key] = distributions.FloatDistribution(each.low, each.high, log=each.log)
    return found


def _trial(found: "optuna.trial.FrozenTrial", rungs: int) -> Trial:
    name, known = found.state.name, found.user_attrs
    is_done = name == "COMPLETE" or rungs in found.intermediate_values
    return Trial(
        number=found.number,
        values=found.params,
        state="failed" if name == "FAIL" else "done" if is_done else "open",
        reached=dict(found.intermediate_values),
        target=known.get(_TARGET, 1),
        attempts=known.get(_ATTEMPTS, 0),
        begun_at=known.get(_FROM, 0),
        reason=known.get(_REASON, ""),
        stops={rung: known.get(f"{_STOP}{rung}", {}) for rung in found.intermediate_values},
    )
