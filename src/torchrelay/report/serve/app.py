"""What is served: the page, `/predict`, `/model`, `/samples` and `/health`; and who may ask for it."""

import asyncio
import io
import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from PIL import Image

from torchrelay.errors import nearest
from torchrelay.report.export.formats import needed
from torchrelay.report.serve.answers import Answers
from torchrelay.report.serve.http import Limits, RefusedError, Request, Response
from torchrelay.report.serve.inputs import Batch

_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_JSON = "application/json"
_HEADERS = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)
_WORKERS = 4  # requests that are computed at once, at most
_TOP = 5
_SEND = "send a picture's bytes with its type (image/jpeg), multipart/form-data or application/json"


class App:
    """Answers requests by an export.

    Args:
        answers: the export.
        limits: what a client may take up.
        names: by which browsers may call this machine, beside its addresses and "localhost".
        debug: show the traceback of an error of ours.
    """

    def __init__(self, answers: Answers, limits: Limits, names: Collection[str] = (), *, debug: bool = False) -> None:
        self._answers, self._limits, self._debug = answers, limits, debug
        own = socket.gethostname().lower()
        self._names = {"localhost", own, f"{own}.local", *(name.lower() for name in names)}
        self._pool = ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1))
        here = files(__package__)
        self._files = {path: (here.joinpath(name).read_bytes(), kind) for path, (name, kind) in _FILES.items()}
        self._since, self._answered, self._refused = time.monotonic(), 0, 0

    def close(self) -> None:
        """Let go of the threads, without waiting for what they compute."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------- who may ask

    def check(self, request: Request) -> None:
        """Refuse what a page of somebody else's sends, before its body is read.

        A page that has its name resolve to this machine's address (DNS rebinding) sends that name as Host; a form or a
        script of another page sends its Origin.

        Raises:
            RefusedError: it does.
        """
        host = request.headers["host"]
        if not self._is_ours(host):
            raise RefusedError(421, f"this server isn't {host[:80]!a}: use its address, or allow the name by --name")
        origin = request.headers.get("origin")
        if request.method not in ("GET", "HEAD") and origin is not None and _place(origin) != host.lower():
            raise RefusedError(403, f"a page of {origin[:80]!a} may not ask this server")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return name.rstrip(".") in self._names
        return True

    # -------------------------------------------------------------------------------------------- what is asked

    async def handle(self, request: Request) -> Response:
        """Answer a request.

        Raises:
            RefusedError: it asks for what there isn't, or sends what isn't accepted.
        """
        try:
            return await self._routed(request)
        except RefusedError:
            raise
        except Exception as error:
            if self._debug:
                raise
            print(f"error: {type(error).__name__}: {str(error)[:300]!a}; --debug shows the traceback", file=sys.stderr)
            raise RefusedError(500, "the server has a defect: its terminal says which") from error

    def refuse(self, error: RefusedError) -> Response:
        """Return the answer that says why there is none."""
        self._refused += 1
        headers = (*_HEADERS, *error.headers)
        return Response(error.status, _encoded({"error": str(error)}), _JSON, headers)

    async def _routed(self, request: Request) -> Response:
        path, _, query = request.target.partition("?")
        if path == "/predict":
            _allow(request, "POST")
            found = await asyncio.get_running_loop().run_in_executor(self._pool, self._predict, request, query)
            self._answered += 1
            return _json(found)
        routes: dict[str, Callable[[], Any]] = {
            "/health": self._health,
            "/model": self._model,
            "/samples": self._samples,
        }
        picture = path.removeprefix("/samples/").removesuffix(".png")
        if path in self._files:
            _allow(request, "GET", "HEAD")
            return Response(200, *self._files[path], _HEADERS)
        if path in routes:
            _allow(request, "GET", "HEAD")
            return _json(routes[path]())
        if path == f"/samples/{picture}.png" and picture in map(str, range(self._pictures())):
            _allow(request, "GET", "HEAD")
            return Response(200, _png(self._answers.samples[int(picture)]), "image/png", _HEADERS)
        known = ["/predict", *routes, *self._files]
        raise RefusedError(404, f"there is nothing at {path[:80]!a}{nearest(path[:80], known)}")

    def _predict(self, request: Request, query: str) -> dict[str, Any]:
        """Answer by the network, in a thread of its own."""
        start = time.perf_counter()
        top, about, heat = _options(query)
        found = self._answers.answer(self._batch(request), top, about, heat)
        milliseconds = round(1000 * (time.perf_counter() - start), 2)
        return {"model": self._answers.card["name"], "answers": found, "milliseconds": milliseconds}

    def _batch(self, request: Request) -> Batch:
        kind, options = needed("werkzeug.http").parse_options_header(request.headers.get("content-type", ""))
        inputs = self._answers.inputs
        if kind == _JSON:
            return inputs.of_json(request.body)
        if kind == "multipart/form-data":
            if not options.get("boundary"):
                raise RefusedError(400, "the form names no boundary: let your client set the Content-Type")
            return inputs.of_multipart(request.body, options["boundary"])
        if kind.startswith("image/") or kind in ("application/octet-stream", ""):
            if not request.body:
                raise RefusedError(400, f"the request is empty: {_SEND}")
            return inputs.of_files([("", request.body)])
        raise RefusedError(415, f"{kind[:80]!a} isn't accepted: {_SEND}")

    # -------------------------------------------------------------------------------------------- what it is

    def _health(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self._since, 1)
        return {"status": "ok", "answered": self._answered, "refused": self._refused, "seconds": seconds}

    def _model(self) -> dict[str, Any]:
        answers, inputs = self._answers, self._answers.inputs
        return answers.card | {
            "engine": answers.engine,
            "heatmaps": not answers.no_heat,
            "no_heatmaps": answers.no_heat,
            "takes": [name for name, yes in (("images", inputs.takes_images), ("text", inputs.takes_text)) if yes]
            + ["inputs"],
            "limits": {
                "bytes": self._limits.size,
                "pixels": inputs.pixels,
                "samples": inputs.most,
                "seconds": self._limits.seconds,
            },
            "samples": len(answers.samples),
        }

    def _samples(self) -> dict[str, Any]:
        if self._answers.inputs.takes_images:
            return {"pictures": [f"/samples/{i}.png" for i in range(self._pictures())]}
        return {"inputs": self._answers.samples.tolist()}

    def _pictures(self) -> int:
        return len(self._answers.samples) if self._answers.inputs.takes_images else 0


def _place(origin: str) -> str:
    """Return the host and port of an origin; "" if it has none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _allow(request: Request, *methods: str) -> None:
    if request.method not in methods:
        allowed = ", ".join(methods)
        raise RefusedError(405, f"{request.method[:20]!a} isn't allowed here, {allowed} is", (("Allow", allowed),))


def _options(query: str) -> tuple[int, str | None, bool]:
    """Return how many classes are named, which one is explained, and whether one is.

    Raises:
        RefusedError: the query asks something else.
    """
    try:
        found = parse_qs(query, keep_blank_values=True, strict_parsing=bool(query), max_num_fields=8, errors="strict")
    except ValueError as error:
        raise RefusedError(400, f"the query can't be parsed: {str(error)[:100]}") from error
    known = ["top", "class", "heatmap"]
    for name in found:
        if name not in known:
            raise RefusedError(
                400, f"there is no option {name[:80]!a}{nearest(name[:80], known) or ': ' + ', '.join(known)}"
            )
    top = found.get("top", [str(_TOP)])[-1]
    if not top.isascii() or not top.isdecimal() or not 1 <= int(top[:9]) <= 10**6:
        raise RefusedError(400, f"top must be a whole number from 1, not {top[:80]!a}")
    heat = found.get("heatmap", ["0"])[-1]
    if heat not in ("0", "1"):
        raise RefusedError(400, f"heatmap must be 0 or 1, not {heat[:80]!a}")
    return int(top), found.get("class", [None])[-1], heat == "1"


def _encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def _json(value: Any) -> Response:
    return Response(200, _encoded(value), _JSON, _HEADERS)


def _png(image: torch.Tensor) -> bytes:
    """Return an image (channels, height, width) as PNG, whose pixels are the image's own."""
    pixels = image if image.dtype == torch.uint8 else (image * 255).round().clamp(0, 255).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.movedim(0, -1).squeeze(-1).numpy())).save(buffer, "PNG")
    return buffer.getvalue()
