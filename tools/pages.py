"""Take the pictures of pages that the documentation shows: a run's report and a check's findings, both of `digits`.

    python -m tools.pages [--out docs/pictures]

trains `digits`, writes both pages and opens them in a headless Chromium, which has to be installed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTH = 1100  # pixels
HEIGHTS = {"report": 1340, "check": 720}  # pixels from the top that are shown


def torchrelay(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "torchrelay", *words], check=True)


def picture(page: Path, out: Path, height: int) -> None:
    """Write the first `height` pixels of a page as a PNG file."""
    switches = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking")
    with tempfile.TemporaryDirectory() as profile:
        more = (f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}", f"--screenshot={out.resolve()}")
        subprocess.run(["chromium", *switches, *more, page.resolve().as_uri()], check=True, capture_output=True)


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, check = Path(folder, "first"), Path(folder, "check.html")
        torchrelay("train", "digits", "--run", str(run), "--quiet")
        torchrelay("report", str(run))
        torchrelay("check", "digits", "--out", str(check))
        for name, page in {"report": run / "report.html", "check": check}.items():
            picture(page, options.out / f"{name}.png", HEIGHTS[name])


if __name__ == "__main__":
    main()
