"""Sockets to listen on; what the system refuses is a line."""

import contextlib
import socket

from torchrelay.errors import UsageError


def listen(host: str, port: int | None, preferred: int) -> list[socket.socket]:
    """Return listening sockets of a host's addresses.

    Args:
        host: a name or an address of this machine.
        port: None: the preferred one, or a free one where that is taken.
        preferred: the port that is tried first.

    Raises:
        UsageError: the host isn't one of this machine's, or the port is taken or may not be used.
    """
    try:
        return _bound(host, preferred if port is None else port)
    except (OSError, OverflowError) as error:
        if port is None and isinstance(error, OSError) and not isinstance(error, socket.gaierror):
            with contextlib.suppress(OSError):
                return _bound(host, 0)
        if isinstance(error, socket.gaierror):
            raise UsageError(
                f"--host {host} isn't an address of this machine: leave it out to serve it alone"
            ) from error
        cause = error.strerror if isinstance(error, OSError) else "there is no such port"
        raise UsageError(f"can't listen on port {port} of {host} ({cause}): choose another by --port") from error


def _bound(host: str, port: int) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    opened = list[socket.socket]()
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            # A free port is chosen for the first address, and is every other's too.
            chosen = opened[0].getsockname()[1] if opened and port == 0 else port
            each = socket.socket(family, kind, protocol)
            opened.append(each)
            if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # elsewhere, Windows lets two programs share a port
                each.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind((address[0], chosen, *address[2:]))
            each.listen(128)
            each.setblocking(False)
    except OSError:
        for each in opened:
            each.close()
        raise
    return opened
