"""Take the picture of the page that `torchrelay serve` shows.

    python -m tools.page_picture [--out docs/pictures/serve.png]

trains a small network on scikit-learn's digits, exports and serves it, and answers three test pictures in headless
Chromium, which has to be installed with its driver.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 860, 1400  # pixels of the page; the picture has twice as many
SAMPLES = (6, 4)  # the test pictures that are answered, the last one on top


def prepare(folder: Path) -> Path:
    """Return a new export of a small network."""
    sets = ("model.name=small-cnn", "run.epochs=15", "data.validation=0.1", "device.name=cpu")
    options = [word for each in sets for word in ("--set", each)]
    for command in (
        ["train", "digits", "--run", "digits", *options],
        ["export", "digits", "--out", "digits-export", "--no-int8"],
    ):
        subprocess.run(
            [sys.executable, "-m", "torchrelay", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    return folder / "digits-export"


def photograph(address: str, path: Path) -> None:
    """Answer some pictures on the page, and take its picture."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"):
        options.add_argument(flag)
    browser: Any = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 2, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(address)
        for count, sample in enumerate(SAMPLES, 1):
            end = time.monotonic() + 30
            while len(browser.find_elements("css selector", ".card .row")) < 8 * (
                count - 1
            ) or not browser.find_elements("css selector", f".samples button:nth-child({sample + 1})"):
                if time.monotonic() > end:
                    raise SystemExit(f"the page doesn't answer: {browser.find_element('tag name', 'body').text}")
                time.sleep(0.1)
            browser.find_element("css selector", f".samples button:nth-child({sample + 1})").click()
        time.sleep(2)
        browser.save_screenshot(str(path))
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/serve.png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        export = prepare(Path(folder))
        command = [sys.executable, "-m", "torchrelay", "serve", str(export), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                found = re.search(r"http://\S+", process.stdout.readline() if process.stdout else "")
                if found is None:
                    raise SystemExit("the server didn't start")
                photograph(found[0].rstrip(";"), options.out)
            finally:
                process.terminate()


if __name__ == "__main__":
    main()
