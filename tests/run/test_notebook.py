"""A notebook shows a run's lines, goes on after a stop, and says what to do where a cell is run twice."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

BUILD = """
import os, signal
import torch
import torchrelay as tr

data = torch.ones(40, 4), torch.arange(40) % 3

class Stop(tr.Callback):
    def on_step(self, trainer, batch, loss):
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

def build(run, **changes):
    torch.manual_seed(0)
    return tr.Trainer(torch.nn.Linear(4, 3), data, batch_size=8, epochs=1, run=run, device="cpu", **changes)
"""
CELLS = [
    BUILD,
    "trainer = build('run')\ntrainer.fit()\ntrainer",
    "trainer = build('run')\ntrainer.fit()",
    "trainer.fit(resume='auto')\ntrainer",
    "stopped = build('stopped', callbacks=Stop)\nstopped.fit()",
    "stopped = build('stopped')\nstopped.resume()\nprint('goes', 'on')",
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> list[str]:
    """What each cell shows: its text, its errors, and what it returns."""
    folder: Path = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.kernelspec = kernel
    client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": folder}})
    client.execute()
    return ["\n".join(map(text_of, cell.outputs)) for cell in notebook.cells]


def text_of(output) -> str:
    if output.output_type == "error":
        return f"{output.ename}: {output.evalue}"
    return output.text if output.output_type == "stream" else output.data.get("text/plain", "")


def test_a_cell_shows_the_runs_lines_and_the_trainer(shown):
    assert shown[0] == ""
    assert "Linear (15 parameters) on arrays (40 samples), 5 steps on cpu" in shown[1]
    assert "epoch 1: train accuracy" in shown[1]
    assert "Trainer(Linear with 15 parameters, 40 samples of arrays, step 5 of 5, run run)" in shown[1]
    assert "\x1b" not in shown[1]


def test_a_cell_that_is_run_twice_says_what_to_do_and_that_helps(shown):
    assert "UsageError: run holds a run already" in shown[2]
    assert "trainer.resume()" in shown[2]
    assert "the run is done: 5 steps" in shown[3]
    assert "step 5 of 5" in shown[3]


def test_an_interrupted_cell_leaves_the_notebook_usable(shown):
    assert "Interrupted: stopped by SIGINT after step 3, saved; resume with: trainer.resume()" in shown[4]
    assert "resuming after step 3 of 5" in shown[5]
    assert shown[5].rstrip().endswith("goes on")
