"""`torchrelay serve EXPORT`: answer by an export, as a page and as JSON."""

import argparse
import ipaddress
import socket
import warnings
from pathlib import Path

from torchrelay.commands.options import count

HELP = "serve an export: a local page and a JSON endpoint that answer, with a heat map of why"
_PORT = 8080
_INSTALL = "pip install 'torchrelay[serve]'"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", type=Path, metavar="EXPORT", help="a folder that 'torchrelay export' made")
    parser.add_argument(
        "--host", metavar="HOST", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine alone)"
    )
    parser.add_argument(
        "--port", type=int, metavar="PORT", help=f"the port to listen on ({_PORT}, or a free one if that is taken)"
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which browsers may call this machine, beside its addresses; can be repeated",
    )
    parser.add_argument("--int8", action="store_true", help="answer by the model in 8-bit integers")
    parser.add_argument("--no-heatmap", action="store_true", help="don't load what explains the answers")
    parser.add_argument("--max-mb", type=count, default=20, metavar="N", help="refuse larger requests, in MB (20)")
    parser.add_argument(
        "--max-megapixels", type=count, default=64, metavar="N", help="refuse larger pictures, in million pixels (64)"
    )
    parser.add_argument(
        "--timeout", type=count, default=60, metavar="SECONDS", help="the most that a request or an answer takes (60)"
    )
    parser.add_argument("--key", type=Path, metavar="KEY", help="check the export's signature: its public key (PEM)")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def run(options: argparse.Namespace) -> None:
    """Load the export, and answer until Ctrl-C."""
    import asyncio

    from torchrelay.report.export.folder import read_facts
    from torchrelay.report.export.formats import needed

    for package in ("h11", "werkzeug"):
        needed(package, _INSTALL)
    from torchrelay.report.serve.answers import Answers
    from torchrelay.report.serve.app import App
    from torchrelay.report.serve.http import Limits, Server
    from torchrelay.report.serve.listen import listen

    name = read_facts(options.folder).get("name", options.folder.name)  # before the port is taken
    if options.key is not None:
        from torchrelay.report.export.signature import check

        check(options.folder, options.key)
    warnings.simplefilter("ignore")  # Pillow tells the terminal what is odd about a picture
    listening = listen(options.host, options.port, _PORT)
    pixels, limits = options.max_megapixels * 10**6, Limits(options.max_mb * 10**6, float(options.timeout))
    answers = Answers(options.folder, pixels, int8=options.int8, heat=not options.no_heatmap)
    app = App(answers, limits, [*options.name, options.host], debug=options.debug)

    def say() -> None:
        if options.quiet:
            return
        print(f"serving {name} ({answers.engine}) on {_address(listening[0])}; Ctrl-C ends it", flush=True)
        if answers.no_heat:
            print(f"without heat maps: {answers.no_heat}", flush=True)
        if _is_open(listening):
            print(
                "whoever reaches this machine may use it: there is no password, and nothing is encrypted; leave out "
                "--host, or put a proxy with both before it",
                flush=True,
            )

    try:
        asyncio.run(Server(app.check, app.handle, app.refuse, limits).run(listening, say))
    finally:
        app.close()


def _address(listening: socket.socket) -> str:
    """Return the page's address."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _is_open(listening: list[socket.socket]) -> bool:
    """Return whether other machines reach a socket."""
    return not all(ipaddress.ip_address(each.getsockname()[0].partition("%")[0]).is_loopback for each in listening)
