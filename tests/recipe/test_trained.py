"""A model loaded from a run folder predicts like its trainer."""

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import torchrelay as tr
from torchrelay.errors import RelayError, UsageError
from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer

INPUTS = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20) % 3


class Own(tr.Task):
    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")

    def predict(self, outputs):
        return outputs.argmax(1)


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def test_a_recipe_run_loads_from_its_folder_alone(tmp_path, quiet, digits):
    run = tmp_path / "run"
    trainer = build_trainer(recipe.load("digits", ["run.epochs=1", "model.ema=0.9"]), run, terminal=quiet)
    trainer.fit()
    trained = tr.load(run)
    assert trained.classes == trainer.classes
    assert trained.step == trainer.step
    images = digits[1].inputs[:30]
    expected = trainer.predict(images)
    assert torch.equal(trained.predict(images), expected)
    assert torch.equal(trained.predict(images.numpy()), expected)
    assert torch.equal(trained.predict(list(images)), expected)
    assert torch.equal(tr.load(str(run), "last").predict(digits[1]), trainer.predict(digits[1]))
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(images[i, 0].numpy()).save(tmp_path / "images" / f"{i}.png")
    paths = sorted((tmp_path / "images").iterdir())
    assert torch.equal(trained.predict(paths), trained.predict(tmp_path / "images"))
    torch.testing.assert_close(trained.predict(str(paths[0])), expected[:1])  # a batch of another size
    (tmp_path / "images" / "2.png").write_text("no image")
    with pytest.raises(RelayError, match=r"2\.png"):
        trained.predict(tmp_path / "images")


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": nn.NLLLoss()}, {"loss": nn.MultiMarginLoss()}, {"task": Own()}, {"loss": nn.CrossEntropyLoss}],
)
def test_a_run_from_python_needs_its_model(tmp_path, quiet, changes):
    torch.manual_seed(0)
    trainer = tr.Trainer(
        linear(), (INPUTS, LABELS), (INPUTS, LABELS), run=tmp_path / "run", epochs=2, terminal=quiet, **changes
    )
    trainer.fit()
    trainer.load("best")
    own = {"task": Own()} if "task" in changes else {}
    assert torch.equal(tr.load(tmp_path / "run", model=linear(), **own).predict(INPUTS), trainer.predict(INPUTS))
    with pytest.raises(UsageError, match=r"was started from Python: give its model too, tr\.load\("):
        tr.load(tmp_path / "run")
    with pytest.raises(RelayError, match="the checkpoint's weights don't fit Linear: size mismatch"):
        tr.load(tmp_path / "run", model=nn.Linear(5, 3), **own)
    with pytest.raises(UsageError, match="the run wasn't trained on images in memory"):
        tr.load(tmp_path / "run", model=linear(), **own).predict("a.png")
    if own:
        with pytest.raises(UsageError, match=r"trained by a task of your own, Own: give tr\.load\(\.\.\., task=Own"):
            tr.load(tmp_path / "run", model=linear())


def test_a_folder_without_a_run_is_reported(tmp_path):
    with pytest.raises(UsageError, match="isn't a run: it has no recipe"):
        tr.load(tmp_path)


def test_a_run_from_python_evaluates_other_images_by_class_name(tmp_path, quiet):
    for name, gray in (("black", 0), ("white", 255), ("other", 127)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (4, 4), gray).save(tmp_path / "images" / name / f"{i}.png")
    inputs = torch.tensor([0, 255], dtype=torch.uint8).repeat(8).reshape(16, 1, 1, 1).expand(16, 1, 4, 4).contiguous()
    train = tr.data.arrays(inputs, torch.arange(16) % 2, ("black", "white"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    settings = {"epochs": 5, "batch_size": 8, "normalize": False, "optimizer": tr.optim.SGD(lr=0.5), "terminal": quiet}
    tr.Trainer(model, train, train, run=tmp_path / "run", **settings).fit()
    said: list[str] = []
    trained = tr.load(tmp_path / "run", model=nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
    found = trained.evaluate(tmp_path / "images", said.append)
    assert {name: (each.samples, each.values["accuracy"]) for name, each in found.items()} == {"all": (8, 1.0)}
    assert any(line.startswith("left out of") and line.endswith(": other") for line in said), said
