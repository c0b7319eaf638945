"""Small exports, real servers of them on the loopback, and clients that say exactly what they send."""

import atexit
import contextlib
import http.client
import io
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import torchrelay as tr
from torchrelay.data.sources import Parts
from torchrelay.report.export.export import Asked, Exporter
from torchrelay.run.terminal import Terminal

HOSTILE = '<img src=x onerror="document.title=1">'
COLORS = ("red", "green", HOSTILE)  # of a square; the last one's is blue
TEXT = "to be or not to be, that is the question. " * 30


def squares(count: int, size: int = 24, side: int = 8) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Gray noise with a square of a class's color; with where each is: its top and left."""
    generator = np.random.default_rng(0)
    images = generator.integers(90, 160, (count, 3, size, size), dtype=np.uint8)
    labels, places = np.arange(count) % 3, []
    for image, label in zip(images, labels, strict=True):
        top, left = (int(each) for each in generator.integers(0, size - side, 2))
        image[:, top : top + side, left : left + side] = 30
        image[label, top : top + side, left : left + side] = 250
        places.append((top, left))
    return torch.from_numpy(images), torch.from_numpy(labels), places


class Next(nn.Module):
    """Predicts the next character from the last two, with attention to nothing before."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 16), nn.Linear(32, vocabulary)

    def forward(self, tokens):
        found = self.embedding(tokens)
        before = nn.functional.pad(found, (0, 0, 1, 0))[:, :-1]
        return self.head(torch.cat([found, before], 2))


def network(name: str) -> tuple[nn.Module, Any, tr.Task, dict[str, Any]]:
    """A model with its data, its task and what its trainer is told."""
    images, labels, _ = squares(96)
    table = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    pooled = [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    classes = tr.tasks.Classification()
    text = torch.tensor([sorted({*TEXT}).index(each) for each in TEXT])
    windows = (text[:1200].view(100, 12), text[1:1201].view(100, 12))
    cases: dict[str, tuple[Any, Any, tr.Task, dict[str, Any]]] = {
        "pictures": (
            nn.Sequential(*convolutions, *pooled, nn.Linear(8, 3)),
            tr.data.arrays(images, labels, classes=COLORS),
            classes,
            {"epochs": 20},
        ),
        "cropped": (
            nn.Sequential(*convolutions, *pooled, nn.Linear(8, 3)),
            tr.data.arrays(images, labels, classes=COLORS),
            classes,
            {"prepare": [tr.augment.Resize(size=20), tr.augment.CenterCrop(size=12)]},
        ),
        "flat": (
            nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3)),
            tr.data.arrays(images, labels, classes=COLORS),
            classes,
            {},
        ),
        "floats": (
            nn.Sequential(*convolutions, *pooled, nn.Linear(8, 1)),
            (images[:, :1].repeat(1, 3, 1, 1).float() / 255, (labels > 0).float()),
            tr.tasks.Binary(),
            {},
        ),
        "masks": (
            nn.Conv2d(3, 2, 1),
            (images, (images[:, 0] > 200).long()),
            tr.tasks.Segmentation(classes=2),
            {},
        ),
        "table": (
            nn.Linear(3, 2),
            tr.data.arrays(table, (table.sum(1) > 1.5).long(), classes=("low", "high")),
            classes,
            {},
        ),
        "labels": (nn.Linear(3, 2), (table, (table[:, :2] > 0.5).float()), tr.tasks.MultiLabel(labels=2), {}),
        "values": (nn.Linear(3, 1), (table, table.sum(1, keepdim=True)), tr.tasks.Regression(), {}),
        "text": (
            Next(len({*TEXT})),
            tr.data.arrays(*windows, classes=sorted({*TEXT})),
            tr.tasks.NextToken(),
            {"epochs": 30},
        ),
    }
    return cases[name]


@cache
def export(name: str) -> Path:
    """Train a network for a moment and export it; return the folder. Beside it lies the run."""
    folder = Path(tempfile.mkdtemp(prefix="exports"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    model, data, task, more = network(name)
    more = {"epochs": 1} | more
    optimizer = tr.optim.AdamW(lr=0.02)
    tr.Trainer(
        model, data, data, run=folder / "run", task=task, optimizer=optimizer, batch_size=16,
        terminal=Terminal(quiet=True), **more,
    ).fit()  # fmt: skip
    trained = load(name, folder / "run", model, task)
    source = tr.data.as_source(data)
    Exporter(trained, Parts(source, source), name, {}, Asked(int8=name == "pictures"), lambda _: None).write(
        folder / "export"
    )
    return folder / "export"


def load(name: str, run: Path, model: nn.Module | None = None, task: tr.Task | None = None) -> Any:
    """The trained model of an export's run."""
    made, _, its_task, more = network(name)
    return tr.load(run, model=model or made, task=task or its_task, prepare=more.get("prepare"))


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        (text,) = self.json.values()
        assert list(self.json) == ["error"]
        assert "\n" not in text
        assert "Traceback" not in text
        return text


class Served:
    """A server's process.

    Args:
        process: it.
        line: what it said when it was ready.
    """

    def __init__(self, process: "subprocess.Popen[str]", line: str) -> None:
        self.process, self.line = process, line
        found = re.search(r"http://\S+?:(\d+)/", line)
        assert found is not None, line
        self.address, self.port = found[0], int(found[1])

    def ask(
        self, path: str = "/predict", body: bytes | None = None, method: str | None = None, **headers: str
    ) -> Answer:
        """Send a request; underlines in the names of headers stand for dashes."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(client):
            client.request(method or ("GET" if body is None else "POST"), path, body, named)
            got = client.getresponse()
            return Answer(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())

    def picture(self, content: bytes, query: str = "") -> Answer:
        """Send a picture's bytes."""
        return self.ask(f"/predict{query}", content, Content_Type="application/octet-stream")

    def json(self, value: Any, query: str = "") -> Answer:
        """Send JSON."""
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.ask(f"/predict{query}", body, Content_Type="application/json")

    def raw(self, *parts: bytes, pause: float = 0.0, end: bool = False) -> Answer:
        """Send bytes as they are, and read until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=40) as client:
            for part in parts:
                with contextlib.suppress(ConnectionError):
                    client.sendall(part)
                select_wait(client, pause)
            if end:
                client.shutdown(socket.SHUT_WR)
            return parsed(read_all(client))

    def lives(self) -> bool:
        """Whether it still answers."""
        return self.process.poll() is None and self.ask("/health").json["status"] == "ok"

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal, wait, and return the exit code with what was printed since."""
        self.process.send_signal(number)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        out, errors = self.process.stdout.read(), self.process.stderr.read()  # the rest of what has been read in part
        return self.process.wait(20), out, errors


def select_wait(client: socket.socket, seconds: float) -> None:
    """Wait, but no longer than until the server says something."""
    select.select([client], [], [], seconds)


def read_all(client: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(2**16):
            found += data
    return found


def parsed(data: bytes) -> Answer:
    """The first answer in what a server sent."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    assert first.startswith("HTTP/1.1 "), data[:200]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(int(first.split()[1]), headers, body[: int(headers["content-length"])])


@contextlib.contextmanager
def running(folder: Path, *options: str, port: int | None = 0) -> Iterator[Served]:
    """A server of an export, which is killed at the end if it still runs."""
    command = [sys.executable, "-m", "torchrelay", "serve", str(folder), *options]
    command += [] if port is None else ["--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise AssertionError(process.communicate()[1])
        yield Served(process, line)
    finally:
        process.kill()
        process.communicate()


def encoded(pixels: Any, form: str = "PNG", **options: Any) -> bytes:
    """An image's file: (height, width, …) or (channels, height, width) as a tensor."""
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.movedim(0, -1).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def multipart(*files: tuple[str, bytes], boundary: str = "edge") -> tuple[bytes, str]:
    """A form with files, and its type."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
