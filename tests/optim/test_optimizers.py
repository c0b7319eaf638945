"""Optimizer settings: the same bits as plain torch optimizers, and clear errors."""

import json
from itertools import pairwise

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn

from torchrelay import optim
from torchrelay.checkpoint.format import pack, unpack
from torchrelay.distributed.process_group import ProcessGroup
from torchrelay.distributed.strategy import Strategy
from torchrelay.errors import UsageError
from torchrelay.optim import SGD, AdamW, Muon, OptimizerSettings, Other
from torchrelay.recipe import recipe
from torchrelay.recipe.recipe import Recipe

TORCH_NAMES = ["Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]
EVERY = [
    SGD(),
    SGD(nesterov=True, momentum=0.8),
    SGD(momentum=0.0),
    SGD(fused=True),
    AdamW(),
    AdamW(fused=True),
    Muon(),
    Muon(normalize_weights=True, other="sgd", other_lr=0.1, iterations=3, dtype="bfloat16"),
    *(Other(name=name) for name in TORCH_NAMES),
]
parser: TypeAdapter[OptimizerSettings] = TypeAdapter(OptimizerSettings)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 2, 4, 4, generator=generator), torch.arange(8) % 4
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def with_values(settings):
    return f"{settings.name}-{settings.model_dump(exclude_unset=True)}"


# ------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        (
            SGD(lr=0.05, momentum=0.9, weight_decay=0.05),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05),
        ),
        (
            SGD(lr=0.05, momentum=0.8, weight_decay=0.0, nesterov=True),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True),
        ),
        (
            SGD(lr=0.05, momentum=0.9, weight_decay=0.05, fused=True),
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.05, fused=True),
        ),
        (AdamW(lr=2e-3, fused=True), lambda p: torch.optim.AdamW(p, lr=2e-3, fused=True)),
        (AdamW(lr=2e-3, betas=(0.8, 0.95)), lambda p: torch.optim.AdamW(p, lr=2e-3, betas=(0.8, 0.95))),
        (Other(name="adam", lr=0.01, weight_decay=0.1), lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        (Other(name="RMSprop", options={"alpha": 0.9}), lambda p: torch.optim.RMSprop(p, alpha=0.9)),
    ],
)
def test_the_weights_are_bit_equal_to_those_of_the_torch_optimizer(settings, plain):
    ours, theirs = a_model(), a_model()
    train(ours, settings(ours), range(6))
    train(theirs, plain(theirs.parameters()), range(6))
    assert weights(ours) == weights(theirs)


@pytest.mark.parametrize("settings", [s for s in EVERY if s.name != "muon"], ids=with_values)
def test_parameters_of_equal_options_are_one_group_in_the_models_order(settings):
    model = a_model()
    (group,) = settings(model).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert group["lr"] == group["initial_lr"] == settings.lr


@pytest.mark.parametrize("settings", EVERY, ids=with_values)
def test_every_optimizer_is_deterministic_and_changes_every_weight(settings):
    first, second = a_model(), a_model()
    before = weights(first)
    for model in (first, second):
        train(model, settings(model), range(3))
    assert weights(first) == weights(second)
    for name, _ in first.named_parameters():
        assert weights(first)[name] != before[name], name


# ------------------------------------------------------------------------------------------------ save and go on


def on_disk(state: dict) -> dict:
    """Send an optimizer's state through JSON and safetensors, as in a checkpoint."""
    skeleton, tensors = pack(state)
    contiguous = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in tensors.items()}
    return unpack(json.loads(json.dumps(skeleton)), load(save(contiguous)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("settings", EVERY, ids=with_values)
def test_five_steps_a_restore_and_five_more_equal_ten_steps(settings, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    through, stopped, resumed = (a_model().to(memory_format=layout) for _ in range(3))
    train(through, settings(through), range(10))
    optimizer = settings(stopped)
    train(stopped, optimizer, range(5))
    state = on_disk(optimizer.state_dict())
    resumed.load_state_dict(stopped.state_dict())
    optimizer = settings(resumed)
    Strategy(resumed, ProcessGroup(0, 1, torch.device("cpu")), exact=True).load_state(optimizer, state)
    train(resumed, optimizer, range(5, 10))
    assert weights(resumed) == weights(through)


# ------------------------------------------------------------------------------------------------ what is decayed


def decays(settings, model: nn.Module) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in settings(model).param_groups for p in group["params"]}


@pytest.mark.parametrize("settings", [SGD, AdamW, Muon, lambda **options: Other(name="adam", **options)])
def test_norms_and_biases_can_be_kept_from_decaying(settings):
    all_names = {"0.weight", "1.weight", "1.bias", "4.weight", "4.bias"}
    everything = decays(settings(weight_decay=0.1), a_model())
    assert everything == dict.fromkeys(all_names, 0.1)
    spared = decays(settings(weight_decay=0.1, decay_norms_and_biases=False), a_model())
    assert {name for name, decay in spared.items() if decay == 0.1} == {"0.weight", "4.weight"}
    assert {name for name, decay in spared.items() if decay == 0.0} == {"1.weight", "1.bias", "4.bias"}


def test_parameters_without_decay_keep_their_value_at_zero_gradient():
    model = a_model()
    optimizer = SGD(lr=0.1, weight_decay=0.5, decay_norms_and_biases=False)(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (parameter.ndim < 2), name


# ------------------------------------------------------------------------------------------------ names and errors


@pytest.mark.parametrize(
    ("table", "kind", "name"),
    [
        ({}, SGD, "sgd"),
        ({"lr": 0.3}, SGD, "sgd"),
        ({"name": "SGD", "lr": 0.1}, SGD, "sgd"),
        ({"name": "AdamW"}, AdamW, "adamw"),
        ({"name": "MUON"}, Muon, "muon"),
        *(({"name": name}, Other, name) for name in TORCH_NAMES),
        *(({"name": name.lower()}, Other, name) for name in TORCH_NAMES),
    ],
)
def test_a_table_becomes_the_settings_of_its_name(table, kind, name):
    found = parser.validate_python(table)
    assert type(found) is kind
    assert found.name == name
    assert parser.validate_python(parser.dump_python(found, mode="json")) == found
    assert parser.validate_python(found) is found


def test_every_torch_optimizer_is_supported_or_refused_with_a_reason():
    classes = {name: found for name, found in vars(torch.optim).items() if isinstance(found, type)}
    names = {name for name, found in classes.items() if issubclass(found, torch.optim.Optimizer)} - {"Optimizer"}
    for name in names - {"SparseAdam"}:
        assert parser.validate_python({"name": name})(a_model()).param_groups
    with pytest.raises(ValidationError, match="can't be used: it"):
        parser.validate_python({"name": "SparseAdam"})


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"name": "sdg", "momentum": 0.9}, "there is no optimizer 'sdg'; did you mean 'sgd'?"),
        ({"name": "RMSpop"}, "there is no optimizer 'RMSpop'; did you mean 'rmsprop'?"),
        ({"name": "Optimizer"}, "there is no optimizer 'Optimizer'"),
        ({"name": "lr_scheduler"}, "there is no optimizer 'lr_scheduler'"),
        ({"name": "LBFGS", "weight_decay": 0.1}, "torch.optim.LBFGS has no weight decay"),
        ({"name": "sparseadam"}, "takes sparse gradients only"),
        ({"name": "adam", "beta": 0.9}, "'beta' is no option of torch.optim.Adam; did you mean 'betas'?"),
        ({"name": "adam", "options": {"amsgrat": True}}, "did you mean 'amsgrad'?"),
        ({"name": "adam", "options": {"params": []}}, "'params' is no option"),
        ({"name": "adam", "options": {"lr": 1.0}}, "'lr' is no option"),
        ({"name": "rprop", "weight_decay": 0.1}, "torch.optim.Rprop has no weight decay: leave weight_decay out"),
        ({"name": "rprop", "groups": [{"match": ["*"], "weight_decay": 0.1}]}, "torch.optim.Rprop has no weight decay"),
        ({"name": "rprop", "zzz": 1}, "'zzz' is no option of torch.optim.Rprop: there are capturable"),
        (
            {"name": "adam", "fused": True, "foreach": True},
            "torch.optim.Adam refuses its options: `fused` and `foreach`",
        ),
        ({"name": 3}, "there is no optimizer '3': use sgd, adamw, muon"),
        ({"name": "rmsprop", "alpha": -1.0}, "torch.optim.RMSprop refuses its options: Invalid alpha"),
        ({"name": "adam", "options": 3}, "Input should be a valid dictionary"),
        ({"nesterov": True, "momentum": 0.0}, "set momentum, such as 0.9"),
        ({"momentum": 1.0}, "less than 1"),
        ({"lr": -0.1}, "greater than or equal to 0"),
        ({"lr": float("nan")}, "finite number"),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"name": "adamw", "betas": [0.9, 1.0]}, "less than 1"),
        ({"name": "muon", "iterations": 0}, "greater than or equal to 1"),
        ({"lern_rate": 0.1}, "Extra inputs"),
    ],
)
def test_an_invalid_optimizer_is_reported(table, says):
    with pytest.raises(ValidationError) as caught:
        parser.validate_python(table)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.name=sgdd", "optimizer: there is no optimizer 'sgdd'; did you mean 'sgd'?"),
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'lr'?"),
        ("optimizer.lr=-1", "optimizer.lr should be at least 0, not -1"),
        ("optimizer.lr=abc", "optimizer.lr should be a number, not 'abc'"),
        ("schedule.name=cosin", "schedule: there is no schedule 'cosin'; did you mean 'cosine'?"),
        ("schedule.warmup=2 foo", "schedule.warmup: '2 foo' has no unit that we know"),
        ("schedule.warmup=5", "schedule.warmup: 5 has no unit: write '5 epochs' or '5 steps'"),
    ],
)
def test_a_wrong_setting_on_the_command_line_gives_one_line(override, says):
    with pytest.raises(UsageError) as caught:
        recipe.load("digits", [override])
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_torch_class_takes_its_options_beside_the_learning_rate():
    flat = parser.validate_python({"name": "rmsprop", "lr": 0.1, "momentum": 0.5, "alpha": 0.9})
    nested = Other(name="RMSprop", lr=0.1, options={"momentum": 0.5, "alpha": 0.9})
    assert flat == nested
    assert flat(a_model()).param_groups[0]["momentum"] == 0.5


def test_another_optimizer_has_torchs_default_learning_rate():
    assert Other(name="adadelta").lr == 1.0
    assert Other(name="rmsprop").lr == 0.01
    assert Other(name="adam").lr == 1e-3


def test_other_refuses_optimizers_with_their_own_settings():
    with pytest.raises(UsageError, match="has settings of its own: use optim"):
        Other(name="AdamW")


def test_settings_cannot_be_changed_after_they_were_checked():
    with pytest.raises(UsageError, match=r"SGD\.lr can't be set, since settings never change"):
        SGD().lr = 3.0


def test_an_optimizer_round_trips_through_toml():
    import tomllib

    for settings in EVERY:
        again = Recipe.model_validate(tomllib.loads(Recipe(optimizer=settings).to_toml()))
        assert again.optimizer == settings


def test_public_names_are_sorted_and_exist():
    assert all(hasattr(optim, name) for name in optim.__all__)
    assert all(a.lower() <= b.lower() or a.isupper() for a, b in pairwise(optim.__all__))
