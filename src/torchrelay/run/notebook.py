"""What a notebook shows: a progress bar that is one output however long the run is, and tables.

They take the notebook's own font and colors, so they suit light and dark themes alike.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape

_SECONDS = 0.5  # between two updates of the bar
_CELL = "padding:2px 14px 2px 0;border:0;background:transparent;color:inherit"
_SOFT = "opacity:.65;font-weight:normal"


@contextmanager
def shown_meanwhile(draw: Callable[[], tuple[str, str]]) -> Iterator[None]:
    """Show in this context, and update, what `draw` returns: one output, which stays as it was last.

    Args:
        draw: returns HTML, and the same as plain text; another thread calls it.
    """
    from IPython.display import display

    ident, ended = uuid.uuid4().hex, threading.Event()

    def show(*, update: bool) -> None:
        html, text = draw()
        display({"text/html": html, "text/plain": text}, raw=True, display_id=ident, update=update)  # type: ignore[no-untyped-call]

    def work() -> None:
        while not ended.wait(_SECONDS):
            with contextlib.suppress(Exception):  # the front end has gone; no bar is worth a run
                show(update=True)

    show(update=False)
    thread = threading.Thread(target=work, name="notebook's bar", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):
            show(update=True)


def bar(value: int, most: int, before: str, facts: str) -> tuple[str, str]:
    """Return a progress bar as HTML and as text."""
    html = (
        '<div style="font-family:monospace;font-size:.9em;white-space:nowrap;overflow-x:auto">'
        f'{escape(before)} <progress max="{max(most, 1)}" value="{value}" style="width:12em"></progress> '
        f'<span style="opacity:.8">{escape(facts)}</span></div>'
    )
    return html, f"{before} {facts}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", note: str = "") -> str:
    """Return a table as HTML: the first column holds names, the others figures. All texts are escaped."""

    def row(cells: Sequence[str], tag: str, style: str = "") -> str:
        sides = ["left", *["right"] * (len(cells) - 1)]
        made = [
            f'<{tag} style="{_CELL};text-align:{side};{style}">{escape(cell)}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        ]
        return f"<tr>{''.join(made)}</tr>"

    head = row(heads, "th", _SOFT) if any(heads) else ""
    return (
        '<div style="overflow-x:auto;color:inherit">'
        + (f"<div><b>{escape(title)}</b></div>" if title else "")
        + (f'<div style="{_SOFT}">{escape(note)}</div>' if note else "")
        + f'<table style="border-collapse:collapse;margin:.4em 0;font-size:.9em">{head}'
        + "".join(row(each, "td") for each in rows)
        + "</table></div>"
    )
