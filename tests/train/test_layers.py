"""Each layer of a model is tried alone: what computes wrongly, or otherwise the second time, is found."""

import pytest
import torch
from torch import Tensor, nn

import torchrelay as tr
from tests.train.test_self_check import Planted, Unwritten
from torchrelay.train.layers import check_layers, compile_error


class Rough(nn.Linear):
    """A product whose kernel forgets half of its terms, in float32 only."""

    def forward(self, inputs: Tensor) -> Tensor:
        half = inputs.clone()
        if inputs.dtype == torch.float32:
            half[:, ::2] = 0
        return super().forward(half)


def trainer(model: nn.Module, inputs: Tensor, **device) -> tr.Trainer:
    data = inputs, torch.zeros(len(inputs), dtype=torch.int64)
    return tr.Trainer(model, data, batch_size=len(inputs), epochs=1, device=tr.DeviceSettings(name="cpu", **device))


def checks(made: tr.Trainer) -> dict:
    made.model.train()
    return {each.name: each for each in check_layers(made.train_step, next(iter(made.batches.epoch(0))))}


def test_good_layers_pass_in_both_memory_formats_and_random_ones_are_not_compared():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten()]
    made = trainer(nn.Sequential(*layers, nn.Linear(8 * 6 * 6, 10)), torch.randn(16, 3, 8, 8))
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    found = checks(made)
    assert list(found) == ["0", "1", "2", "3", "4", "5"]
    assert all(each.is_good for each in found.values())
    assert found["0"].forward < 1e-5
    assert found["0"].other_format < 1e-4
    assert found["0"].input_shape == (16, 3, 8, 8)
    assert found["3"].forward is None, "dropout"
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_layer_is_found_that_is_wrong_or_differs_the_second_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Planted(Unwritten), Rough(32, 32), nn.Linear(32, 10))
    found = checks(trainer(model, torch.randn(32, 64)))
    assert [name for name, each in found.items() if not each.is_good] == ["1", "2"]
    assert not found["1"].twice
    assert found["2"].twice
    assert found["2"].forward > 0.1


@pytest.mark.slow
def test_the_gradients_of_a_compiled_model_are_compared():
    torch.manual_seed(0)
    made = trainer(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 8))
    batch = next(iter(made.batches.epoch(0)))
    assert compile_error(made.train_step, batch) < 1e-5
