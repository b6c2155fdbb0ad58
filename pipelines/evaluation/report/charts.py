"""The tables and drawings of the report, as pieces of HTML; no script, so that any viewer shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from panoptic.metrics.bootstrap import Interval
from panoptic.metrics.report import Evaluation
from panoptic.segmentation import Categories
from pipelines.report.parts import axis_step, table

KEY = {"good": "PQ", "outline": "lost to outlines", "wrong": "to made-up segments", "missed": "to missed segments"}
"""Parts of a class's bar, by the name of their colour."""

LETTER = 8.0
"""Pixels that a letter of a plot takes at most, on average."""

MATRIX = 24
"""Largest number of classes of which the confusions are shown as a matrix."""


def number(value: float, digits: int = 1) -> str:
    """A figure as text; "–" where it is not defined."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float) -> str:
    """A difference as text; "–" where it is not defined."""
    return "–" if math.isnan(value) else f"{value:+.1f}"


def headline(evaluation: Evaluation) -> str:
    """PQ, SQ, RQ, mIoU, boundary PQ of all, things and stuff."""
    quality, regions, boundary = evaluation.quality, evaluation.regions, evaluation.boundary
    rows = [["", "PQ", "SQ", "RQ", "classes"]]
    groups = {"all": quality.all, "things": quality.things, "stuff": quality.stuff}
    rows += [[name, *map(number, (g.pq, g.sq, g.rq)), str(g.classes)] for name, g in groups.items()]
    if regions is not None:
        rows[0].append("mIoU")
        for row, value in zip(rows[1:], regions.by_kind(quality.categories), strict=True):
            row.append(number(value))
    if boundary is not None:
        rows[0].append("boundary PQ")
        for row, group in zip(rows[1:], (boundary.all, boundary.things, boundary.stuff), strict=True):
            row.append(number(group.pq))
    if evaluation.precision is not None:
        rows[0] += ["AP", "AP50"]
        precision = evaluation.precision
        for row in rows[1:]:
            things = row[0] == "things"
            row += [number(precision.mean_ap), number(precision.mean_ap50)] if things else ["", ""]
    return table(rows)


def class_bars(evaluation: Evaluation) -> str:
    """A bar of each class that occurs: what it scores and what it loses to what; the costliest first."""
    quality, counts = evaluation.quality, evaluation.quality.counts
    weight = counts.tp + 0.5 * counts.fp + 0.5 * counts.fn
    shown = [c for c in range(len(quality.pq)) if weight[c] > 0]
    key = "".join(f'<span><i style="background:var(--{name})"></i>{text}</span>' for name, text in KEY.items())
    cells = ['<span class="head">class</span><span></span><span class="head number">PQ</span>']
    cells.append('<span class="head number">costs</span>')
    for c in sorted(shown, key=lambda c: quality.pq[c]):
        parts = (counts.iou[c], counts.tp[c] - counts.iou[c], 0.5 * counts.fp[c], 0.5 * counts.fn[c])
        shares = zip(KEY, parts, strict=True)
        bar = "".join(f'<i style="width:{100 * p / weight[c]:.2f}%;background:var(--{n})"></i>' for n, p in shares)
        name = escape(quality.categories.names[c])
        segments = f"{counts.tp[c]} matched, {counts.fp[c]} made up, {counts.fn[c]} missed"
        cells.append(f'<span class="name" title="{name}">{name}</span><div class="bar" title="{segments}">{bar}</div>')
        cells.append(f'<span class="number">{number(quality.pq[c])}</span>')
        cells.append(f'<span class="number">{(100 - quality.pq[c]) / len(shown):.2f}</span>')
    return f'<div class="key">{key}</div><div class="bars">{"".join(cells)}</div>'


def size_table(evaluation: Evaluation) -> str:
    """PQ of small, medium and large segments."""
    rows = [["true segments", "PQ", "things", "stuff", "matched", "made up", "missed"]]
    names = {"small": "small (below 32²)", "medium": "medium (below 96²)", "large": "large"}
    for name, sized in evaluation.sizes.items():
        figures = [number(group.pq) for group in (sized.all, sized.things, sized.stuff)]
        counts = [str(n.sum()) for n in (sized.counts.tp, sized.counts.fp, sized.counts.fn)]
        rows.append([names.get(name, name), *figures, *counts])
    return table(rows)


def confusions(table_: np.ndarray, categories: Categories) -> str:
    """The commonest confusions as a list, and the whole matrix where classes are few."""
    names = [*categories.names, "nothing"]
    off = [(int(n), i, j) for (i, j), n in np.ndenumerate(table_) if n and i != j and len(categories) not in (i, j)]
    rows = [["true", "found as", "segments"]]
    rows += [[names[i], names[j], str(n)] for n, i, j in sorted(off, reverse=True)[:12]]
    listed = table(rows) if len(rows) > 1 else "<p>No segment was found under another class.</p>"
    return listed + (_matrix(table_, names) if len(categories) <= MATRIX else "")


def _matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    heads = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    lines = []
    for i, name in enumerate(names):
        total = max(1, counts[i].sum())
        cells = "".join(
            f'<td style="background:rgba(var(--shade),{0.65 * n / total:.2f})">{n or ""}</td>' for n in counts[i]
        )
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    head = f"<thead><tr><th>true \\ found</th>{heads}</tr></thead>"
    return f'<br><div class="scroll"><table class="matrix">{head}<tbody>{"".join(lines)}</tbody></table></div>'


def difference_bars(gains: Mapping[str, Interval], categories: Categories) -> str:
    """Differences with their intervals, the surest classes first; a dot is grey where the interval holds 0."""
    classes = [str(c) for c in range(len(categories)) if not math.isnan(gains[str(c)].value)]
    classes.sort(key=lambda c: (not gains[c].certain, -abs(gains[c].value)))
    chosen = [name for name in ("all", "things", "stuff") if not math.isnan(gains[name].value)] + classes
    reach = max([1.0, *(abs(v) for name in chosen for v in (gains[name].low, gains[name].high) if not math.isnan(v))])
    cells = ['<span class="head">class</span><span></span><span class="head number">difference</span>']
    cells.append('<span class="head number">95 %</span>')
    for name in chosen:
        one = gains[name]
        place = [50 + 48 * (v if not math.isnan(v) else one.value) / reach for v in (one.low, one.value, one.high)]
        colour = "faint" if not one.certain else "good" if one.value > 0 else "wrong"
        title = escape(categories.names[int(name)] if name.isdigit() else name)
        dot = f'<b style="left:{place[1]:.1f}%;background:var(--{colour})"></b>'
        line = f'<i style="left:{place[0]:.1f}%;width:{place[2] - place[0]:.1f}%"></i><u style="left:50%"></u>'
        cells.append(f'<span class="name">{title}</span><div class="range">{line}{dot}</div>')
        cells.append(f'<span class="number">{signed(one.value)}</span>')
        cells.append(f'<span class="number">{signed(one.low)} … {signed(one.high)}</span>')
    return f'<div class="bars">{"".join(cells)}</div>'


def speed_plot(points: Sequence[tuple[str, float, float]]) -> str:
    """PQ against milliseconds an image (network and post-processing); points are (name, ms, PQ).

    Nothing where fewer than two points have both figures.
    """
    points = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    if len(points) < 2:
        return ""
    width, height, left, bottom, right = 760, 360, 56, 46, 24
    times, scores = [max(ms, 1e-3) for _, ms, _ in points], [pq for _, _, pq in points]
    step = axis_step(max(times))
    end = step * math.ceil(1.05 * max(times) / step)
    low, high = (5 * f((v + d) / 5) for f, v, d in ((math.floor, min(scores), -1), (math.ceil, max(scores), 1)))
    low, high = max(low, 0), min(high, 100)

    def x(ms: float) -> float:
        return left + (width - left - right) * ms / end

    def y(pq: float) -> float:
        return 14 + (height - 14 - bottom) * (high - pq) / (high - low)

    marks = []
    for k in range(round(end / step) + 1):
        marks.append(f'<line x1="{x(k * step):.1f}" x2="{x(k * step):.1f}" y1="14" y2="{height - bottom}"/>')
        at = f'x="{x(k * step):.1f}" y="{height - bottom + 18}"'
        marks.append(f'<text class="faint" text-anchor="middle" {at}>{k * step:g}</text>')
    for pq in np.arange(low, high + 0.1, axis_step(high - low)):
        marks.append(f'<line x1="{left}" x2="{width - right}" y1="{y(pq):.1f}" y2="{y(pq):.1f}"/>')
        marks.append(f'<text class="faint" text-anchor="end" x="{left - 8}" y="{y(pq) + 4:.1f}">{pq:g}</text>')
    for name, ms, pq in points:
        marks.append(f'<circle cx="{x(ms):.1f}" cy="{y(pq):.1f}" r="5.5"/>')
        # to the side on which there is more room, and no longer than that
        before = x(ms) > width / 2
        room = (x(ms) - 10 if before else width - x(ms) - 10) / LETTER
        shown = name if len(name) <= room else f"{name[: math.floor(room / 2) - 1]}…{name[-math.floor(room / 2) :]}"
        place = f'text-anchor="end" x="{x(ms) - 10:.1f}"' if before else f'x="{x(ms) + 10:.1f}"'
        title = f"<title>{escape(name)}</title>" if shown != name else ""
        marks.append(f'<text {place} y="{y(pq) + 4:.1f}">{escape(shown)}{title}</text>')
    axis = f'<text class="faint" text-anchor="middle" x="{(left + width - right) / 2}" y="{height - 6}">'
    label = f"{axis}ms an image, network and post-processing</text>"
    title = f'<text class="faint" x="{left}" y="10">PQ</text>'
    body = f"{''.join(marks)}{label}{title}"
    drawing = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{body}</svg>'
    return f'<div class="scroll">{drawing}</div>'
