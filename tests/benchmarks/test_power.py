"""What a loss of power leaves: data from before the last flush, and names from before the folder's."""

from benchmarks.exactness.power import Call, lose, unflushed

CALLS = [
    Call(1, "write", "/kept", ""),
    Call(2, "fsync", "/kept", "3"),
    Call(3, "write", "/kept", ""),
    Call(4, "write", "/.new", ""),
    Call(5, "rename", "/new", "/.new"),
    Call(6, "unlink", "/gone", ""),
]


def folder(tmp_path):
    run, backup = tmp_path / "run", tmp_path / "backup"
    run.mkdir()
    backup.mkdir()
    (run / "kept").write_text("abcdef")
    (run / "new").write_text("new")
    (backup / "5").write_text("old")
    (backup / "6").write_text("gone")
    return run, backup


def test_what_was_not_flushed_is_known_under_its_new_name():
    assert unflushed(CALLS) == {"/kept": 3, "/new": 0}
    assert unflushed(CALLS[:2]) == {}


def test_unflushed_data_is_dropped_or_zeroed(tmp_path):
    run, backup = folder(tmp_path)
    lose(run, CALLS, backup, "data zeroed")
    assert (run / "kept").read_bytes() == b"abc\0\0\0"
    assert (run / "new").read_bytes() == b"\0\0\0"
    lose(run, CALLS, backup, "data dropped")
    assert (run / "kept").read_bytes() == b"abc"
    assert (run / "new").read_bytes() == b""


def test_names_go_back_to_what_the_folder_was_when_it_was_flushed(tmp_path):
    run, backup = folder(tmp_path)
    lose(run, CALLS, backup, "names and data dropped")
    assert sorted(path.name for path in run.iterdir()) == [".new", "gone", "kept", "new"]
    assert (run / "new").read_text() == "old"
    assert (run / "gone").read_text() == "gone"


def test_names_stay_that_were_flushed(tmp_path):
    run, backup = folder(tmp_path)
    lose(run, [*CALLS, Call(7, "fsync", "", "0")], backup, "names and data dropped")
    assert sorted(path.name for path in run.iterdir()) == ["kept", "new"]
