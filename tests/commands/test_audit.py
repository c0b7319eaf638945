"""An audit replays a run from its checkpoints, and finds the first step and tensor that isn't what it was."""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w
import torch
from PIL import Image

from torchrelay import cli
from torchrelay.checkpoint.format import Contents, read, write
from torchrelay.run.receipt import NAME, chained, read_receipt

SETTINGS = ("model.name=mlp", "data.batch_size=64", "run.epochs=2", "run.log_every=10", "device.precision=float32")
SAVING = ("checkpoint.every=15 steps", "checkpoint.keep=9")


def words(*sets: str) -> list[str]:
    return [word for setting in (*sets, "device.threads=1") for word in ("--set", setting)]


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A run of 46 steps with checkpoints of step 0, 15, 23 (the epoch's best), 30, 45 and 46."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    assert cli.main(["train", "digits", "--run", str(folder), "--quiet", *words(*SETTINGS, *SAVING)]) == 0
    return folder


@pytest.fixture
def run(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def audit(capsys) -> Callable[..., tuple[int, str, str]]:
    def audited(run: Path, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["audit", str(run), "--seed", "1", *more])
        said = capsys.readouterr()
        return code, said.out, said.err

    return audited


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forge(run: Path, step: int, change: Callable[[Contents], None]) -> None:
    """Change a checkpoint, which keeps a correct manifest."""
    contents = read(run / "checkpoints" / f"step-{step:08d}")
    change(contents)
    write(run / "checkpoints", contents)


def rewrite(run: Path, change: Callable[[dict], dict]) -> None:
    """Change the receipt's lines, each with the chain that it should have."""
    chain, lines = "", []
    for text in (run / NAME).read_text().splitlines():
        line = change({key: value for key, value in json.loads(text).items() if key != "chain"})
        chain = chained(chain, line)
        lines.append(json.dumps(line | {"chain": chain}) + "\n")
    (run / NAME).write_text("".join(lines))


def test_an_honest_run_is_equal_and_stays_untouched(run, audit):
    before = content(run)
    code, out, err = audit(run)
    assert (code, err) == (0, "")
    assert "equal: 46 of 46 steps were replayed on 1 device (--seed 1)" in out
    assert read_receipt(run).chain in out
    assert "steps 24 to 30, from the checkpoint of step 23: equal" in out
    assert content(run) == before


def test_a_sample_is_drawn_by_the_seed(run, audit):
    _, first, _ = audit(run, "--sample", "2")
    _, again, _ = audit(run, "--sample", "2")
    assert first == again
    assert first.count(": equal") == 2
    assert any(audit(run, "--sample", "2", "--seed", str(seed))[1] != first for seed in range(2, 5))


def test_a_line_that_was_changed_by_hand_is_found(run, audit):
    text = (run / NAME).read_text()
    (run / NAME).write_text(text.replace('"step": 20', '"step": 19', 1))
    code, _, err = audit(run, "--sample", "1")
    assert code == 1
    assert "the receipt was changed: line" in err
    assert "doesn't match the chain" in err


def test_a_forged_loss_is_found_by_its_step(run, audit):
    forged = "3ff0000000000000"
    loss = read_receipt(run).losses[27]
    rewrite(run, lambda line: line | ({"losses": line["losses"].replace(loss, forged)} if "losses" in line else {}))
    code, out, err = audit(run)
    assert code == 1
    assert "steps 24 to 30, from the checkpoint of step 23: different from step 27 on" in out
    assert "the loss of step 27 was 1.0 and is " in err


def test_weights_that_were_changed_are_named(run, audit):
    forge(run, 30, lambda saved: saved.model["head.weight"].view(-1)[3].add_(0.5))
    code, out, err = audit(run, "--sample", "1")
    assert code == 1
    assert "the checkpoint of step 30 has other weights than the receipt says" in err
    assert "the checkpoint of step 30 isn't what the steps before it lead to: first in head.weight (1 of " in out
    assert "by up to 0.5" in out


def test_an_optimizers_state_that_was_changed_is_named(run, audit):
    def change(saved: Contents) -> None:
        state = saved.state["optimizer"]["state"]
        state[next(iter(state))]["momentum_buffer"].view(-1)[0] += 1.0

    forge(run, 30, change)
    code, out, _ = audit(run)
    assert code == 1
    assert (
        "the checkpoint of step 30 isn't what the steps before it lead to: first in the optimizer's state.0.mom" in out
    )
    assert "steps 31 to 40, from the checkpoint of step 30: different from step 32 on" in out
    assert "steps 41 to 45, from the checkpoint of step 30: different, as is step 32 before them" in out


def test_a_rate_in_recipe_toml_that_isnt_the_runs_is_found(run, audit):
    path = run / "recipe.toml"
    recipe = tomllib.loads(path.read_text())
    recipe["optimizer"]["momentum"] = 0.5
    path.write_text(tomli_w.dumps(recipe))
    shutil.rmtree(run / "checkpoints")
    code, _, err = audit(run)
    assert code == 1
    assert "the loss of step 3 was" in err  # the first step's update has no momentum yet


def test_a_change_that_was_accepted_is_replayed_as_it_was_made(tmp_path, audit):
    run = str(tmp_path / "run")
    assert cli.main(["train", "digits", "--run", run, "--quiet", *words(*SETTINGS, *SAVING, "run.max_steps=23")]) == 0
    changed = words("run.max_steps=30", "optimizer.lr=0.01")
    assert cli.main(["resume", run, "--quiet", "--accept-changes", *changed]) == 0
    code, out, err = audit(tmp_path / "run")
    assert (code, err) == (0, ""), out
    assert "equal: 30 of 30 steps" in out


def test_what_is_too_far_from_a_checkpoint_is_said(run, audit):
    for step in (15, 23):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    code, out, _ = audit(run, "--reach", "20")
    assert code == 0
    assert "10 steps were out of reach" in out
    assert "equal: 36 of 46 steps" in out


def test_a_run_that_an_older_release_began_is_audited_from_there(run, audit):
    def later(path: Path) -> None:
        kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] > 30]
        path.write_text('{"step": 30, "format": 1, "chain": ""}\n' + "".join(kept))

    later(run / NAME)
    rewrite(run, lambda line: line)
    code, out, _ = audit(run)
    assert code == 0
    assert "there is no record of what led to step 30" in out
    assert "equal: 16 of 16 steps" in out


def test_a_run_without_exactness_is_audited_with_a_caveat(tmp_path, audit):
    run = str(tmp_path / "run")
    sets = words(*SETTINGS, "run.exact=false", "run.max_steps=5")
    assert cli.main(["train", "digits", "--run", run, "--quiet", *sets]) == 0
    assert "numbers that differ in their last bits prove nothing" in audit(tmp_path / "run")[1]


@pytest.fixture
def photos(tmp_path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(48):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(image.numpy()).save(path)
    return tmp_path / "photos"


def test_a_file_of_the_data_that_was_edited_is_named_with_the_first_step_that_shows_it(photos, tmp_path, audit):
    run, sets = tmp_path / "run", (f"data.root={photos}", "data.size=8", "data.cache=false", "data.batch_size=8")
    sets = words(*sets, "model.name=mlp", "model.pretrained=false", "run.epochs=2")
    assert cli.main(["train", "image-folder", "--run", str(run), "--quiet", *sets]) == 0
    assert audit(run)[0] == 0
    Image.new("RGB", (8, 8)).save(photos / "a" / "4.png")
    code, out, err = audit(run)
    assert code == 1
    assert "not as it was: the training data changed: a/4.png was edited" in out
    assert "the loss of step " in err
    shutil.rmtree(photos)
    code, _, err = audit(run)
    assert code != 0
    assert str(photos) in err


def test_another_number_of_devices_replays_the_same_bits(cli, tmp_path):
    sets = (*SETTINGS, "parallel.replicas=2", "run.max_steps=12")
    assert cli("train", "digits", "--run", tmp_path / "run", sets=sets).returncode == 0
    done = cli("audit", tmp_path / "run", "--devices", "2", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "equal: 12 of 12 steps were replayed on 2 devices" in done.stdout
    assert done.stdout.count("equal") == 3
    assert not (tmp_path / "run" / "logs").exists()
