"""A bisection names the first step in which two runs part, and which of their differences makes them."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from torchrelay import cli
from torchrelay.report.audit.bisect import smallest

SETTINGS = ("model.name=mlp", "data.batch_size=64", "run.epochs=2", "run.log_every=10", "device.precision=float32")
CODE = """
from torch import nn

def net(classes, channels=1, **_):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes)){more}
"""


def train(run: Path, *sets: str, code: Path | None = None, recipe: str = "digits") -> Path:
    words = [word for setting in (*SETTINGS, "device.threads=1", *sets) for word in ("--set", setting)]
    given = ["--code", str(code)] if code else []
    assert cli.main(["train", recipe, "--run", str(run), "--quiet", *words, *given]) == 0
    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("shared") / "good")


@pytest.fixture
def bisect(capsys):
    def bisected(good: Path, bad: Path, *more: str) -> tuple[str, str]:
        """Return what was said, and the verdict."""
        capsys.readouterr()
        code = cli.main(["bisect", str(good), str(bad), *more])
        said = capsys.readouterr()
        assert (code, said.err) == (0, "")
        return said.out, said.out.splitlines()[-1]

    return bisected


def test_runs_that_agree_do_so_in_all_steps(good, tmp_path, bisect):
    bad = train(tmp_path / "bad", "run.max_steps=30", "checkpoint.every=7 steps")
    assert bisect(good, bad)[1] == "verdict: the runs agree in all 30 steps that both recorded"


def test_the_guilty_key_is_named_among_harmless_ones(good, tmp_path, bisect):
    sets = (
        "data.workers=1",
        "optimizer.momentum=0.8",
        "run.evaluate_every=2",
        "run.spike_threshold=9",
        "run.log_every=7",
    )
    out, verdict = bisect(good, train(tmp_path / "bad", *sets))
    assert "data.workers" in out
    assert "they part at step 3: its loss is " in out
    assert verdict == "verdict: optimizer.momentum (0.9 in GOOD, 0.8 in BAD) makes them part at step 3"


def test_a_key_that_changes_the_initial_weights_is_named(good, tmp_path, bisect):
    out, verdict = bisect(good, train(tmp_path / "bad", "run.seed=3", "optimizer.weight_decay=0"))
    assert "they part after step 0: the weights differ" in out
    assert verdict == "verdict: run.seed (0 in GOOD, 3 in BAD) makes them part at step 0"


def test_two_keys_that_only_together_explain_it_are_both_named(good, tmp_path, bisect):
    sets = ("data.augment=[]", "loss.label_smoothing=0.1", "data.workers=1", "optimizer.lr=0.01")
    _, verdict = bisect(good, train(tmp_path / "bad", *sets))
    assert verdict.startswith("verdict: data.augment ([{")
    assert verdict.endswith(" and loss.label_smoothing (0.0 in GOOD, 0.1 in BAD) make them part at step 1")


def test_another_optimizer_is_one_difference(good, tmp_path, bisect):
    _, verdict = bisect(good, train(tmp_path / "bad", "optimizer.name=adamw", "optimizer.lr=0.01"))
    assert verdict == "verdict: optimizer.name (sgd in GOOD, adamw in BAD) makes them part at step 2"


def test_a_rate_that_a_resume_changed_is_found_at_its_step(good, tmp_path, bisect):
    bad = train(tmp_path / "bad", "run.max_steps=30")
    sets = [word for setting in ("run.max_steps=46", "optimizer.lr=0.01") for word in ("--set", setting)]
    assert cli.main(["resume", str(bad), "--quiet", "--accept-changes", *sets]) == 0
    shutil.rmtree(bad / "checkpoints")
    out, verdict = bisect(good, bad)
    assert "they part at step 32" in out
    assert verdict == "verdict: optimizer.lr (0.05 in GOOD, 0.01 in BAD) makes them part at step 32"


def test_another_file_of_code_is_named(tmp_path, bisect, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = tmp_path / "one" / "net.py", tmp_path / "two" / "net.py"
    one.write_text(CODE.format(more=""))
    two.write_text(CODE.format(more=".append(nn.Tanh())"))
    sets = ("model.name=net", "run.max_steps=4")
    good, bad = train(tmp_path / "good", *sets, code=one), train(tmp_path / "bad", *sets, "data.workers=1", code=two)
    _, verdict = bisect(good, bad, "--code", str(one), "--code", str(two))
    assert verdict == "verdict: --code (another file) makes them part at step 1"
    assert cli.main(["bisect", str(good), str(bad), "--code", str(one)]) == 2
    assert "give that one too by --code" in capsys.readouterr().err


def test_a_run_that_its_recipe_does_not_lead_to_is_told_apart(good, tmp_path, bisect):
    """As with another version of a package: its receipt is that of a run with another seed."""
    other, bad = train(tmp_path / "other", "run.seed=1"), Path(shutil.copytree(good, tmp_path / "bad"))
    shutil.copy(other / "receipt.jsonl", bad)
    recipe = bad / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[environment]", '[environment]\nnumpy = "1.0"'))
    out, verdict = bisect(good, bad)
    assert "numpy  unset in GOOD, 1.0 in BAD" in out
    assert verdict.startswith("verdict: only GOOD can be replayed here, so the cause isn't in the recipe: what differs")
    assert verdict.endswith("numpy")


def test_a_file_that_was_edited_between_two_runs_is_named(tmp_path, bisect):
    photos = tmp_path / "photos"
    for i in range(24):
        (photos / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 5, 200 - i)).save(photos / "ab"[i % 2] / f"{i}.png")
    images = (f"data.root={photos}", "data.size=8", "data.cache=false", "data.batch_size=8")
    sets = (*images, "model.pretrained=false", "device.channels_last=false")
    good = train(tmp_path / "good", *sets, recipe="image-folder")
    Image.new("RGB", (8, 8)).save(photos / "a" / "4.png")
    _, verdict = bisect(good, train(tmp_path / "bad", *sets, recipe="image-folder"))
    assert verdict.startswith("verdict: only BAD can be replayed here, so the cause isn't in the recipe: what differs")
    assert verdict.endswith("is a/4.png was edited")


@pytest.mark.parametrize("guilty", ["a", "e", "cd", "ag", "bdf"])
def test_the_smallest_part_that_holds_is_found(guilty):
    asked = []

    def holds(some) -> bool:
        asked.append(tuple(some))
        return set(guilty) <= set(some)

    assert smallest(list("abcdefg"), holds) == list(guilty)
    assert len(asked) < 50
