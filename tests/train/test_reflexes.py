"""A PyTorch user's habits work, or one sentence names torchrelay's equivalent."""

import functools
import io
import os
import pydoc
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision import transforms
from torchvision.transforms import v2

import torchrelay as tr
from torchrelay.errors import RelayError
from torchrelay.run.terminal import Terminal

SAMPLES = 22  # so that the last batch is smaller
BATCH = 8


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


INPUTS, LABELS = numbers(SAMPLES, 4), torch.arange(SAMPLES) % 3
VALUES, SEVERAL = numbers(SAMPLES, 3), (numbers(SAMPLES, 3) > 0).float()
PAIR = INPUTS, LABELS


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def trainer(model: nn.Module | None = None, train: Any = PAIR, test: Any = None, **changes: Any) -> tr.Trainer:
    arguments = {"epochs": 1, "batch_size": BATCH, "device": "cpu", "terminal": Terminal(quiet=True)}
    return tr.Trainer(linear() if model is None else model, train, test, **(arguments | changes))


def refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(RelayError) as caught:
        call()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ optimizer

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "an instance": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "a class": lambda _: torch.optim.Adam,
    "a partial": lambda _: functools.partial(torch.optim.Adam, lr=0.01),
    "a function": lambda _: lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "a name": lambda _: "adam",
    "a name as PyTorch writes it": lambda _: "Adam",
    "a table": lambda _: {"name": "adam", "lr": 0.01},
    "settings": lambda _: tr.optim.Adam(lr=0.01),
    "a class of settings": lambda _: tr.optim.Adam,
    "by update": lambda _: {"main": "adam"},
}


@pytest.mark.parametrize("given", OPTIMIZERS)
def test_an_optimizer_is_accepted_as(given):
    model = linear()
    built = trainer(model, optimizer=OPTIMIZERS[given](model))
    assert type(built.optimizer) is torch.optim.Adam
    assert built.optimizer.param_groups[0]["lr"] in (0.01, 0.001)
    before = model.weight.detach().clone()
    built.fit()
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: torch.optim.Adam(linear().parameters()), "2 of 2 parameters in the optimizer aren't the model's"),
        (lambda: "adm", "there is no optimizer 'adm'; did you mean 'adam'?"),
        (lambda: {"name": "adam", "betta": 1}, "'betta' is no option of torch.optim.Adam; did you mean 'betas'?"),
        (lambda: {"rate": 0.1}, "unknown key 'optimizer.rate'; did you mean"),
        (lambda: 0.1, "optimizer is 0.1 (float): give tr.optim.SGD(lr=0.1)"),
        (lambda: lambda model: model.parameters(), "the optimizer's function returns"),
        (lambda: "sparseadam", "takes sparse gradients only"),
        (lambda: functools.partial(torch.optim.Adam, rate=1), "unexpected keyword argument 'rate'"),
    ],
)
def test_an_invalid_optimizer_is_refused_in_one_line(given, says):
    refused(lambda: trainer(optimizer=given()), says)


def test_every_torch_optimizer_has_settings():
    names = {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    for name in names - {"Optimizer", "SparseAdam", "SGD", "AdamW", "Muon"}:
        assert type(getattr(tr.optim, name)()(linear())).__name__ == name
        assert name in dir(tr.optim)
    with pytest.raises(AttributeError):
        tr.optim.SparseAdam  # noqa: B018
    with pytest.raises(AttributeError):
        tr.optim.adam  # noqa: B018


def test_lbfgs_settings_train_like_a_hand_written_loop():
    by_hand, ours = linear(), linear()
    optimizer = torch.optim.LBFGS(by_hand.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(by_hand(INPUTS), LABELS)
        loss.backward()
        return loss

    optimizer.step(closure)
    lbfgs = tr.optim.LBFGS(options={"max_iter": 4})
    trainer(ours, optimizer=lbfgs, batch_size=SAMPLES, sampling="sequential").fit()
    torch.testing.assert_close(ours.weight, by_hand.weight)
    groups = [{"match": ["weight"], "lr": 0.5}]
    refused(lambda: trainer(optimizer=tr.optim.LBFGS(groups=groups)), "has one learning rate for all parameters")


def test_a_run_with_an_optimizer_instance_resumes_exactly(tmp_path, same_runs):
    def run(folder: Path, **changes: Any) -> tr.Trainer:
        model = linear()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return trainer(model, test=PAIR, epochs=3, run=folder, optimizer=optimizer, **changes)

    run(tmp_path / "whole").fit()
    with pytest.raises(tr.RelayError, match=r"resume with: trainer\.resume\(\)"):
        run(tmp_path / "parted", callbacks=Interrupts()).fit()
    run(tmp_path / "parted").resume()
    same_runs(tmp_path / "whole", tmp_path / "parted")


class Interrupts(tr.Callback):
    """Stops the first run in its second epoch, like a signal."""

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------------ schedule

SCHEDULES: dict[str, tuple[Any, list[float]]] = {
    "nothing": (None, [1.0, 1.0, 1.0]),
    "a name": ("cosine", [1.0, 0.75, 0.25]),
    "a name as a class": ("Cosine", [1.0, 0.75, 0.25]),
    "a class": (tr.optim.Cosine, [1.0, 0.75, 0.25]),
    "settings": (tr.optim.Cosine(), [1.0, 0.75, 0.25]),
    "a table": ({"name": "cosine", "final_lr": 1.0}, [1.0, 1.0, 1.0]),
    "a function": (lambda step: 0.5**step, [1.0, 0.5, 0.25]),
}


@pytest.mark.parametrize("given", SCHEDULES)
def test_a_schedule_is_accepted_as(given):
    schedule, rates = SCHEDULES[given]
    seen: list[float] = []

    class Rates(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            seen.append(trainer.optimizer.param_groups[0]["lr"])

    trainer(optimizer=tr.optim.SGD(lr=1.0), schedule=schedule, callbacks=Rates()).fit()
    assert seen == pytest.approx(rates)


def scheduler(kind: str, *arguments: Any) -> Any:
    optimizer = torch.optim.SGD(linear().parameters(), lr=0.1)
    return getattr(torch.optim.lr_scheduler, kind)(optimizer, *arguments)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: scheduler("CosineAnnealingLR", 10), 'can\'t resume exactly: give tr.optim.Cosine(per="epoch")'),
        (lambda: scheduler("StepLR", 10), "give tr.optim.Step("),
        (lambda: scheduler("OneCycleLR", 0.1, 10), "give tr.optim.OneCycle()"),
        (lambda: scheduler("MultiStepLR", [3]), "give tr.optim.MultiStep("),
        (lambda: scheduler("ReduceLROnPlateau"), "give tr.optim.Plateau()"),
        (lambda: scheduler("ExponentialLR", 0.9), "give a function from the step to the factor of the rate"),
        (lambda: torch.optim.lr_scheduler.LambdaLR, "torch's LambdaLR"),
        (lambda: functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3), "torch's StepLR"),
        (lambda: "cosin", "there is no schedule 'cosin'; did you mean 'cosine'?"),
        (lambda: {"name": "cosine", "final": 1}, "unknown key 'schedule.final'; did you mean 'final_lr'?"),
        (lambda: 0.9, "schedule is 0.9 (float): give tr.optim.Cosine()"),
        (lambda: lambda: 0.9, "schedule=lambda step:"),
        (lambda: int, "schedule is int"),
    ],
)
def test_an_invalid_schedule_is_refused_in_one_line(given, says):
    refused(lambda: trainer(schedule=given()), says.replace("can't resume", "couldn't resume"))


# ------------------------------------------------------------------------------------------------ device, callbacks


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu"), tr.DeviceSettings(name="cpu")])
def test_a_device_is_accepted_as(given):
    assert trainer(device=given).device.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (99, "device.name is 'cuda:99', but PyTorch sees"),
        (torch.device("cuda", 98), "device.name is 'cuda:98', but PyTorch sees"),
        (torch.device("meta"), "device.name 'meta' is unknown"),
        ("gpu", "device.name 'gpu' is unknown: use auto, cpu, cuda"),
        (True, "device is True: give a name"),
        (None, "device is None: give a name"),
    ],
)
def test_an_invalid_device_is_refused_in_one_line(given, says):
    refused(lambda: trainer(device=given), says)


class Counts(tr.Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, trainer, batch, loss) -> None:
        self.steps += 1


def test_callbacks_may_be_one_or_a_class():
    for given in (Counts(), Counts, [Counts()], (Counts,), [Counts, Counts()]):
        built = trainer(callbacks=given)
        built.fit()
        assert [each.steps for each in built.callbacks if isinstance(each, Counts)] == [3] * (
            len(given) if isinstance(given, list | tuple) else 1
        )
    assert trainer(callbacks=None).callbacks


def test_invalid_callbacks_are_refused_in_one_line():
    refused(lambda: trainer(callbacks=print), "callbacks has print, which is no tr.Callback")
    refused(
        lambda: trainer(callbacks=[tr.EarlyStopping]), "callbacks has the class EarlyStopping: give an object of it"
    )


# ------------------------------------------------------------------------------------------------ loss

IMAGES, PIXELS = numbers(SAMPLES, 4, 2, 2), (torch.arange(SAMPLES * 4).reshape(SAMPLES, 2, 2) * 7) % 3
IGNORED = torch.where(torch.arange(SAMPLES) % 4 == 0, -100, LABELS)
SEVENS = torch.where(torch.arange(SAMPLES) % 4 == 0, 7, LABELS)
MIXED = VALUES.softmax(1)
WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


def focal(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    each = F.cross_entropy(outputs, targets, reduction="none")
    each = (1 - torch.exp(-each)) ** 2 * each
    return each.mean() if reduction == "mean" else each.sum()


class Log(nn.Module):
    """Log-probabilities, as some losses want them."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.log_softmax(inputs, 1)


def pixels() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(4, 3, 1)


# The loss, the targets, and the class of the task that comes of it.
LOSSES: dict[str, tuple[Any, Tensor, str]] = {
    "cross entropy": (nn.CrossEntropyLoss(), LABELS, "Classification"),
    "its class": (nn.CrossEntropyLoss, LABELS, "Classification"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS, "Classification"),
    "weighted": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), LABELS, "Classification"),
    "ignoring": (nn.CrossEntropyLoss(), IGNORED, "OfClasses"),
    "ignoring another": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=7), SEVENS, "OfClasses"),
    "of probabilities": (nn.CrossEntropyLoss(), MIXED, "OfClasses"),
    "of pixels": (nn.CrossEntropyLoss(), PIXELS, "OfClasses"),
    "of weighted pixels": (nn.CrossEntropyLoss(WEIGHTS), PIXELS, "OfClasses"),
    "function": (F.cross_entropy, LABELS, "Classification"),
    "partial": (functools.partial(F.cross_entropy, label_smoothing=0.1), LABELS, "Classification"),
    "nll": (nn.NLLLoss(WEIGHTS), LABELS, "OfClasses"),
    "nll function": (F.nll_loss, LABELS, "OfClasses"),
    "bce": (nn.BCEWithLogitsLoss(), SEVERAL, "MultiLabel"),
    "bce of positives": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), SEVERAL, "MultiLabel"),
    "bce of labels": (nn.BCEWithLogitsLoss(WEIGHTS), SEVERAL, "OfValues"),
    "bce function": (F.binary_cross_entropy_with_logits, SEVERAL, "MultiLabel"),
    "mse": (nn.MSELoss(), VALUES, "Regression"),
    "mse function": (F.mse_loss, VALUES, "Regression"),
    "l1": (nn.L1Loss(), VALUES, "OfValues"),
    "smooth l1": (nn.SmoothL1Loss(beta=0.5), VALUES, "OfValues"),
    "huber": (nn.HuberLoss(), VALUES, "OfValues"),
    "huber function": (functools.partial(F.huber_loss, delta=0.5), VALUES, "OfValues"),
    "poisson": (nn.PoissonNLLLoss(), SEVERAL, "OfValues"),
    "kl": (nn.KLDivLoss(reduction="batchmean"), MIXED, "OfSamples"),
    "margin": (nn.MultiMarginLoss(), LABELS, "OfSamples"),
    "soft margin": (nn.MultiLabelSoftMarginLoss(), SEVERAL, "OfSamples"),
    "of one's own": (focal, LABELS, "Criterion"),
}


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_is_the_mean_over_the_whole_batch(case, replicas):
    """A global batch in four unequal parts gives the gradient of the loss over the whole batch."""
    loss, targets, kind = LOSSES[case]
    inputs, make = (IMAGES, pixels) if targets is PIXELS else (INPUTS, linear)
    by_hand, ours = make(), make()
    outputs = by_hand(inputs)
    expected = (loss() if isinstance(loss, type) else loss)(Log()(outputs) if "nll" in case else outputs, targets)
    expected.backward()
    model = nn.Sequential(ours, Log()) if "nll" in case else ours
    seen: list[float] = []

    class Losses(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            seen.append(loss.item())

    built = trainer(
        model,
        (inputs, targets),
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        batch_size=SAMPLES,
        normalize=False,
        parallel=tr.ParallelSettings(replicas=replicas),
        callbacks=Losses,
    )
    assert type(built.task).__name__ == kind
    before = ours.weight.detach().clone()
    built.fit()
    torch.testing.assert_close(torch.tensor(seen), expected.detach()[None])
    torch.testing.assert_close(before - ours.weight, by_hand.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_is_used_in_evaluation(case):
    """In two batches of different sizes."""
    loss, targets, _ = LOSSES[case]
    inputs, model = (IMAGES, pixels()) if targets is PIXELS else (INPUTS, linear())
    model = nn.Sequential(model, Log()) if "nll" in case else model
    built = trainer(model, (inputs, targets), (inputs, targets), loss=loss, normalize=False, batch_size=16)
    expected = (loss() if isinstance(loss, type) else loss)(model(inputs), targets)
    found = built.evaluate()
    assert found.values["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= found.values.get("accuracy", 0) <= 1
    assert len(built.predict(inputs)) == SAMPLES


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_one_logit_tells_two_classes_apart(shape, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.Unflatten(1, (1,)) if shape else nn.Flatten(0))
    positive = (INPUTS[:, 0] > 0.3).to(kind)
    built = trainer(model, (INPUTS, positive), (INPUTS, positive), loss=nn.BCEWithLogitsLoss(), epochs=2)
    values = built.fit()
    assert isinstance(built.task, tr.tasks.Binary)
    likely = built.predict(INPUTS)
    assert likely.shape == (SAMPLES,)
    logits = model(INPUTS).detach().flatten()
    torch.testing.assert_close(likely, logits.sigmoid())
    found, present = likely > 0.5, positive == 1
    assert values["accuracy"] == pytest.approx((found == present).float().mean().item())
    assert values["f1"] == pytest.approx(2 * (found & present).sum().item() / (found.sum() + present.sum()).item())
    assert values["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(logits, positive.float()).item())


def test_one_logit_for_two_classes_says_which_loss_takes_it():
    refused(lambda: trainer(nn.Linear(4, 1), (INPUTS, LABELS % 2)).fit(), "or give loss=nn.BCEWithLogitsLoss()")


def test_a_loss_given_as_the_task_is_accepted_with_a_note(tmp_path):
    built = trainer(task=nn.CrossEntropyLoss(label_smoothing=0.1), run=tmp_path / "run")
    assert isinstance(built.task, tr.Classification)
    assert built.task.label_smoothing == 0.1
    built.fit()
    assert "CrossEntropyLoss is computed as Classification: its sums over parts" in (
        tmp_path / "run" / "log.txt"
    ).read_text(encoding="utf-8")


def test_a_task_may_be_a_class_or_a_name():
    assert isinstance(trainer(task=tr.Classification).task, tr.Classification)
    assert isinstance(trainer(task="mse", train=(INPUTS, VALUES)).task, tr.Regression)
    assert isinstance(trainer(loss=tr.MultiLabel(labels=3), train=(INPUTS, SEVERAL)).task, tr.MultiLabel)


class Own(nn.Module):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()


def of_squares(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    each = (outputs - targets).square().sum(1)
    return each.mean() if reduction == "mean" else each.sum()


class Learns(nn.L1Loss):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class NeedsMore(tr.Task):
    def __init__(self, factor: float) -> None:
        self.factor = factor


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda outputs, targets: outputs.sum(), "no 'reduction', so a part of a batch has no sum of it: write class"),
        (Own(), "loss Own has no 'reduction'"),
        (nn.MSELoss(reduction="sum"), 'loss MSELoss has reduction="sum": leave it at "mean"'),
        (nn.L1Loss(reduction="none"), 'has reduction="none"'),
        (nn.CTCLoss(), "isn't called with (outputs, targets) alone"),
        (nn.TripletMarginLoss(), "isn't called with (outputs, targets) alone"),
        ("mae", "task 'mae' is unknown; did you mean 'mse'?"),
        (3, "task is 3: give tr.Classification()"),
        (NeedsMore, "task is the class NeedsMore, which needs other arguments: give an object"),
        (functools.partial(F.cross_entropy, smoothing=0.1), "task is the class CrossEntropyLoss, which needs other"),
        (Learns(), "loss Learns has parameters, and only the model's are trained"),
        (tr.Task, "Task has no loss: define loss(outputs, targets)"),
    ],
)
def test_an_invalid_loss_is_refused_in_one_line(given, says):
    refused(lambda: trainer(loss=given, train=(INPUTS, VALUES)), says)


def test_a_loss_with_another_divisor_is_refused_at_the_first_batch():
    refused(lambda: trainer(loss=of_squares, train=(INPUTS, VALUES)).fit(), "the mean of of_squares is")


def test_giving_a_task_and_a_loss_is_refused():
    refused(lambda: trainer(loss=nn.MSELoss(), task=tr.Regression()), "two names of one argument")


# ------------------------------------------------------------------------------------------------ data


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.layer(left) + right


def collate(samples: list[Any]) -> Any:
    return torch.stack([x for x, _ in samples]), torch.tensor([int(y) for _, y in samples])


DATASET = TensorDataset(*PAIR)
DATA: dict[str, tuple[Any, Callable[[], nn.Module]]] = {
    "a pair of tensors": (PAIR, linear),
    "a pair of NumPy arrays": ((INPUTS.numpy(), LABELS.numpy()), linear),
    "a list of two arrays": ([INPUTS.numpy(), LABELS.numpy()], linear),
    "a dataset": (DATASET, linear),
    "a dataset of three tensors": (TensorDataset(INPUTS, VALUES, LABELS), Two),
    "a list of pairs": ([(x, int(y)) for x, y in zip(*PAIR, strict=True)], linear),
    "a list of two pairs": ([(INPUTS[0], 0), (INPUTS[1], 1)], linear),
    "a list of dicts": ([{"x": x, "label": y} for x, y in zip(*PAIR, strict=True)], linear),
    "a dict of tensors": ({"left": INPUTS, "right": VALUES, "labels": LABELS}, Two),
    "a dict of arrays": ({"inputs": INPUTS.numpy(), "targets": LABELS.numpy()}, linear),
    "a loader": (DataLoader(DATASET, batch_size=8, shuffle=True), linear),
    "a loader in order": (DataLoader(DATASET, batch_size=8), linear),
    "a loader that collates": (DataLoader(DATASET, batch_size=8, shuffle=True, collate_fn=collate), linear),
    "a loader of a list": (DataLoader([(x, int(y)) for x, y in zip(*PAIR, strict=True)], batch_size=8), linear),
}


@pytest.mark.parametrize("case", DATA)
def test_data_is_accepted_as(case):
    data, model = DATA[case]
    built = trainer(model(), data, data)
    assert built.fit()["loss"] > 0
    assert built.evaluate(data).samples == built.evaluate().samples == len(built.batches.source)


def test_a_dataset_of_another_library_is_accepted():
    assert trainer(train=Rows(), test=Rows()).fit()["loss"] > 0


def test_unsupported_samplers_are_refused():
    part = DataLoader(DATASET, sampler=SubsetRandomSampler([1, 2]))
    refused(lambda: trainer(test=part), "the DataLoader has a SubsetRandomSampler")
    refused(lambda: trainer(test=PAIR).evaluate(part), "the DataLoader has a SubsetRandomSampler")


def test_a_label_that_pytorchs_loss_rejects_is_reported():
    labels = torch.where(torch.arange(SAMPLES) == 5, 9, IGNORED)
    built = trainer(train=(INPUTS, labels), loss=nn.CrossEntropyLoss(), sampling="sequential")
    refused(built.fit, "arrays (training): sample 5 has label 9")
    built = trainer(train=(INPUTS, LABELS[:, None]), loss=nn.CrossEntropyLoss())
    refused(built.fit, "the loss wants one class a sample")


def test_the_settings_of_a_loader_are_used():
    data = DataLoader(DATASET, batch_size=5, shuffle=True, drop_last=True, num_workers=0, pin_memory=False)
    built = tr.Trainer(linear(), data, device="cpu", terminal=Terminal(quiet=True))
    assert (built.batches.batch_size, len(built.batches)) == (5, 4)
    in_order = tr.Trainer(linear(), DataLoader(DATASET, batch_size=5), device="cpu", terminal=Terminal(quiet=True))
    assert list(in_order.batches.indices(0, 1)) == [5, 6, 7, 8, 9]
    assert list(built.batches.indices(0, 1)) != [5, 6, 7, 8, 9]
    assert trainer(train=data, batch_size=8).batches.batch_size == 8


class Stream(IterableDataset):
    def __iter__(self):
        return iter(DATASET)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: ((x, y) for x, y in DATASET), "a generator can be read once and in its own order"),
        (lambda: iter(DATASET), "can be read once"),
        (lambda: Stream(), "Stream has no __len__, so nothing says where its training ends: give steps="),
        (lambda: DataLoader(Stream(), batch_size=4), "Stream has no __len__"),
        (
            lambda: DataLoader(DATASET, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)),
            'whose order doesn\'t follow from (seed, epoch, position): give sampling="balanced"',
        ),
        (lambda: DataLoader(DATASET, sampler=SubsetRandomSampler([1, 2])), "give torch.utils.data.Subset(dataset, ind"),
        (lambda: DataLoader(DATASET, sampler=RandomSampler(DATASET, replacement=True)), "the DataLoader has a Random"),
        (
            lambda: DataLoader(DATASET, sampler=RandomSampler(DATASET, num_samples=4)),
            "the DataLoader has a RandomSamp",
        ),
        (
            lambda: DataLoader(DATASET, batch_sampler=Batched(SequentialSampler(DATASET), 4, False)),
            "the DataLoader has a batch_sampler (Batched)",
        ),
        (lambda: DataLoader(DATASET, batch_size=None), "the DataLoader has no batch_size"),
        (lambda: DataLoader(DATASET, num_workers=1, worker_init_fn=print), "has a worker_init_fn"),
        (
            lambda: {"x": INPUTS, "y": LABELS[:3]},
            "equally long tensors, an entry a sample, and has 'x' 22, 'y' 3",
        ),
        (lambda: {"train": DATASET}, "a dict of TensorDataset can't be used as data"),
        (dict, "needs equally long tensors"),
        (lambda: "digits", "str can't be used as data"),
        (lambda: 3, "int can't be used as data"),
        (lambda: Table(), "Table can't be used as data"),
    ],
)
def test_invalid_data_is_refused_in_one_line(given, says):
    refused(lambda: tr.Trainer(linear(), given(), device="cpu", terminal=Terminal(quiet=True)), says)


class Table:
    """Like a dataframe: its length is that of a column, and its entries are columns."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, column: str) -> Any:
        return {"x": INPUTS}[column]


class Rows:
    """A dataset of another library's."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return {"x": INPUTS[index], "label": int(LABELS[index])}


class Batched(BatchSampler):
    pass


# ------------------------------------------------------------------------------------------------ augment

PICTURES = numbers(SAMPLES, 1, 8, 8).abs().clamp(max=1), LABELS


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


AUGMENTS: dict[str, Any] = {
    "one": tr.augment.Flip(p=1),
    "several": [tr.augment.Flip(p=1)],
    "a class": tr.augment.Flip,
    "a name": "flip",
    "a table": [{"name": "flip", "p": 1}],
    "a function": lambda images, draw: images.flip(-1),
}


@pytest.mark.parametrize("given", AUGMENTS)
def test_an_augmentation_may_be(given):
    built = trainer(flat(), PICTURES, augment=AUGMENTS[given], normalize=False, sampling="sequential")
    inputs = next(built.batches.epoch(0)).inputs
    is_mirrored = (inputs == PICTURES[0][:BATCH].flip(-1)).flatten(1).all(1)
    assert is_mirrored.any() if given in ("a class", "a name") else is_mirrored.all()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (transforms.RandomHorizontalFlip(), "augment has torchvision's RandomHorizontalFlip, which transforms one"),
        (v2.RandomHorizontalFlip(), "leave it to the dataset (transform=...)"),
        ([lambda images: images], "augment has <lambda>, which can't be called with (images, draw): give a transform"),
        ([3], "augment has int, which can't be called with (images, draw)"),
        ("flop", "augment: unknown transform 'flop'; did you mean 'flip'?"),
    ],
)
def test_an_augmentation_is_refused_in_a_line(given, says):
    refused(lambda: trainer(flat(), PICTURES, augment=given), says)


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lr": 0.1}, "has no argument 'lr': the optimizer has the learning rate: optimizer=tr.optim.SGD(lr=0.1)"),
        ({"optimizer_lr": 0.1}, "the optimizer has the learning rate"),
        ({"weight_decay": 0.1}, "optimizer=tr.optim.SGD(weight_decay=...)"),
        ({"accumulate": 4}, "parallel=tr.ParallelSettings(replicas=4)"),
        ({"gradient_accumulation_steps": 4}, "parallel=tr.ParallelSettings(replicas=4)"),
        ({"epochs": 0.5}, "epochs should be a whole number, not 0.5"),
        ({"epochs": "3"}, "epochs"),
        ({"seed": -1}, "seed should be at least 0, not -1"),
        ({"batchsize": 4}, "write batch_size="),
        ({"batch_siz": 4}, "did you mean 'batch_size'?"),
        ({"metrics": ["accuracy"]}, "the task has the metrics"),
        ({"verbose": 1}, "the terminal prints: terminal=Terminal(quiet=True)"),
        ({"shuffle": True}, 'write sampling="shuffle"'),
        ({"num_workers": 2}, "write workers="),
        ({"patience": 3}, "write settings=tr.RunSettings(patience=...)"),
        ({"criterion": nn.MSELoss()}, "write loss="),
        ({"lr_scheduler": None}, "write schedule="),
        ({"precision": 16}, 'write device=tr.DeviceSettings(precision="bf16")'),
        ({"ema": 1.5}, "ema is 1.5: give the decay of the average, from 0 (none) up to, not including, 1"),
        ({"clip_norm": -1}, "clip_norm is -1: give the gradient's largest norm, above 0; or None, for any"),
        ({"sampler": None}, "write sampling=, which may be a function from (seed, epoch) to sample indices"),
        ({"sampling": RandomSampler(PAIR)}, "sampling of RandomSampler is unknown; known: shuffle, balanced"),
        ({"sampling": "sequentiall"}, "sampling 'sequentiall' is unknown; did you mean 'sequential'?"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(arguments, says):
    if arguments == {"epochs": "3"}:
        assert trainer(epochs="3").settings.epochs == 3
        return
    refused(lambda: trainer(**arguments), says)


def test_a_step_of_ones_own_in_the_trainer_is_refused_and_not_left_uncalled():
    for name in ("train_step", "training_step"):
        refused(lambda name=name: type("Mine", (tr.Trainer,), {name: print}), f"Mine defines {name}, and a step's loss")


def test_fit_names_arguments_that_belong_to_the_constructor():
    refused(lambda: trainer().fit(epochs=1), "Trainer.fit has no argument 'epochs': write Trainer(..., epochs=...)")
    refused(lambda: trainer().fit(batch_size=1), "write Trainer(..., batch_size=...)")
    refused(lambda: trainer().fit(lr=1), "the optimizer has the learning rate")
    refused(lambda: trainer().fit(DATASET), "Trainer.fit takes no data: write Trainer(model, train, test)")
    refused(lambda: trainer().fit(resum=True), "did you mean 'resume'?")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tr.RunSettings(epoch=3), "RunSettings: unknown key 'epoch'; did you mean 'epochs'?"),
        (lambda: tr.RunSettings(log_every=0), "RunSettings: log_every: 0 is no interval: give 1 or more"),
        (lambda: tr.optim.SGD(lr="high"), "SGD: lr should be a number, not 'high'"),
        (lambda: tr.optim.SGD(learning_rate=1), "SGD: unknown key 'learning_rate'; did you mean 'lr'?"),
        (lambda: tr.optim.Adam(beta=1), "did you mean 'betas'?"),
        (lambda: tr.optim.Cosine(warmup=5), "Cosine: warmup: 5 has no unit: write '5 epochs' or '5 steps'"),
        (
            lambda: tr.DeviceSettings(precision="fp8"),
            "DeviceSettings: precision should be 'float32', 'bf16', ",
        ),
        (lambda: tr.augment.Flip(p=3), "Flip: p should be at most 1, not 3"),
        (lambda: tr.CheckpointSettings(keep=-1), "CheckpointSettings: keep"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(make, says):
    refused(make, says)


def test_other_data_can_be_evaluated_and_lists_predicted():
    built = trainer(test=PAIR)
    built.fit()
    assert built.evaluate((INPUTS[:5], LABELS[:5])).samples == 5
    assert built.evaluate(DATASET).values == built.evaluate().values
    assert built.best.value == built.evaluate().values["accuracy"]
    rows = built.predict([x.numpy() for x in INPUTS])
    assert torch.equal(rows, built.predict(INPUTS))
    assert torch.equal(rows, built.predict(PAIR))
    refused(lambda: built.evaluate("train"), "there is no train data to evaluate on")


def test_a_trainer_has_a_readable_repr(tmp_path):
    built = trainer(run=tmp_path / "run")
    shown = f"Trainer(Linear with 15 parameters, 22 samples of arrays, step 0 of 3, run {tmp_path / 'run'})"
    assert repr(built) == shown
    built.fit()
    assert "step 3 of 3" in repr(built)
    assert repr(trainer()).endswith("no run folder)")


def test_a_folder_used_twice_suggests_resume_in_python(tmp_path):
    trainer(run=tmp_path / "run").fit()
    refused(lambda: trainer(run=tmp_path / "run").fit(), "resume it by: trainer.resume(), in place of fit()")
    trainer(run=tmp_path / "run", epochs=2).resume()


class Plain(io.TextIOBase):
    """A notebook's standard output: neither a terminal nor a file."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)


def test_a_notebook_gets_plain_lines(monkeypatch):
    plain = Plain()
    monkeypatch.setattr("sys.stdout", plain)
    tr.Trainer(linear(), PAIR, epochs=1, device="cpu").fit()
    lines = plain.text.splitlines()
    assert lines[0].startswith("Linear (15 parameters) on arrays (22 samples)")
    assert lines[-2].startswith("epoch 1: train accuracy")
    assert "\x1b" not in plain.text


def test_help_starts_with_the_purpose():
    for kind in (tr.Trainer, tr.RunSettings, tr.optim.SGD):
        text = pydoc.plain(pydoc.render_doc(kind))
        assert text.index(kind.__doc__.splitlines()[0]) < 2200
        assert "Annotated" not in text[:1000]
        assert "FieldInfo" not in text[:1000]
    assert "RunSettings(*, epochs=10, steps=None, seed=0, exact=True" in pydoc.plain(pydoc.render_doc(tr.RunSettings))


# ------------------------------------------------------------------------------------------------ float64, generators


@pytest.mark.parametrize(
    "data",
    [
        (INPUTS.double().numpy(), VALUES.double().numpy()),
        TensorDataset(INPUTS.double(), VALUES.double()),
        TensorDataset(INPUTS, VALUES),
        {"x": INPUTS.double(), "targets": VALUES.double()},
    ],
)
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.L1Loss()])
def test_a_double_precision_model_gets_double_precision_data(data, loss, tmp_path):
    model = linear().double()
    built = trainer(model, data, data, loss=loss, run=tmp_path / "run", ema=0.9)
    assert next(built.batches.epoch(0)).inputs.dtype == torch.float64
    built.fit()
    assert model.weight.dtype == torch.float64
    assert built.predict(INPUTS.double()).dtype == torch.float64


def test_arrays_keep_double_precision_for_a_double_precision_model():
    precise = INPUTS.double() + 1e-12
    built = trainer(linear().double(), (precise, precise[:, :3]), loss="mse", sampling="sequential")
    assert torch.equal(next(built.batches.epoch(0)).inputs, precise[:BATCH])
    assert built.batches.source.targets.dtype == torch.float64
    half = trainer(linear().bfloat16(), PAIR)
    assert next(half.batches.epoch(0)).inputs.dtype == torch.bfloat16


def test_training_restores_the_global_generators():
    class Draws(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return SAMPLES

        def __getitem__(self, index: int) -> Any:
            return INPUTS[index] + random.random() + np.random.rand() + torch.rand(4), index % 3

    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), np.random.rand(), random.random(), torch.randn(3).sum().item()

    def seed() -> None:
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)

    built = trainer(nn.Sequential(nn.Dropout(), linear()), Draws(), Draws())
    seed()
    expected = draw()
    for act in (built.fit, built.evaluate, lambda: built.predict(INPUTS)):
        seed()
        act()
        assert draw() == expected
