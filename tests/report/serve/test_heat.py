"""Heat maps: they are Grad-CAM's by hand, lie where the answer's reason is, and a network without places has none."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from serving import COLORS, encoded, export, load, network, squares
from torchrelay.errors import RelayError, UsageError
from torchrelay.report.export.formats import run_onnx
from torchrelay.report.serve.answers import Answers
from torchrelay.report.serve.heat import HeatMaps

# They take ten seconds: imports of the exporters, and traces.
pytestmark = [pytest.mark.ci, pytest.mark.slow]

IMAGES, LABELS, PLACES = squares(96)


def write(model: nn.Module, images: torch.Tensor, folder: Path) -> Path:
    """A program as an export has it."""
    program = torch.export.export(model.eval(), (images,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    program._example_inputs = None
    torch.export.save(program, folder / "program.pt2")
    return folder / "program.pt2"


def by_hand(model: nn.Sequential, images: torch.Tensor, classes: list[int]) -> torch.Tensor:
    """Equations 1 and 2 of the paper, on the activation after the last convolution, scaled to at most 1."""
    maps = model[:4](images).detach().requires_grad_()
    logits = model[4:](maps)
    (gradients,) = torch.autograd.grad(logits[range(len(images)), classes].sum(), maps)
    found = F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1)).detach()
    return found / found.amax((1, 2), keepdim=True).clamp(min=1e-12)


@pytest.mark.parametrize("about", [None, 0, 2])
def test_the_map_is_that_of_the_papers_equations(about):
    model = network("pictures")[0]
    trained = load("pictures", export("pictures").parent / "run", model)
    classes = LABELS[:8].tolist() if about is None else [about] * 8
    heat = HeatMaps(export("pictures") / "program.pt2").of(IMAGES[:8], classes)
    normalized = IMAGES[:8].float() / 255
    if trained.mean is not None:
        shape = (1, 3, 1, 1)
        normalized = (normalized - torch.tensor(trained.mean).view(shape)) / torch.tensor(trained.std).view(shape)
    expected = by_hand(model, normalized, classes)
    for each, wanted in zip(heat, expected, strict=True):
        assert torch.allclose(each.values.float(), wanted, atol=1e-4)
        assert each.box == (0, 0, 1, 1)


def test_the_map_is_strongest_where_the_square_is():
    heat = HeatMaps(export("pictures") / "program.pt2").of(IMAGES, LABELS.tolist())
    inside = 0
    for each, (top, left) in zip(heat, PLACES, strict=True):
        row, column = divmod(int(each.values.argmax()), 24)
        inside += top - 2 <= row < top + 10 and left - 2 <= column < left + 10
    assert inside > 0.9 * len(PLACES)


def test_the_program_answers_as_before_with_the_map_in_it():
    maps = HeatMaps(export("pictures") / "program.pt2")
    logits = run_onnx(export("pictures") / "model.onnx")(IMAGES[:8])[1]
    assert torch.allclose(maps._logits(IMAGES[:8]).detach(), logits, atol=1e-4)


def test_a_crop_of_the_preprocessing_is_the_part_that_the_map_covers():
    heat = HeatMaps(export("cropped") / "program.pt2").of(IMAGES[:1], [0])
    assert heat[0].box == pytest.approx((0.2, 0.2, 0.8, 0.8))
    answers = Answers(export("cropped"), 10**6)
    (answer,) = answers.answer(answers.inputs.of_files([("", encoded(IMAGES[0]))]), 3, heat=True)
    assert answer["heatmap"]["box"] == pytest.approx([0.2, 0.2, 0.8, 0.8])


class Attention(nn.Module):
    """Patches by a convolution, then attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT[:, None]
        return self.head(F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mean(1))


class Squeezed(nn.Module):
    """A residual network whose last convolutions see one place, as in squeeze and excitation, or two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.gate, self.head = nn.Conv2d(8, 8, 3, 6), nn.Conv2d(8, 8, 1), nn.Linear(8, 3)

    def forward(self, images):
        maps = F.relu(self.stem(images))
        maps = F.relu(maps + self.norm(self.inner(maps)))
        maps = self.last(maps)
        return self.head((maps * self.gate(maps.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3)))


def test_a_network_that_mixes_the_places_has_no_map(tmp_path):
    with pytest.raises(UsageError, match="mixes all places of the picture by attention"):
        HeatMaps(write(Attention(), torch.rand(2, 3, 24, 24), tmp_path))


def test_the_map_is_the_last_one_that_says_where_something_is(tmp_path):
    """Two places across, and one, say too little: it is that after the block before, its sum and activation."""
    torch.manual_seed(0)
    maps = HeatMaps(write(Squeezed(), torch.rand(2, 3, 24, 24), tmp_path))
    (heat, _) = maps.of(torch.rand(2, 3, 24, 24), [0, 1])
    assert heat.values.shape == (12, 12)
    put = next(node for node in maps._module.graph.nodes if node.op == "call_module" and node.target == "heat_map")
    assert "relu" in str(put.args[0])


def test_nothing_that_speaks_for_a_class_is_a_map_of_zeros(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 22 * 22, 2))
    nn.init.zeros_(model[2].weight)
    (heat,) = HeatMaps(write(model, torch.rand(1, 3, 24, 24), tmp_path)).of(torch.rand(1, 3, 24, 24), [0])
    assert not heat.values.any()


def test_a_network_without_a_convolution_is_answered_without_a_map():
    with pytest.raises(UsageError, match="has no convolution"):
        HeatMaps(export("flat") / "program.pt2")
    answers = Answers(export("flat"), 10**6)
    (answer,) = answers.answer(answers.inputs.of_files([("", encoded(IMAGES[0]))]), 3, heat=True)
    assert answer["class"] in COLORS
    assert answer["no_heatmap"] == "the network has no convolution whose map could be shown"


def test_without_captum_the_answer_comes_without_a_map(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    answers = Answers(export("pictures"), 10**6)
    assert answers.no_heat == "this needs captum.attr: install it by pip install 'torchrelay[serve]'"
    (answer,) = answers.answer(answers.inputs.of_files([("", encoded(IMAGES[0]))]), 3, heat=True)
    assert answer["no_heatmap"] == answers.no_heat


def test_a_damaged_program_is_an_error(tmp_path):
    (tmp_path / "program.pt2").write_bytes(b"PK\x03\x04")
    with pytest.raises(RelayError, match=r"program\.pt2 is damaged"):
        HeatMaps(tmp_path / "program.pt2")
