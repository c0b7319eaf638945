"""The moving average follows the formula, and swapping it in and out changes nothing."""

import pytest
import torch
from torch import Tensor, nn

from torchrelay.errors import RelayError
from torchrelay.models import EMA


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train_a_little(model: nn.Module, seed: int) -> None:
    """Move weights and buffers as an optimizer step and a forward pass would."""
    generator = torch.Generator().manual_seed(seed)
    model.train()(torch.randn(8, 3, generator=generator))
    with torch.no_grad():
        for value in model.parameters():
            value += torch.randn(value.shape, generator=generator)


def copy_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_average_follows_the_formula_and_the_buffers_are_the_latest() -> None:
    model = small()
    ema = EMA(model, decay=0.6)
    expected = copy_of(dict(model.named_parameters()))
    for step in range(12):
        train_a_little(model, step)
        ema.update(model, step)
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    state = ema.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)
        assert not torch.equal(state[name], model.state_dict()[name])
    for name, value in model.named_buffers():
        assert torch.equal(state[name], value)
    assert state["1.num_batches_tracked"] == 12


def test_the_warm_up_forgets_the_initial_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    ema = EMA(model, decay=0.999)
    nn.init.constant_(model.weight, 1.0)
    for step in range(50):
        ema.update(model, step)
    assert abs(ema.state_dict()["weight"].item() - 1.0) < 0.01  # without the warm-up it would stand at 95


def test_swap_evaluates_the_average_and_restores_the_weights_exactly() -> None:
    model = small()
    ema = EMA(model, decay=0.9)
    train_a_little(model, 1)
    ema.update(model, 100)
    train_a_little(model, 2)
    mine, average = copy_of(model.state_dict()), copy_of(ema.state_dict())
    with ema.swap(model):
        assert equal(model.state_dict(), average)
    assert equal(model.state_dict(), mine)
    assert equal(ema.state_dict(), average)
    with pytest.raises(ZeroDivisionError), ema.swap(model):
        _ = 1 / 0
    assert equal(model.state_dict(), mine)


def test_a_saved_and_loaded_average_continues_to_the_same_bits() -> None:
    model, twin = small(), small()
    straight, resumed = EMA(model, 0.99), EMA(twin, 0.99)
    for step in range(6):
        train_a_little(model, step)
        straight.update(model, step)
        if step == 2:
            saved, weights = copy_of(straight.state_dict()), copy_of(model.state_dict())
    twin.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for step in range(3, 6):
        train_a_little(twin, step)
        resumed.update(twin, step)
    assert equal(straight.state_dict(), resumed.state_dict())


def test_the_average_is_copied_into_a_model() -> None:
    model = small()
    ema = EMA(model, 0.9)
    before = copy_of(ema.state_dict())
    train_a_little(model, 0)
    assert equal(ema.state_dict(), before)
    other = small()
    other.load_state_dict(ema.state_dict())
    assert equal(other.state_dict(), before)


def test_tied_weights_keep_both_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    ema = EMA(model, 0.9)
    nn.init.constant_(model["a"].weight, 5.0)
    ema.update(model, 0)
    state = ema.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert torch.equal(state["a.weight"], state["b.weight"])


def test_averages_of_another_model_are_refused_without_changes() -> None:
    ema = EMA(small(), 0.9)
    before = copy_of(ema.state_dict())
    wrong = {name: value + 1 for name, value in before.items()}
    with pytest.raises(RelayError, match=r"1 differ, such as '2\.bias'"):
        ema.load_state_dict({name: value for name, value in wrong.items() if name != "2.bias"})
    with pytest.raises(RelayError, match=r"1 differ, such as '2\.bias'"):
        ema.load_state_dict({**wrong, "2.bias": torch.zeros(3)})
    assert equal(ema.state_dict(), before)
