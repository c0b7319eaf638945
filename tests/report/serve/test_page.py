"""The own page in a real browser: pictures, heat maps, errors in words, a phone's width, the keyboard."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import COLORS, HOSTILE, Served, encoded, export, running, squares

pytestmark = [pytest.mark.browser, pytest.mark.ci, pytest.mark.slow]

IMAGES, LABELS, PLACES = squares(96)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running(export("pictures"), "--max-mb", "1") as own:
        yield own


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
        *("--window-size=1200,1600", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield opened
    finally:
        opened.quit()


@pytest.fixture
def page(browser: Any, served: Served) -> Iterator[Any]:
    """The page of pictures; nothing on it may break its own policy or come from elsewhere."""
    browser.get_log("browser")
    open_page(browser, served.address)
    yield browser
    said = [line["message"] for line in browser.get_log("browser")]
    assert not [line for line in said if "Content Security Policy" in line or "Uncaught" in line], said
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert not [name for name in loaded if not name.startswith((served.address, "blob:", "data:"))], loaded


def open_page(browser: Any, address: str, width: int = 1200, dark: bool = False, touch: bool = False) -> None:
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": touch}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
    browser.get(address)
    until(browser, lambda: browser.find_element("id", "about").text != "Loading…")


def until(browser: Any, condition: Callable[[], Any], seconds: float = 20) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(lambda _: condition())


def files(folder: Path, count: int = 3) -> list[str]:
    for i, image in enumerate(IMAGES[:count]):
        (folder / f"{i}.png").write_bytes(encoded(image))
    return [str(folder / f"{i}.png") for i in range(count)]


def choose(page: Any, *paths: str) -> list[Any]:
    """Choose files; return their cards in their order once they are answered."""
    page.find_element("id", "file").send_keys("\n".join(paths))
    return answered(page, len(paths))


def answered(page: Any, count: int) -> list[Any]:
    until(page, lambda: len(page.find_elements("css selector", ".card")) == count and not waiting(page))
    return page.find_elements("css selector", ".card")[::-1]


def waiting(page: Any) -> list[Any]:
    return page.find_elements("css selector", ".wait")


def texts(card: Any, css: str) -> list[str]:
    return [each.text for each in card.find_elements("css selector", css)]


def canvas(page: Any, card: Any) -> np.ndarray:
    """The brightness of a card's heat map."""
    script = """
    const drawn = arguments[0].querySelector("canvas");
    const {data} = drawn.getContext("2d").getImageData(0, 0, drawn.width, drawn.height);
    return [Array.from(data).filter((_, i) => i % 4 == 0), drawn.width];
    """
    values, width = page.execute_script(script, card)
    return np.array(values).reshape(-1, width)


# ------------------------------------------------------------------------------------------------ pictures


def test_pictures_get_their_classes_as_the_endpoint_gives_them(page: Any, served: Served, tmp_path: Path) -> None:
    for card, image, name in zip(choose(page, *files(tmp_path)), IMAGES, ("0.png", "1.png", "2.png"), strict=False):
        (expected,) = served.picture(encoded(image)).json["answers"]
        assert texts(card, "h3") == [name]
        assert texts(card, ".row span") == [row["class"] for row in expected["top"]]
        shown = [float(text.strip("<>%")) / 100 for text in texts(card, ".row b")]
        assert np.allclose(shown, [row["probability"] for row in expected["top"]], atol=1.1e-3)
        assert texts(card, ".verdict")[0].startswith(f"{expected['class']}, ")
        widths = [bar.size["width"] for bar in card.find_elements("css selector", ".row i")]
        assert widths == sorted(widths, reverse=True)
    assert page.find_element("id", "about").text.startswith("Sequential, ")
    assert "accuracy" in page.find_element("id", "about").text


def test_a_class_that_is_called_like_a_tag_is_a_text(page: Any, tmp_path: Path) -> None:
    card = choose(page, *files(tmp_path, 3))[2]
    assert texts(card, ".verdict")[0].startswith(HOSTILE)
    assert page.title == "pictures"
    assert not page.find_elements("css selector", "img[src=x]")


def test_the_heat_map_is_bright_where_the_square_is_and_can_be_switched_off(page: Any, tmp_path: Path) -> None:
    for card, (top, left) in zip(choose(page, *files(tmp_path)), PLACES, strict=False):
        bright = canvas(page, card)
        row, column = (
            at * 24 / size
            for at, size in zip(np.unravel_index(bright.argmax(), bright.shape), bright.shape, strict=True)
        )
        assert top - 2 <= row < top + 10
        assert left - 2 <= column < left + 10
        box, picture = (card.find_element("css selector", css).rect for css in (".box", "img"))
        assert box == pytest.approx(picture, abs=1)
        said = card.find_element("css selector", "canvas").get_attribute("aria-label")
        assert said.startswith("Heat map. What speaks for ")
    switch = page.find_element("id", "heat")
    assert all(box.is_displayed() for box in page.find_elements("css selector", ".box"))
    switch.click()
    assert not any(box.is_displayed() for box in page.find_elements("css selector", ".box"))


def test_another_class_is_explained_when_it_is_chosen(page: Any, tmp_path: Path) -> None:
    (card,) = choose(page, *files(tmp_path, 1))
    before = canvas(page, card)
    rows = card.find_elements("css selector", ".row")
    assert [row.get_attribute("aria-pressed") for row in rows] == ["true", "false", "false"]
    name = texts(rows[1], "span")[0]
    rows[1].click()
    until(page, lambda: f"What speaks for {name} is" in card.text)
    assert [row.get_attribute("aria-pressed") for row in card.find_elements("css selector", ".row")] == [
        "false",
        "true",
        "false",
    ]
    assert not np.array_equal(before, canvas(page, card))
    assert texts(card, ".verdict")[0].startswith("red, ")


def test_test_pictures_and_pasted_and_dropped_ones_are_answered(page: Any) -> None:
    until(page, lambda: len(page.find_elements("css selector", ".samples button")) == 8)
    page.find_element("css selector", ".samples button:nth-child(2)").click()
    (card,) = answered(page, 1)
    second = LABELS[np.linspace(0, 95, 16).astype(int)[1]]  # of the export's golden samples
    assert (texts(card, "h3"), texts(card, ".verdict")[0].split(",")[0]) == (["test picture 2"], COLORS[second])
    made = """
    const bytes = Uint8Array.from(arguments[0]);
    const data = new DataTransfer();
    data.items.add(new File([bytes], arguments[1] + ".png", {type: "image/png"}));
    document.dispatchEvent(arguments[1] === "paste"
      ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
      : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    """
    for count, name in ((2, "paste"), (3, "drop")):
        page.execute_script(made, [*encoded(IMAGES[0])], name)
        assert texts(answered(page, count)[-1], "h3") == [f"{name}.png"]
    page.find_element("id", "clear").click()
    assert not page.find_elements("css selector", ".card")


def test_errors_are_said_in_words(page: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(encoded(IMAGES[0])[:900])
    (tmp_path / "large.png").write_bytes(bytes(1_100_000))
    cards = choose(page, *(str(tmp_path / name) for name in ("notes.png", "cut.png", "large.png")))
    said = [texts(card, ".verdict")[0] for card in cards]
    assert said[0] == "The picture isn't an image that is read: send JPEG, PNG, WebP or TIFF."
    assert said[1].startswith("The picture can't be read as an image: ")
    assert said[2] == "The file is larger than 1 MB, the most that is accepted."
    assert all("error" in card.get_attribute("class") for card in cards)
    assert any(text in page.find_element("id", "status").get_attribute("textContent") for text in said)


def test_a_server_that_has_gone_is_said(browser: Any, tmp_path: Path) -> None:
    with running(export("pictures"), "--no-heatmap") as own:
        open_page(browser, own.address)
        assert "No heat maps: heat maps were switched off." in browser.find_element("id", "calibrated").text
        assert not browser.find_element("id", "switch").is_displayed()
        own.end()
        (card,) = choose(browser, *files(tmp_path, 1))
        assert texts(card, ".verdict") == ["The server doesn't answer. Is it still running?"]


def test_without_scripts_a_picture_is_sent_by_the_form(browser: Any, served: Served, tmp_path: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(served.address)
        browser.find_element("id", "file").send_keys(*files(tmp_path, 1))
        browser.find_element("css selector", "noscript button").click()
        assert '"class":"red"' in until(browser, lambda: browser.find_element("tag name", "pre").text)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


# ------------------------------------------------------------------------------------------------ widths and keys


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_nothing_is_wider_than_the_screen(page: Any, served: Served, tmp_path: Path, width: int) -> None:
    open_page(page, served.address, width, touch=width < 600)
    choose(page, *files(tmp_path))
    assert page.execute_script("return document.documentElement.scrollWidth") == width
    photo = page.find_element("css selector", "label.camera")
    assert photo.is_displayed() == (width < 600)
    if width < 600:
        for each in page.find_elements("css selector", "button:not([hidden]), label.button, .switch"):
            if each.is_displayed():
                assert each.size["height"] >= 44, each.text
    assert page.save_screenshot(str(tmp_path / f"{width}.png"))


def test_it_is_dark_where_the_system_is(page: Any, served: Served) -> None:
    shades = {}
    for dark in (False, True):
        open_page(page, served.address, dark=dark)
        color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        shades[dark] = json.loads(color.removeprefix("rgb").replace("(", "[").replace(")", "]"))
    assert min(shades[False]) > 240
    assert max(shades[True]) < 40


def test_the_keyboard_reaches_everything(page: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    choose(page, *files(tmp_path, 1))
    page.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(24):
        ActionChains(page).send_keys("\ue004").perform()  # the tabulator
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("class") or active.tag_name)
        if reached[-1] == "heat":
            active.send_keys(" ")
            assert not page.find_element("css selector", ".box").is_displayed()
    assert {"skip", "file", "heat", "clear", "row", "summary"} <= set(reached)
    assert reached.count("row") == len(COLORS)


# ------------------------------------------------------------------------------------------------ other networks


def test_a_table_is_answered_from_a_form(browser: Any) -> None:
    with running(export("table")) as own:
        open_page(browser, own.address)
        assert browser.find_element("css selector", "label[for=values]").text == "3 numbers"
        field, button = browser.find_element("id", "values"), browser.find_element("css selector", "#numbers .main")
        field.send_keys("0.9, 0.8 1\n0.1;0.2 0.1")
        button.click()
        first, second = answered(browser, 2)
        assert (texts(first, "h3"), texts(second, "h3")) == (["Row 1"], ["Row 2"])
        expected = own.json({"inputs": [[0.9, 0.8, 1], [0.1, 0.2, 0.1]]}).json["answers"]
        assert [texts(card, ".verdict")[0].split(",")[0] for card in (first, second)] == [
            row["class"] for row in expected
        ]
        for wrong, words in (
            ("1 2", "A line needs 3 numbers, and one has 2."),
            ("a b c", '"a" is no number.'),
            (" ", "nothing to answer"),
        ):
            field.clear()
            field.send_keys(wrong)
            button.click()
            assert words in until(browser, lambda: browser.find_element("id", "problem").text)
        browser.find_element("id", "example").click()
        answered(browser, 3)


def test_a_text_goes_on_with_the_chosen_character(browser: Any) -> None:
    with running(export("text")) as own:
        open_page(browser, own.address)
        browser.find_element("id", "values").send_keys("not to b")
        browser.find_element("css selector", "#numbers .main").click()
        (card,) = answered(browser, 1)
        assert texts(card, ".verdict")[0].startswith("e, ")
        card.find_element("css selector", ".row").click()
        answered(browser, 2)
        assert browser.find_element("id", "values").get_attribute("value") == "not to be"


def test_a_segmentation_is_drawn_over_the_picture(browser: Any, tmp_path: Path) -> None:
    with running(export("masks")) as own:
        open_page(browser, own.address)
        (card,) = choose(browser, *files(tmp_path, 1))
        mask = np.array(own.picture(encoded(IMAGES[0])).json["answers"][0]["predictions"])
        assert len(np.unique(canvas(browser, card))) == len(np.unique(mask))
        assert "of the picture" in texts(card, ".verdict")[0]
