"""What is "auto" is decided once, by timing passes of the model, and is part of the run from then on."""

import time

import pytest
import torch
from torch import Tensor, nn

import torchrelay as tr
from torchrelay.device import device as devices
from torchrelay.device.device import DeviceSettings
from torchrelay.run.record import read_record
from torchrelay.run.terminal import Terminal

AUTO = DeviceSettings(name="cpu", precision="auto", channels_last="auto", threads="auto")


class Slow(nn.Module):
    """Takes long in one precision, in one memory format, or with one number of threads."""

    def __init__(self, **where) -> None:
        super().__init__()
        self.where = where
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.LazyLinear(10)
        )
        self.layers(torch.zeros(2, 1, 8, 8))

    def forward(self, images: Tensor) -> Tensor:
        here = {
            "autocast": torch.is_autocast_enabled("cpu"),
            "last": images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous(),
            "threads": torch.get_num_threads(),
        }
        if any(here[name] == value for name, value in self.where.items()):
            time.sleep(0.05)
        return self.layers(images)


class Picky(nn.Module):
    """Can't be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 10)

    def __deepcopy__(self, memo):
        raise TypeError("there is only one of me")

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images.flatten(1))


def trainer(model: nn.Module, device: DeviceSettings = AUTO, **options) -> tr.Trainer:
    torch.manual_seed(0)
    train, test = tr.data.digits()
    parts = train.take(torch.arange(64)), test.take(torch.arange(64))
    arguments = {"epochs": 1, "batch_size": 16, "terminal": Terminal(quiet=True)} | options
    return tr.Trainer(model, *parts, device=device, **arguments)


@pytest.mark.parametrize(("slow", "chosen"), [(True, "float32"), (False, "bf16")])
def test_the_faster_precision_is_chosen(slow, chosen):
    settings = trainer(Slow(autocast=slow), DeviceSettings(name="cpu", precision="auto")).device.settings
    assert (settings.precision, settings.channels_last, settings.threads) == (chosen, False, None)


def test_what_is_decided_stays_and_what_gains_nothing_keeps_its_default():
    settings = trainer(
        Slow(autocast=False, last=True), DeviceSettings(name="cpu", channels_last="auto")
    ).device.settings
    assert (settings.precision, settings.channels_last) == ("float32", False)


def test_the_number_of_threads_is_decided_and_set(monkeypatch):
    monkeypatch.setattr("torchrelay.train.probe.cores", lambda: 4)
    decided = trainer(Slow(threads=4), DeviceSettings(name="cpu", threads="auto")).device.settings.threads
    assert decided in (1, 2)
    assert torch.get_num_threads() == decided


def test_a_decision_is_said_with_its_reason_and_recorded_and_a_resume_asks_no_more(tmp_path, capsys):
    run = tmp_path / "run"
    decided = trainer(Slow(), run=run, terminal=Terminal())
    decided.fit()
    said = capsys.readouterr().out
    assert said.startswith("auto: ")
    assert "ms for" in said
    assert "auto: " in (run / "log.txt").read_text()
    recorded = read_record(run)["device"]
    for name in ("precision", "channels_last", "threads"):
        assert recorded[name] == getattr(decided.device.settings, name)

    # Whatever would be faster now, the run goes on as it began.
    resumed = trainer(Slow(autocast=recorded["precision"] == "bf16"), run=run, epochs=2, terminal=Terminal())
    assert resumed.device.settings.model_dump() | {"name": "auto"} == recorded | {"name": "auto"}
    resumed.resume()
    assert "auto: " not in capsys.readouterr().out


def test_a_decision_leaves_the_weights_and_the_random_numbers_as_they_are(tmp_path, same_runs):
    torch.manual_seed(0)
    decided = trainer(Slow(), run=tmp_path / "auto")
    drawn = torch.rand(1)
    decided.fit()
    torch.manual_seed(0)
    given = trainer(Slow(), DeviceSettings(**decided.device.settings.model_dump()), run=tmp_path / "given")
    assert torch.equal(drawn, torch.rand(1))
    given.fit()
    same_runs(tmp_path / "auto", tmp_path / "given")


def test_a_model_that_cannot_be_tried_keeps_the_defaults_and_the_reason_is_said(capsys):
    settings = trainer(Picky(), terminal=Terminal()).device.settings
    assert (settings.precision, settings.channels_last, settings.threads) == ("float32", False, 1)
    assert "(the model can't be tried alone: TypeError: there is only one of me)" in capsys.readouterr().out


def test_a_choice_whose_kernel_corrupts_memory_is_not_tried(monkeypatch):
    monkeypatch.setattr(devices, "_capabilities", lambda: {"avx2": True})

    formats = set()

    class Thin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.thin, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 8, 1, stride=2), nn.Linear(128, 10)

        def forward(self, images: Tensor) -> Tensor:
            seen = self.first(images)
            formats.add(seen.is_contiguous())
            return self.last(self.thin(seen).flatten(1))

    device = DeviceSettings(name="cpu", channels_last="auto")
    assert not trainer(Thin(), device).device.settings.channels_last
    assert formats == {True}


def test_texts_and_tables_have_no_memory_format():
    torch.manual_seed(0)
    data = torch.randn(32, 5), torch.arange(32) % 3
    decided = tr.Trainer(nn.Linear(5, 3), data, epochs=1, batch_size=8, device=AUTO, terminal=Terminal(quiet=True))
    assert not decided.device.settings.channels_last


@pytest.mark.ci
@pytest.mark.slow
def test_a_recipe_is_decided_by_all_processes_alike_and_a_restart_keeps_it(cli, tmp_path):
    sets = ("device.name=cpu", "device.precision=auto", "device.channels_last=auto", "run.epochs=1")
    done = cli("train", "digits", "--run=run", "--devices=2", sets=sets)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("auto: ") == 1
    recorded = read_record(tmp_path / "run")["device"]
    assert "auto" not in (recorded["precision"], recorded["channels_last"])
    again = cli("resume", "run", "--devices=2", "--set=run.epochs=2")
    assert again.returncode == 0, again.stderr
    assert "auto: " not in again.stdout
    assert read_record(tmp_path / "run")["device"] == recorded


def test_waits_of_several_threads_do_not_keep_the_samples_few(capsys):
    torch.set_num_threads(2)
    trainer(Slow(threads=2), DeviceSettings(name="cpu", precision="auto"), terminal=Terminal())
    assert "ms for 16 samples" in capsys.readouterr().out  # the whole batch of a network that is so small
