"""Parameter groups: learning rates and weight decay by name, and freezing."""

import pytest
import torch
from torch import nn

from torchrelay.errors import UsageError
from torchrelay.optim import SGD, AdamW, Group, Muon


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3))


def rates(model: nn.Module, optimizer: torch.optim.Optimizer, option: str = "lr") -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group[option] for group in optimizer.param_groups for p in group["params"]}


def test_a_group_has_its_learning_rate_and_weight_decay():
    model = a_model()
    head = Group(match=["2.*"], lr=0.5, weight_decay=0.0)
    optimizer = SGD(lr=0.1, weight_decay=0.01, groups=[head])(model)
    assert rates(model, optimizer)["2.weight"] == rates(model, optimizer)["2.bias"] == 0.5
    assert rates(model, optimizer)["0.0.weight"] == 0.1
    assert rates(model, optimizer, "weight_decay")["2.weight"] == 0.0
    assert rates(model, optimizer, "weight_decay")["0.0.weight"] == 0.01
    assert rates(model, optimizer, "initial_lr") == rates(model, optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 2]


def test_a_scale_multiplies_the_learning_rate():
    model = a_model()
    groups = [Group(match=["0.*"], lr_scale=0.1), Group(match=["2.*"], lr_scale=0)]
    found = rates(model, AdamW(lr=0.02, groups=groups)(model))
    assert found["0.0.weight"] == pytest.approx(0.002)
    assert found["2.weight"] == 0.0
    muon = rates(model, Muon(lr=0.02, other_lr=0.004, groups=groups[:1])(model))
    assert muon["0.0.weight"] == pytest.approx(0.002)
    assert muon["0.0.bias"] == pytest.approx(0.0004)
    assert muon["2.weight"] == pytest.approx(0.004)


def test_the_first_group_that_matches_counts():
    model = a_model()
    groups = [Group(match=["*.bias"], lr=1.0), Group(match=["2.*", "0.2.*"], lr=2.0)]
    found = rates(model, SGD(lr=0.1, groups=groups)(model))
    assert found["2.bias"] == found["0.0.bias"] == 1.0
    assert found["2.weight"] == found["0.2.weight"] == 2.0
    assert found["0.0.weight"] == 0.1


def test_a_frozen_group_is_not_trained_and_needs_no_gradient():
    model = a_model()
    optimizer = SGD(groups=[Group(match=["0.*"], freeze=True)])(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("0."), name
        assert (parameter.grad is None) == name.startswith("0."), name
    assert set(rates(model, optimizer)) == {"2.weight", "2.bias"}


def test_frozen_parameters_are_excluded():
    model = a_model()
    model[0].requires_grad_(False)
    assert set(rates(model, SGD()(model))) == {"2.weight", "2.bias"}


def test_norms_and_biases_in_a_group_do_not_decay():
    model = a_model()
    group = Group(match=["2.*"], weight_decay=0.3)
    found = rates(model, SGD(weight_decay=0.1, decay_norms_and_biases=False, groups=[group])(model), "weight_decay")
    assert found["2.weight"] == 0.3
    assert found["2.bias"] == 0.0


def test_shared_weights_are_trained_once():
    model = a_model()
    model[0][2].weight = model[0][0].weight = nn.Parameter(torch.ones(8, 8))
    optimizer = SGD()(model)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        (
            [Group(match=["0.0.wieght"], lr=1.0)],
            "'0.0.wieght' matches no trainable parameter; did you mean '0.0.weight'?",
        ),
        ([Group(match=["zzz*"], lr=1.0)], "'zzz\\*' matches no trainable parameter; the names begin with 0.0.weight"),
        ([Group(match=["0.22.*"], lr=1.0)], "'0.22.\\*' matches no trainable parameter; did you mean '0.2.\\*'?"),
        (
            [Group(match=["0.*"], lr=1.0), Group(match=["0.0.*"], lr=2.0)],
            "'0.0.\\*' comes too late: earlier groups have all that it matches",
        ),
        ([Group(match=["*"], freeze=True)], "no parameter is left to train"),
    ],
)
def test_a_useless_pattern_is_an_error(groups, says):
    with pytest.raises(UsageError, match=says):
        SGD(groups=groups)(a_model())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"match": ["a"], "lr": 0.1, "lr_scale": 2.0}, "keep one of them"),
        ({"match": ["a"], "freeze": True, "lr": 0.1}, "a frozen group has no lr"),
        ({"match": []}, "at least 1 item"),
        ({"match": ["a"], "lr": -1}, "lr should be at least 0, not -1"),
    ],
)
def test_a_group_that_contradicts_itself_is_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        Group(**wrong)
