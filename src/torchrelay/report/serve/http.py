"""The server: HTTP/1.1 on asyncio, parsed by h11, with a limit for each thing that a client may send too much of."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus

import h11

_CHUNK = 2**16  # bytes that are read at once
_LARGEST_HEAD = 2**14  # bytes of a request's first line and headers
_HEAD_SECONDS, _IDLE_SECONDS, _SEND_SECONDS, _LINGER_SECONDS = 10.0, 60.0, 30.0, 2.0
_SLOWEST = 50_000  # bytes a second of a body
_GRACE = 5.0  # seconds for requests that are being answered when the server is stopped
_CONNECTIONS, _REQUESTS = 64, 16  # at once


class RefusedError(Exception):
    """A request isn't answered; the text is one line for whoever sent it.

    Args:
        status: of HTTP, from 400.
        text: says why, and what is accepted.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Request:
    """What a client asks.

    Args:
        method: such as "GET".
        target: the path with its query.
        headers: by their names in lower case; of a name that was sent twice, the last one.
        body: whole.
    """

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class Response:
    """What it gets."""

    status: int
    body: bytes
    kind: str  # the media type
    headers: tuple[tuple[str, str], ...] = field(default=())


@dataclass(frozen=True)
class Limits:
    """What a client may take up.

    Args:
        size: bytes of a request's body.
        seconds: until a request has arrived, and until it is answered.
    """

    size: int
    seconds: float


# Looks at a request without its body, and raises where it isn't to be read.
Check = Callable[[Request], None]
Handle = Callable[[Request], Awaitable[Response]]


class Server:
    """Answers requests until a signal comes.

    Args:
        check: called before a body is read.
        handle: answers a request; may raise `RefusedError`, as `check` may.
        refuse: makes an answer of what was raised.
        limits: what a client may take up.
    """

    def __init__(
        self, check: Check, handle: Handle, refuse: Callable[[RefusedError], Response], limits: Limits
    ) -> None:
        self._check, self._handle, self._refuse, self._limits = check, handle, refuse, limits
        self._connections: set[asyncio.Task[None]] = set()
        self._idle: set[asyncio.Task[None]] = set()  # those between two requests
        self._requests = 0

    async def run(self, listening: list[socket.socket], ready: Callable[[], None] = lambda: None) -> None:
        """Serve on sockets until SIGINT or SIGTERM, then finish what is being answered; a second signal kills."""
        stop = asyncio.Event()
        servers = [await asyncio.start_server(self._connected, sock=each, limit=_CHUNK) for each in listening]
        with _signals(stop):
            ready()
            await stop.wait()
        for server in servers:
            server.close()
        for task in self._idle:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_GRACE)
        for task in self._connections:
            task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs a coroutine in one
        full = len(self._connections) >= _CONNECTIONS
        self._connections.add(task)
        try:
            writer.transport.set_write_buffer_limits(0)  # an answer is sent whole before its connection is closed
            connection = _Connection(reader, writer, self._limits)
            if full:
                await connection.send(self._refuse(_busy("too many connections")), close=True)
                return
            while await self._exchange(connection, task):
                pass
        except (OSError, asyncio.CancelledError, TimeoutError, h11.LocalProtocolError):
            pass  # the client has gone, or we are
        finally:
            self._connections.discard(task)
            self._idle.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _exchange(self, connection: "_Connection", task: asyncio.Task[None]) -> bool:
        """Answer a request; return whether another one may follow."""
        self._idle.add(task)
        if not await connection.wakes():
            return False
        self._idle.discard(task)
        try:
            request = await connection.head()
            self._check(request)
            response = await self._answer(connection, request)
        except RefusedError as error:
            await connection.send(self._refuse(error), close=not connection.is_read)
            return connection.next()
        await connection.send(response)
        return connection.next()

    async def _answer(self, connection: "_Connection", head: Request) -> Response:
        if self._requests >= _REQUESTS:
            raise _busy("too many requests at once")
        self._requests += 1
        try:
            body = await connection.body(head)
            async with asyncio.timeout(self._limits.seconds):
                return await self._handle(Request(head.method, head.target, head.headers, body))
        except TimeoutError as error:
            raise _busy(f"no answer within {self._limits.seconds:g} s") from error
        finally:
            self._requests -= 1


def _busy(why: str) -> RefusedError:
    return RefusedError(503, f"the server is busy, {why}: try again later", (("Retry-After", "2"),))


class _Connection:
    """One client's connection: what h11 makes of its bytes, with deadlines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits) -> None:
        self._reader, self._writer, self._limits = reader, writer, limits
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_LARGEST_HEAD)
        self._method = b""

    @property
    def is_read(self) -> bool:
        """Whether the request has been read to its end."""
        return self._http.their_state in (h11.DONE, h11.IDLE)

    async def wakes(self) -> bool:
        """Wait for the first byte of a request; return False where none comes."""
        if self._http.trailing_data[0]:  # a request that came with the one before
            return True
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                data = await self._reader.read(_CHUNK)
        except TimeoutError:
            return False
        with contextlib.suppress(h11.RemoteProtocolError):
            self._http.receive_data(data)
        return bool(data)

    async def head(self) -> Request:
        """Read a request's first line and headers.

        Raises:
            RefusedError: it isn't HTTP, is too large or comes too slowly.
        """
        event = await self._next(_HEAD_SECONDS)
        if not isinstance(event, h11.Request):
            raise RefusedError(400, "this isn't a request of HTTP/1.1")
        self._method = event.method
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        if sum(name == b"host" for name, _ in event.headers) != 1:
            raise RefusedError(400, "a request needs one Host header")
        return Request(event.method.decode("latin-1"), event.target.decode("latin-1"), headers)

    async def body(self, head: Request) -> bytes:
        """Read a request's body.

        Raises:
            RefusedError: it is too large, malformed or comes too slowly.
        """
        most = self._limits.size
        announced = head.headers.get("content-length", "")
        length = int(announced) if announced.isdecimal() and len(announced) < 20 else 0
        too_large = RefusedError(413, f"the body is larger than {most / 1e6:g} MB, the most that is accepted")
        if length > most:
            raise too_large
        seconds = min(self._limits.seconds, _HEAD_SECONDS + (length or most) / _SLOWEST)
        body = bytearray()
        end = asyncio.get_running_loop().time() + seconds
        while True:
            if self._http.they_are_waiting_for_100_continue:
                self._writer.write(self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
            event = await self._next(end - asyncio.get_running_loop().time(), seconds)
            if isinstance(event, h11.EndOfMessage):
                return bytes(body)
            if isinstance(event, h11.Data):
                body += event.data
                if len(body) > most:
                    raise too_large

    async def _next(self, seconds: float, said: float = _HEAD_SECONDS) -> object:
        """Return h11's next event."""
        try:
            async with asyncio.timeout(seconds):
                while (event := self._http.next_event()) is h11.NEED_DATA:
                    self._http.receive_data(await self._reader.read(_CHUNK))
        except TimeoutError as error:
            raise RefusedError(408, f"the request didn't arrive within {said:.0f} s: send it faster") from error
        except h11.RemoteProtocolError as error:
            status = error.error_status_hint
            why = f"its headers have more than {_LARGEST_HEAD // 1024} KiB" if status == 431 else _shown(error)
            raise RefusedError(status, f"the request isn't as HTTP/1.1 says: {why}") from error
        if isinstance(event, h11.ConnectionClosed):
            raise ConnectionError
        return event

    async def send(self, response: Response, close: bool = False) -> None:
        """Send an answer, and close where the request wasn't read to its end."""
        headers = [
            ("Content-Type", response.kind),
            ("Content-Length", str(len(response.body))),
            ("Date", formatdate(usegmt=True)),
            *response.headers,
            *([("Connection", "close")] if close else []),
        ]
        reason = HTTPStatus(response.status).phrase
        data = self._http.send(h11.Response(status_code=response.status, headers=headers, reason=reason)) or b""
        if self._method != b"HEAD":
            data += self._http.send(h11.Data(data=response.body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        self._writer.write(data)
        async with asyncio.timeout(_SEND_SECONDS):
            await self._writer.drain()
        if close:
            await self._linger()

    async def _linger(self) -> None:
        """Read what the client still sends for a moment: closing at once would reset it before it reads the answer."""
        with contextlib.suppress(OSError, TimeoutError):
            self._writer.write_eof()
            async with asyncio.timeout(_LINGER_SECONDS):
                while await self._reader.read(_CHUNK):
                    pass

    def next(self) -> bool:
        """Begin with the next request; return False where none may follow."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self._method = b""
        return True


def _shown(error: Exception) -> str:
    """Return a parser's words, without what it quotes of the request."""
    return str(error).partition("(")[0].partition("b'")[0].strip(" :") or "it can't be parsed"


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM set an event; from then on they do what they did before."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
