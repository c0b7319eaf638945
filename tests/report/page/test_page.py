"""A run's page: what it says, what it escapes, and that a browser opens it without a network."""

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import torchrelay as tr
from torchrelay.recipe import recipe
from torchrelay.recipe.build import build_trainer
from torchrelay.report.page import findings, page, svg
from torchrelay.report.page.facts import Facts, nearest_recipe, read_facts
from torchrelay.report.page.page import render, write_page
from torchrelay.run.metrics import Headline
from torchrelay.run.terminal import Terminal
from torchrelay.run.trackers import TensorBoard

HOSTILE = (
    '<script>document.title="taken"</script>',
    '"><img src=x onerror="document.title=1">',
    "{{ 7 * 7 }}",
    "& ' \\",
)


class Tags(HTMLParser):
    """Collects a page's tags with their attributes, its headings and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags[-1:] and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the recipe digits."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    loaded = recipe.load("digits", ["run.epochs=2", "optimizer.lr=0.04", "device.name=cpu", "run.log_every=5"])
    build_trainer(loaded, folder, terminal=Terminal(quiet=True)).fit()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "digits")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose folder and classes have names that a page mustn't take for its own."""
    torch.manual_seed(0)
    source = tr.data.arrays(torch.randn(40, 6), torch.arange(40) % 4, classes=HOSTILE)
    folder = tmp_path_factory.mktemp("runs") / "<b>run"
    trainer = tr.Trainer(nn.Linear(6, 4), source, source, epochs=1, run=folder, terminal=Terminal(quiet=True))
    trainer.fit()
    return folder


def facts(lines: list[dict[str, Any]] | None = None, **more: Any) -> Facts:
    record = {"run": {"epochs": 3}, "environment": {"started_from": "python"}}
    return Facts(Path("runs/one"), record, lines or [], Headline("accuracy", True, True), **more)


# ------------------------------------------------------------------------------------------------ the command


def test_the_page_of_a_run_has_all_sections(run: Path, cli: Callable) -> None:
    done = cli("report", str(run))
    assert (done.returncode, done.stderr) == (0, "")
    text = (run / "report.html").read_text()
    assert len(text) < page.MOST
    found = Tags(text)
    assert found.headings == [
        *("Curves", "Metrics", "Confusion", "Accuracy by class", "Worst samples", "Calibration", "Slices"),
        *("Time and memory", "Recipe", "Environment", "Make it again"),
    ]
    images = [values["src"] or "" for tag, values in found.tags if tag == "img"]
    assert len(images) == 24
    assert all(image.startswith("data:image/jpeg;base64,") for image in images)
    values = json.loads((run / "evaluation.json").read_text())
    assert f"{100 * values['accuracy']:.2f}%" in found.text
    assert "by brightness" in found.text
    assert "optimizer.lr" in found.text


def test_several_runs_have_a_page_each_and_one_file_holds_one(run: Path, hostile: Path, cli: Callable) -> None:
    done = cli("report", str(run), str(hostile), "--no-data", "--quiet")
    assert (done.returncode, done.stdout) == (0, "")
    assert (run / "report.html").exists()
    assert (hostile / "report.html").exists()
    done = cli("report", str(run), str(hostile), "--out=page.html")
    assert done.returncode == 2
    assert "--out is one file" in done.stderr


def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, run: Path, cli: Callable, one_line: Callable
) -> None:
    done = cli("report", str(run), str(tmp_path))
    assert "isn't a run" in one_line(done, code=2)
    assert not (run / "report.html").exists()


def test_a_file_that_cannot_be_written_is_an_error(run: Path, cli: Callable, one_line: Callable) -> None:
    done = cli("report", str(run), "--out=no/such/folder.html", "--no-data")
    one_line(done, "can't write no/such/folder.html")


def test_a_run_that_has_just_begun_or_is_being_written_has_a_page(run: Path) -> None:
    for name in ("evaluation.json", "samples.safetensors", "log.txt"):
        (run / name).unlink()
    shutil.rmtree(run / "tensorboard")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "epo')
    assert "it is being trained, or was stopped" in Tags(render(read_facts(run))).text
    (run / "metrics.jsonl").unlink()
    found = Tags(render(read_facts(run)))
    assert "nothing is recorded yet" in found.text
    assert found.headings == ["Recipe", "Environment", "Make it again"]


def test_a_run_without_samples_has_the_other_sections(run: Path) -> None:
    (run / "samples.safetensors").unlink()
    found = Tags(render(read_facts(run)))
    assert {"Curves", "Metrics", "Confusion", "Accuracy by class"} <= {*found.headings}
    assert not {"Worst samples", "Calibration", "Slices"} & {*found.headings}


@pytest.mark.parametrize("name", ["evaluation.json", "samples.safetensors"])
def test_a_damaged_file_is_named_on_the_page(run: Path, name: str) -> None:
    (run / name).write_bytes(b"{")
    assert f"{name} can't be read" in Tags(render(read_facts(run))).text


def test_samples_of_another_evaluation_are_left_out(run: Path) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**found, "step": found["step"] + 1}))
    text = Tags(render(read_facts(run))).text
    assert "samples.safetensors is of another evaluation" in text
    assert "Worst samples" not in text


def test_without_the_data_the_page_says_so(run: Path, cli: Callable) -> None:
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace('name = "digits"', 'name = "image-folder"\nroot = "gone"'))
    done = cli("report", str(run))
    assert done.returncode == 0, done.stderr
    found = Tags((run / "report.html").read_text())
    assert "There are no pictures: the data can't be read" in found.text
    assert not any(tag == "img" for tag, _ in found.tags)


def test_pictures_are_left_out_of_a_page_that_would_be_too_large(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrelay.report.page.pictures import Pictures

    many = Pictures(dict.fromkeys(range(359), "data:image/jpeg;base64," + "A" * 10**5))
    write_page(read_facts(run), run / "page.html", many)
    text = (run / "page.html").read_text()
    assert len(text) < page.MOST
    assert "Pictures are left out" in text


def test_what_differs_from_the_shipped_recipe_is_what_was_set(run: Path) -> None:
    found = nearest_recipe(read_facts(run))
    assert found is not None
    name, pairs = found
    assert name == "digits"
    assert pairs["optimizer.lr"] == (0.05, 0.04)
    assert {*pairs} == {"optimizer.lr", "run.epochs", "device.name", "run.log_every"}
    command = (
        "torchrelay train digits --set run.epochs=2 --set run.log_every=5 --set device.name=cpu --set optimizer.lr=0.04"
    )
    assert command in Tags(render(read_facts(run), None, found)).text


@pytest.mark.plots
def test_the_first_batch_is_that_of_tensorboard(run: Path) -> None:
    with closing(TensorBoard(run / "tensorboard")) as board:
        board.images("pictures/another", torch.rand(4, 1, 8, 8), None, None, step=0)
        board.images("pictures/first batch", torch.zeros(4, 3, 8, 8), None, None, step=0)
    found = Tags(render(read_facts(run)))
    assert "What the network saw" in found.headings
    (source,) = (values["src"] or "" for tag, values in found.tags if tag == "img")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))))
    assert picture[20:40, 20:40].max() < 20
    assert f"torchrelay report {run} adds the pictures" in found.text


def test_a_page_without_the_data_needs_no_torch(run: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from torchrelay.report.page.facts import read_facts
from torchrelay.report.page.page import write_page
write_page(read_facts(Path({str(run)!r})), Path("page.html"))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=run, check=True)


# ------------------------------------------------------------------------------------------------ escaping


def test_names_from_data_are_text(hostile: Path) -> None:
    found = Tags(render(read_facts(hostile)))
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in values for tag, values in found.tags)
    for name in HOSTILE:
        assert name in found.text
    assert "<b>run" in found.text


def test_metrics_and_settings_are_text() -> None:
    evil = "<i onclick=alert(1)>"
    lines = [{"step": 1, "epoch": 1, "split": "train", "loss": 1.0, evil: 1.0}]
    lines.append({"step": 1, "epoch": 1, "split": evil, "loss": None})
    given = facts(lines, evaluation={"accuracy": 0.5, evil: 1.0}, notes=[evil], cost=evil)
    given.record["data"] = {"name": evil, evil: evil}
    found = Tags(render(given, None, (evil, {evil: (evil, evil)})))
    assert not any(tag == "i" and "onclick" in values for tag, values in found.tags)
    assert found.text.count(evil) > 8


# ------------------------------------------------------------------------------------------------ findings


def sure(right: list[bool], confidence: list[float], classes: int = 2) -> dict[str, Any]:
    target = np.arange(len(right)) % classes
    prediction = np.where(right, target, (target + 1) % classes)
    columns = {"target": target, "prediction": prediction, "confidence": np.array(confidence, np.float32)}
    return {"index": np.arange(len(right)), **columns}


def test_the_calibration_error_is_the_mean_distance_of_the_bins() -> None:
    right, confidence = [True] * 8 + [False] * 2 + [True] * 5 + [False] * 5, [0.9] * 10 + [0.6] * 10
    found = findings.answers(facts(samples=sure(right, confidence)))
    assert found is not None
    result = findings.calibration(found)
    assert result["error"] == pytest.approx(0.1)
    assert [row["count"] for row in result["bins"]] == [10, 10]


def test_a_slice_is_worse_where_its_interval_lies_below_all_samples() -> None:
    right = [True] * 180 + [False] * 20
    samples = sure(right, [0.9] * 200)
    given = facts(samples=samples, evaluation={"accuracy_by_class": {"a": 0.9, "b": 0.9}})
    found = findings.answers(given)
    assert found is not None
    result = findings.slices(given, found, {"brightness": np.arange(200) / 200})
    assert [each.name for each in result["worse"]] == ["brightness 0.746 to 0.995"]
    assert result["worse"][0].value == 0.6
    assert result["judged"] == 6


def test_intervals_are_wilsons_for_shares_and_normal_for_the_loss() -> None:
    samples = sure([True] * 90 + [False] * 10, [0.9] * 100) | {"loss": np.arange(100) / 50}
    given = facts(samples=samples, evaluation={"samples": 100, "accuracy": 0.9, "loss": 0.99, "other": 3.0})
    found = findings.intervals(given)
    assert found["accuracy"][:2] == pytest.approx((0.8256, 0.9448), abs=1e-4)
    assert found["loss"][:2] == pytest.approx((0.99 - 0.11372, 0.99 + 0.11372), abs=1e-4)
    assert {*found} == {"accuracy", "loss"}


def test_the_most_confused_pairs_come_first() -> None:
    matrix = [[5, 0, 1], [4, 6, 0], [0, 2, 8]]
    given = facts(evaluation={"confusion_matrix": matrix, "accuracy_by_class": {"a": 0.8, "b": 0.6, "c": 0.8}})
    pairs = [(row["true"], row["said"], row["count"]) for row in findings.confused(given)]
    assert pairs == [("b", "a", 4), ("c", "b", 2), ("a", "c", 1)]
    assert [each.samples for each in findings.by_class(given)] == [6, 10, 10]


@pytest.mark.parametrize(("column", "rows"), [("loss", [2, 0, 1]), ("mean_iou", [1, 0, 2])])
def test_the_worst_samples_have_the_highest_loss_or_the_lowest_iou(column: str, rows: list[int]) -> None:
    values = np.array([0.5, 0.1, 0.9, np.nan])
    cards = findings.worst(facts(samples={"index": np.arange(4) + 10, column: values}))
    assert [card["row"] for card in cards] == rows
    assert cards[0]["index"] == rows[0] + 10


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (np.array([[True, False, True]]), "a, c"),
        (np.array([[False] * 3]), "none"),
        (np.array([1]), "b"),
        (np.array([7]), "7"),
        (np.array([1.23456]), "1.235"),
        (np.arange(6.0)[None], "0, 1, 2, 3, …"),
    ],
)
def test_what_is_true_is_told_in_words(column: Any, text: str) -> None:
    samples = {"index": np.arange(1), "loss": np.ones(1), "target": column}
    given = facts(samples=samples, evaluation={"f1_by_label": {"a": 1, "b": 1, "c": 1}})
    assert findings.worst(given)[0]["target"] == text


# ------------------------------------------------------------------------------------------------ charts


def test_ten_thousand_lines_make_a_small_page_that_keeps_the_extremes() -> None:
    lines = [{"step": i, "epoch": 1 + i // 100, "split": "step", "loss": 1 + (i == 5000)} for i in range(1, 10_001)]
    lines += [{"step": 100 * e, "epoch": e, "split": "train", "loss": 1.5, "accuracy": 0.5} for e in range(1, 101)]
    text = render(facts(lines))
    assert len(text) < 200_000
    assert max(y for _, y in svg.thinned([(line["step"], line["loss"]) for line in lines[:10_000]])) == 2


def test_values_that_are_not_finite_leave_a_gap() -> None:
    lines = [{"step": e, "epoch": e, "split": "train", "loss": None if e > 2 else 1.0 / e} for e in range(1, 5)]
    found = Tags(render(facts(lines)))
    assert "not finite" in found.text
    assert "NaN" not in found.text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.97, 0.99, [0.97, 0.975, 0.98, 0.985, 0.99]),
        (3.0, 3.0, None),
        (0.0, 0.0, None),
    ],
)
def test_ticks_are_round_and_hold_the_values(low: float, high: float, expected: list[float] | None) -> None:
    found = svg.ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert found[0] < found[-1]
    assert expected is None or found == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------ a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start headless Chromium with a new profile and a log of its requests."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.mark.browser
@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.parametrize("which", ["run", "hostile"])
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_a_browser_opens_the_page_without_a_request_or_an_error(
    browser: Any, which: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    given = read_facts(request.getfixturevalue(which))
    path = tmp_path / "page.html"
    write_page(given, path)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("performance")
    browser.get(f"file://{path}")
    assert browser.title == given.name
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    move = """
const chart = document.querySelector("[data-curves]"), box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width * 0.9, clientY: box.top + 20}));
return chart.parentNode.querySelector(".tip:not([hidden])").innerText;
"""
    assert browser.execute_script(move).startswith("epoch ")
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in sent if each["method"] == "Network.requestWillBeSent"]
    assert f"file://{path}" in urls
    assert all(url.startswith(("file:///", "data:")) for url in urls), urls
