"""A study's table: the paper's figures and ours, and what exceeds the noise of the seeds; text, Markdown, CSV, plot."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from panoptic.metrics.text import markdown_table, text_table
from pipelines.studies.statistics import ROUNDING, SIGNIFICANCE, Cell, compare, holm, pooled_deviation
from pipelines.studies.study import NONE, Study


@dataclass(frozen=True)
class Table:
    """A study's table as text, Markdown, rows of a CSV file and a plot."""

    text: str
    markdown: str
    rows: list[dict[str, str | float]]
    plot: str
    """SVG of the plot."""

    @property
    def csv(self) -> str:
        """The rows as a file."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(self.rows[0]))
        writer.writeheader()
        writer.writerows(self.rows)
        return buffer.getvalue()


def table_of(
    name: str, study: Study, cells: Sequence[Sequence[Cell]], budget: str, remarks: Sequence[str] = ()
) -> Table:
    """The table of a study in every form.

    Args:
        name: of the study.
        study: its rows and columns.
        cells: a list a row, a cell a column.
        budget: steps and seeds, in words.
        remarks: lines below the table, after the study's own.
    """
    labels = [row.label for row in study.rows]
    head = ["", *(f"{column} {who}" for column in study.columns for who in ("paper", "ours"))]
    body = [
        [label, *(text for cell in row for text in (cell.paper, cell.text()))]
        for label, row in zip(labels, cells, strict=True)
    ]
    leading = "PQ" if "PQ" in study.columns else study.columns[0]
    place = study.columns.index(leading)
    notes = [*verdict(labels, [row[place] for row in cells], leading), *([study.note] if study.note else []), *remarks]
    title = f"{name}: {study.title}. Ours: {budget}"
    return Table(
        text="\n".join([title, text_table([head, *body]), *notes]),
        markdown="\n".join([f"**{title}**", "", markdown_table([head, *body]), "", *(f"- {note}" for note in notes)]),
        rows=[csv_row(label, study.columns, row) for label, row in zip(labels, cells, strict=True)],
        plot=plot(title, labels, [row[place] for row in cells], leading),
    )


def csv_row(label: str, columns: Sequence[str], row: Sequence[Cell]) -> dict[str, str | float]:
    """A row of the CSV file: the paper's, our mean, deviation and number of seeds."""
    flat: dict[str, str | float] = {"row": label}
    for column, cell in zip(columns, row, strict=True):
        flat |= {
            f"{column} paper": "" if cell.paper == NONE else cell.paper,
            f"{column} mean": cell.mean,
            f"{column} deviation": cell.deviation,
            f"{column} seeds": len(cell.values),
        }
    return flat


def plot(title: str, labels: Sequence[str], cells: Sequence[Cell], column: str) -> str:
    """Bars of the paper's figure and ours a row, with the deviation of the seeds, as SVG."""
    heights = [value for cell in cells for value in (cell.published, cell.mean) if value is not None and value == value]
    top = max([*heights, 1.0]) * 1.15
    width, high, left, base = max(420, 130 * len(labels) + 60, 20 + 7 * len(title)), 320, 50, 260
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{high}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="10" y="36">{escape(column)}: paper (grey), ours (blue)</text>',
        f'<line x1="{left}" y1="{base}" x2="{width - 10}" y2="{base}" stroke="black"/>',
    ]
    for k, (label, cell) in enumerate(zip(labels, cells, strict=True)):
        x = left + 10 + 130 * k
        for shift, value, colour in ((0, cell.published, "#999999"), (48, cell.mean, "#3b6fb6")):
            if value is None or value != value:
                continue
            tall = 200 * max(value, 0.0) / top
            parts.append(
                f'<rect x="{x + shift}" y="{base - tall:.1f}" width="44" height="{tall:.1f}" fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{x + shift + 22}" y="{base - tall - 6:.1f}" text-anchor="middle">{value:.1f}</text>'
            )
        if cell.deviation == cell.deviation and cell.mean == cell.mean:
            low, upper = (base - 200 * max(cell.mean + sign * cell.deviation, 0) / top for sign in (-1, 1))
            parts.append(f'<line x1="{x + 70}" y1="{low:.1f}" x2="{x + 70}" y2="{upper:.1f}" stroke="black"/>')
        parts.append(f'<text x="{x + 46}" y="{base + 18}" text-anchor="middle">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"])


def verdict(labels: Sequence[str], cells: Sequence[Cell], column: str) -> list[str]:
    """Sentences that say which differences of `column` exceed the noise of the seeds."""
    there = [(label, cell) for label, cell in zip(labels, cells, strict=True) if cell.values]
    if len(there) < 2:
        return ["Fewer than two rows have a figure: nothing to compare."]
    deviation, freedom = pooled_deviation([cell for _, cell in there])
    if not freedom and max(len(cell.ours) for _, cell in there) < 2:
        return ["One seed: its noise is unknown, so no difference is claimed (--seeds 2 or more)."]
    if not freedom:
        return ["No row has the figures of two seeds: the noise is unknown, so no difference is claimed."]
    if deviation < ROUNDING:
        return ["All seeds of a row gave the same figure: the noise is unknown, so no difference is claimed."]
    pairs = [(a, b) for a, b in itertools.combinations(there, 2) if not _same(a[1], b[1])]
    compared = [compare(a, b, deviation, freedom) for a, b in pairs]
    claimed = holm([one.p_value for one in compared])
    exceeding = [one.text for one, yes in zip(compared, claimed, strict=True) if yes]
    within = [one.text for one, yes in zip(compared, claimed, strict=True) if not yes]
    lines = [
        f"Noise of one run: {column} ± {deviation:.2f} ({freedom} degrees of freedom).",
        f"Beyond the noise (all of these together with {1 - SIGNIFICANCE:.0%} confidence): "
        f"{'; '.join(exceeding) or 'no difference'}.",
    ]
    if within:
        lines.append(f"Within it: {'; '.join(within)}.")
    if any(a[1].shares(b[1]) for a, b in pairs):
        lines.append("Rows that are one training, evaluated in several ways, are compared seed by seed.")
    return [*lines, *orders(labels, cells)]


def _same(a: Cell, b: Cell) -> bool:
    """True if two cells are one figure, printed twice."""
    return a.shares(b) and all(x == y or (x != x and y != y) for x, y in zip(a.ours, b.ours, strict=True))


def orders(labels: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """The paper's order of the rows beside ours, where it has two or more."""
    both = [(label, cell) for label, cell in zip(labels, cells, strict=True) if cell.paper != NONE and cell.values]
    if len(both) < 2:
        return []
    paper = [label for label, cell in sorted(both, key=lambda entry: -(entry[1].published or 0.0))]
    ours = [label for label, cell in sorted(both, key=lambda entry: -entry[1].mean)]
    if paper == ours:
        return [f"The order of the means is the paper's: {' > '.join(ours)}."]
    return [f"Order of the means: {' > '.join(ours)}; the paper's: {' > '.join(paper)}."]
