"""The order of samples is a function of the seed and the epoch, also one of the user's."""

import os
import signal

import numpy as np
import pytest
import torch

import torchrelay as tr
from torchrelay.errors import Interrupted, RelayError

INPUTS, LABELS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2


def heavy_first(seed: int, epoch: int) -> np.ndarray:
    """Twelve samples, the first of them more often, as a weighted sampler draws them."""
    generator = np.random.default_rng((seed, epoch))
    return generator.choice(20, 12, p=np.linspace(2, 0, 20) / 20)


def trainer(quiet, sampling, **changes) -> tr.Trainer:
    torch.manual_seed(0)
    arguments = {"epochs": 3, "batch_size": 5, "terminal": quiet, "sampling": sampling, "device": "cpu"}
    return tr.Trainer(torch.nn.Linear(4, 2), (INPUTS, LABELS), **(arguments | changes))


def test_a_function_of_seed_and_epoch_says_which_samples_come_when(quiet):
    batches = trainer(quiet, heavy_first, seed=3).batches
    assert (len(batches), batches.samples) == (3, 12)
    for epoch in (0, 2):
        read = np.concatenate([batch.indices for batch in batches.epoch(epoch)])
        assert read.tolist() == heavy_first(3, epoch).tolist()
    assert [batch.indices.tolist() for batch in batches.epoch(1, start=2)] == [heavy_first(3, 1)[10:].tolist()]


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_with_a_sampler_of_ones_own_goes_on_exactly(quiet, tmp_path, same_runs, replicas):
    class Interrupts(tr.Callback):
        def on_step(self, trainer, batch, loss) -> None:
            if trainer.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    parallel = tr.ParallelSettings(replicas=replicas)
    trainer(quiet, heavy_first, run=tmp_path / "whole", parallel=parallel).fit()
    with pytest.raises(Interrupted):
        trainer(quiet, heavy_first, run=tmp_path / "parted", parallel=parallel, callbacks=Interrupts()).fit()
    trainer(quiet, heavy_first, run=tmp_path / "parted", parallel=parallel).resume()
    same_runs(tmp_path / "whole", tmp_path / "parted")


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        (lambda seed, epoch: [0.5], "sampling gives float64 of shape (1,) for epoch 1: return the indices"),
        (lambda seed, epoch: [], "of shape (0,) for epoch 1"),
        (lambda seed, epoch: [0, 20], "sampling gives 0 to 20 for epoch 1, and arrays has the samples 0 to 19"),
        (
            lambda seed, epoch: range(4 + epoch),
            "sampling gives 5 samples in epoch 2, and 4 in the first",
        ),
    ],
)
def test_what_is_no_order_of_samples_is_named(quiet, sampling, says):
    with pytest.raises(RelayError) as caught:
        trainer(quiet, sampling).fit()
    assert says in str(caught.value)
