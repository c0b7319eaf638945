"""Write the SHA-256 of the file that pip would install for each package of a complete environment, as requirements.

    python -m tools.hashes --extra dev --out constraints-hashes.txt

pip resolves `torchrelay[EXTRA]` under `constraints.txt` and reports the files without installing them, so the list has
all dependencies of dependencies, which `pip install --require-hashes` asks for. It holds for this platform, this Python
and the index that pip is set up with: torch's files for CUDA, for ROCm and for the CPU differ, though their versions
look alike. No index's address is written.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def report(extra: str) -> dict[str, Any]:
    """Return pip's report of what it would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), f"{ROOT}[{extra}]"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def requirements(found: dict[str, Any]) -> str:
    """Return the packages of a report with the hashes of their files; torchrelay itself is left out."""
    lines = []
    for each in sorted(found["install"], key=lambda each: each["metadata"]["name"].lower()):
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        if (archive := each["download_info"].get("archive_info")) is not None:
            lines.append(f"{name}=={version} --hash=sha256:{archive['hashes']['sha256']}")
    environment = found["environment"]
    head = (
        f"# The files for Python {environment['python_version']} on {environment['sys_platform']}, "
        f"{environment['platform_machine']}; made by `python -m tools.hashes`.\n"
        "# pip install --require-hashes -r constraints-hashes.txt && pip install --no-deps torchrelay\n"
    )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", default="dev", help="the extra whose packages are listed (dev)")
    parser.add_argument("--out", type=Path, help="where to write the list")
    options = parser.parse_args()
    text = requirements(report(options.extra))
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
