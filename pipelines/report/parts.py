"""The parts of a page that all reports share, as pieces of HTML; no script, so that any viewer shows them."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

from pipelines.report.style import CSS


def document(title: str, body: Sequence[str]) -> str:
    """The whole file.

    Args:
        title: of the window.
        body: pieces of HTML, one below the other.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    return (
        f'<!doctype html><html lang="en"><head>{head}<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>"
    )


def section(title: str, text: str, content: str) -> str:
    """A heading, a paragraph of plain text, and a piece of HTML."""
    return f"<h2>{escape(title)}</h2>{f'<p>{escape(text)}</p>' if text else ''}{content}"


def tiles(entries: Sequence[tuple[str, str]]) -> str:
    """Large figures with their names."""
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in entries)
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Plain text cells; the first row is the head unless it is a table of facts."""

    def line(row: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"

    head = "" if kind == "facts" else f"<thead>{line(rows[0], 'th')}</thead>"
    body = "".join(line(row, "td") for row in (rows if kind == "facts" else rows[1:]))
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def panels(name: str, pictures: Mapping[str, bytes]) -> str:
    """Pictures of one image beside each other: title to JPEG."""
    shown = "".join(
        f'<div><img alt="{escape(title)} of {escape(name)}" loading="lazy" '
        f'src="data:image/jpeg;base64,{base64.b64encode(data).decode()}"><span>{escape(title)}</span></div>'
        for title, data in pictures.items()
    )
    return f'<div class="panels">{shown}</div>'


def axis_step(reach: float) -> float:
    """A round distance of axis marks, of which 4 to 10 fit."""
    power = 10 ** math.floor(math.log10(max(reach, 1e-9)))
    return next(power * f for f in (0.1, 0.2, 0.25, 0.5, 1.0, 2.0) if reach / (power * f) <= 8)
