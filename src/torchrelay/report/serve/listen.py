"""Sockets to listen on; what the system refuses is a line."""

import errno
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
    if port is not None and not 0 <= port < 2**16:
        raise UsageError(f"there is no port {port}: choose one up to {2**16 - 1} by --port")
    try:
        return _bound(host, preferred if port is None else port)
    except socket.gaierror as error:
        raise UsageError(f"--host {host} isn't an address of this machine: leave it out to serve it alone") from error
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return _bound(host, 0)
        shown = preferred if port is None else port
        cause = error.strerror or error
        raise UsageError(f"can't listen on port {shown} of {host} ({cause}): choose another by --port") from error


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
