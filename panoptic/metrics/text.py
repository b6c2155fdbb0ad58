"""Tables as text, and the names of metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], words: Sequence[str] = (), widest: int | None = None) -> str:
    """Rows of cells, the header first, as lines of text with two spaces between columns.

    Args:
        rows: of equal length.
        words: headers of columns that are left-aligned, as the first is; the others, which hold figures, stand right.
        widest: characters of a column at the most; a longer cell is whole, and moves the rest of its line.
    """
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    widths = widths if widest is None else [min(width, widest) for width in widths]
    left = [k == 0 or name in words for k, name in enumerate(rows[0])]
    lines = (
        "  ".join(cell.ljust(w) if word else cell.rjust(w) for cell, w, word in zip(row, widths, left, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table whose columns are straight in plain text too."""
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(rows[0]))]
    head, *body = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["-" * width for width in widths], *body))


def metric_name(name: str) -> str:
    """A name that MLflow accepts: letters, digits, `_ - . space : /`; anything else becomes `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
