"""Of a run that grows, only what was appended is read."""

import json

import pytest

from torchrelay.errors import UsageError
from torchrelay.report.watch.follow import Followed
from written_runs import write_run


def append(run, *lines, end="\n"):
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(line) for line in lines) + end)


def line(step, **values):
    return {"step": step, "epoch": 1, "split": "step", "loss": 0.5} | values


def test_only_what_was_appended_is_read(tmp_path):
    run = write_run(tmp_path / "run")
    append(run, *(line(step) for step in range(100)))
    followed = Followed(run)
    before = len(followed.facts.lines)
    path = run / "metrics.jsonl"
    path.write_bytes(b"#" * 1000 + path.read_bytes()[1000:])  # what was read isn't looked at again
    append(run, line(100))
    followed.refresh()
    assert len(followed.facts.lines) == before + 1
    assert followed.facts.lines[-1]["step"] == 100


def test_a_line_that_is_being_written_is_read_when_it_is_whole(tmp_path):
    run = write_run(tmp_path / "run", accuracies=())
    append(run, line(1))
    followed = Followed(run)
    text = json.dumps(line(2))
    append(run, end=text[:10])
    followed.refresh()
    assert [each["step"] for each in followed.facts.lines] == [1]
    append(run, end=text[10:] + "\n")
    followed.refresh()
    assert [each["step"] for each in followed.facts.lines] == [1, 2]


@pytest.mark.parametrize("steps", [(1,), (1, 7, 8, 9)])
def test_a_run_that_was_resumed_from_an_earlier_checkpoint_is_read_anew(tmp_path, steps):
    run = write_run(tmp_path / "run", accuracies=())
    append(run, line(1), line(2), line(3))
    followed = Followed(run)
    (run / "metrics.jsonl").unlink()
    append(run, *map(line, steps))
    (run / "recipe.toml").write_text("[run]\nepochs = 9\n")
    followed.refresh()
    assert [each["step"] for each in followed.facts.lines] == [*steps]
    assert followed.facts.settings["run.epochs"] == 9


def test_a_run_whose_lock_is_not_seen_is_running_while_it_grows(tmp_path):
    run = write_run(tmp_path / "run", done=False)
    followed = Followed(run)
    assert followed.status == "stopped"
    append(run, line(30))
    followed.refresh()
    assert followed.status == "running"


def test_a_run_that_is_removed_is_gone_and_still_shown(tmp_path):
    run = write_run(tmp_path / "run")
    followed = Followed(run)
    (run / "metrics.jsonl").unlink()
    followed.refresh()
    assert followed.status == "gone"
    assert followed.facts.lines


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="isn't a run"):
        Followed(tmp_path)
