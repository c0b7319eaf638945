"""The convolution that computes its weight gradient as a matrix product: the same numbers, only where it is faster."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import torchrelay as tr
from torchrelay.device.device import DeviceSettings
from torchrelay.models import convolution
from torchrelay.models.convolution import Conv2d, pad_narrow_maps, reads_gaps, weight_gradient
from torchrelay.train.self_check import FILLINGS, fill_free_memory

needs_avx512 = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_f"), reason="the kernel that reads unwritten memory needs AVX-512"
)


@pytest.fixture
def products(monkeypatch):
    """The weight shapes whose gradient was a matrix product, pretending that this CPU has AMX."""
    found = []

    def noted(maps, gradient, shape, padding):
        found.append(tuple(shape))
        return weight_gradient(maps, gradient, shape, padding)

    monkeypatch.setattr(convolution, "weight_gradient", noted)
    monkeypatch.setattr(convolution, "has_amx", lambda: True)
    return found


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (5, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 2)])
@pytest.mark.parametrize("size", [(5, 5), (6, 7)])
def test_the_gradient_equals_pytorchs(kernel, padding, size):
    maps = torch.randn(3, 4, *size, dtype=torch.float64)
    weight = torch.randn(6, 4, *kernel, dtype=torch.float64, requires_grad=True)
    out = nn.functional.conv2d(maps, weight, padding=padding)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    for layout in (torch.contiguous_format, torch.channels_last):
        maps, gradient = (tensor.contiguous(memory_format=layout) for tensor in (maps, gradient))
        torch.testing.assert_close(weight_gradient(maps, gradient, weight.shape, padding), weight.grad)


def passes(layer: nn.Conv2d, maps: torch.Tensor, dtype: torch.dtype | None = torch.bfloat16) -> list[torch.Tensor]:
    """Return a layer's output and the gradients of its input and parameters."""
    maps = maps.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = layer(maps)
    out.float().square().mean().backward()
    return [out.detach(), maps.grad, *(parameter.grad for parameter in layer.parameters())]


def both(maps: torch.Tensor, dtype: torch.dtype | None = torch.bfloat16, **options) -> None:
    """Compare PyTorch's convolution with ours for the same weights."""
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    layers = [kind(maps.shape[1], 8, **options).to(memory_format=torch.channels_last) for kind in (nn.Conv2d, Conv2d)]
    layers[1].load_state_dict(layers[0].state_dict())
    theirs, ours = (passes(layer, maps, dtype) for layer in layers)
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])
    for expected, found in zip(theirs[2:], ours[2:], strict=True):
        assert found.dtype == expected.dtype
        assert found.stride() == expected.stride()  # optimizers iterate in memory order
        assert (found - expected).norm() <= 0.01 * expected.norm()


def maps(channels: int = 128, size: int = 7) -> torch.Tensor:
    return torch.randn(4, channels, size, size).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_small_feature_maps_with_many_channels_use_a_matrix_product(size, products):
    both(maps(size=size))
    assert products == [(8, 128, 3, 3)]


@pytest.mark.parametrize(
    ("given", "dtype", "options"),
    [
        (maps(size=8), torch.bfloat16, {}),
        (maps(channels=64), torch.bfloat16, {}),
        (maps().contiguous(), torch.bfloat16, {}),
        (maps(), None, {}),
        (maps(), torch.float16, {}),
        (maps(), torch.bfloat16, {"bias": True}),
        (maps(), torch.bfloat16, {"stride": 2}),
        (maps(), torch.bfloat16, {"dilation": 2}),
        (maps(), torch.bfloat16, {"groups": 4}),
        (maps(), torch.bfloat16, {"padding": "same"}),
        (maps(), torch.bfloat16, {"padding_mode": "reflect"}),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, dict) else None,
)
def test_other_convolutions_use_pytorch(given, dtype, options, products):
    both(given, dtype, **options)
    assert not products


def test_without_amx_nothing_changes(monkeypatch, products):
    monkeypatch.setattr(convolution, "has_amx", lambda: False)
    both(maps())
    assert not products


def test_a_frozen_weight_and_an_evaluation_need_no_product(products):
    layer = Conv2d(128, 8, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(maps())
    layer.weight.requires_grad_(False)
    assert passes(layer, maps())[1] is not None
    assert not products


@pytest.mark.slow
def test_the_fast_network_trains_with_it_and_resumes_exactly(products, quiet, tmp_path):
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name, steps in (("whole", None), ("resumed", 1), ("resumed", None)):
        torch.manual_seed(0)
        trainer = tr.Trainer(
            tr.models.build(tr.models.ModelSettings(name="fast-cnn"), classes=4, channels=3, image_size=32, log=print),
            (images, torch.arange(8) % 4),
            epochs=1,
            batch_size=4,
            optimizer=tr.optim.SGD(lr=0.01, momentum=0.9),
            device=DeviceSettings(name="cpu", precision="bf16", channels_last=True),
            settings=tr.RunSettings(max_steps=steps),
            terminal=quiet,
            run=tmp_path / name,
        )
        trainer.resume() if name == "resumed" and steps is None else trainer.fit()
    assert set(products) == {(256, 256, 3, 3)}
    weights = [
        next((tmp_path / name / "checkpoints").glob("step-00000002/model.safetensors")).read_bytes()
        for name in ("whole", "resumed")
    ]
    assert weights[0] == weights[1]


# ------------------------------------------------------------------------------------------------ narrow maps


def errors(layer: nn.Conv2d, maps: torch.Tensor) -> list[float]:
    """Return by how much the bf16 weight gradient is wrong, with several values in free memory."""
    gradient = torch.randn(layer(maps).shape, generator=torch.Generator().manual_seed(1))
    (true,) = torch.autograd.grad(layer(maps), layer.weight, gradient)
    found = []
    for filling in FILLINGS * 4:
        fill_free_memory(filling, 16 * 2**20, maps.device)
        with torch.autocast("cpu", torch.bfloat16):
            (mine,) = torch.autograd.grad(layer(maps), layer.weight, gradient.bfloat16())
        found.append(float((mine - true).abs().max() / true.abs().max()))
    return found


@needs_avx512
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "size", "options"),
    [
        ((64, 128), (1, 1), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((32, 32), (5, 1), {"kernel_size": 3, "stride": (1, 2), "padding": 1}),
        ((32, 32), (2, 2), {"kernel_size": 3, "stride": 3, "padding": 1}),
        ((32, 32), (1, 1), {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 2}),
    ],
    ids=str,
)
def test_gradients_of_maps_that_are_narrower_than_the_stride_are_right(channels, size, options, layout):
    theirs = nn.Conv2d(*channels, **options).to(memory_format=layout)
    maps = torch.randn(50, channels[0], *size).contiguous(memory_format=layout)
    (ours,) = pad_narrow_maps(nn.Sequential(theirs))
    assert reads_gaps(theirs, size[1])
    assert max(errors(ours, maps)) < 0.02
    assert not max(errors(theirs, maps)) < 0.02, "PyTorch's is right here: nothing has to be routed around it"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(maps), theirs(maps))


@pytest.mark.parametrize(
    ("layer", "width", "expected"),
    [
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), 1, True),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), 2, False),
        (nn.Conv2d(8, 8, 3, stride=(2, 1), padding=1), 1, False),
        (nn.Conv2d(8, 8, 1, stride=2), 1, False),
        (nn.Conv2d(8, 8, (3, 1), stride=2, padding=(1, 0)), 1, False),
        (nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2), 1, False),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), 1, False),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="reflect"), 1, False),
        (nn.Conv1d(8, 8, 3, stride=2, padding=1), 1, True),
        (nn.Conv3d(8, 8, 3, stride=2, padding=1), 1, True),
        (nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1), 1, True),
        (nn.Linear(8, 8), 1, False),
    ],
    ids=str,
)
def test_the_layers_that_read_unwritten_memory_are_known(layer, width, expected):
    assert reads_gaps(layer, width) is expected


def test_in_a_library_s_model_only_strided_convolutions_are_replaced_with_the_same_parameters():
    settings = tr.models.ModelSettings(name="resnet18")
    torch.manual_seed(0)
    model = tr.models.build(settings, classes=4, image_size=16, log=print)
    ours = {name for name, layer in model.named_modules() if type(layer) is Conv2d}
    assert ours == {"conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"}
    torch.manual_seed(0)
    plain = resnet18(num_classes=4)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert str(model) == str(plain)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
