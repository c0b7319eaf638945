"""A hidden state that goes from batch to batch survives a stop inside an epoch, as the documentation says it does."""

import os
import re
import signal
from pathlib import Path

import pytest

import torchrelay as tr
from torchrelay.errors import Interrupted

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "extend.md"


class Stop(tr.Callback):
    def __init__(self, step: int = 0) -> None:
        self.step = step

    def on_step(self, trainer, batch, loss) -> None:
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_was_stopped_between_two_batches_reads_on(tmp_path, same_runs, monkeypatch):
    section = PAGE.read_text(encoding="utf-8").split("## State that goes from batch to batch")[1]
    made: dict = {"__name__": "page"}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], made)  # noqa: S102 - the page's own code
    build, over = made["trainer"], made["StartOver"]
    build(str(tmp_path / "whole"), Stop()).fit()
    with pytest.raises(Interrupted, match="after step 8"):
        build(str(tmp_path / "parted"), Stop(8)).fit()
    resumed = build(str(tmp_path / "parted"), Stop())
    cleared: list[int] = []
    monkeypatch.setattr(over, "on_epoch_start", lambda self, trainer, epoch: cleared.append(epoch))
    resumed.resume()
    assert cleared == [], "the epoch goes on"
    same_runs(tmp_path / "whole", tmp_path / "parted")
