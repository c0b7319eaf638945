"""Plots: contents, no overlapping or clipped text, and reproducible bytes."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from torchrelay.errors import RelayError
from torchrelay.report.plots import curves, draw_curves
from torchrelay.run.metrics import Headline, best_line, headline_of, read_metrics

Line = dict[str, Any]
ACCURACY = Headline("accuracy", percent=True, higher_is_better=True)


def lines_of(
    epochs: int, *, test: bool = True, validation: bool = False, steps: int = 50, every: int = 10
) -> list[Line]:
    """Return the metrics of a run whose test accuracy is best in the epoch before the last."""
    lines: list[Line] = []
    for epoch in range(1, epochs + 1):
        done = range((epoch - 1) * steps + every, epoch * steps + 1, every)
        rate = 0.1 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        lines += [{"step": s, "epoch": epoch, "split": "step", "loss": 2.5 / (1 + s / steps), "lr": rate} for s in done]
        place = {"step": epoch * steps, "epoch": epoch}
        train = {"loss": 2 / epoch, "accuracy": 1 - 0.6 / epoch, "lr": rate}
        lines.append({**place, "split": "train", **train, "samples_per_second": 1128.4, "seconds": 44.31})
        accuracy = 0.8844 if epoch == epochs - 1 else 0.88 - 0.4 / epoch
        if validation:
            lines.append(
                {**place, "split": "validation", "loss": 1 + 1 / epoch, "accuracy": accuracy - 0.001 * (epoch % 2)}
            )
        if test:
            lines.append({**place, "split": "test", "loss": 1 + 1 / epoch, "accuracy": accuracy})
    return lines


def diverging() -> list[Line]:
    lines = lines_of(12)
    return [
        {**line, "loss": None, "accuracy": 0.1} if line["epoch"] > 7 and line["split"] != "step" else line
        for line in lines
    ]


def regression() -> list[Line]:
    """Return metrics of a task whose headline metric is better the lower it is."""
    renamed = [{**line, "mean_squared_error": 40 * line["loss"]} for line in lines_of(20)]
    return [{name: value for name, value in line.items() if name != "accuracy"} for line in renamed]


RUNS = {
    "one epoch": lines_of(1),
    "one epoch without steps": [line for line in lines_of(1, validation=True) if line["split"] != "step"],
    "two epochs": lines_of(2, validation=True),
    "thirty": lines_of(30),
    "a hundred and all three parts": lines_of(100, validation=True),
    "training alone": lines_of(8, test=False),
    "diverging": diverging(),
    "regression": regression(),
    "a language model": [{k: v for k, v in line.items() if k != "accuracy"} for line in lines_of(20)],
    "over many decades": [{**line, "loss": line["loss"] ** 9} for line in lines_of(20)],
    "everything right": [
        {**line, "accuracy": 1.0} if "accuracy" in line else line for line in lines_of(5, validation=True)
    ],
    "no finished epoch": lines_of(1)[:3],
    "nothing": [],
}


def written(folder: Path, lines: list[Line]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def drawn(figure: Figure) -> np.ndarray[Any, Any]:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.array(Image.open(buffer).convert("RGB"))


def shown_texts(figure: Figure) -> list[Text]:
    """Return the visible texts after drawing: matplotlib keeps more ticks than it shows."""
    figure.draw_without_rendering()
    seen: list[Text] = [*figure.texts]
    for axes in figure.axes:
        legend = axes.get_legend()
        seen += legend.get_texts() if legend else []
        seen += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title, axes._right_title]  # type: ignore[attr-defined]
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            seen += [
                tick.label1
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label1.get_visible()
            ]
            seen += [
                tick.label2
                for tick in axis.get_major_ticks()
                if low <= tick.get_loc() <= high and tick.label2.get_visible()
            ]
    return [text for text in seen if text.get_text()]


# ------------------------------------------------------------------------------------------------ reading


def test_a_half_written_last_line_is_skipped(tmp_path: Path) -> None:
    lines = lines_of(2)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for cut in (1, 2, 20, len(json.dumps(lines[-1]))):
        (tmp_path / "metrics.jsonl").write_text(text[:-cut])
        assert read_metrics(tmp_path) == (lines if cut == 1 else lines[:-1])


def test_a_truncated_utf8_character_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + '{"note": "größe'.encode()[:-4])
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_damage_before_the_last_line_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RelayError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RelayError, match=r"has no metrics\.jsonl: give the folder of a run"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("thirty", ACCURACY),
        ("regression", Headline("mean_squared_error", percent=False, higher_is_better=False)),
        ("a language model", Headline("loss", percent=False, higher_is_better=False)),
        ("nothing", Headline("loss", percent=False, higher_is_better=False)),
    ],
)
def test_the_headline_metric_is_inferred_from_the_metrics(name: str, expected: Headline) -> None:
    assert headline_of(RUNS[name]) == expected


def test_the_best_epoch_is_the_first_best_on_the_validation_part() -> None:
    lines = [
        {"step": 1, "epoch": 1, "split": "validation", "accuracy": None},
        {"step": 1, "epoch": 1, "split": "test", "accuracy": 0.9},
        {"step": 2, "epoch": 2, "split": "validation", "accuracy": 0.7},
        {"step": 3, "epoch": 3, "split": "validation", "accuracy": 0.7},
        {"step": 4, "epoch": 4, "split": "train", "accuracy": 1.0},
    ]
    assert best_line(lines, ACCURACY) is lines[2]
    assert best_line(lines[:2], ACCURACY) is lines[1]
    assert best_line(lines[-1:], ACCURACY) is None
    lowest = best_line(RUNS["regression"], headline_of(RUNS["regression"]))
    assert lowest is not None
    assert lowest["epoch"] == 20


# ------------------------------------------------------------------------------------------------ the curves


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_curves_show_the_best_value_and_its_epoch() -> None:
    figure = draw_curves(lines_of(30), "first")
    said = texts(figure)
    assert "first" in said
    assert "best test accuracy 88.44% at epoch 29" in said
    assert {"train 98.00%", "test 86.67%", "best 88.44%", "train 0.0667", "test 1.0333", "learning rate"} <= set(said)


def test_the_legend_covers_no_curve_if_there_is_room() -> None:
    figure = draw_curves(lines_of(30), "first")
    figure.draw_without_rendering()
    for name in ("accuracy", "loss"):
        panel = panels(figure)[name]
        legend = panel.get_legend()
        assert legend is not None
        box = legend.get_window_extent()
        for line in panel.lines:
            points = panel.transData.transform(line.get_xydata())
            assert not any(box.contains(x, y) for x, y in points), (name, line.get_label())


def test_the_curves_show_the_metrics() -> None:
    panel = panels(draw_curves(lines_of(30), "first"))["accuracy"]
    train, test, ring = panel.lines
    assert train.get_xydata() == pytest.approx(np.array([(e - 0.5, 1 - 0.6 / e) for e in range(1, 31)]))
    assert test.get_xydata()[-2] == pytest.approx([29, 0.8844])
    assert ring.get_xydata() == pytest.approx(np.array([(29, 0.8844)]))


def test_step_losses_are_drawn_only_if_they_are_denser_than_epochs() -> None:
    def labels(lines: list[Line]) -> list[object]:
        return [line.get_label() for line in panels(draw_curves(lines, "first"))["loss"].lines]

    sparse = [line for line in lines_of(5) if line["split"] != "step" or line["step"] in (100, 200)]
    assert "within epochs" in labels(lines_of(5))
    assert "within epochs" not in labels(sparse)
    assert "within epochs" in labels([line for line in lines_of(1) if line["split"] == "step"])


def test_a_partial_epoch_is_drawn_where_it_ended() -> None:
    lines = lines_of(3)
    cut = [line for line in lines if line["step"] <= 120]
    cut.append({"step": 120, "epoch": 3, "split": "train", "loss": 1.0, "accuracy": 0.5, "lr": 0.0})
    train, *_ = panels(draw_curves(cut, "cut"))["accuracy"].lines
    assert list(train.get_xdata()) == [0.5, 1.5, 2.2]


def test_a_mean_over_steps_stands_in_their_middle() -> None:
    """The loss of each step falls along a line; wherever a mean is drawn it must lie on it."""
    lines: list[Line] = []
    for epoch in (1, 2, 3):
        for step in (50 * epoch - 20, 50 * epoch):  # the mean of steps 1 to 30, 31 to 50, 51 to 80, …
            begin = lines[-1]["step"] if lines and step != 30 else 0
            mean = 1000 - sum(range(begin + 1, step + 1)) / (step - begin)
            lines.append({"step": step, "epoch": epoch, "split": "step", "loss": mean})
        mean = 1000 - sum(range(50 * epoch - 49, 50 * epoch + 1)) / 50
        lines.append({"step": 50 * epoch, "epoch": epoch, "split": "train", "loss": mean})
        lines.append({"step": 50 * epoch, "epoch": epoch, "split": "test", "loss": 1000 - 50 * epoch})
    within, train, test, _ = panels(draw_curves(lines, "x", Headline("loss", False, False)))["loss"].lines
    for curve, half in ((within, 0.5), (train, 0.5), (test, 0.0)):
        for epoch, loss in np.asarray(curve.get_xydata()):
            assert loss == pytest.approx(1000 - 50 * epoch - half)  # a step's loss is that before it


def test_one_epoch_without_losses_of_steps_is_bars_and_with_them_a_curve() -> None:
    alone = [line for line in lines_of(1, validation=True) if line["split"] != "step"]
    figure = draw_curves(alone, "x")
    for name, said in (
        ("accuracy", ["train 40.00%", "validation 47.90%", "test 48.00%"]),
        ("loss", ["train 2.0000", "validation 2.0000", "test 2.0000"]),
    ):
        panel = panels(figure)[name]
        assert [text.get_text() for text in panel.texts] == said
        assert not panel.lines
        lengths = [bar.get_width() for bar in panel.patches]  # type: ignore[attr-defined]
        assert lengths == pytest.approx([line[name] for line in alone])
    panel = panels(draw_curves(lines_of(1), "x"))["loss"]
    assert [line.get_label() for line in panel.lines] == ["within epochs", "train 2.0000", "test 2.0000"]
    assert panel.get_ylim()[0] == 0


@pytest.mark.parametrize("epochs", [2, 3])
def test_two_epochs_are_drawn_on_a_whole_axis(epochs: int) -> None:
    lowest, highest = panels(draw_curves(lines_of(epochs), "x"))["accuracy"].get_ylim()
    assert ((lowest, highest) == (0, 1)) == (epochs == 2)


def test_without_a_finished_epoch_the_axis_counts_steps() -> None:
    [panel] = draw_curves(lines_of(1)[:3], "x").axes
    assert panel.get_xlabel() == "step"
    assert panels(draw_curves(lines_of(3), "x"))["accuracy"].get_xlabel() == "epoch"


def test_nan_is_a_gap_with_a_note() -> None:
    figure = draw_curves(RUNS["diverging"], "diverging")
    panel = panels(figure)["loss"]
    losses = panel.lines[1].get_ydata()
    assert np.isfinite(losses).tolist() == 7 * [True] + 5 * [False]
    assert {"train nan", "test nan"} <= set(texts(figure))


def test_a_loss_over_many_decades_has_a_logarithmic_scale() -> None:
    assert panels(draw_curves(RUNS["over many decades"], "x"))["loss"].get_yscale() == "log"
    assert panels(draw_curves(RUNS["thirty"], "x"))["loss"].get_yscale() == "linear"


def test_one_wild_batch_does_not_squash_the_curves() -> None:
    lines = [
        {**line, "loss": 500.0} if line["step"] == 10 and line["split"] == "step" else line for line in lines_of(30)
    ]
    assert panels(draw_curves(lines, "x"))["loss"].get_ylim()[1] < 5


def test_a_constant_learning_rate_has_no_strip() -> None:
    lines = [{**line, "lr": 0.1} if "lr" in line else line for line in lines_of(30)]
    assert len(draw_curves(lines, "x").axes) == len(draw_curves(lines_of(30), "x").axes) - 1


@pytest.mark.parametrize("name", RUNS)
def test_no_text_of_the_curves_is_clipped_or_overlaps(name: str) -> None:
    figure = draw_curves(RUNS[name], 20 * "long name ")
    seen = [(text.get_text(), text.get_window_extent()) for text in shown_texts(figure)]
    assert len(seen) > 4
    page = figure.bbox
    for text, box in seen:
        assert page.x0 <= box.x0 < box.x1 <= page.x1, text
        assert page.y0 <= box.y0 < box.y1 <= page.y1, text
    for place, (text, box) in enumerate(seen):
        for other, other_box in seen[place + 1 :]:
            overlap = (
                min(box.x1, other_box.x1) - max(box.x0, other_box.x0),
                min(box.y1, other_box.y1) - max(box.y0, other_box.y0),
            )
            # A text's box has some air above and below it.
            assert overlap[0] <= 1 or overlap[1] <= 8, (text, other)


@pytest.mark.parametrize("name", RUNS)
def test_a_picture_is_not_blank_and_the_same_metrics_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "run", RUNS[name])
    first = curves(folder).read_bytes()
    if name in ("thirty", "diverging", "nothing"):
        assert curves(folder).read_bytes() == first
    picture = np.array(Image.open(io.BytesIO(first)).convert("RGB"))
    assert picture.shape == (960, 2200, 3)
    assert (picture != 255).any(axis=2).mean() > 0.002
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_dollars_and_underscores_in_a_runs_name_are_literal(tmp_path: Path) -> None:
    folder = written(tmp_path / "lr_$0.1$_", lines_of(2))
    curves(folder)
    assert "lr_$0.1$_" in texts(draw_curves(lines_of(2), folder.name))


def test_plots_restore_matplotlib_and_need_no_display(tmp_path: Path, cli: Callable[..., Any]) -> None:
    folder = written(tmp_path / "run", lines_of(2))
    program = f"""
import sys
from forked import forget
forget("matplotlib.pyplot")
from pathlib import Path
from torchrelay.report.confusion import confusion_matrix
from torchrelay.report.plots import curves
import matplotlib, torch
def settings():  # asking for the backend would choose one, and import pyplot
    return {{name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}}
before = settings()
curves(Path({str(folder)!r}))
confusion_matrix(torch.eye(3).long()).savefig(Path({str(folder)!r}) / "confusion.png")
assert settings() == before
print("matplotlib.pyplot" in sys.modules)
"""
    done = cli(program=program)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_matplotlib_is_imported_when_a_plot_is_drawn(cli: Callable[..., Any]) -> None:
    program = """
import sys
from forked import forget
forget("torchrelay", "matplotlib")
import torchrelay.report.plots
print("matplotlib" in sys.modules)
"""
    assert cli(program=program).stdout == "False\n"
