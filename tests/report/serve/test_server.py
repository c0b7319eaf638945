"""A real server and its clients: it answers as the run predicts, refuses what is hostile, and lives on."""

import base64
import contextlib
import io
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from serving import COLORS, Served, encoded, export, load, multipart, running, squares
from torchrelay.data.folder import decode_images
from torchrelay.report.export.folder import write_sums

# They take half a minute: imports of the exporters, traces, servers.
pytestmark = [pytest.mark.ci, pytest.mark.slow]

IMAGES, LABELS, PLACES = squares(96)
RANDOM = np.random.default_rng(0)
PHOTO = RANDOM.integers(0, 256, (37, 61, 3), dtype=np.uint8)
PICTURE = encoded(IMAGES[0])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with running(export("pictures"), "--max-mb", "1", "--max-megapixels", "2") as own:
        yield own
        assert own.lives()
        code, out, errors = own.end(signal.SIGTERM)
        assert (code, out, errors) == (0, "", "")


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(export("pictures") / "model.onnx")


def probabilities(answer: dict) -> np.ndarray:
    """An answer's probabilities in the order of the classes."""
    found = {row["class"]: row["probability"] for row in answer["top"]}
    return np.array([found[name] for name in COLORS], np.float32)


# ------------------------------------------------------------------------------------------------ answers


def test_a_picture_of_the_networks_size_is_answered_as_by_onnxruntime_to_the_last_bit(served, session):
    for image in IMAGES[:6]:
        (answer,) = served.picture(encoded(image)).json["answers"]
        expected = session.run(["probabilities"], {"images": image[None].numpy()})[0][0]
        assert probabilities(answer).tobytes() == expected.tobytes()
        assert answer["class"] == COLORS[int(expected.argmax())]
        assert answer["probability"] == float(expected.max())


FORMS = {
    "photo.png": encoded(PHOTO),
    "photo.jpg": encoded(PHOTO, "JPEG", quality=90),
    "progressive.jpg": encoded(PHOTO, "JPEG", progressive=True),
    "gray.jpg": encoded(PHOTO[:, :, 0], "JPEG"),
    "photo.webp": encoded(PHOTO, "WEBP"),
    "photo.gif": encoded(PHOTO, "GIF"),
    "photo.tif": encoded(PHOTO, "TIFF"),
    "clear.png": encoded(np.dstack([PHOTO, PHOTO[:, :, 0]])),
    "deep.png": encoded(PHOTO[:, :, 0].astype(np.uint16) * 257),
    "turned.jpg": encoded(PHOTO, "JPEG", exif=(lambda e: e.__setitem__(0x0112, 6) or e)(Image.Exif())),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_is_decoded_as_by_predict_and_answered_like_it(served, session, tmp_path, name):
    """The pixels are equal to the last bit, so what onnxruntime answers is; the run's own prediction is rounded."""
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    (answer,) = served.picture(FORMS[name]).json["answers"]
    pixels = decode_images([path], (3, 24, 24))
    expected = session.run(["probabilities"], {"images": pixels.numpy()})[0][0]
    assert probabilities(answer).tobytes() == expected.tobytes()
    (predicted,) = load("pictures", export("pictures").parent / "run").predict_files([path])
    assert np.allclose(probabilities(answer), predicted.numpy(), atol=1e-5)


def test_the_answer_is_that_of_the_exports_example(served, tmp_path):
    (tmp_path / "x.png").write_bytes(PICTURE)
    command = [sys.executable, "example.py", str(tmp_path / "x.png")]
    out = subprocess.run(command, cwd=export("pictures"), check=True, capture_output=True, text=True).stdout
    (answer,) = served.picture(PICTURE).json["answers"]
    assert out.splitlines() == [f"{row['class']}: {row['probability']:.1%}" for row in answer["top"]]


def test_each_way_of_sending_pictures_gives_the_same_answers(served):
    contents = [encoded(image) for image in IMAGES[:3]]
    alone = [served.picture(content).json["answers"][0] for content in contents]
    form, kind = multipart(*((f"{i}.png", content) for i, content in enumerate(contents)))
    by_form = served.ask("/predict", form, Content_Type=kind).json["answers"]
    assert [answer.pop("name") for answer in by_form] == ["0.png", "1.png", "2.png"]
    by_text = served.json({"images": [base64.b64encode(content).decode() for content in contents]}).json["answers"]
    by_numbers = served.json({"inputs": IMAGES[:3].tolist()}).json["answers"]
    assert [answer.pop("name") for answer in by_text] == ["picture 1", "picture 2", "picture 3"]
    (one,) = served.json({"inputs": IMAGES[0].tolist()}).json["answers"]
    assert served.ask("/predict", contents[0], Content_Type="image/png").json["answers"] == [alone[0]]
    for answer, form, text, numbers in zip(alone, by_form, by_text, by_numbers, strict=True):
        for other in (form, text, numbers):
            assert other["class"] == answer["class"]
            assert np.allclose(probabilities(other), probabilities(answer), atol=1e-6)
    assert one == alone[0]


def test_a_body_in_chunks_and_several_requests_on_a_connection_are_answered(served):
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (PICTURE[:100], PICTURE[100:])) + b"0\r\n\r\n"
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    chunked = head + b"Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    again = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(chunked + again)
        found = b""
        while data := client.recv(2**16):
            found += data
    assert found.count(b"HTTP/1.1 200 OK") == 2
    assert found.count(b'"answers"') == 1
    assert found.endswith(b"}")


def test_a_client_that_waits_for_leave_gets_it(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(PICTURE)}\r\n"
        client.sendall(head.encode() + b"Expect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(PICTURE)
        assert client.recv(2**16).startswith(b"HTTP/1.1 200 OK")


def test_options_choose_how_many_classes_and_what_is_explained(served):
    assert [len(served.picture(PICTURE, f"?top={n}").json["answers"][0]["top"]) for n in (1, 2, 99)] == [1, 2, 3]
    plain, heat, other = (
        served.picture(PICTURE, query).json["answers"][0] for query in ("", "?heatmap=1", "?class=green")
    )
    assert "heatmap" not in plain
    assert heat["heatmap"]["class"] == heat["class"] == "red"
    assert other["heatmap"]["class"] == "green"
    assert other["class"] == "red"
    rows = heat["heatmap"]["values"]
    assert (len(rows), len(rows[0]), max(map(max, rows)), min(map(min, rows)) >= 0) == (24, 24, 1.0, True)


def test_the_heat_map_of_a_wide_picture_says_which_part_it_covers(served):
    wide = np.zeros((24, 48, 3), np.uint8)
    (answer,) = served.picture(encoded(wide), "?heatmap=1").json["answers"]
    assert answer["heatmap"]["box"] == [0.25, 0, 0.75, 1]


def test_health_and_the_model_and_the_samples_are_told(served):
    health = served.ask("/health").json
    assert health["status"] == "ok"
    card = served.ask("/model").json
    facts = json.loads((export("pictures") / "export.json").read_text())
    assert {name: card[name] for name in ("classes", "metrics", "input", "temperature")} == {
        name: facts[name] for name in ("classes", "metrics", "input", "temperature")
    }
    assert (card["engine"], card["heatmaps"], card["takes"]) == ("model.onnx", True, ["images", "inputs"])
    assert card["limits"] == {"bytes": 10**6, "pixels": 2 * 10**6, "samples": 32, "seconds": 60.0}
    assert str(Path.home()) not in json.dumps(card)
    addresses = served.ask("/samples").json["pictures"]
    assert len(addresses) == card["samples"] == 8
    sample = served.ask(addresses[0])
    assert sample.headers["content-type"] == "image/png"
    assert (np.asarray(Image.open(io.BytesIO(sample.body))).transpose(2, 0, 1) == IMAGES[0].numpy()).all()


def test_a_head_request_has_no_body_and_every_answer_is_guarded(served):
    head = served.ask("/", method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) > 1000
    for answer in (
        served.ask("/"),
        served.ask("/page.js"),
        served.ask("/model"),
        served.ask("/gone"),
        served.picture(b"x"),
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers


def test_many_clients_at_once_are_answered_alike(served):
    expected, found = served.picture(PICTURE, "?heatmap=1").json["answers"], []

    def client() -> None:
        found.extend(served.picture(PICTURE, "?heatmap=1") for _ in range(5))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert {answer.status for answer in found} == {200}
    assert all(answer.json["answers"] == expected for answer in found)


# ------------------------------------------------------------------------------------------------ hostile pictures


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes whose header states many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10**6))
        + chunk(b"IEND", b"")
    )


def many_scans() -> bytes:
    """A progressive JPEG with a scan repeated a thousand times."""
    content = encoded(np.zeros((400, 400, 3), np.uint8), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * 1000 + b"\xff\xd9"


JPEG = encoded(PHOTO, "JPEG")
PICTURES = {
    "nothing": (b"", 400, "the request is empty"),
    "text": (b"hello", 415, "isn't an image"),
    "html": (b"<!doctype html><script>alert(1)</script>", 415, "isn't an image"),
    "an archive": (b"PK\x03\x04" + bytes(100), 415, "isn't an image"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), 415, "isn't an image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', 415, "isn't an image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n", 415, "isn't an image"),
    "a cut JPEG": (JPEG[: len(JPEG) // 2], 422, "can't be read as an image"),
    "a cut PNG": (PICTURE[: len(PICTURE) // 2], 422, "can't be read as an image"),
    "a head alone": (PICTURE[:33], 415, "isn't an image"),
    "a start alone": (b"\xff\xd8\xff", 415, "isn't an image"),
    "a bomb": (bomb(30_000, 30_000), 413, "more than 2 million pixels"),
    "a smaller bomb": (bomb(9_000, 9_000), 413, "9000 x 9000 pixels, more than 2 million"),
    "a bomb of no height": (bomb(10, 0), 415, "isn't an image"),
    "many scans": (many_scans(), 413, "in too many passes"),
    "noise": (RANDOM.bytes(5000), 415, "isn't an image"),
    "too large": (bytes(10**6 + 1), 413, "larger than 1 MB"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_gets_an_error_and_the_server_lives(served, name):
    content, status, words = PICTURES[name]
    answer = served.picture(content)
    assert (answer.status, words in answer.error) == (status, True), answer
    assert answer.headers["content-type"] == "application/json"
    assert served.lives()


def test_what_is_two_things_at_once_is_a_picture_and_nothing_else(served):
    """A picture with a script, an archive or a page at its end: its pixels count, and nothing of it comes back."""
    for tail in (b"<script>alert(1)</script>", b"PK\x05\x06" + bytes(18), b"<?php system('id'); ?>"):
        answer = served.picture(PICTURE + tail)
        assert answer.json["answers"] == served.picture(PICTURE).json["answers"]
        assert b"script" not in answer.body


def test_random_damage_to_pictures_is_survived(served):
    for name, content in FORMS.items():
        for _ in range(12):
            damaged = bytearray(content)
            for at in RANDOM.integers(0, len(damaged), 8):
                damaged[at] = RANDOM.integers(256)
            answer = served.picture(bytes(damaged))
            assert answer.status in (200, 413, 415, 422), (name, answer)
            assert answer.status == 200 or answer.error
    assert served.lives()


# ------------------------------------------------------------------------------------------------ hostile bodies

FORM = multipart(("x.png", PICTURE))[0]
BODIES = {
    "no boundary": (FORM, "multipart/form-data", 400, "names no boundary"),
    "another boundary": (FORM, "multipart/form-data; boundary=other", 400, "form can't be parsed"),
    "a cut form": (FORM[:-30], "multipart/form-data; boundary=edge", 400, "form can't be parsed"),
    "an empty form": (b"--edge--\r\n", "multipart/form-data; boundary=edge", 400, "no picture"),
    "a form of nothing": (b"", "multipart/form-data; boundary=edge", 400, "form"),
    "a text of a form": (
        b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--edge--\r\n',
        "multipart/form-data; boundary=edge",
        400,
        "no picture",
    ),
    "a long text of a form": (
        b'--edge\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"b" * 900_000 + b"\r\n--edge--\r\n",
        "multipart/form-data; boundary=edge",
        413,
        "too many parts or too long",
    ),
    "many parts": (multipart(*[("x.png", b"")] * 100)[0], "multipart/form-data; boundary=edge", 413, "too many parts"),
    "many pictures": (
        multipart(*[("x.png", PICTURE)] * 33)[0],
        "multipart/form-data; boundary=edge",
        413,
        "more than 32",
    ),
    "a bad file among good ones": (
        multipart(("a.png", PICTURE), ("../../b.png", b"x"))[0],
        "multipart/form-data; boundary=edge",
        415,
        "../../b.png isn't an image",
    ),
    "no JSON": (b"{", "application/json", 400, "isn't JSON"),
    "no UTF-8": (b'{"inputs": "\xff"}', "application/json", 400, "isn't JSON"),
    "NaN": (b'{"inputs": [NaN]}', "application/json", 400, "NaN is no number"),
    "infinity": (b'{"inputs": [-Infinity]}', "application/json", 400, "-Infinity is no number"),
    "nested": (b'{"inputs": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "application/json", 400, "nested too deeply"),
    "a long number": (b'{"inputs": [' + b"9" * 10_000 + b"]}", "application/json", 400, "isn't JSON"),
    "a list": (b"[1]", "application/json", 422, 'must be {"inputs": …}'),
    "another key": (b'{"input": [1]}', "application/json", 422, 'must be {"inputs": …}'),
    "two keys": (b'{"inputs": [1], "images": []}', "application/json", 422, 'must be {"inputs": …}'),
    "ragged rows": (b'{"inputs": [[1], [1, 2]]}', "application/json", 422, "numbers"),
    "another shape": (b'{"inputs": [[1, 2]]}', "application/json", 422, "has the shape (1, 2)"),
    "nothing inside": (b'{"inputs": []}', "application/json", 422, "numbers"),
    "texts": (b'{"inputs": ["1"]}', "application/json", 422, "numbers"),
    "truths": (b'{"inputs": [true]}', "application/json", 422, "numbers"),
    "null": (b'{"inputs": null}', "application/json", 422, "numbers"),
    "no base64": (b'{"images": ["%%%"]}', "application/json", 422, "base64"),
    "base64 of nothing": (b'{"images": [""]}', "application/json", 415, "isn't an image"),
    "a text for images": (b'{"images": "abcd"}', "application/json", 422, "a list"),
    "another type": (PICTURE, "application/x-www-form-urlencoded", 415, "isn't accepted: send a picture's bytes"),
    "a strange type": (PICTURE, "\x00;=;", 415, "isn't accepted"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_gets_an_error_and_the_server_lives(served, name):
    body, kind, status, words = BODIES[name]
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    if kind.isprintable():
        answer = served.raw(f"{head}Content-Type: {kind}\r\n\r\n".encode(), body)
    else:
        answer, status, words = served.raw(f"{head}Content-Type: {kind}\r\n\r\n".encode(), body), 400, "HTTP/1.1"
    assert (answer.status, words in answer.error) == (status, True), answer
    assert served.lives()


@pytest.mark.parametrize("value", [256, -1, 0.5, 1e300])
def test_pixels_are_whole_numbers_of_a_byte(served, value):
    image = IMAGES[0].tolist()
    image[0][0][0] = value
    answer = served.json({"inputs": image})
    assert (answer.status, answer.error) == (422, '"inputs" must be whole numbers from 0 to 255')


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?top=0", "top must be"),
        ("?top=x", "top must be"),
        ("?top=-1", "top must be"),
        ("?top=" + "9" * 1000, "top must be"),
        ("?top=٣", "can't be parsed|top must be"),
        ("?heatmap=2", "heatmap must be 0 or 1"),
        ("?heat=1", "no option 'heat'; did you mean 'heatmap'?"),
        ("?" + "&".join(["top=1"] * 100), "can't be parsed"),
        ("?class=blue", "there is no class 'blue'"),
    ],
)
def test_an_option_that_there_isnt_gets_an_error(served, query, words):
    head = f"POST /predict{query} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nConnection: close\r\n"
    answer = served.raw(f"{head}Content-Length: {len(PICTURE)}\r\n\r\n".encode() + PICTURE)
    assert answer.status in (400, 422)
    assert any(part in answer.error for part in words.split("|")) or not query.isascii()


# ------------------------------------------------------------------------------------------------ hostile requests

HOST = b"Host: localhost\r\n"
REQUESTS = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01" + bytes(200), 400),
    "noise": (RANDOM.bytes(3000) + b"\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "no host of HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", 400),
    "huge headers": (b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"a" * 10**6 + b"\r\n\r\n", 431),
    "many headers": (b"GET / HTTP/1.1\r\n" + HOST + b"".join(b"A%d: 1\r\n" % i for i in range(10**5)) + b"\r\n", 431),
    "a huge target": (b"GET /" + b"a" * 10**6 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431),
    "two lengths": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "no length": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
    "an endless length": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", 400),
    "a great length": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 999999999999\r\n\r\n", 413),
    "chunks that aren't": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "endless chunks": (
        b"POST /predict HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + (b"20000\r\n" + bytes(2**17) + b"\r\n") * 12,
        413,
    ),
    "another coding": (b"POST /predict HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "a folded header": (b"GET / HTTP/1.1\r\n" + HOST + b" b\r\nA\x00: 1\r\n\r\n", 400),
    "a method that isn't": (b"BREW / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 405),
    "a path that climbs": (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "an encoded path": (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "a path among samples": (
        b"GET /samples/../export.json.png HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n",
        404,
    ),
    "a sample that isn't": (b"GET /samples/8.png HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "a sample before": (b"GET /samples/-1.png HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "an address": (b"GET http://evil.example/ HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "another's name": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    "a name like ours": (b"GET / HTTP/1.1\r\nHost: localhost.evil.example:80\r\n\r\n", 421),
    "a name that is none": (b"GET / HTTP/1.1\r\nHost: [::\r\n\r\n", 421),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_hostile_request_gets_an_error_and_the_server_lives(served, name):
    data, status = REQUESTS[name]
    answer = served.raw(data)
    assert (answer.status, bool(answer.error)) == (status, True), answer
    assert served.lives()


def test_a_request_that_breaks_off_disturbs_nobody(served):
    for part in (b"", b"GET / HT", b"POST /predict HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\nabc"):
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(part)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not an end
    assert served.lives()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]:80", "203.0.113.7:8000", "LOCALHOST", "localhost.:1", socket.gethostname()]
)
def test_an_address_or_this_machines_name_is_served(served, host):
    assert served.ask("/health", Host=host).status == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 200),
        ("https://LOCALHOST", 200),
        ("http://evil.example", 403),
        ("http://localhost:81", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_a_page_of_somebody_else_may_not_ask(served, origin, status):
    answer = served.ask("/predict", PICTURE, Content_Type="image/png", Host="localhost", Origin=origin)
    assert answer.status == status
    assert status == 200 or "may not ask this server" in answer.error


# ------------------------------------------------------------------------------------------------ slow clients


def test_slow_senders_are_told_so_while_others_are_served():
    """Twenty connections that send a byte a second, a head or a body: each gets 408, and nobody else waits for them."""
    with running(export("pictures"), "--timeout", "3", "--no-heatmap") as own:
        clients = [socket.create_connection(("127.0.0.1", own.port), timeout=30) for _ in range(20)]
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 90000\r\n\r\n"
        begun = time.monotonic()
        for i, client in enumerate(clients):
            client.sendall(head if i % 2 and i < 20 else b"GET / HTTP/1.1\r\nHost: local")
        waits, ended = [], dict[int, float]()
        while len(ended) < 20 and time.monotonic() < begun + 20:
            for i, client in enumerate(clients):
                if i not in ended:
                    try:
                        client.sendall(b"a")
                        client.setblocking(False)
                        if data := client.recv(2**16):
                            assert b" 408 " in data, data
                            assert b"send it faster" in data
                            ended[i] = time.monotonic() - begun
                    except BlockingIOError:
                        pass
                    finally:
                        client.setblocking(True)
            start = time.monotonic()
            assert own.picture(PICTURE).status == 200
            waits.append(time.monotonic() - start)
            time.sleep(0.5)
        assert len(ended) == 20
        assert max(ended[i] for i in range(1, 20, 2)) < 8, "a body"
        assert 9 < min(ended[i] for i in range(0, 20, 2)) < 15, "a head"
        assert max(waits) < 2
        assert own.lives()
        for client in clients:
            client.close()


def test_too_many_connections_are_told_to_come_back_and_leave_room_again():
    with running(export("pictures"), "--no-heatmap") as own:
        idle = [socket.create_connection(("127.0.0.1", own.port), timeout=20) for _ in range(64)]
        time.sleep(0.3)
        answer = own.raw()
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert "too many connections" in answer.error
        for client in idle:
            client.close()
        deadline = time.monotonic() + 5
        while own.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").status != 200:
            assert time.monotonic() < deadline
        assert own.lives()


# ------------------------------------------------------------------------------------------------ other networks


def test_a_table_is_answered_by_rows():
    with running(export("table")) as own:
        session = onnxruntime.InferenceSession(export("table") / "model.onnx")
        rows = [[0.1, 0.2, 0.3], [0.9, 0.8, 1]]
        expected = session.run(["probabilities"], {"inputs": np.array(rows, np.float32)})[0]
        answers = own.json({"inputs": rows}).json["answers"]
        assert [answer["class"] for answer in answers] == [("low", "high")[i] for i in expected.argmax(1)]
        assert [answer["probability"] for answer in answers] == expected.max(1).tolist()
        assert own.json({"inputs": rows[0]}).json["answers"] == answers[:1]
        assert np.shape(own.ask("/samples").json["inputs"]) == (8, 3)
        for value, words in (
            ([1e400, 0, 0], "isn't JSON|numbers|too large"),
            ([1e300, 0, 0], "too large"),
            ([[1, 2]], "shape"),
        ):
            answer = own.json(json.dumps({"inputs": value}).replace("Infinity", "1e400").encode())
            assert answer.status == 422
            assert any(part in answer.error for part in words.split("|")), answer.error
        assert own.json({"inputs": [[0.0] * 3] * 1025}).status == 413
        refused = own.picture(PICTURE)
        assert (refused.status, "takes no pictures" in refused.error) == (415, True)
        assert (
            own.json({"inputs": rows}, "?heatmap=1").json["answers"][0]["no_heatmap"].startswith("only answers about")
        )
        assert own.lives()


def test_a_text_is_continued():
    with running(export("text")) as own:
        (answer,) = own.json({"text": "not to b"}).json["answers"]
        assert answer["class"] == "e"
        assert len(answer["top"]) == 5
        (long,) = own.json({"text": "be or " * 50 + "not to b"}).json["answers"]
        assert long["class"] == "e"
        assert "doesn't know the character '\\xe4'" in own.json({"text": "ä"}).error
        assert "doesn't know the character '\\u4f60'" in own.json({"text": "你"}).error
        for wrong in (
            {"text": ""},
            {"text": 3},
            {"inputs": [[99] * 12]},
            {"inputs": [[-1] * 12]},
            {"inputs": [[0.5] * 12]},
        ):
            assert own.json(wrong).status == 422, wrong
        assert own.lives()


@pytest.mark.parametrize("name", ["labels", "values", "floats", "masks", "flat"])
def test_other_tasks_are_answered_in_their_own_way(name):
    with running(export(name)) as own:
        session = onnxruntime.InferenceSession(export(name) / "model.onnx")
        given = session.get_inputs()[0].name
        if name in ("labels", "values"):
            row = np.array([[0.9, 0.1, 0.4]], np.float32)
            expected = session.run(None, {given: row})[0]
            (answer,) = own.json({"inputs": row.tolist()}).json["answers"]
        else:
            pixels = IMAGES[:1].numpy()
            expected = session.run(None, {given: pixels.astype(np.float32) / 255 if name == "floats" else pixels})[0]
            (answer,) = own.picture(PICTURE, "?heatmap=1").json["answers"]
        if name in ("values", "masks"):
            assert np.array_equal(np.array(answer["predictions"], expected.dtype), expected[0])
        elif name == "labels":
            assert answer["probability"] == float(expected.max())
            assert answer["present"] == [str(i) for i in np.argsort(-expected[0]) if expected[0][i] > 0.5]
        elif name == "floats":
            assert answer["top"][0]["probability"] == pytest.approx(max(expected[0], 1 - expected[0]))
            assert sum(row["probability"] for row in answer["top"]) == pytest.approx(1)
            assert answer["heatmap"]["class"] == "1"
        else:
            assert answer["no_heatmap"] == "the network has no convolution whose map could be shown"


# ------------------------------------------------------------------------------------------------ start and end


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_exit_code_0_while_clients_are_connected(number):
    with running(export("pictures"), "--no-heatmap") as own:
        with socket.create_connection(("127.0.0.1", own.port)):
            assert own.lives()
            begun = time.monotonic()
            assert own.end(number) == (0, "without heat maps: heat maps were switched off\n", "")
            assert time.monotonic() - begun < 4
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", own.port))


def test_it_listens_on_the_loopback_alone_unless_told_otherwise():
    with running(export("table")) as own:
        sockets = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
        listening = [line.split()[1] for line in sockets.splitlines() if line.split()[3] == "0A"]
        assert [each.partition(":")[0] for each in listening if each.endswith(f":{own.port:04X}")] == ["0100007F"]
    with running(export("table"), "--host", "0.0.0.0", "--name", "models.example") as own:  # noqa: S104
        assert own.ask("/health", Host="models.example").status == 200
        assert own.ask("/health", Host="other.example").status == 421
        code, out, errors = own.end()
        assert (code, errors) == (0, "")
        assert "there is no password, and nothing is encrypted" in out


def test_a_port_that_is_taken_is_named_and_none_that_was_asked_for_becomes_a_free_one(cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("serve", str(export("table")), "--port", str(port))
        assert done.returncode == 2
        assert done.stderr == (
            f"error: can't listen on port {port} of 127.0.0.1 (Address already in use): choose another by --port\n"
        )
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # by somebody else already
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        with running(export("table"), port=None) as own:
            assert own.port != 8080
            assert own.lives()


def test_mistakes_of_the_command_line_are_a_line_each(cli, tmp_path):
    for arguments, words in (
        ((tmp_path,), "isn't an export: it has no export.json"),
        ((export("table"), "--int8"), "has no model.int8.onnx: leave out --int8"),
        ((export("table"), "--host", "no.such.host.invalid"), "isn't an address of this machine"),
        ((export("table"), "--host", "192.0.2.1"), "can't listen on port 8080 of 192.0.2.1"),
        ((export("table"), "--port", "99999"), "there is no port 99999"),
        ((export("table"), "--port", "-1"), "there is no port -1"),
        ((export("table"), "--max-mb", "0"), "at least 1"),
        ((export("table"), "--key", "key.pem"), "isn't signed"),
    ):
        done = cli("serve", *map(str, arguments))
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_damaged_export_isnt_served(cli, tmp_path):
    folder = shutil.copytree(export("table"), tmp_path / "export")
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    done = cli("serve", str(folder))
    assert (done.returncode, done.stdout) == (1, "")
    assert "model.onnx has changed" in done.stderr


def test_integers_answer_and_a_program_alone_does(tmp_path):
    with running(export("pictures"), "--int8") as own:
        assert "(model.int8.onnx)" in own.line
        assert own.picture(PICTURE).json["answers"][0]["class"] == "red"
    folder = shutil.copytree(export("pictures"), tmp_path / "export")
    facts = json.loads((folder / "export.json").read_text())
    facts["proof"] = [row for row in facts["proof"] if "onnx" not in row["file"]]
    (folder / "export.json").write_text(json.dumps(facts))
    for file in ("model.onnx", "model.int8.onnx"):
        (folder / file).unlink()
    write_sums(folder)
    with running(folder) as own:
        assert "(program.pt2)" in own.line
        (answer,) = own.picture(PICTURE, "?heatmap=1").json["answers"]
        expected = load("pictures", export("pictures").parent / "run").predict(IMAGES[:1])[0]
        assert torch.allclose(torch.from_numpy(probabilities(answer)), expected, atol=1e-5)
        assert answer["heatmap"]["class"] == "red"
