"""The self-check of an exact run's first gradients finds kernels that can't be trusted, and changes nothing."""

import itertools
import random
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchrelay as tr
from torchrelay.errors import RelayError
from torchrelay.recipe import recipe
from torchrelay.train.self_check import Comparison, kernels_of, unchanged


class Unwritten(torch.autograd.Function):
    """A product whose weight gradient leaves a row as it finds it in memory, as some kernels do."""

    @staticmethod
    def forward(ctx, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        return inputs @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        of_weight = torch.empty_like(weight)
        of_weight[1:] = (gradient.T @ inputs)[1:]
        return gradient @ weight, of_weight


class Varying(Unwritten):
    """A product whose weight gradient is other in its last bits each time."""

    calls = itertools.count()

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        return gradient @ weight, (gradient.T @ inputs) * (1 + next(Varying.calls) * 1e-6)


class Planted(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(32, 64) / 8), function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function.apply(inputs, self.weight)


class Root(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs - inputs).sqrt() + inputs


def trainer(*layers: nn.Module, samples: int = 96, **options) -> tr.Trainer:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(samples, 64, generator=generator), torch.randint(10, (samples,), generator=generator)
    torch.manual_seed(0)
    first = nn.Linear(64, 64)
    return tr.Trainer(nn.Sequential(first, nn.ReLU(), *layers), data, epochs=1, batch_size=32, device="cpu", **options)


@pytest.mark.parametrize("function", [Unwritten, Varying])
def test_a_gradient_that_is_other_the_second_time_stops_the_run_with_its_layer_and_kernel(function):
    refused = trainer(Planted(function), nn.ReLU(), nn.Linear(32, 10))
    with pytest.raises(RelayError, match=f"the gradient of 2.weight .by {function.__name__}; .*isn't the same twice"):
        refused.fit()
    assert refused.step == 0, "no step was taken"


def test_a_gradient_that_is_not_finite_stops_the_run_though_its_loss_is():
    with pytest.raises(RelayError, match=r"the gradient of 0\.bias .by Addmm; .*isn't finite in the first batch"):
        trainer(Root(), nn.Linear(64, 10)).fit()


def test_a_rollback_is_left_to_skip_a_gradient_that_is_not_finite(tmp_path):
    settings = tr.RunSettings(on_spike="rollback", max_skipped=1)
    with pytest.raises(RelayError, match="skip"):
        trainer(Root(), nn.Linear(64, 10), settings=settings, run=tmp_path / "run").fit()


def test_a_run_that_is_not_exact_goes_on_where_last_bits_differ_and_is_warned_of_garbage(capsys):
    settings = tr.RunSettings(exact=False)
    for function, warned in ((Varying, False), (Unwritten, True)):
        # One step: garbage in the weights may make the loss of a second one nan.
        unchecked = trainer(Planted(function), nn.ReLU(), nn.Linear(32, 10), settings=settings, samples=32)
        unchecked.fit()
        assert unchecked.step == 1
        assert ("warning: the gradient of 2.weight" in capsys.readouterr().out) == warned


class Counting(nn.Module):
    """Has all that a forward pass may change: a buffer, a number, a tensor, and it draws from all generators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))
        self.calls, self.last = 0, torch.zeros(64)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += len(inputs)
            self.replaced = self.replaced + 1
            self.calls += 1
            self.last = inputs.detach().mean(0)
        return F.dropout(inputs, 0.5, self.training) + random.random() + np.random.rand()


class Remembering(tr.Classification):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def compute(self, model, batch, update):
        self.steps += 1
        tr.log("steps", self.steps)
        return super().compute(model, batch, update)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_check_leaves_model_task_and_random_numbers_as_they_were(tmp_path, same_runs, replicas):
    found = []
    for checks in (True, False):
        random.seed(1)
        np.random.seed(1)
        run = tmp_path / str(checks)
        options = {"task": Remembering(), "run": run, "parallel": tr.ParallelSettings(replicas=replicas)}
        made = trainer(nn.BatchNorm1d(64), Counting(), nn.Linear(64, 10), **options)
        made.judge._unchecked = checks
        made.fit()
        log = (run / "log.txt").read_text(encoding="utf-8")
        assert ("the first batch's gradients are the same twice" in log) == checks
        found.append((made.model[3].calls, made.model[3].last, made.task.steps))
    assert found[0][0] == found[1][0] == 3 * replicas
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    same_runs(tmp_path / "True", tmp_path / "False")


def test_a_check_leaves_no_hook_that_each_later_step_would_call_but_a_user_s_own():
    made = trainer(nn.Linear(64, 10))
    hooked, *others = made.model.parameters()
    calls = []
    hooked.register_hook(calls.append)
    made.fit()
    assert len(calls) == 5  # three steps, and the two passes of the check
    assert all(each._backward_hooks is None for each in others)


def test_buffers_that_a_forward_pass_updates_are_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with unchanged(model, tr.Classification()):
        model(torch.randn(8, 4)).sum().backward()
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_kernel_is_named_behind_what_only_hands_a_parameter_on():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 3, 3)).float().sum()
    named = dict(model.named_parameters())
    kernels = kernels_of(loss, named)
    assert kernels["0.weight"] == kernels["0.bias"] == "Convolution"
    assert kernels["1.weight"] == "NativeBatchNorm"
    assert kernels["3.weight"] == "Addmm"


class Two(tr.Task):
    """Two updates, of which the second meets the planted kernel."""

    updates = ("body", "head")

    def compute(self, model, batch, update):
        return F.cross_entropy(model(batch.inputs), batch.targets, reduction="sum")


def test_each_update_of_a_step_is_checked():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(32, 64, generator=generator), torch.randint(10, (32,), generator=generator)
    model = nn.Sequential()
    model.body, model.head = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(Planted(Varying), nn.Linear(32, 10))
    optimizers = {"body": tr.optim.SGD(), "head": tr.optim.SGD()}
    with pytest.raises(RelayError, match=r"the gradient of head\.0\.weight"):
        tr.Trainer(model, data, task=Two(), optimizer=optimizers, epochs=1, batch_size=32, device="cpu").fit()


def test_weights_that_a_forward_pass_writes_to_are_as_they_were():
    class Normed(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.div_(self.weight.norm())
            return super().forward(inputs)

    model = Normed(4, 4)
    before = model.weight.detach().clone()
    with unchanged(model):
        model(torch.randn(2, 4))
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_a_convolution_that_corrupts_memory_is_refused_before_it_computes(monkeypatch):
    monkeypatch.setattr("torchrelay.train.self_check.has_only_avx2", lambda: True)
    images = torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.int64)

    def fit(channels_last: bool) -> tr.Trainer:
        model = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.Flatten(), nn.Linear(128, 2))
        device = tr.DeviceSettings(name="cpu", channels_last=channels_last)
        made = tr.Trainer(model, images, epochs=1, batch_size=16, device=device)
        made.fit()
        return made

    with pytest.raises(RelayError, match=r"^0 is Conv2d\(3, 8, .*set device\.channels_last=false"):
        fit(channels_last=True)
    assert fit(channels_last=False).step == 2


@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_f"), reason="the kernel needs AVX-512")
def test_a_convolution_that_reads_unwritten_memory_is_refused_even_where_its_gradient_begins_with_0(monkeypatch):
    images = torch.randn(32, 3, 16, 16), torch.arange(32) % 4

    def fit(precision: str = "bf16") -> tr.Trainer:
        # Its last BatchNorm of each block begins with 0: in the first step, whatever memory holds is multiplied by 0.
        settings = tr.models.ModelSettings(name="resnet18", options={"zero_init_residual": True})
        model = tr.models.build(settings, classes=4, image_size=16, log=print)
        device = tr.DeviceSettings(name="cpu", precision=precision)
        made = tr.Trainer(model, images, epochs=1, batch_size=16, device=device)
        made.fit()
        return made

    assert fit().step == 2, "a library's model has our own convolution"
    monkeypatch.setattr("torchrelay.models.factory.pad_narrow_maps", lambda model: model)
    with pytest.raises(RelayError, match=r"^layer4\.0\.conv1 is Conv2d\(256, 512.*set device\.precision=float32"):
        fit()
    assert fit("float32").step == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("digits", 1, 8),
        ("fashion-mnist", 1, 28),
        ("cifar10-small", 3, 32),
        ("cifar10-fast", 3, 18),
        ("cifar10-94", 3, 32),
        ("cifar10-reference", 3, 112),
        ("image-folder", 3, 32),
    ],
)
def test_no_shipped_recipe_s_model_is_refused_in_bf16(name, channels, side, monkeypatch, tmp_path):
    # Not even where nothing is routed around.
    monkeypatch.setattr("torchrelay.models.factory.pad_narrow_maps", lambda model: model)
    settings = recipe.load(name).model
    torch.manual_seed(0)
    model = tr.models.build(settings, classes=4, channels=channels, image_size=side, log=print)
    images = torch.randint(256, (8, channels, side, side), dtype=torch.uint8), torch.arange(8) % 4
    device = tr.DeviceSettings(name="cpu", precision="bf16")
    tr.Trainer(model, images, epochs=1, batch_size=8, device=device, run=tmp_path / "run").fit()
    assert "gradients are the same twice" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


def test_a_sparse_gradient_is_compared_too():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.table(inputs).mean(1))

    data = torch.arange(480).reshape(96, 5) % 50, torch.arange(96) % 3
    plain = tr.optim.SGD(lr=0.1, momentum=0, weight_decay=0)
    trained = tr.Trainer(Words(), data, epochs=1, batch_size=32, device="cpu", optimizer=plain)
    trained.fit()
    assert trained.step == 3


def test_a_comparison_lets_go_of_each_gradient_as_soon_as_its_second_one_is_known():
    comparison, again = Comparison(exact=True), torch.ones(2)
    for name in ("last", "first"):
        comparison.take(name, torch.ones(2))
    first = weakref.ref(comparison._first["last"])
    comparison.take("last", again)
    assert first() is None
    comparison.take("first", torch.zeros(2))
    assert (comparison.other, comparison.not_finite) == ("first", "")
