"""What a request to `torchrelay serve` costs on the loopback, beside onnxruntime in the process itself.

    python -m benchmarks.speed.serving EXPORT PICTURE [--seconds 6]

An export of a network of images, and a picture file. Clients keep their connections, as browsers do, and run in a
process of their own.
"""

import argparse
import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.measure import machine
from benchmarks.page import markdown

CLIENTS = 4


@contextmanager
def server(export: Path) -> Iterator[int]:
    """Serve an export, and give the port."""
    command = [sys.executable, "-m", "torchrelay", "serve", str(export), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        found = re.search(r":(\d+)/", process.stdout.readline() if process.stdout else "")
        if found is None:
            raise SystemExit("the server didn't start")
        try:
            yield int(found[1])
        finally:
            process.terminate()


def repeated(call: Callable[[], object], seconds: float) -> list[float]:
    """Return how long each call took, after ten that warm up."""
    for _ in range(10):
        call()
    found, end = list[float](), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        found.append(time.perf_counter() - start)
    return found


def client(port: int, query: str, content: bytes) -> Callable[[], object]:
    """Return what sends a picture and reads the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call() -> object:
        connection.request("POST", f"/predict{query}", content, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(body.decode())
        return body

    return call


def in_process(export: Path, content: bytes) -> Callable[[], object]:
    """Return what decodes a picture and answers it without a server."""
    from torchrelay.report.serve.answers import Answers

    answers = Answers(export, 64 * 10**6, heat=False)
    return lambda: answers.answer(answers.inputs.of_files([("", content)]), 5)


def row(name: str, seconds: list[float], clients: int = 1, wall: float | None = None) -> tuple[str, ...]:
    """Return a line of the table."""
    p50, p95 = np.percentile(seconds, [50, 95]) * 1000
    rate = len(seconds) / (wall or sum(seconds))
    return name, str(clients), f"{p50:.2f}", f"{p95:.2f}", f"{rate:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    options = parser.parse_args()
    content = options.picture.read_bytes()
    rows = [
        row("decoding and onnxruntime in the process", repeated(in_process(options.export, content), options.seconds))
    ]
    with server(options.export) as port:
        rows.append(row("a request", repeated(client(port, "", content), options.seconds)))
        rows.append(row("a request with a heat map", repeated(client(port, "?heatmap=1", content), options.seconds)))
        found = list[list[float]]()
        threads = [
            threading.Thread(target=lambda: found.append(repeated(client(port, "", content), options.seconds)))
            for _ in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows.append(row("requests", [each for part in found for each in part], CLIENTS, options.seconds))
    print(machine())
    print(markdown(("", "clients", "p50, ms", "p95, ms", "a second"), rows))


if __name__ == "__main__":
    main()
