"""Muon: its orthogonalization, the parameters that get it, and the others, trained as torch does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchrelay.errors import UsageError
from torchrelay.models import small
from torchrelay.optim import SGD, AdamW, Muon, MuonOptimizer
from torchrelay.optim.muon import orthogonalize


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def fill_gradients(model: nn.Module, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def by_rule(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, set[str]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["rule"], set()).update(names[id(p)] for p in group["params"])
    return found


# ------------------------------------------------------------------------------------------------ orthogonalization


@pytest.mark.parametrize("shape", [(32, 32), (16, 144), (144, 16), (1, 9), (9, 1), (64, 576)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_approach_one_and_singular_vectors_are_kept(shape, dtype):
    given = matrix(*shape)
    found = orthogonalize(given, 5, dtype)
    values = torch.linalg.svdvals(found)
    largest = values[torch.linalg.svdvals(given) > 0.1 * torch.linalg.norm(given) / min(shape) ** 0.5]
    assert values.max() < 1.3
    assert largest.min() > 0.6
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    inner = u.T @ found @ v.T  # diagonal where the vectors are those of the given matrix
    assert (inner - torch.diag(inner.diagonal())).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
    assert found.dtype == given.dtype
    assert found.shape == given.shape


def test_more_iterations_raise_small_singular_values():
    u, _, v = torch.linalg.svd(matrix(16, 16))
    given = u @ torch.diag(torch.logspace(0, -3, 16)) @ v
    least = [float(torch.linalg.svdvals(orthogonalize(given, n)).min()) for n in (1, 3, 5, 8)]
    assert least == sorted(least)
    assert least[0] < 0.01
    assert least[-1] > 0.6


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_the_gradients_scale_does_not_matter(scale):
    given = matrix(12, 30)
    assert torch.allclose(orthogonalize(given * scale, 5), orthogonalize(given, 5), atol=1e-4)


def test_a_zero_matrix_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 6), 5), torch.zeros(4, 6))


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_step_moves_a_convolution_along_its_orthogonalized_momentum(nesterov):
    model = a_model()
    settings = Muon(lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.2, dtype="float32")
    optimizer = settings(model)
    expected, momentum = model[3].weight.detach().clone(), torch.zeros(16, 72)
    for seed in range(2):
        gradient = matrix(16, 72, seed)
        model[3].weight.grad = gradient.view(16, 8, 3, 3)
        optimizer.step()
        momentum = 0.5 * momentum + gradient
        update = orthogonalize(gradient + 0.5 * momentum if nesterov else momentum, 5)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * update.view(16, 8, 3, 3)
    assert torch.allclose(model[3].weight, expected, atol=1e-6)


def test_the_update_of_a_tall_matrix_is_scaled_up():
    model = nn.Sequential(nn.Linear(4, 64, bias=False), nn.Linear(64, 2, bias=False))
    before = model[0].weight.detach().clone()
    optimizer = Muon(lr=0.1, momentum=0.0, weight_decay=0.0, dtype="float32")(model)
    gradient = model[0].weight.grad = matrix(64, 4)
    optimizer.step()
    assert torch.allclose(before - model[0].weight, 0.1 * 4.0 * orthogonalize(gradient, 5), atol=1e-6)


def test_normalized_weights_have_the_expected_norm_before_the_update():
    model = a_model()
    optimizer = Muon(lr=1e-9, normalize_weights=True, weight_decay=0.5)(model)
    fill_gradients(model)
    optimizer.step()
    assert model[3].weight.norm().item() == pytest.approx(16**0.5, rel=1e-5)
    assert model[0].weight.norm().item() == pytest.approx(8**0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("other", "plain"),
    [
        ("sgd", SGD(lr=0.07, momentum=0.85, weight_decay=0.01, nesterov=True)),
        ("adamw", AdamW(lr=0.07, weight_decay=0.01, betas=(0.85, 0.95))),
    ],
)
def test_other_parameters_are_trained_bit_equal_to_torch(other, plain):
    ours, theirs = a_model(), a_model()
    settings = Muon(other=other, other_lr=0.07, other_momentum=0.85, weight_decay=0.01)
    for model, optimizer in ((ours, settings(ours)), (theirs, plain(theirs))):
        for step in range(4):
            fill_gradients(model, scale=step + 1.0)
            optimizer.step()
    rest = {"1.weight", "1.bias", "3.bias", "6.weight", "6.bias"}
    for name, value in ours.named_parameters():
        assert torch.equal(value, theirs.get_parameter(name)) == (name in rest), name


def test_parameters_without_a_gradient_do_not_change():
    model = a_model()
    optimizer = Muon(other="sgd", weight_decay=0.1)(model)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not optimizer.state


def test_a_closure_is_evaluated_with_gradients():
    model = a_model()
    loss = Muon()(model).step(lambda: model(torch.ones(2, 1, 4, 4)).sum().backward() or 3.0)
    assert loss == 3.0


# ------------------------------------------------------------------------------------------------ which parameters


def test_convolutions_and_hidden_layers_but_not_the_head_are_orthogonalized():
    model = a_model()
    optimizer = Muon()(model)
    assert isinstance(optimizer, MuonOptimizer)
    assert by_rule(model, optimizer) == {
        "muon": {"0.weight", "3.weight"},
        "adamw": {"1.weight", "1.bias", "3.bias", "6.weight", "6.bias"},
    }
    assert [group["rule"] for group in optimizer.param_groups] == ["muon", "adamw"]


def test_further_matrices_can_be_excluded():
    model = a_model()
    assert by_rule(model, Muon(exclude=["0.*"])(model))["muon"] == {"3.weight"}


def test_an_exclude_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(UsageError, match=r"exclude: '33\.\*' matches no parameter; did you mean '3\.\*'"):
        Muon(exclude=["33.*"])(a_model())


def test_embeddings_tables_and_tokens_are_not_orthogonalized():
    model = small.char_lm(20, width=16, layers=1, heads=2)
    model.register_parameter("class_token", nn.Parameter(torch.zeros(1, 1, 16)))
    names = by_rule(model, Muon()(model))
    assert names["muon"] == {
        "blocks.0.query_key_value.weight",
        "blocks.0.mix.weight",
        "blocks.0.perceptron.0.weight",
        "blocks.0.perceptron.2.weight",
    }


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(UsageError, match="finds no matrix to train besides the head: use 'sgd' or 'adamw'"):
        Muon()(nn.Linear(4, 2))


def test_a_schedules_factor_multiplies_every_rate():
    model = a_model()
    optimizer = Muon(lr=0.2, other_lr=0.05)(model)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.2, 0.05]


# ------------------------------------------------------------------------------------------------ it trains


@pytest.mark.parametrize(
    "settings",
    [
        Muon(lr=0.05),
        Muon(lr=0.1, momentum=0.6, iterations=3, normalize_weights=True, other="sgd", other_lr=0.1),
    ],
    ids=["plain", "normalized"],
)
def test_a_small_network_learns_stripes(settings):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(128) % 4
    wave = torch.sin(torch.arange(8.0))
    patterns = torch.stack(
        [wave.expand(8, 8), wave[:, None].expand(8, 8), torch.outer(wave, wave), wave.roll(2).expand(8, 8)]
    )
    inputs = patterns[targets][:, None] + 0.5 * torch.randn(128, 1, 8, 8, generator=generator)
    model = a_model()
    optimizer = settings(model)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(inputs), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 1.2
    assert losses[-1] < 0.1
