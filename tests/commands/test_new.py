"""A new project runs: its recipe, its test and its notebook."""

import json
import subprocess
import sys

import pytest

from torchrelay import cli


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "My shapes"
    assert cli.main(["new", str(folder)]) == 0
    return folder


def test_a_new_project_has_its_name_in_its_files(project):
    assert {path.name for path in project.iterdir()} == {
        "README.md",
        "notebook.ipynb",
        "project.py",
        "recipe.toml",
        "test_project.py",
    }
    texts = [path.read_text(encoding="utf-8") for path in project.iterdir()]
    assert not any("PROJECT" in text for text in texts)
    assert (project / "README.md").read_text().startswith("# My shapes\n")


def test_its_recipe_trains_to_a_good_network(cli, tmp_path, project):
    line = ["train", str(project / "recipe.toml"), "--code", str(project / "project.py"), "--run", "run"]
    done = cli(*line)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["accuracy"] > 0.9
    assert 0.3 < found["confidence"] <= 1


@pytest.mark.ci
@pytest.mark.slow
def test_its_test_passes(project):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


@pytest.mark.ci
@pytest.mark.slow
def test_its_notebook_runs(project):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(project / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(project)}})
    client.execute()
    assert "accuracy" in str(notebook.cells[5].outputs)


def test_a_folder_that_holds_something_is_refused(project, capsys):
    assert cli.main(["new", str(project)]) == 2
    assert "exists already: choose a new name" in capsys.readouterr().err


def test_an_empty_folder_is_used_and_hostile_names_end_no_string(tmp_path):
    folder = tmp_path / 'quoted" \\ and\nmore'
    folder.mkdir()
    assert cli.main(["new", str(folder)]) == 0
    json.loads((folder / "notebook.ipynb").read_text())
    compile((folder / "project.py").read_text(), "project.py", "exec")
