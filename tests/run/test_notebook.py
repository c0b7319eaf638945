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
    "long = build(None, test=data, steps=600)\nlong.fit()",
    "long",
    "long.evaluate()",
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The cells of an executed notebook."""
    folder: Path = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata.kernelspec = kernel
    client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, resources={"metadata": {"path": folder}})
    client.execute()
    return notebook.cells


@pytest.fixture(scope="module")
def shown(cells) -> list[str]:
    """What each cell shows: its text, its errors, and what it returns."""
    return ["\n".join(map(text_of, cell.outputs)) for cell in cells]


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


def test_the_bar_is_one_output_however_long_the_run_is(cells):
    bars = [each for each in cells[6].outputs if each.output_type == "display_data"]
    [bar] = [each.data["text/html"] for each in bars]
    assert '<progress max="600" value="600"' in bar
    assert "600/600" in bar
    lines = "".join(each.text for each in cells[6].outputs if each.output_type == "stream").splitlines()
    assert len(lines) == 122  # of 120 epochs, the first and the last
    assert len(cells[6].outputs) <= 5


def test_a_trainer_and_its_results_are_tables(cells):
    pages = [cells[place].outputs[-1].data["text/html"] for place in (6, 7, 8)]
    assert all("<table" in page and "accuracy" in page for page in pages)
    assert "Linear with 15 parameters, 40 samples of arrays, step 600 of 600" in pages[1]
    assert pages[1].count("<tr>") == 9  # the heads and eight epochs
    assert "40 samples evaluated" in pages[2]
    assert not any(word in page for page in pages for word in ("#", "white", "black"))
    assert cells[6].outputs[-1].data["text/plain"].startswith("{'loss': ")
