"""Schedules: PyTorch's rates as pure functions of the step, and a plateau that resumes."""

import json
import math
import time
import warnings

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler

from torchrelay.checkpoint.format import pack, unpack
from torchrelay.optim import (
    Constant,
    Cosine,
    Linear,
    MultiStep,
    OneCycle,
    Plateau,
    ScheduleSettings,
    Step,
)

STEPS_PER_EPOCH, EPOCHS, LR = 7, 30, 0.3
TOTAL = STEPS_PER_EPOCH * EPOCHS
STATELESS = [Constant(), Step(), MultiStep(), Cosine(), Cosine(per="epoch", final_lr=1e-4), OneCycle(), Linear()]
EVERY = [*STATELESS, Plateau()]
parser: TypeAdapter[ScheduleSettings] = TypeAdapter(ScheduleSettings)


def rates(settings, lr: float = LR) -> list[float]:
    schedule = settings.bind(STEPS_PER_EPOCH, TOTAL)
    return [schedule.at(step, lr) for step in range(TOTAL)]


def by_torch(scheduler, every: int = 1) -> list[float]:
    """Return the rates of a torch scheduler that is stepped every `interval` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns, since nothing is trained
        stepped = scheduler(optimizer)
        found = []
        for step in range(1, TOTAL + 1):
            found.append(optimizer.param_groups[0]["lr"])
            if step % every == 0 and step < TOTAL:
                stepped.step()
    return found


def kind(settings):
    return f"{settings.name}-{settings.model_dump(exclude_unset=True)}"


# ------------------------------------------------------------------------------------------------ PyTorch's rates


@pytest.mark.parametrize(
    ("ours", "theirs", "every", "tolerance"),
    [
        (
            Cosine(per="epoch", final_lr=1e-4),
            lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS, 1e-4),
            STEPS_PER_EPOCH,
            1e-12,
        ),
        (Cosine(final_lr=0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.01), 1, 1e-12),
        (OneCycle(), lambda o: lr_scheduler.OneCycleLR(o, LR, TOTAL, cycle_momentum=False), 1, 1e-9),
        (
            OneCycle(pct_start=0.1, div_factor=10, final_div_factor=100),
            lambda o: lr_scheduler.OneCycleLR(
                o, LR, TOTAL, pct_start=0.1, div_factor=10, final_div_factor=100, cycle_momentum=False
            ),
            1,
            1e-9,
        ),
        (Step(every="4 epochs", gamma=0.5), lambda o: lr_scheduler.StepLR(o, 4, 0.5), STEPS_PER_EPOCH, 1e-12),
        (Step(every="11 steps"), lambda o: lr_scheduler.StepLR(o, 11), 1, 1e-12),
        (
            MultiStep(milestones=["20 epochs", "10 epochs"], gamma=0.2),
            lambda o: lr_scheduler.MultiStepLR(o, [10, 20], 0.2),
            STEPS_PER_EPOCH,
            1e-12,
        ),
        (
            MultiStep(milestones=["0 steps", "9 steps", "9 steps"]),
            lambda o: lr_scheduler.MultiStepLR(o, [0, 9, 9]),
            1,
            1e-12,
        ),
        (Cosine(final_lr=0.5), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.5), 1, 1e-12),  # it may rise, too
        (Linear(final_fraction=0.1), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, TOTAL), 1, 1e-12),
        (
            Constant(warmup="25 steps", warmup_start=0.2),
            lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 25),
            1,
            1e-12,
        ),
        (
            Cosine(warmup="21 steps", warmup_start=0.1),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 21), lr_scheduler.CosineAnnealingLR(o, TOTAL - 21)], [21]
            ),
            1,
            1e-12,
        ),
        (Constant(), lambda o: lr_scheduler.ConstantLR(o, 1.0), 1, 0.0),
    ],
)
def test_the_rates_equal_those_of_torchs_scheduler(ours, theirs, every, tolerance):
    assert rates(ours) == pytest.approx(by_torch(theirs, every), abs=tolerance, rel=0)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_a_plateau_decays_when_torchs_does(patience):
    scores = [
        0.1,
        0.3,
        0.3,
        0.29,
        0.3,
        0.35,
        0.2,
        0.355,
        0.1,
        0.1,
        0.1,
        0.1,
        0.1,
        0.1,
        0.1,
        0.1,
        0.9,
        math.nan,
        0.9,
        0.9,
    ]
    ours = Plateau(factor=0.5, patience=patience, threshold=0.01, min_lr=0.02).bind(STEPS_PER_EPOCH, TOTAL)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=LR)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.5, patience=patience, threshold=0.01, threshold_mode="abs", min_lr=0.02, eps=0
    )
    fell = 0
    for step, score in enumerate(scores):
        ours.update(score)
        theirs.step(score)
        assert ours.at(step, LR) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        fell += ours.at(step, LR) < LR
    assert fell


# ------------------------------------------------------------------------------------------------ shapes


def test_a_schedule_ends_at_its_final_rate():
    assert rates(Cosine(final_lr=0.01))[-1] == pytest.approx(0.01, abs=1e-4)
    assert rates(Linear())[-1] == pytest.approx(LR / TOTAL)
    assert rates(OneCycle())[-1] == pytest.approx(LR / 25 / 1e4)
    for settings in (Cosine(final_lr=0.01), Linear(final_fraction=0.5), OneCycle()):  # and stays there
        schedule = settings.bind(STEPS_PER_EPOCH, TOTAL)
        assert schedule.at(TOTAL + 100, LR) == schedule.at(TOTAL, LR)


@pytest.mark.parametrize("settings", STATELESS, ids=kind)
def test_a_warm_up_rises_linearly_to_the_start_of_the_schedule(settings):
    warm = rates(settings.model_copy(update={"warmup": type(Constant().warmup)("20 steps")}))
    first = rates(settings)[0]
    assert warm[:20] == pytest.approx([first * (0.01 + 0.99 * step / 20) for step in range(20)])
    assert warm[20] == pytest.approx(first)


@pytest.mark.parametrize("settings", [Cosine(final_lr=0.01), Linear(final_fraction=0.1), OneCycle()], ids=kind)
def test_after_a_warm_up_a_schedule_spans_the_rest_of_the_run(settings):
    warm = type(settings)(**settings.model_dump(exclude={"warmup"}), warmup="20 steps").bind(STEPS_PER_EPOCH, TOTAL)
    short = settings.bind(STEPS_PER_EPOCH, TOTAL - 20)
    for step in range(TOTAL - 20):
        assert warm.at(20 + step, LR) == pytest.approx(short.at(step, LR), abs=1e-15)


def test_milestones_count_from_the_runs_start():
    marked = MultiStep(milestones=["50 steps"], warmup="20 steps").bind(STEPS_PER_EPOCH, TOTAL)
    assert marked.at(49, LR) == LR
    assert marked.at(50, LR) == pytest.approx(LR / 10)


def test_a_warm_up_may_be_a_share_of_the_run():
    assert rates(Linear(warmup="10%")) == rates(Linear(warmup="3 epochs")) == rates(Linear(warmup="21 steps"))


@pytest.mark.parametrize("settings", EVERY, ids=kind)
@pytest.mark.parametrize(("steps_per_epoch", "total"), [(1, 1), (1, 2), (3, 3), (5, 20)])
@pytest.mark.parametrize("warmup", ["0 steps", "1 step", "100 steps"])
def test_schedules_work_for_the_shortest_runs(settings, steps_per_epoch, total, warmup):
    schedule = type(settings)(**settings.model_dump(exclude={"warmup"}), warmup=warmup).bind(steps_per_epoch, total)
    for step in range(total):
        assert 0.0 <= schedule.at(step, LR) <= LR * (1 + 1e-12)


@pytest.mark.parametrize("settings", EVERY, ids=kind)
@pytest.mark.parametrize("total", [1, 2, 20])
def test_a_warm_up_leaves_at_least_one_step_at_the_full_rate(settings, total):
    short = type(settings)(**settings.model_dump(exclude={"warmup", "warmup_start"}), warmup="100 steps")
    last = type(settings)(**settings.model_dump(exclude={"warmup"})).bind(1, 1).at(0, LR)
    if settings.name not in ("step", "multistep"):  # whose own times count from the run's start
        assert short.bind(5, total).at(total - 1, LR) == pytest.approx(last)


@pytest.mark.parametrize("settings", [*EVERY, Cosine(final_lr=0.1), Plateau(min_lr=0.1)], ids=kind)
def test_a_rate_of_zero_stays_zero(settings):
    assert set(rates(settings, 0.0)) == {0.0}


def test_a_per_epoch_cosine_changes_at_epoch_boundaries_after_a_warm_up():
    found = rates(Cosine(per="epoch", warmup="10 steps", final_lr=0.01))
    changes = {step for step in range(11, TOTAL) if found[step] != found[step - 1]}
    assert changes == set(range(14, TOTAL, STEPS_PER_EPOCH))
    assert found[10] == LR
    assert min(found[10:]) > 0.01


# ------------------------------------------------------------------------------------------------ pure, and fast


@pytest.mark.parametrize("settings", STATELESS, ids=kind)
def test_a_rate_depends_only_on_the_step(settings):
    schedule = settings.bind(STEPS_PER_EPOCH, TOTAL)
    backwards = [schedule.at(step, LR) for step in reversed(range(TOTAL))]
    schedule.update(0.5)
    assert backwards[::-1] == rates(settings)
    assert schedule.state_dict() == {}
    schedule.load_state_dict({})


@pytest.mark.parametrize("settings", [s for s in EVERY if s.name != "cosine"], ids=kind)
def test_a_schedules_factor_multiplies_all_rates(settings):
    for one, ten in zip(rates(settings, 0.1), rates(settings, 1.0), strict=True):
        assert 10 * one == pytest.approx(ten)


@pytest.mark.parametrize("settings", [*EVERY, Cosine(warmup="50%")], ids=kind)
def test_computing_a_rate_is_fast(settings):
    schedule = settings.bind(100, 3000)
    costs = []
    for _ in range(5):
        start = time.perf_counter()
        for step in range(3000):
            schedule.at(step, LR)
        costs.append((time.perf_counter() - start) / 3000)
    assert min(costs) < 5e-6  # seconds; 0.1 to 0.5 us on the machine it was written on


# ------------------------------------------------------------------------------------------------ the plateau's state


def test_a_plateau_resumes_from_a_checkpoint():
    settings = Plateau(patience=1, factor=0.5)
    scores = [0.5, 0.4, 0.3, 0.6, 0.1, 0.1, 0.1, 0.7, 0.1, 0.1]
    for stop in range(len(scores)):
        through, stopped, resumed = (settings.bind(STEPS_PER_EPOCH, TOTAL) for _ in range(3))
        for score in scores[:stop]:
            through.update(score)
            stopped.update(score)
        skeleton, tensors = pack(stopped.state_dict())
        resumed.load_state_dict(unpack(json.loads(json.dumps(skeleton)), tensors))
        for step, score in enumerate(scores[stop:]):
            through.update(score)
            resumed.update(score)
            assert resumed.at(step, LR) == through.at(step, LR)
        assert resumed.state_dict() == through.state_dict()


def test_a_plateau_never_raises_a_rate_that_was_low_from_the_start():
    schedule = Plateau(min_lr=0.1, patience=0).bind(STEPS_PER_EPOCH, TOTAL)
    assert schedule.at(0, 0.01) == 0.01
    for _ in range(5):
        schedule.update(0.0)
    assert schedule.at(0, 0.01) == 0.01
    assert schedule.at(0, LR) == 0.1


# ------------------------------------------------------------------------------------------------ names and errors


@pytest.mark.parametrize("settings", EVERY, ids=kind)
def test_a_table_becomes_the_schedule_of_its_name(settings):
    table = parser.dump_python(settings, mode="json")
    assert parser.validate_python(table) == settings
    assert parser.validate_python({**table, "name": table["name"].upper()}) == settings
    assert parser.validate_python(settings) is settings


@pytest.mark.parametrize("name", ["OneCycle", "one_cycle", "ONE_CYCLE", "onecycle"])
def test_a_schedule_name_may_be_spelled_like_its_class(name):
    assert parser.validate_python({"name": name}) == OneCycle()


def test_a_plateau_starts_fresh_after_another_schedule():
    schedule = Plateau().bind(STEPS_PER_EPOCH, TOTAL)
    schedule.load_state_dict(Cosine().bind(STEPS_PER_EPOCH, TOTAL).state_dict())
    assert schedule.at(0, LR) == LR


def test_without_a_name_the_rate_is_constant():
    assert parser.validate_python({"warmup": "2%"}) == Constant(warmup="2%")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"name": "cosin", "final_lr": 0.1}, "there is no schedule 'cosin'; did you mean 'cosine'?"),
        ({"name": "xyzzy"}, "there is no schedule 'xyzzy': use constant, step"),
        ({"name": "cosine", "per": "batch"}, "'step' or 'epoch'"),
        ({"name": "cosine", "warmup": "10 min"}, "measured by the clock"),
        ({"name": "cosine", "eta_min": 0.1}, "Extra inputs"),
        ({"name": "multistep", "milestones": ["1 epoch", "soon"]}, "'soon' is no duration"),
        ({"name": "one_cycle", "pct_start": 1.0}, "less than 1"),
        ({"name": "step", "every": "0 epochs"}, "can't hold for '0 epochs': write at least '1 step'"),
        ({"name": "step", "every": 5}, "5 has no unit: write '5 epochs' or '5 steps'"),
        ({"name": "plateau", "factor": 1.5}, "less than 1"),
    ],
)
def test_an_invalid_schedule_is_reported(table, says):
    with pytest.raises(ValidationError) as caught:
        parser.validate_python(table)
    assert says in str(caught.value)
