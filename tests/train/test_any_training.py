"""Batches, losses and optimizers of every kind, exact on 1, 2 and 4 processes; as a script, this is one of them."""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import torchrelay as tr
from torchrelay.errors import Interrupted, RelayError, UsageError
from torchrelay.run.terminal import Terminal
from torchrelay.train.logs import Pictures

SAMPLES, BATCH, SIZES = 44, 16, (4, 2)  # three batches; the last one has fewer samples than some replicas would like


class Listed(Dataset):
    """Samples of any kind, from a list."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS = torch.arange(SAMPLES) % 3


# ------------------------------------------------------------------------------------------------ several inputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(2, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.first(left) + self.second(right))


def tuples() -> dict[str, Any]:
    data = TensorDataset(numbers(SAMPLES, 4), numbers(SAMPLES, 2), LABELS)
    return {"model": TwoInputs(), "train": data, "test": data}


def dicts() -> dict[str, Any]:
    left, right = numbers(SAMPLES, 4), numbers(SAMPLES, 2)
    samples = [
        {"left": left[i], "right": right[i], "label": int(LABELS[i]), "text": f"sample {i}"} for i in range(SAMPLES)
    ]

    class Texts(tr.Classification):
        def compute(self, model: Any, batch: Any, update: str) -> Any:
            assert batch.data["text"] == [f"sample {i}" for i in batch.indices]
            return super().compute(model, batch, update)

    data = Listed(samples)
    return {"model": TwoInputs(), "train": data, "test": data, "task": Texts()}


# ------------------------------------------------------------------------------------------------ samples of any length


def padded() -> dict[str, Any]:
    """A sample is padded to the longest of its replica, regardless of the process."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens).mean(1))  # padding counts, on purpose

    def collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        tokens, labels = zip(*samples, strict=True)
        return nn.utils.rnn.pad_sequence(list(tokens), batch_first=True), torch.tensor(labels)

    samples = [(torch.arange(1 + i * 7 % 9) % 10, int(LABELS[i])) for i in range(SAMPLES)]
    data = tr.data.dataset(Listed(samples), collate=collate)
    return {"model": Mean(), "train": data, "test": data}


class Boxes(tr.Task):
    """A minimal detector: lists of images of different sizes, and of dicts with their boxes."""

    def forward(self, model: Any, batch: Any) -> Any:
        return model(batch.inputs)

    def loss(self, outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        pairs = list(zip(outputs, targets, strict=True))
        boxes = torch.stack([(found["boxes"] - target["boxes"]).abs().sum() for found, target in pairs]).sum()
        return {"boxes": boxes, "scores": torch.stack([(1 - found["score"]) ** 2 for found, _ in pairs]).sum()}


def ragged() -> dict[str, Any]:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.score = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            rows = [self.features(image) for image in images]
            return [{"boxes": row, "score": self.score(row).mean()} for row in rows]

    def collate(samples: list[Any]) -> tuple[Any, ...]:
        return tuple(list(each) for each in zip(*samples, strict=True))

    lengths = [1 + i * 5 % 4 for i in range(SAMPLES)]
    samples = [(numbers(n, 4) + i, {"boxes": numbers(n, 4)}) for i, n in enumerate(lengths)]
    data = tr.data.dataset(Listed(samples), collate=collate)
    optimizer = tr.optim.SGD(lr=1e-4)
    return {"model": Detector(), "train": data, "test": data, "task": Boxes(), "optimizer": optimizer}


# ------------------------------------------------------------------------------------------ losses that need the model


class Autoencoder(tr.Task):
    """Variational (Kingma and Welling, 2014): no targets, a loss of two parts, random numbers in both modes."""

    def compute(self, model: Any, batch: Any, update: str) -> dict[str, Tensor]:
        assert batch.targets is None
        mean, deviation = model.encoder(batch.inputs).chunk(2, 1)
        tr.log("deviation", deviation.exp().mean())
        found = model.decoder(mean + deviation.exp() * torch.randn_like(mean))
        divergence = 0.5 * (mean**2 + (2 * deviation).exp() - 2 * deviation - 1).sum()
        return {"reconstruction": F.mse_loss(found, batch.inputs, reduction="sum"), "divergence": divergence}


def vae() -> dict[str, Any]:
    model = nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(2, 6)})
    return {"model": model, "train": numbers(SAMPLES, 6), "test": numbers(SAMPLES, 6), "task": Autoencoder()}


class Adversarial(tr.Task):
    """Two updates, each with its optimizer; the critic's loss takes gradients with respect to its inputs."""

    updates = ("critic", "generator")

    def compute(self, model: Any, batch: Any, update: str) -> Tensor:
        fake = model.generator(torch.randn(len(batch.inputs), 3))
        if update == "generator":
            return -model.critic(fake).sum()
        assert not fake.requires_grad, "only the critic is trained in its update"
        mixed = (batch.inputs + fake).div(2).requires_grad_()
        (gradient,) = torch.autograd.grad(model.critic(mixed).sum(), mixed, create_graph=True)
        penalty = ((gradient.norm(dim=1) - 1) ** 2).sum()
        return model.critic(fake).sum() - model.critic(batch.inputs).sum() + 10 * penalty

    def evaluate_batch(self, model: Any, batch: Any) -> tuple[Tensor, Any]:
        return model.critic(batch.inputs).sum(), None


def gan() -> dict[str, Any]:
    model = nn.Module()
    model.generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    model.critic = nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 1))
    optimizers = {"critic": tr.optim.AdamW(lr=1e-2), "generator": tr.optim.SGD(lr=1e-2, clip_norm=1.0)}
    data = numbers(SAMPLES, 5)
    return {"model": model, "train": data, "test": data, "task": Adversarial(), "optimizer": optimizers}


def distillation() -> dict[str, Any]:
    class Distillation(tr.Classification):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))

        def compute(self, model: Any, batch: Any, update: str) -> Any:
            outputs, wanted = model(batch.inputs), self.teacher(batch.inputs)
            assert not wanted.requires_grad
            return self.loss(outputs, batch.targets) + F.mse_loss(outputs, wanted, reduction="sum"), outputs

    data = TensorDataset(numbers(SAMPLES, 4), LABELS)
    return {"model": nn.Linear(4, 3), "train": data, "test": data, "task": Distillation()}


# ------------------------------------------------------------------------------------------------ closures


class SAM(torch.optim.SGD):
    """Sharpness-aware minimization (Foret et al., ICLR 2021): one gradient at the weights and one uphill of them."""

    needs_closure = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        weights = [each for group in self.param_groups for each in group["params"]]
        norm = torch.stack([each.grad.norm() for each in weights]).norm() + 1e-12
        uphill = [0.05 * each.grad / norm for each in weights]
        for each, change in zip(weights, uphill, strict=True):
            each.data.add_(change)
        closure()
        for each, change in zip(weights, uphill, strict=True):
            each.data.sub_(change)
        super().step()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))


def sam() -> dict[str, Any]:
    data = TensorDataset(numbers(SAMPLES, 4), LABELS)
    optimizer = lambda model: SAM(model.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    return {"model": net(), "train": data, "test": data, "optimizer": optimizer}


def lbfgs() -> dict[str, Any]:
    data = TensorDataset(numbers(SAMPLES, 4), LABELS)
    optimizer = lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")  # noqa: E731
    return {"model": net(), "train": data, "test": data, "optimizer": optimizer}


def criterion() -> dict[str, Any]:
    """A PyTorch loss that ignores some labels and weighs the others, and a PyTorch optimizer."""
    labels = torch.where(torch.arange(SAMPLES) % 5 == 0, -100, LABELS)
    model, arrays = nn.Linear(4, 3), (numbers(SAMPLES, 4), labels)
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "train": arrays, "test": arrays, "loss": loss, "optimizer": optimizer}


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    each.__name__: each for each in (tuples, dicts, padded, ragged, vae, gan, distillation, sam, lbfgs, criterion)
}


def build(name: str, run: Path | None = None, **changes: Any) -> tr.Trainer:
    torch.manual_seed(0)
    arguments = CASES[name]() | changes
    arguments = {"optimizer": tr.optim.SGD(lr=0.05), "epochs": 2, "batch_size": BATCH, "device": "cpu"} | arguments
    parallel, settings = tr.ParallelSettings(replicas=4), tr.RunSettings(log_every=2)
    model, train = arguments.pop("model"), arguments.pop("train")
    quiet = Terminal(quiet=True)
    trainer = tr.Trainer(
        model, train, **{"parallel": parallel, "settings": settings, "terminal": quiet, "run": run} | arguments
    )
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Pictures)]
    return trainer


def main(folder: Path) -> None:
    from forked import fork

    for size in SIZES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def run(rank: int, size: int = size, port: int = port) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            for name in CASES:
                trainer = build(name, folder / str(size) / name)
                trainer.fit()
                predicted = trainer.predict(CASES[name]()["test"]) if name in ("ragged", "tuples") else None
                if rank == 0:
                    torch.save(predicted, folder / str(size) / f"{name}.pt")

        fork(size, run)


@pytest.fixture(scope="module")
def runs(_server, tmp_path_factory) -> Path:
    """A folder with each case's run on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("any")
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    done = _server.start(folder, folder=folder, script=Path(__file__), environment=loopback).done(280)
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)
    for name in CASES:
        build(name, folder / "1" / name).fit()
    return folder


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("processes", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_several_processes_write_the_same_files_as_one(runs, same_runs, name, processes):
    same_runs(runs / str(processes) / name, runs / "1" / name)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ragged", "tuples"])
def test_predictions_of_several_processes_are_those_of_one(runs, name):
    alone = build(name, runs / "1" / name)
    alone.load("last")
    expected = alone.predict(CASES[name]()["test"])
    found = torch.load(runs / "2" / f"{name}.pt", weights_only=True)
    assert len(found) == SAMPLES
    assert str(found) == str(expected)


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_resumes_to_the_same_bytes(runs, same_runs, name, tmp_path):
    class Stop(tr.Callback):
        def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:
            if trainer.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = build(name, tmp_path / "run")
    trainer.callbacks.append(Stop())
    with pytest.raises(Interrupted):
        trainer.fit()
    build(name, tmp_path / "run").resume()
    same_runs(tmp_path / "run", runs / "1" / name)


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_of_replicas_add_up_to_those_of_one_replica(name):
    if name in ("padded", "gan", "vae", "sam", "lbfgs", "tuples", "dicts"):
        pytest.skip("its outputs depend on the replicas: padding, random numbers, BatchNorm's statistics")
    several = build(name, epochs=1)
    alone = build(name, epochs=1, parallel=tr.ParallelSettings(replicas=1))
    several.fit()
    alone.fit()
    for one, other in zip(several.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------------------ against hand-written loops


def test_lbfgs_trains_like_a_hand_written_loop():
    inputs, targets = numbers(40, 4), LABELS[:40]
    torch.manual_seed(0)
    by_hand = nn.Linear(4, 3)
    optimizer = torch.optim.LBFGS(by_hand.parameters(), max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(by_hand(inputs), targets)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    torch.manual_seed(0)
    trainer = tr.Trainer(
        nn.Linear(4, 3),
        (inputs, targets),
        optimizer=lambda model: torch.optim.LBFGS(model.parameters(), max_iter=4),
        settings=tr.RunSettings(epochs=3),
        batch_size=40,
        sampling="sequential",
        terminal=Terminal(quiet=True),
    )
    trainer.fit()
    torch.testing.assert_close(trainer.model.weight, by_hand.weight)


def test_each_update_changes_only_its_own_submodule():
    trainer = build("gan", epochs=1)
    before = {name: value.clone() for name, value in trainer.model.critic.named_parameters()}
    for group in trainer.train_step.updates[0].optimizer.param_groups:
        group["initial_lr"] = 0.0
        group["weight_decay"] = 0.0
    trainer.fit()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.critic.named_parameters())
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


# ------------------------------------------------------------------------------------------------ what people see


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


@pytest.mark.ci
@pytest.mark.slow
def test_the_parts_of_a_loss_add_up_in_every_line(runs):
    run = runs / "1" / "vae"
    for split in ("train", "test"):
        for line in lines(run, split):
            assert line["reconstruction"] + line["divergence"] == pytest.approx(line["loss"], rel=1e-5)
    assert all(line["deviation"] > 0 for line in lines(run, "step") + lines(run, "train"))
    assert all("deviation" not in line for line in lines(run, "test")), "nothing is logged in an evaluation"


@pytest.mark.ci
@pytest.mark.slow
def test_each_update_of_a_step_has_its_loss_in_the_metrics(runs):
    for line in lines(runs / "1" / "gan", "train"):
        assert line["loss_critic"] + line["loss_generator"] == pytest.approx(line["loss"], rel=1e-5, abs=1e-5)


def test_callbacks_log_numbers_images_texts_and_histograms(tmp_path):
    class Logs(tr.Callback):
        def on_step(self, trainer: Any, batch: Any, loss: Tensor) -> None:
            tr.log("twice", 2 * trainer.step)
            tr.log.image("picture", torch.rand(2, 3, 8, 8))
            tr.log.text("words", "some **words**")
            tr.log.histogram("weights", trainer.model.weight)

    build("distillation", tmp_path, epochs=1, callbacks=[Logs()]).fit()
    # The line of step 2 is written before the callbacks of step 2 are called.
    assert [line["twice"] for line in lines(tmp_path, "step")] == [2.0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (media,) = (tmp_path / "tensorboard").glob("*.media")
    found = EventAccumulator(str(media)).Reload().Tags()
    assert "picture" in found["images"]
    assert "weights" in found["histograms"] + found["tensors"]
    assert "words/text_summary" in found["tensors"]


def test_logging_outside_of_training_is_an_error():
    with pytest.raises(UsageError, match=r"tr.log\('x'\) is for tasks and callbacks, and nothing is being trained"):
        tr.log("x", 1.0)


# ------------------------------------------------------------------------------------------ what a task may not do


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda outputs, targets: outputs, r"is a tensor of shape \(16, 3\): return a sum over the samples"),
        (lambda outputs, targets: None, "is NoneType: return a sum"),
        (lambda outputs, targets: {}, "is dict: return a sum"),
        (lambda outputs, targets: {"a": 1.0}, "is float: return a sum"),
    ],
)
def test_a_loss_of_another_shape_is_reported_with_the_expected_one(returned, says):
    class Wrong(tr.Task):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return returned(outputs, targets)

    data = TensorDataset(numbers(SAMPLES, 4), LABELS)
    trainer = build("distillation", task=Wrong(), train=data, parallel=tr.ParallelSettings(replicas=1))
    with pytest.raises(RelayError, match=says):
        trainer.fit()


def test_a_task_without_a_loss_names_the_method_to_define():
    with pytest.raises(UsageError, match=r"Task has no loss: define loss\(outputs, targets\), summed over the samples"):
        build("distillation", task=tr.Task())


def test_optimizers_that_do_not_match_the_updates_are_refused():
    with pytest.raises(UsageError, match="Adversarial has the updates critic, generator: give an optimizer for each"):
        build("gan", optimizer=tr.optim.SGD())
    with pytest.raises(UsageError, match="Linear has no submodule 'critic', which Adversarial updates"):
        build("gan", model=nn.Linear(5, 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
