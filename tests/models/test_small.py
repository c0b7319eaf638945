"""Our own networks: shapes, their properties, and that the small one learns the digits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchrelay.errors import RelayError, UsageError
from torchrelay.models import ModelSettings, build
from torchrelay.models.small import NETWORKS, FastCNN


def make(name: str, classes: int = 10, channels: int = 3, image_size: int | None = 32, **options: object) -> nn.Module:
    settings = ModelSettings(name=name, options=options)
    return build(settings, classes=classes, channels=channels, image_size=image_size, log=print)


def count(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet18-small", "fast-cnn"])
@pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (4, 48)])
def test_an_image_network_accepts_any_channels_and_sizes(name: str, channels: int, size: int) -> None:
    model = make(name, classes=7, channels=channels, image_size=size)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_initial_weights_depend_on_the_seed(name: str) -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(make(name).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_the_mlp_accepts_features_and_flattens_images() -> None:
    assert make("mlp", channels=13, image_size=None)(torch.randn(5, 13)).shape == (5, 10)
    model = make("mlp", channels=1, image_size=8, widths=[16])
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert count(model) == 64 * 16 + 16 + 16 * 10 + 10


def test_resnet18_small_keeps_the_images_resolution_in_its_first_stage() -> None:
    model = make("resnet18-small")
    seen: list[torch.Size] = []
    layer1: nn.Module = model.get_submodule("layer1")
    layer1.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 64, 32, 32)]
    assert count(model) == 11_173_962


@pytest.mark.parametrize(("name", "size"), [("small-cnn", 3), ("fast-cnn", 8)])
def test_too_small_images_are_refused_with_the_minimum_size(name: str, size: int) -> None:
    with pytest.raises(UsageError, match=f"at least {size + 1} pixels, not {size}"):
        make(name, image_size=size)
    make(name, image_size=size + 1).eval()(torch.randn(1, 3, size + 1, size + 1))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("small-cnn", {"width": [1]}, "no option 'width'; did you mean 'widths'"),
        ("small-cnn", {"widths": "wide"}, r"model\.options\.widths"),
        ("char-lm", {"width": 10, "heads": 4}, "among 4 heads"),
        ("char-lm", {"window": 0}, "can't see 0 characters: set model.options.window"),
        ("resnet18-small", {"pretrained": True}, "no option"),
    ],
)
def test_a_wrong_option_is_a_usage_error_that_names_it(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(name, **options)


def test_our_networks_have_no_pretrained_weights() -> None:
    with pytest.raises(UsageError, match="no weights of its own"):
        build(ModelSettings(name="small-cnn", pretrained=True), classes=10, log=print)


# ------------------------------------------------------------------------------------------------ small-cnn


def test_the_small_cnn_learns_the_digits_in_seconds() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    targets = torch.tensor(digits.target)
    torch.manual_seed(1)
    order = torch.randperm(len(images))
    train, test = order[:1437], order[1437:]
    images = (images - images[train].mean()) / images[train].std()
    model = make("small-cnn", channels=1, image_size=8)
    assert 50_000 < count(model) < 100_000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batches = [batch for _ in range(5) for batch in train[torch.randperm(len(train))].split(64)]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == targets[test]).float().mean()
    assert accuracy >= 0.96


# ------------------------------------------------------------------------------------------------ fast-cnn


def photographs(samples: int) -> torch.Tensor:
    """Return images (samples, 3, 16, 16) with correlated neighboring pixels and channels, like photographs."""
    coarse = F.interpolate(torch.randn(samples, 1, 4, 4), size=16, mode="bicubic")
    return coarse + 0.3 * torch.randn(samples, 3, 16, 16)


def patch_answers(model: FastCNN, images: torch.Tensor) -> torch.Tensor:
    """Return (patches, directions): the output of the first half of the whitening filters."""
    half = model.whiten.weight[: len(model.whiten.weight) // 2]
    return F.conv2d(images, half).permute(0, 2, 3, 1).flatten(0, 2)


def test_after_init_from_the_whitened_patches_have_covariance_one() -> None:
    torch.manual_seed(0)
    model, images = make("fast-cnn"), photographs(600)
    assert isinstance(model, FastCNN)
    before = patch_answers(model, images).T.cov()
    model.init_from(images)
    after = patch_answers(model, images).T.cov()
    assert after.shape == (12, 12)
    assert (after - torch.eye(12)).abs().max() < 0.01
    assert (before - torch.eye(12)).abs().max() > 0.1


def test_each_whitening_filter_has_its_negative_and_is_not_trained() -> None:
    torch.manual_seed(0)
    model = make("fast-cnn", channels=1)
    assert isinstance(model, FastCNN)
    model.init_from(photographs(50)[:, :1])
    weight = model.whiten.weight
    assert weight.shape == (8, 1, 2, 2)
    assert torch.equal(weight[:4], -weight[4:])
    assert not weight.requires_grad
    assert model.whiten.bias is not None
    assert model.whiten.bias.requires_grad


def test_init_from_is_deterministic() -> None:
    torch.manual_seed(0)
    images = photographs(300)
    one, two = make("fast-cnn"), make("fast-cnn")
    state = torch.get_rng_state()
    for model in (one, two):
        assert isinstance(model, FastCNN)
        model.init_from(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.get_parameter("whiten.weight"), two.get_parameter("whiten.weight"))


def test_the_fast_networks_convolutions_start_as_the_identity() -> None:
    conv = make("fast-cnn").get_submodule("groups.0.conv2")
    images = torch.randn(1, 64, 5, 5)
    torch.testing.assert_close(conv(images), images)


# ------------------------------------------------------------------------------------------------ char-lm


def test_the_language_model_sees_no_future_token() -> None:
    torch.manual_seed(0)
    model = make("char-lm", classes=11).eval()
    tokens = torch.randint(11, (2, 20))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 11
    one, two = model(tokens), model(changed)
    assert one.shape == (2, 20, 11)
    torch.testing.assert_close(one[:, :12], two[:, :12])
    assert not torch.allclose(one[:, 12], two[:, 12])
    assert not torch.allclose(one[:, 13:], two[:, 13:])


def test_a_language_model_with_a_window_sees_just_the_characters_before() -> None:
    torch.manual_seed(0)
    model = make("char-lm", classes=11, layers=0, window=3).eval()  # without blocks there is no attention
    tokens = torch.randint(11, (1, 20))
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 11
    differs = (model(tokens) != model(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [12, 13, 14]
    torch.testing.assert_close(model(tokens[:, :1]), model(tokens)[:, :1])  # a text that is shorter than the window


def test_the_language_model_learns_a_rule() -> None:
    torch.manual_seed(0)
    model = make("char-lm", classes=5, width=32, layers=1, heads=2, context=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = (torch.randint(5, (64, 1)) + torch.arange(17)) % 5  # each token is the one before it, plus one
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_a_text_longer_than_the_context_names_the_setting() -> None:
    model = make("char-lm", classes=5, context=8)
    with pytest.raises(RelayError, match=r"at most 8 characters, not 9: set model\.options\.context"):
        model(torch.zeros(1, 9, dtype=torch.int64))
