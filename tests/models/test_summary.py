"""The counts equal hand-computed ones, and counting has no side effects."""

import torch
from torch import Tensor, nn

from torchrelay.models import ModelSettings, build, summarize


def test_the_counts_of_a_tiny_model_equal_hand_computed_ones() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 5))
    model[4].bias.requires_grad_(False)
    counts = summarize(model, torch.zeros(3, 1, 4, 4))
    conv, linear = 3 * (2 * 2 * 2) * 9 * 2, 3 * 8 * 5 * 2  # outputs × products each × 2, over a batch of 3
    assert counts.flops == conv + linear
    assert counts.parameters == (18 + 2) + (2 + 2) + (40 + 5)
    assert counts.trainable == counts.parameters - 5
    assert counts.buffer_bytes == 2 * 4 + 2 * 4 + 8
    assert counts.activation_bytes == 4 * 3 * (8 + 8 + 0 + 0 + 5)  # ReLU works in place, Flatten makes a view
    assert [row.flops for row in counts.rows] == [conv, 0, 0, 0, linear]
    assert [row.output for row in counts.rows] == ["3×2×2×2"] * 3 + ["3×8", "3×5"]
    assert [row.parameters for row in counts.rows] == [20, 4, 0, 0, 45]


def test_resnet18_has_its_published_counts() -> None:
    model = build(ModelSettings(name="resnet18"), classes=1000, log=print)
    counts = summarize(model, torch.zeros(1, 3, 224, 224))
    assert counts.parameters == 11_689_512
    assert round(counts.flops / 2e9, 3) == 1.814  # multiplications with additions, as torchvision publishes them
    assert sum(row.flops for row in counts.rows) == counts.flops
    assert sum(row.parameters for row in counts.rows) == counts.parameters
    assert {row.name: row.output for row in counts.rows}["layer4"] == "1×512×7×7"


def test_a_model_without_children_is_one_row() -> None:
    counts = summarize(nn.Linear(3, 4), torch.zeros(2, 3))
    assert [(row.name, row.kind, row.flops) for row in counts.rows] == [("Linear", "Linear", 2 * 3 * 4 * 2)]
    assert counts.flops == 48


class Restless(nn.Module):
    """Changes a buffer and draws random numbers in every pass; returns a tuple; skips a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: Tensor
        self.register_buffer("passes", torch.zeros(()))
        self.used = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.spare = nn.Linear(4, 4)
        self.recurrent = nn.GRU(4, 4)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        self.passes += 1
        out, hidden = self.recurrent(self.used(inputs) + torch.rand(4))
        return out, hidden


def test_counting_restores_buffers_modes_hooks_and_the_random_state() -> None:
    model = Restless().train()
    model.used[1].eval()  # a frozen norm in a training model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    counts = summarize(model, torch.zeros(6, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert {row.name: row.output for row in counts.rows} == {
        "used": "6×4",
        "spare": "not used",
        "recurrent": "6×4 1×4",
    }


def test_a_summary_prints_as_a_table_with_a_total() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU())
    text = str(summarize(model, torch.zeros(64, 1000)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "kind", "output", "parameters", "FLOPs", "activations"]
    assert lines[1].split() == ["0", "Linear", "64×1000", "1,001,000", "128.00", "M", "250.0", "KiB"]
    assert lines[3].split()[:2] == ["total", "1,001,000"]
    assert "1,001,000 parameters are trained" in lines[4]
