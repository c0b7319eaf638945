"""A run that pauses after an evaluation goes on as if it never had: the whole folder is the same."""

import pytest

from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer

SHORT = ["run.epochs=4", "model.name=mlp", "device.threads=1", "data.batch_size=128"]


def train(folder, quiet, overrides, *pauses):
    for step in (*pauses, None):
        trainer = build_trainer(recipe.load("digits", [*SHORT, *overrides]), folder, terminal=quiet)
        if step is not None:
            trainer.progress.pause_after(step)
        trainer.fit(resume="auto")
        if step is not None:
            assert trainer.progress.step == step
            assert not (folder / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("overrides", "pauses"),
    [
        ([], (12, 36)),
        (["run.evaluate_every=2", "checkpoint.every='3 epochs'"], (24,)),
        (["run.evaluate_every='5 steps'"], (5, 20, 40)),
        (["run.evaluate_every='5 steps'", "checkpoint.every='10 steps'", "schedule.name=plateau"], (5, 10, 30)),
        (["run.evaluate_every='7 steps'", "run.steps=45", "run.patience=3"], (7, 42)),
        (["run.max_steps=30", "run.log_every=3"], (24,)),
    ],
)
def test_a_run_that_pauses_gives_the_folder_of_one_that_does_not(tmp_path, quiet, same_runs, overrides, pauses):
    train(tmp_path / "at once", quiet, overrides)
    train(tmp_path / "pausing", quiet, overrides, *pauses)
    same_runs(tmp_path / "at once", tmp_path / "pausing")
    assert (tmp_path / "pausing" / "evaluation.json").exists()


def test_a_pause_at_the_end_has_no_effect(tmp_path, quiet):
    trainer = build_trainer(recipe.load("digits", SHORT), tmp_path / "run", terminal=quiet)
    trainer.progress.pause_after(trainer.progress.total_steps)
    trainer.fit()
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_a_run_resumed_where_it_paused_pauses_again_with_nothing_recorded_twice(tmp_path, quiet):
    for _ in range(2):
        trainer = build_trainer(recipe.load("digits", SHORT), tmp_path / "run", terminal=quiet)
        trainer.progress.pause_after(12)
        trainer.fit(resume="auto")
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert trainer.progress.step == 12
        assert sum('"split": "test"' in line for line in lines) == 1
