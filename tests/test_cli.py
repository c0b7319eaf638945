"""The command line: its output, its files, and its exit codes."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torchrelay as tr
from torchrelay import checkpoint, cli
from torchrelay.recipe import shipped

FAST = ("--set", "device.threads=1")


def failing(arguments, capsys) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and its one line on standard error."""
    try:
        code = cli.main(arguments)
    except SystemExit as leave:  # argparse's way out
        code = leave.code
    out, err = capsys.readouterr()
    assert not out.strip() or "error" not in out
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"more than a line: {err}"
    assert "Traceback" not in err
    return code, err.strip()


def say(arguments, capsys) -> str:
    """Run a command that must succeed, and return what it printed."""
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def write_image(path: Path, image: torch.Tensor) -> Path:
    """Write a gray image (1, height, width) in the format of the file's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image[0].numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of the digits recipe that has learned."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    torch.set_num_threads(1)
    assert cli.main(["train", "digits", *FAST, "--set", "run.epochs=6", "--run", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[list[Path], list[int]]:
    """Forty test digits as PNG files, and their labels."""
    folder = tmp_path_factory.mktemp("pictures")
    test = tr.data.digits()[1]
    paths = [write_image(folder / f"{i:02d}.png", test.inputs[i]) for i in range(40)]
    return paths, test.targets[:40].tolist()


# ------------------------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("", "the following arguments are required: COMMAND; see 'torchrelay --help'"),
        ("train", "the following arguments are required: RECIPE; see 'torchrelay train --help'"),
        ("trian digits", "there is no command 'trian'; did you mean 'train'?"),
        ("train digits --sett run.epochs=1", "there is no option '--sett'; did you mean '--set'?"),
        ("train digits --rum=x", "there is no option '--rum'; did you mean '--run'?"),
        ("train digits more", "unrecognized arguments: more; see 'torchrelay train --help'"),
        ("recipes --foo", "there is no option '--foo'; see 'torchrelay recipes --help'"),
        ("train digit", "there is no recipe 'digit', neither a shipped one nor a file; did you mean 'digits'?"),
        ("train nothing.toml", "there is no recipe 'nothing.toml', neither a shipped one nor a file"),
        ("train digits --set run.epoch=3", "digits: unknown key 'run.epoch'; did you mean 'epochs'?"),
        ("train digits --set model.name=resnet81", "there is no model 'resnet81'; did you mean 'resnet18'?"),
        ("train digits --set model.options.widht=3", "has no option 'widht'; did you mean 'widths'?"),
        ("train digits --set data.name=digts", "data.name 'digts' is unknown; did you mean 'digits'?"),
        ("train digits --set data.name=cifar10", "data.root isn't set: set it to the folder of cifar10"),
        ("train digits --set loss.name=cross_entrop", "'cross_entrop' is unknown; did you mean 'cross_entropy'?"),
        ("train digits --set loss.name=foo", "'foo' is unknown; known: cross_entropy, bce, mse, next_token"),
        ("train digits --set loss.class_weights=[1,2]", "has 2 weights for 10 classes: give one for each"),
        ("train digits --set device.name=cudda", "'cudda' is unknown: use auto, cpu, cuda, cuda:1 or mps"),
        ("train digits --set device.precision=fp16", "'fp16' isn't for the CPU: use 'bf16' or 'float32'"),
        ("train digits --set parallel.replicas=3", "an exact run needs a power of two"),
        ("train digits --set model.pretrained=true", "set model.pretrained to a file, or false"),
        ("train digits --code nothing.py", "--code nothing.py: there is no such file"),
        ("recipe", "recipe needs a name or a file: 'torchrelay recipes' lists the shipped ones"),
        ("recipe digits --set run.epochs=many", "run.epochs should be a whole number, not 'many'"),
        ("resume nothing", "nothing isn't a run: it has no recipe.toml; give a folder that 'torchrelay train' made"),
        ("evaluate nothing --json", "nothing isn't a run"),
        ("predict nothing x.png", "nothing isn't a run"),
    ],
)
def test_wrong_usage_is_one_line_that_leaves_nothing_behind(command, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = failing(command.split(), capsys)
    assert code == 2
    assert says in line
    assert list(tmp_path.iterdir()) == []


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_fits_80_columns_and_explains_each_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(command, capsys).partition("\nshipped recipes")[0].splitlines()
    assert max(map(len, lines)) <= 80
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -"):
            assert re.search(r"\S  +\S", line.strip()) or following.startswith("      "), line


def test_help_of_train_names_the_recipes_and_evaluate_offers_nothing_of_training(capsys):
    text = help_of("train", capsys)
    assert all(name in text for name in shipped.headers())
    assert "torchrelay train digits" in text
    assert text.count("\n  torchrelay train ") == 2
    of_training = ("--restarts", "--port", "--shutdown-timeout")
    assert all(option in text and option in help_of("resume", capsys) for option in of_training)
    assert not any(option in help_of(command, capsys) for command in ("evaluate", "audit") for option in of_training)
    assert "speed" in help_of("tune", capsys)


def test_debug_shows_where_an_error_was_raised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tr.RelayError, match="did you mean 'digits'"):
        cli.main(["train", "digit", "--debug"])


def test_a_process_ends_with_the_exit_code_and_one_line(start, tmp_path):
    done = start("train", "digits", sets=["optimizer.lrr=1"]).done()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: digits: unknown key 'optimizer.lrr'; did you mean 'lr'?\n"
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_run_folder_is_reported(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, line = failing(["train", "digits", *FAST, "--run", str(tmp_path / "file" / "run")], capsys)
    assert code == 1
    assert f"can't write in the run folder {tmp_path}/file/run" in line


# ------------------------------------------------------------------------------------------------ train and resume


def test_a_run_is_named_after_its_changes_and_never_overwrites(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = ["--set", "run.epochs=1", *FAST]
    out = say(["train", "digits", *changes], capsys)
    assert "the run is in runs/digits-run.epochs=1-device.threads=1\n" in out
    assert re.search(r"^epoch 1: train accuracy [\d.]+%, test [\d.]+%", out, re.M)
    say(["train", "digits", *changes], capsys)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["digits-run.epochs=1-device.threads=1", "digits-run.epochs=1-device.threads=1-2"]


def test_training_again_in_a_folder_prints_the_resume_command(run, capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*"))
    code, line = failing(["train", "digits", *FAST, "--run", str(run)], capsys)
    assert code == 2
    assert f"{run} holds a run already: choose another folder, or resume it by: torchrelay resume" in line
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*")) == before


def test_quiet_prints_only_errors(capsys, tmp_path):
    assert cli.main(["train", "digits", *FAST, "--set", "run.epochs=1", "--run", str(tmp_path / "r"), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    code, _ = failing(["train", "digits", "--run", str(tmp_path / "r"), "--quiet"], capsys)
    assert code == 2


def test_a_finished_run_can_be_given_more_epochs(capsys, tmp_path):
    folder = str(tmp_path / "run")
    say(["train", "digits", *FAST, "--set", "run.epochs=1", "--run", folder], capsys)
    assert "the run is done: 23 steps" in say(["resume", folder], capsys)
    out = say(["resume", folder, "--set", "run.epochs=2"], capsys)
    assert "changed: run.epochs was 1 and is 2" in out
    assert checkpoint.find(Path(folder) / "checkpoints", "last").name == "step-00000046"


def test_a_change_of_the_result_is_refused_at_a_resume(run, tmp_path, capsys):
    copy = str(shutil.copytree(run, tmp_path / "copy"))
    code, line = failing(["resume", copy, "--set", "optimizer.lr=0.2", "--quiet"], capsys)
    assert code == 1
    assert "optimizer.lr was 0.05 and is 0.2" in line
    assert "--accept-changes" in line


def test_ctrl_c_saves_and_prints_the_resume_command_and_the_lock_names_its_holder(start, tmp_path, capsys, monkeypatch):
    process = start("train", "digits", *FAST, "--run", "a run", sets=["run.epochs=400"])
    process.until(lambda: "epoch   1: " in process.output)
    monkeypatch.chdir(tmp_path)
    code, line = failing(["resume", "a run", "--quiet"], capsys)
    assert code == 1
    assert f"a run is in use by process {process.pid} on " in line
    process.send(signal.SIGINT)
    done = process.done()
    assert done.returncode == 75
    stopped = re.fullmatch(
        r"stopped by SIGINT after step (\d+), saved; resume with: torchrelay resume '?a run'?\n", done.stderr
    )
    assert stopped, done.stderr
    steps = int(stopped[1]) + 5
    out = say(["resume", "a run", "--set", f"run.max_steps={steps}"], capsys)
    assert f"resuming after step {stopped[1]}" in out
    assert checkpoint.find(Path("a run/checkpoints"), "last").name == f"step-{steps:08d}"


def old_names(run: Path) -> None:
    """Write a run's recipe with the previous release's names."""
    file = run / "recipe.toml"
    file.write_text(file.read_text().replace("normalize = ", "normalise = "))
    assert "normalise" in file.read_text()


@pytest.mark.filterwarnings("default::FutureWarning")
def test_a_run_with_an_old_key_resumes_with_a_line_that_names_the_new_one(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    old_names(copy)
    assert cli.main(["resume", str(copy), "--set", "run.epochs=7"]) == 0
    out, err = capsys.readouterr()
    assert err == (
        "warning: data.normalise has been renamed to data.normalize; the old name will be removed in the next release\n"
    )
    assert "changed: run.epochs was 6 and is 7" in out
    assert "normali" not in out
    assert "epoch 7: " in out


def test_a_run_into_a_folder_of_photographs_is_refused_before_the_data_is_read(pictures, capsys):
    folder = pictures[0][0].parent
    before = sorted(folder.iterdir())
    code, line = failing(["train", "image-folder", "--set", f"data.root={folder}", "--run", str(folder)], capsys)
    assert code == 2
    assert f"{folder} isn't empty and holds no run, but 00.png: choose a new or an empty folder" in line
    assert sorted(folder.iterdir()) == before


def test_a_setting_without_effect_gets_one_hint_at_the_start(tmp_path, capsys):
    run = str(tmp_path / "run")
    command = ["train", "digits", "--run", run, *FAST, "--set", "run.max_steps=1", "--set", "data.size=32"]
    assert say(command, capsys).count("hint: data.size has no effect on digits\n") == 1
    assert "hint" not in say(["evaluate", run], capsys)


# ------------------------------------------------------------------------------------------------ evaluate


def test_evaluate_prints_the_metrics_of_training(run, capsys):
    out = say(["evaluate", str(run)], capsys)
    assert out.splitlines()[0] == str(checkpoint.find(run / "checkpoints", "best"))
    assert re.search(r"^test \(359 samples\)   loss [\d.]+   accuracy 0\.9\d+   top5 accuracy [\d.]+$", out, re.M)
    assert len(re.findall(r"^    \d  [01]\.\d{4}$", out, re.M)) == 10


def test_evaluate_as_json_is_json_and_agrees_with_the_run(run, capsys):
    found = json.loads(say(["evaluate", str(run), "--json", "--checkpoint", "last"], capsys))
    written = json.loads((run / "evaluation.json").read_text())
    assert written == {"step": written["step"], "epoch": written["epoch"], **found["test"]}
    assert np.array(found["test"]["confusion_matrix"]).sum() == 359


def test_a_checkpoint_is_selected_by_name_or_step(run, capsys):
    steps = [int(path.name.removeprefix("step-")) for path in checkpoint.complete(run / "checkpoints")]
    assert f"step-{steps[0]:08d}" in say(["evaluate", str(run), "--checkpoint", str(steps[0])], capsys)
    code, line = failing(["evaluate", str(run), "--checkpoint", "999"], capsys)
    assert code == 2
    assert f"has no checkpoint '999': choose best, last, {steps[0]}" in line


# ------------------------------------------------------------------------------------------------ predict


def test_predict_agrees_with_the_labels(run, pictures, capsys):
    paths, labels = pictures
    found = json.loads(say(["predict", str(run), *map(str, paths), "--json", "--top", "2"], capsys))
    assert [entry["path"] for entry in found] == [str(path) for path in paths]
    first = [int(max(entry["classes"], key=entry["classes"].get)) for entry in found]
    assert sum(a == b for a, b in zip(first, labels, strict=True)) >= 36
    assert all(len(entry["classes"]) == 2 for entry in found)


def test_predict_agrees_with_the_trainer(run, pictures, capsys):
    from torchrelay.recipe import recipe
    from torchrelay.recipe.build import build_trainer

    paths, _ = pictures
    trainer = build_trainer(recipe.load(str(run / "recipe.toml")), run, fresh=False)
    trainer.load("best")
    expected = trainer.predict(tr.data.digits()[1].inputs[:40])
    capsys.readouterr()
    found = json.loads(say(["predict", str(run), *map(str, paths), "--json", "--top", "10"], capsys))
    for entry, row in zip(found, expected.tolist(), strict=True):
        assert [entry["classes"][str(c)] for c in range(10)] == pytest.approx(row, abs=2e-6)


def test_predict_prints_a_table_of_a_folder(run, pictures, capsys):
    folder = pictures[0][0].parent
    lines = say(["predict", str(run), str(folder)], capsys).splitlines()
    assert len(lines) == 40
    assert re.fullmatch(rf"{re.escape(str(folder))}/00\.png  (\d \d+\.\d%   ){{2}}\d \d+\.\d%", lines[0])


@pytest.mark.parametrize("name", ["two words/a picture.png", "Zähler/七.PNG", "line\nbreak.png"])
def test_predict_accepts_any_path(run, digits, tmp_path, capsys, name):
    path = write_image(tmp_path / name, digits[1].inputs[0])
    (entry,) = json.loads(say(["predict", str(run), str(path), "--json"], capsys))
    assert entry["path"] == str(path)


def test_predict_reports_a_missing_file(run, pictures, tmp_path, capsys):
    code, line = failing(["predict", str(run), str(pictures[0][0]), "missing.png"], capsys)
    assert (code, line) == (2, "error: missing.png: there is no such file")
    (tmp_path / "empty").mkdir()
    code, line = failing(["predict", str(run), str(tmp_path / "empty")], capsys)
    assert (code, line) == (2, f"error: {tmp_path}/empty has no images in it")
    code, line = failing(["predict", str(run), str(pictures[0][0]), "--top", "0"], capsys)
    assert (code, line) == (
        2,
        "error: argument --top: '0' isn't a whole number of at least 1; see 'torchrelay predict --help'",
    )


def test_weights_of_another_model_are_refused(run, pictures, capsys):
    code, line = failing(["predict", str(run), str(pictures[0][0]), "--set", "model.name=mlp"], capsys)
    assert code == 1
    assert "the checkpoint's weights don't fit Sequential: Missing key(s)" in line
    assert "head.weight" in line


def test_an_image_folder_is_trained_on_and_predicts_without_the_training_data(digits, tmp_path, capsys):
    root, held = tmp_path / "Ziffern, alle", tmp_path / "held"
    train, test = digits
    for i in range(300):
        write_image(root / f"class {train.targets[i]}" / f"{i}.png", train.inputs[i])
    picture = write_image(held / "x.png", test.inputs[0])
    run = str(tmp_path / "lange\nReise")
    settings = ["data.channels=1", f"data.cache_dir={tmp_path}/cache", "model.name=small-cnn", "data.batch_size=30"]
    settings += [f'data.root="{root}"', "data.augment=[]", "optimizer.lr=0.05", "device.precision=float32"]
    command = ["train", "image-folder", "--run", run, *FAST]
    for setting in settings:
        command += ["--set", setting]
    assert "Ziffern, alle" in say(command, capsys)
    shutil.rmtree(tmp_path / "cache")
    found = json.loads(say(["evaluate", run, "--json"], capsys))  # decodes again, and says so elsewhere
    assert found["test"]["accuracy"] > 0.8
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(root)
    (entry,) = json.loads(say(["predict", run, str(picture), "--json", "--top", "1"], capsys))
    assert list(entry["classes"]) == [f"class {test.targets[0]}"]


# ------------------------------------------------------------------------------------------------ user code

CODE = """
from __future__ import annotations

from dataclasses import dataclass
from shutil import rmtree

import torch
from torch import nn

import torchrelay as tr
from beside import WIDTH


@dataclass
class Options:
    width: int = WIDTH


class Mine(nn.Sequential):
    def __init__(self, classes: int, width: int = Options().width):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))


class Doubled(tr.Classification):
    def loss(self, outputs, targets):
        return 2 * super().loss(outputs, targets)


class Needy(tr.Classification):
    def __init__(self, needed):
        super().__init__(needed)


class Unfinished(tr.Task):
    pass


def half(share: float = 0.5):
    train, test = tr.data.digits()
    return tr.data.split(train, share, seed=0)[0], test
"""


@pytest.fixture
def code(tmp_path) -> Path:
    file = tmp_path / "my net.py"
    file.write_text(CODE)
    (tmp_path / "beside.py").write_text("WIDTH = 48\n")
    yield file
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]
    sys.modules.pop("beside", None)


OWN = ["--set", "model.name=Mine", "--set", "data.name=half", "--set", "loss.name=Doubled", *FAST]


def test_user_code_trains_resumes_evaluates_and_predicts(code, tmp_path, pictures, capsys):
    run = str(tmp_path / "run")
    given = ["--code", str(code)]
    command = ["train", "digits", *OWN, "--set", "data.options.share=0.75", "--set", "run.epochs=4", "--run", run]
    out = say([*command, *given], capsys)
    assert "Mine (3,610 parameters) on digits (359 samples)" in out
    say(["resume", run, "--set", "run.epochs=6", *given], capsys)
    assert json.loads(say(["evaluate", run, "--json", *given], capsys))["test"]["accuracy"] > 0.7
    assert len(say(["predict", run, str(pictures[0][0]), *given], capsys).splitlines()) == 1
    for command in (["resume", run], ["evaluate", run], ["predict", run, str(pictures[0][0])]):
        failed, line = failing(command, capsys)
        assert failed == 2
        assert f"was started with a file of code: add --code {code}" in line
    code.write_text(CODE.replace("2 * super", "3 * super"))
    failed, line = failing(["resume", run, "--set", "run.epochs=7", "--quiet", *given], capsys)
    assert failed == 1
    assert "the file of --code is not the one that the run was started with" in line
    assert "--accept-changes" in line
    out = say(["resume", run, "--set", "run.epochs=7", "--accept-changes", *given], capsys)
    assert "changed: the file of --code" in out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\nundefined\n", "NameError: name 'undefined' is not defined (line 2)"),
        ("def f(:\n", "SyntaxError"),
        ("import does_not_exist\n", "No module named 'does_not_exist' (line 1)"),
    ],
)
def test_failing_code_is_reported_with_its_line(text, says, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(text)
    code, line = failing(["train", "digits", "--code", str(tmp_path / "bad.py"), "--run", str(tmp_path / "r")], capsys)
    assert code == 1
    assert f"--code {tmp_path}/bad.py fails: " in line
    assert says in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("loss.name=Needy", "must be constructible without arguments (missing a required argument: 'needed')"),
        ("loss.name=Unfinished", "the task in --code has no method 'loss'"),
        ("loss.name=half", "'half' is unknown"),
        ("data.name=rmtree", "data.name 'rmtree' is unknown"),
        ("model.name=rmtree", "there is no model 'rmtree'"),
        ("data.options.shar=0.5", "data.options don't match 'half'"),
        ("model.name=Min", "did you mean 'Mine'?"),
    ],
)
def test_only_definitions_of_the_file_can_be_named(code, setting, says, tmp_path, capsys):
    command = ["train", "digits", *OWN, "--set", setting, "--run", str(tmp_path / "r"), "--code", str(code)]
    failed, line = failing(command, capsys)
    assert failed == 2
    assert says in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "torch.nn.Linear", "subprocess.run", "__import__"])
@pytest.mark.parametrize("key", ["model.name", "data.name", "loss.name", "optimizer.name", "schedule.name"])
def test_a_recipe_cannot_run_unnamed_code(key, name, tmp_path, capsys):
    section = key.partition(".")[0]
    recipe = tmp_path / "stranger.toml"
    recipe.write_text(f'[{section}]\nname = "{name}"\n' + (f'options = {{ command = "touch {tmp_path}/ran" }}\n' if
                      section in ("model", "data") else ""))  # fmt: skip
    code, line = failing(["train", str(recipe), "--run", str(tmp_path / "run"), *FAST], capsys)
    assert code == 2
    assert name in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger.toml"]


def test_a_pickle_given_as_weights_is_refused_and_does_not_run(tmp_path, capsys):
    import pickle

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"weight": Payload()}))
    command = ["train", "digits", "--set", f'model.pretrained="{tmp_path}/weights.pt"', "--run", str(tmp_path / "r")]
    code, line = failing(command, capsys)
    assert code == 1
    assert "weights.pt" in line
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "r").exists()


def test_a_run_started_from_python_is_resumed_by_its_script(digits, quiet, tmp_path, capsys, pictures):
    run = tmp_path / "run"
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    tr.Trainer(model, *digits, epochs=1, run=run, terminal=quiet).fit()
    for command in (["resume", str(run)], ["evaluate", str(run)], ["predict", str(run), str(pictures[0][0])]):
        code, line = failing(command, capsys)
        assert code == 2
        assert f"{run} was started from Python: call trainer.resume() or .load()" in line


# ------------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("weights", ["balanced", "[1,1,1,1,1,1,1,1,1,2.5]"])
def test_label_smoothing_and_class_weights_train(weights, tmp_path, capsys):
    command = ["train", "digits", *FAST, "--run", str(tmp_path / "run"), "--set", "run.epochs=2"]
    say([*command, "--set", "loss.label_smoothing=0.1", "--set", f"loss.class_weights={weights}"], capsys)
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["accuracy"] > 0.8


def test_predict_refuses_a_run_without_classes(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    command = ["train", "characters", "--run", str(tmp_path / "run"), "--set", "run.epochs=1", *FAST]
    say([*command, "--set", f'data.root="{tmp_path}/book.txt"', "--set", "data.length=16"], capsys)
    code, line = failing(["predict", str(tmp_path / "run"), str(tmp_path / "book.txt")], capsys)
    assert code == 2
    assert "predicts no classes" in line
    assert "test (" in say(["evaluate", str(tmp_path / "run")], capsys)


def test_recipes_lists_the_shipped_recipes(capsys):
    lines = say(["recipes"], capsys).splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert {line.split()[0] for line in lines} >= {
        "digits", "cifar10-reference", "cifar10-fast", "cifar10-94", "image-folder",
    }  # fmt: skip
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_doctor_shows_the_machine(capsys):
    out = say(["doctor"], capsys)
    assert f"torch             {torch.__version__.partition('+')[0]}" in out
    assert re.search(r"^memory +\d+ GiB", out, re.M)
    assert re.search(r"^device.name auto +", out, re.M)


def test_version_and_help(capsys):
    for option, expected in (("--version", f"torchrelay {tr.__version__}\n"), ("--help", "usage: torchrelay")):
        with pytest.raises(SystemExit) as leave:
            cli.main([option])
        assert leave.value.code == 0
        assert capsys.readouterr().out.startswith(expected)


def test_a_pytorch_error_is_one_line_and_debug_shows_the_traceback(tmp_path, capsys):
    arguments = ["train", "digits", "--set", "model.name=char-lm", "--run", str(tmp_path / "run"), "--quiet"]
    assert cli.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("; --debug shows the traceback")
    with pytest.raises(Exception, match="Expected tensor for argument"):
        cli.main([*arguments[:-2], str(tmp_path / "other"), "--debug"])


def test_a_message_is_one_line_without_control_characters_and_of_limited_length(capsys):
    code, line = failing(["train", "digits", "--set", "a\x1b[2J\x85.b\udce6=1"], capsys)
    assert code == 2
    assert line.isprintable()
    assert "\\x1b[2J" in line
    _, line = failing(["train", "digits", "--set", f"run.epochs={'A' * 100_000}"], capsys)
    assert len(line) < 5_000
    assert line.startswith("error: digits: run.epochs should be a whole number")
    assert line.endswith("(such as epochs = 10)")


def test_an_empty_argument_after_an_unknown_option_is_no_crash(capsys):
    code, line = failing(["train", "digits", "--epoch", ""], capsys)
    assert (code, "there is no option '--epoch'" in line) == (2, True)
