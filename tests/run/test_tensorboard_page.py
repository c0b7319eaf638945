"""TensorBoard on a run: a real server, a real browser, and what it shows."""

import io
import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchrelay.report.confusion import confusion_matrix
from torchrelay.run.trackers import TensorBoard

pytestmark = [pytest.mark.browser, pytest.mark.ci, pytest.mark.slow]

Pixels = np.ndarray[Any, np.dtype[np.int64]]  # (height, width, 3)

# TensorBoard's page is made of nested components, some of which hide their parts in shadow roots.
FIND = """
const found = [];
const search = (root) => {
  for (const element of root.querySelectorAll("*")) {
    if (element.matches(arguments[0])) found.push(element);
    if (element.shadowRoot) search(element.shadowRoot);
  }
};
search(document);
return found;
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the events of a short training on scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    digits = torch.tensor(data.images[:64], dtype=torch.float32)[:, None] / 16  # (64, 1, 8, 8)
    mean, std = float(digits.mean()), float(digits.std())
    folder = tmp_path_factory.mktemp("runs") / "digits"
    board = TensorBoard(folder / "tensorboard")
    board.images("pictures/a batch", (digits - mean) / std, (mean,), (std,), step=0)
    for epoch in range(1, 11):
        place = {"step": 100 * epoch, "epoch": epoch, "time": 1.7e9 + epoch}
        for split, speed in (("train", 0.4), ("validation", 0.35), ("test", 0.3)):
            left = math.exp(-speed * epoch)
            board.write({**place, "split": split, "loss": 2.3 * left, "accuracy": 1 - 0.9 * left})
    board.figure(
        "pictures/confusion matrix", confusion_matrix(10 * torch.eye(10).long(), [str(c) for c in range(10)]), step=1000
    )
    board.hyperparameters({"optimizer.lr": 0.1, "run.epochs": 10})
    board.close()
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Serve the run's parent folder, as `tensorboard --logdir runs` does, and return the page's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = run.parent / "server.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent), "--host", "127.0.0.1"]
    with log.open("w") as output:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(
            lambda: "digits/tensorboard/test" in fetch(f"http://127.0.0.1:{port}/data/runs"), log.read_text, seconds=30
        )
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start headless Chromium with a new profile."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--window-size=1400,2200", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(flag)
    # With the driver's path given, selenium looks for nothing and downloads nothing.
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


def fetch(url: str) -> Any:
    try:
        # An opener of its own: urllib keeps the first one it made, with the proxies that were set then.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return json.load(answer)
    except urllib.error.URLError:
        return []


def wait_for(condition: Callable[[], Any], explain: Callable[[], str], seconds: float = 60) -> Any:
    """Return the condition's value once it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, explain()
        time.sleep(0.2)
    return value


def open_page(browser: Any, address: str, name: str) -> Callable[[str], list[Any]]:
    """Open one of TensorBoard's pages; return a function that finds elements by CSS, inside shadow roots too."""
    browser.get(f"{address}#{name}")
    return lambda css: browser.execute_script(FIND, css)


def seen(browser: Any) -> str:
    """Return the page's text, for failure messages."""
    return f"not on the page, which says: {browser.find_element('tag name', 'body').text}"


def pixels(png: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int64)


def keep(browser: Any, path: Path) -> None:
    """Save a screenshot, and assert that it isn't blank."""
    assert browser.save_screenshot(str(path))
    assert len(np.unique(pixels(path.read_bytes()) @ [1, 256, 65536])) > 50


def curve(chart: Any) -> Pixels:
    """Return the (column, row) of a chart's colored pixels, which are its curve: axes and grid are gray."""
    picture = pixels(chart.screenshot_as_png)
    rows, columns = np.nonzero(picture.max(axis=2) - picture.min(axis=2) > 25)
    return np.stack([columns, rows], axis=1)


def is_drawn(chart: Any) -> bool:
    """Return whether a curve covers most of a chart's columns."""
    return len(np.unique(curve(chart)[:, 0])) > 0.6 * int(chart.size["width"])


def test_the_charts_of_a_run_are_drawn(browser: Any, address: str, tmp_path: Path) -> None:
    find = open_page(browser, address, "timeseries")
    wait_for(lambda: len(find("scalar-card line-chart canvas")) >= 2, lambda: seen(browser))
    titles = [tag.get_attribute("title") for tag in find("scalar-card .tag")]
    assert titles == ["accuracy", "loss"]
    for title, canvas in zip(titles, find("scalar-card line-chart canvas"), strict=True):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
        wait_for(lambda canvas=canvas: is_drawn(canvas), lambda: f"the chart of {title} has no curve")  # noqa: B023
        line, height = curve(canvas), canvas.size["height"]
        middle = line[:, 0].mean()
        rise = line[line[:, 0] < middle, 1].mean() - line[line[:, 0] > middle, 1].mean()  # rows count downwards
        assert (rise if title.startswith("accuracy") else -rise) > height / 10, title
    keep(browser, tmp_path / "timeseries.png")


def test_the_first_batch_and_the_confusion_matrix_are_shown(browser: Any, address: str, tmp_path: Path) -> None:
    find = open_page(browser, address, "images")

    def loaded() -> list[Any]:
        images = find("img")
        widths = [browser.execute_script("return arguments[0].naturalWidth", image) for image in images]
        return images if len(images) == 2 and all(widths) else []

    images = wait_for(loaded, lambda: seen(browser))
    said = " ".join(loader.text for loader in find("tf-image-loader"))
    assert "pictures/a batch" in said
    assert "pictures/confusion matrix" in said
    sizes = [browser.execute_script("return arguments[0].naturalWidth", image) for image in images]
    assert 1056 in sizes  # eight digits of 128 pixels side by side, each in a frame
    for image in images:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        shades = pixels(image.screenshot_as_png).mean(axis=2)
        assert shades.max() > 230
        assert shades.min() < 60
        assert shades.std() > 20
    keep(browser, tmp_path / "images.png")


def test_the_hparams_table_shows_settings_and_results(browser: Any, address: str, run: Path, tmp_path: Path) -> None:
    find = open_page(browser, address, "hparams")

    def cells() -> list[str]:
        found = [cell.text.strip() for cell in find("vaadin-grid-cell-content")]
        return found if f"digits ({run.parent})" in found and "0.10000" in found else []

    shown = wait_for(cells, lambda: seen(browser))
    assert {"optimizer.lr", "run.epochs", "test.accuracy", "validation.accuracy", "10.000"} <= set(shown)
    keep(browser, tmp_path / "hparams.png")
