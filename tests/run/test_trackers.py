"""TensorBoard's event files, read back by TensorBoard's own reader."""

import io
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import scalar

from torchrelay.run.trackers import TensorBoard, image_grid


def lines_of(epochs: int, steps: int = 40, every: int = 10) -> list[dict[str, Any]]:
    """Return the metrics of a run as in metrics.jsonl."""
    lines: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        inside = {"epoch": epoch, "split": "step"}
        done = range((epoch - 1) * steps + every, epoch * steps + 1, every)
        lines += [{"step": step, **inside, "loss": 1 / step, "lr": 1 - step / 1000} for step in done]
        ending = {"step": epoch * steps, "epoch": epoch, "time": 1.7e9 + epoch}
        train = {"loss": 2 / epoch, "accuracy": 1 - 1 / (epoch + 1), "lr": 1 - epoch * steps / 1000, "seconds": 3.5}
        lines.append({**ending, "split": "train", **train, "samples_per_second": 1000.0 + epoch})
        lines.append({**ending, "split": "test", "loss": 3 / epoch, "accuracy": 0.5})
    return lines


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each curve by its run and its card, such as "test: loss"."""
    found = {}
    for part in sorted({path.parent for path in folder.rglob("events.*")}):
        events = read(part)
        name = part.relative_to(folder)
        for tag in events.Tags()["scalars"]:
            found[f"{name}: {tag}"] = [(point.step, point.value) for point in events.Scalars(tag)]
    return found


def picture(folder: Path, tag: str) -> np.ndarray[Any, Any]:
    [shown] = read(folder).Images(tag)
    return np.array(Image.open(io.BytesIO(shown.encoded_image_string)).convert("RGB"))


def files(folder: Path) -> list[str]:
    return sorted(f"{path.parent.relative_to(folder)}/*{path.suffix}" for path in folder.rglob("events.*"))


# ------------------------------------------------------------------------------------------------ charts


def test_a_metric_of_all_splits_is_one_card_with_a_curve_for_each(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for line in lines_of(epochs=2):
        board.write(line)
    board.close()
    found = scalars(tmp_path)
    assert set(found) == {
        *("train: loss", "test: loss", "train: accuracy", "test: accuracy"),
        *("train: loss/step", "train: lr", "train: samples_per_second"),
    }
    assert found["test: loss"] == [(40, 3.0), (80, 1.5)]
    assert found["train: accuracy"] == [(40, 0.5), (80, pytest.approx(2 / 3))]


def test_a_chart_has_one_point_per_step(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for line in lines_of(epochs=2):
        board.write(line)
    board.close()
    assert [step for step, _ in scalars(tmp_path)["train: lr"]] == [10, 20, 30, 40, 50, 60, 70, 80]


def test_points_carry_the_time_of_their_line(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.write(lines_of(epochs=1)[-1])
    board.close()
    assert [point.wall_time for point in read(tmp_path / "test").Scalars("loss")] == [1.7e9 + 1]


def test_a_diverged_loss_is_a_point_from_the_run_and_from_the_file(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step, loss in enumerate((math.inf, math.nan, None)):
        board.write({"step": step, "epoch": 1, "split": "test", "loss": loss, "note": "no number", "by_class": [1.0]})
    board.close()
    [(tag, points)] = scalars(tmp_path).items()
    assert tag == "test: loss"
    assert [step for step, _ in points] == [0, 1, 2]
    assert all(math.isnan(value) for _, value in points)


def test_a_line_is_one_event(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for line in lines_of(epochs=1):
        board.write(line)
    board.close()
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    events = {path.parent.name: len(list(RawEventFileLoader(str(path)).Load())) for path in tmp_path.rglob("events.*")}
    assert events == {"train": 1 + 4 + 1, "test": 1 + 1}


def test_the_name_of_a_test_set_stays_inside_the_folder(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path / "tensorboard")
    for name in ("../out", "night photos", "雨"):
        board.write({"step": 1, "epoch": 1, "split": name, "loss": 0.5})
    board.close()
    assert set(scalars(tmp_path)) == {f"tensorboard/{name}: loss" for name in ("_._out", "night_photos", "雨")}


def test_after_a_resume_no_point_is_duplicate_or_missing(tmp_path: Path, cli: Callable[..., Any]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    board = TensorBoard(whole)
    for line in lines_of(epochs=4):
        board.write(line)
    board.close()

    killed_in_epoch_3 = f"""
import os, signal, torch
from pathlib import Path
from torchrelay.run.trackers import TensorBoard
board = TensorBoard(Path({str(broken)!r}))
board.images("first batch", torch.rand(4, 3, 8, 8), None, None, step=0)
for line in {lines_of(epochs=3)!r}:
    board.write(line)
for writer in board._writers.values():
    writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert cli(program=killed_in_epoch_3).returncode == -signal.SIGKILL
    assert len(scalars(broken)["test: loss"]) == 3
    board = TensorBoard(broken)
    board.rewrite(lines_of(epochs=2))  # its last checkpoint is that of epoch 2
    for line in lines_of(epochs=4)[len(lines_of(epochs=2)) :]:
        board.write(line)
    board.close()

    assert scalars(broken) == scalars(whole)
    assert read(broken).Tags()["images"] == ["first batch"]
    assert files(broken) == ["./*.media", "test/*.scalars", "train/*.scalars"]


def test_a_resumed_run_of_an_older_layout_has_each_point_once(tmp_path: Path) -> None:
    """Its charts were in one file, with tags such as "loss/test"; its pictures stay."""
    old = TensorBoard(tmp_path)
    old.images("first batch", torch.rand(4, 3, 8, 8), None, None, step=0)
    old._add(".scalars", scalar("loss/test", 3.0), 40)  # type: ignore[no-untyped-call]
    old._add(".scalars", scalar("loss/train", 2.0), 40)  # type: ignore[no-untyped-call]
    old.close()
    board = TensorBoard(tmp_path)
    board.rewrite(lines_of(epochs=1))
    for line in lines_of(epochs=2)[len(lines_of(epochs=1)) :]:
        board.write(line)
    board.close()
    found = scalars(tmp_path)
    assert found["test: loss"] == [(40, 3.0), (80, 1.5)]
    assert not any(curve.startswith(".:") for curve in found)
    assert read(tmp_path).Tags()["images"] == ["first batch"]


def test_nothing_is_opened_or_imported_before_it_is_needed(tmp_path: Path, cli: Callable[..., Any]) -> None:
    program = f"""
import sys
from forked import forget
lazy = ("tensorboard", "torch.utils.tensorboard", "matplotlib", "torchvision")
forget("torchrelay", *lazy)
from pathlib import Path
from torchrelay.run.trackers import TensorBoard
board = TensorBoard(Path({str(tmp_path)!r}))
board.close()
print([name for name in ("torchrelay.run.trackers", *lazy) if name in sys.modules])
"""
    assert cli(program=program).stdout == "['torchrelay.run.trackers']\n"
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ pictures


def test_a_normalized_batch_is_shown_as_its_original_images(tmp_path: Path) -> None:
    original = torch.randint(0, 256, (70, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = torch.tensor([0.49, 0.48, 0.44]), torch.tensor([0.2, 0.19, 0.21])
    normalized = (original / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    board = TensorBoard(tmp_path)
    board.images("first batch", normalized, mean.tolist(), std.tolist(), step=0)
    board.close()
    shown = picture(tmp_path, "first batch")
    assert shown.shape == (8 * 132, 8 * 132, 3)  # 64 of them, eightfold, each in a frame of two pixels
    for place in (0, 7, 8, 63):
        row, column = divmod(place, 8)
        tile = shown[row * 132 + 2 : row * 132 + 130, column * 132 + 2 : column * 132 + 130]
        assert (tile[::8, ::8] == original[place].permute(1, 2, 0).numpy()).all()
        assert (tile[7::8, 7::8] == tile[::8, ::8]).all()


def test_images_are_float32_of_any_memory_format_or_precision(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 8, 8)
    board = TensorBoard(tmp_path)
    board.images("plain", images, None, None, step=0)
    board.images("channels last", images.contiguous(memory_format=torch.channels_last), None, None, step=0)
    board.images("half", images.bfloat16(), None, None, step=0)
    board.close()
    assert (picture(tmp_path, "plain") == picture(tmp_path, "channels last")).all()
    assert np.abs(picture(tmp_path, "plain").astype(int) - picture(tmp_path, "half")).max() <= 1


@pytest.mark.parametrize(
    ("count", "side", "shape"), [(256, 224, (912, 912)), (2, 1100, (1104, 1104)), (3, 4, (132, 396))]
)
def test_a_grid_is_never_much_wider_than_a_screen(
    tmp_path: Path, count: int, side: int, shape: tuple[int, int]
) -> None:
    board = TensorBoard(tmp_path)
    board.images("first batch", torch.rand(count, 1, side, side), (0.0,), (1.0,), step=0)
    board.close()
    assert picture(tmp_path, "first batch").shape[:2] == shape


def test_the_missing_images_of_a_last_row_are_white() -> None:
    grid = image_grid(torch.zeros(9, 1, 128, 128))
    assert grid.shape == (2 * 132, 8 * 132, 3)
    assert (grid[132:, 132:] == 255).all()
    assert (grid[134:262, 2:130] == 0).all()


def test_images_with_nan_are_black() -> None:
    assert (image_grid(torch.full((1, 1, 200, 200), math.nan))[2:-2, 2:-2] == 0).all()


@pytest.mark.parametrize("inputs", [torch.zeros(8, 64), torch.zeros(8, 12, dtype=torch.int64), [torch.zeros(2)], {}])
def test_inputs_that_are_not_images_are_skipped(tmp_path: Path, inputs: Any) -> None:
    TensorBoard(tmp_path).images("first batch", inputs, None, None, step=0)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_and_a_png_file_give_the_same_image(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2, 3])
    figure.savefig(tmp_path / "figure.png", dpi=100)
    board = TensorBoard(tmp_path / "tensorboard")
    board.figure("drawn", figure, step=3)
    board.figure("from file", tmp_path / "figure.png", step=3)
    board.close()
    assert picture(tmp_path / "tensorboard", "drawn").shape == (100, 200, 3)
    assert (picture(tmp_path / "tensorboard", "drawn") == picture(tmp_path / "tensorboard", "from file")).all()


def test_a_png_file_is_shown_byte_for_byte(tmp_path: Path) -> None:
    """Decoding and encoding it again would take many times its memory."""
    Image.new("L", (40, 30), 200).save(tmp_path / "grey.png")
    board = TensorBoard(tmp_path / "tensorboard")
    board.figure("grey", tmp_path / "grey.png", step=3)
    board.close()
    [shown] = read(tmp_path / "tensorboard").Images("grey")
    assert shown.encoded_image_string == (tmp_path / "grey.png").read_bytes()
    assert (shown.step, shown.width, shown.height) == (3, 40, 30)


# ------------------------------------------------------------------------------------------------ settings


def session(folder: Path) -> Any:
    content = read(folder).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return HParamsPluginData.FromString(content).session_start_info


def hyperparameters(folder: Path) -> dict[str, Any]:
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in session(folder).hparams.items()}


def test_hparams_are_written_to_the_run_folder(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for line in lines_of(epochs=2):
        board.write(line)
    settings = {"optimizer.lr": 0.1, "run.exact": True, "run.patience": None, "data.augment": ["flip"], "run.epochs": 2}
    board.hyperparameters(settings)
    board.close()
    assert hyperparameters(tmp_path) == {
        "optimizer.lr": 0.1,
        "run.exact": "true",
        "run.patience": "None",
        "data.augment": "['flip']",
        "run.epochs": 2.0,
    }
    assert scalars(tmp_path)["test: accuracy"] == [(40, 0.5), (80, 0.5)]


def test_the_table_of_runs_names_a_run_by_its_folder(tmp_path: Path) -> None:
    for parent in ("a", "b"):  # the table joins runs of one name
        board = TensorBoard(tmp_path / parent / "first" / "tensorboard")
        board.hyperparameters({"run.epochs": 2})
        board.close()
        name = session(tmp_path / parent / "first" / "tensorboard").group_name
        assert name == f"first ({tmp_path / parent})"


def test_a_resumed_run_shows_only_its_new_settings(tmp_path: Path) -> None:
    for epochs in (2, 4):
        board = TensorBoard(tmp_path)
        board.rewrite(lines_of(epochs))
        board.hyperparameters({"run.epochs": epochs})
        board.close()
    assert hyperparameters(tmp_path) == {"run.epochs": 4.0}
    assert files(tmp_path) == ["./*.hparams", "test/*.scalars", "train/*.scalars"]


def test_metrics_from_a_file_give_the_same_charts(tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines_of(epochs=2))
    board = TensorBoard(tmp_path)
    board.rewrite(map(json.loads, text.splitlines()))
    board.close()
    assert scalars(tmp_path)["train: loss"] == [(40, 2.0), (80, 1.0)]


# ------------------------------------------------------------------------------------------------ failures


def test_what_the_writers_thread_cannot_write_is_said_once_by_the_close(tmp_path: Path) -> None:
    folder, said = tmp_path / "tensorboard", list[str]()
    board = TensorBoard(folder, said.append)
    board.images("first", torch.rand(4, 3, 8, 8), None, None, step=0)
    board._writers["", ".media"].flush()
    shutil.rmtree(folder)  # so that the file can't be opened to append
    board.images("second", torch.rand(4, 3, 8, 8), None, None, step=1)
    board.close()
    board.images("third", torch.rand(4, 3, 8, 8), None, None, step=2)
    board.close()
    assert said == [
        f"warning: {folder} can't be written (No such file or directory): make room or repair the disk; "
        "the end of the run or the next resume writes its charts anew"
    ]
    assert not folder.exists(), "nothing is written until it is tried again"


def test_a_file_in_the_way_costs_the_charts_until_they_are_tried_again(tmp_path: Path) -> None:
    folder, said, lines = tmp_path / "tensorboard", list[str](), lines_of(2)
    folder.write_text("in the way")
    board = TensorBoard(folder, said.append)
    for line in lines[:5]:
        board.write(line)
    assert len(said) == 1
    assert board.lost
    folder.unlink()
    board.retry(lines)
    board.hyperparameters({"seed": 1})
    board.close()
    assert scalars(folder)["test: loss"] == [(40, 3.0), (80, 1.5)]
    assert files(folder) == ["./*.hparams", "test/*.scalars", "train/*.scalars"]


@pytest.mark.ci
@pytest.mark.slow
def test_a_file_in_the_way_is_warned_of_and_a_resume_makes_charts_and_pictures_again(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    done = cli(
        "train", "digits", "--run", str(run), "--set", "run.epochs=1", "--set", "data.batch_size=512", plots=True
    )
    assert done.stdout.count("tensorboard can't be written (File exists)") == 1
    (run / "tensorboard").unlink()
    cli("resume", str(run), "--set", "run.epochs=2", "--accept-changes", plots=True)
    assert {point for point, _ in scalars(run / "tensorboard")["test: loss"]} == {3, 6}
    assert read(run / "tensorboard").Tags()["images"] == ["pictures/first batch", "pictures/confusion matrix"]
