"""Step 1: the run's identity: everything that its bits depend on.

It is part of every checkpoint and compared at a resume. A difference that changes the result is refused; one that may
change only its last bits is a warning.
"""

from collections.abc import Callable
from typing import Any

from torchrelay.errors import RelayError
from torchrelay.settings import rename_keys

Identity = dict[str, str | int | bool]

_MUST_AGREE = {
    "data": "the training data",
    "validation_data": "the validation data",
    "test_data": "the test data",
    "samples": "the number of training samples",
    "seed": "run.seed",
    "batch_size": "data.batch_size",
    "replicas": "parallel.replicas",
}

# Recipe keys that may change at a resume: how long, how often, from where, but not what is computed.
_MAY_CHANGE = {
    *("run.epochs", "run.steps", "run.max_steps", "run.patience"),
    *("run.evaluate_every", "run.evaluate_batches", "run.log_every", "run.receipt_every", "run.notify", "run.trackers"),
    "run.report",
    *("run.on_spike", "run.spike_threshold", "run.max_skipped"),
    *("data.root", "data.workers", "data.download", "data.cache", "data.cache_dir", "model.pretrained"),
    *("device.name", "device.threads", "checkpoint.every", "checkpoint.keep", "checkpoint.keep_best"),
    *("parallel.kind", "parallel.timeout"),
}


def compare(
    saved: dict[str, Any], now: Identity, accept_changes: bool, data_changes: Callable[[], str] = str
) -> list[str]:
    """Compare a checkpoint's identity with the current one and return warnings.

    Args:
        saved: the checkpoint's identity.
        now: the current one.
        accept_changes: whether a difference that changes the result is only a warning.
        data_changes: returns how the data's files changed, or "" if that is unknown.

    Raises:
        RelayError: something differs that changes the result, and `accept_changes` is off.
    """
    warnings = []
    for name, value in now.items():
        if name not in saved or saved[name] == value:
            continue
        change = f"{_MUST_AGREE.get(name, name)} was {saved[name]} and is {value}"
        if name.endswith("data") and (files := data_changes()):
            change = f"{_MUST_AGREE[name]} changed: {files}"
        if name in _MUST_AGREE and not accept_changes:
            raise RelayError(
                f"this run can't continue to the same result: {change}; undo it, or resume with --accept-changes"
            )
        warnings.append(f"{change}: the result may differ from an uninterrupted run's")
    return warnings


def compare_recipes(saved: dict[str, Any], now: dict[str, Any], accept_changes: bool) -> list[str]:
    """Compare the recipe that a run was started with and the current one by section, and return the changes.

    Raises:
        RelayError: a change would lead to another result, and `accept_changes` is off.
    """
    changes, refused = [], []
    code, code_now = (table.get("environment", {}).get("code_sha256") for table in (saved, now))
    if code != code_now and code is not None:
        changes.append("the file of --code is not the one that the run was started with")
        refused.append(changes[0])
    for name, (before, after) in differing(saved, now).items():
        change = f"{name} was {'unset' if before is None else before} and is {'unset' if after is None else after}"
        changes.append(change)
        if name not in _MAY_CHANGE:
            refused.append(change)
    if refused and not accept_changes:
        raise RelayError(
            f"this run can't continue to the same result: {', '.join(refused)}; undo it, or resume with "
            "--accept-changes"
        )
    return changes


def differing(one: dict[str, Any], other: dict[str, Any], *, result: bool = False) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two recorded recipes differ, with both values; None: unset.

    Args:
        one: a recipe as recipe.toml has it.
        other: another.
        result: whether only keys count by which the result changes.
    """
    one, other = rename_keys(one, warn=False), rename_keys(other, warn=False)
    return {
        name: values
        for section in sorted({*one, *other} - {"environment"})
        for key in sorted({*one.get(section, {}), *other.get(section, {})})
        if (values := (one.get(section, {}).get(key), other.get(section, {}).get(key)))[0] != values[1]
        and not ((name := f"{section}.{key}") in _MAY_CHANGE and result)
    }
