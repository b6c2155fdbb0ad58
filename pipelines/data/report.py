"""`prepare --report`: statistics and pictures of a data set on one page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np

from panoptic.png import decode_image, encode_jpeg
from panoptic.segmentation import Segmentation
from panoptic.visualization import overlay
from pipelines.data.manifest import Manifest
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.source import Problem, Source
from pipelines.data.statistics import BINS, Statistics, percent, share, size_pairs
from pipelines.data.validation import check_photograph
from pipelines.report.parts import axis_step, document, panels, section, table, tiles

EXAMPLES = 12
"""Images that are shown."""

WIDTH, QUALITY = 520, 82
"""Largest width of a picture in pixels, and quality of its JPEG, 0 to 100."""

SHOWN = 200
"""The most problems that are listed."""

POINTS = 1500
"""The most points of the plot of sizes; of more sizes, those that are close become one point."""

_PLOT = (720, 300, 56, 46)
"""Width and height of a plot, and its margins at the left and below."""

CLASSES = (
    "Segments and pixels of each class. The scales are logarithmic: a bar grows by the same length whenever its "
    "figure is ten times as large. The columns: segments, images that have the class, share of all pixels."
)

Pictures = Mapping[str, bytes]
"""Title to JPEG."""


def page(manifest: Manifest, examples: Sequence[tuple[str, Pictures]]) -> str:
    """The page of a set of images.

    Args:
        manifest: what `prepare` or `check` found, with its statistics.
        examples: name and pictures of the images to show.

    Raises:
        ValueError: the manifest has no statistics, as an earlier version wrote it.
    """
    counts = manifest.statistics
    if counts is None:
        raise ValueError(
            f"{manifest.uri}: an earlier version wrote these shards, without statistics; prepare them again"
        )
    source = manifest.source
    title = f"{source.get('split', manifest.split)} of {source.get('root', '')}"
    parts = [
        f"<h1>{escape(title)}</h1><p>{manifest.rows:,} images</p>",
        tiles(_tiles(manifest, counts)),
        section("Classes", CLASSES, _class_bars(manifest, counts)),
        '<div class="plots"><div>',
        section("Size of segments", "By their pixels, doubling from bar to bar.", _area_plot(manifest, counts)),
        "</div><div>",
        section("Segments of an image", "Images by the number of segments that they have.", _segment_plot(counts)),
        "</div><div>",
        section("Size of images", "A point a size; its area grows with the number of images.", _size_plot(counts)),
        "</div></div>",
        _examples(examples),
        _problems(manifest.skipped),
        section("Notes", "", _listed(manifest.notes)) if manifest.notes else "",
        section("What was read", "", table(_facts(manifest), "facts")),
    ]
    return document(title, parts)


def pictures(source: Source, number: int = EXAMPLES) -> list[tuple[str, Pictures]]:
    """Photograph and overlay of images that pass validation, evenly spaced over the rows."""
    rows = source.rows
    found = []
    for place in np.unique(np.linspace(0, max(rows.num_rows - 1, 0), number).astype(int))[: rows.num_rows]:
        row = rows.slice(int(place), 1).to_pylist()[0]
        try:
            truth = source.decode(row, read_file, source.categories).segmentation
            data, _ = check_photograph(read_file(row["image"]), row["name"], truth.size, source.orientation)
            image = decode_image(data, row["name"])
        except (ValueError, OSError):  # it is a row of the table of problems
            continue
        found.append((row["name"], _drawn(image, truth, source)))
    return found


def _drawn(image: np.ndarray, truth: Segmentation, source: Source) -> Pictures:
    height, width = truth.size
    scale = min(1.0, WIDTH / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    segments = cv2.resize(truth.segments, size, interpolation=cv2.INTER_NEAREST)
    drawn = overlay(small, Segmentation(segments, truth.labels, truth.crowd), source.categories)
    return {"image": encode_jpeg(small, QUALITY), "segments": encode_jpeg(drawn, QUALITY)}


def _tiles(manifest: Manifest, counts: Statistics) -> list[tuple[str, str]]:
    segments = sum(manifest.segments)
    sizes = size_pairs(counts)
    most = max(sizes, key=lambda size: size[2], default=(0, 0, 0))
    return [
        ("images", f"{manifest.rows:,}"),
        ("segments", f"{segments:,}"),
        ("segments an image", f"{segments / max(manifest.rows, 1):.1f}"),
        ("of the pixels void", percent(counts.void, counts.pixels)),
        ("of the pixels crowds", percent(counts.crowd, counts.pixels)),
        (f"sizes; {percent(most[2], manifest.rows)} are {most[1]} x {most[0]}", f"{len(sizes):,}"),
        ("images left out", f"{len(manifest.skipped):,}"),
    ]


def _class_bars(manifest: Manifest, counts: Statistics) -> str:
    """Two bars of each class, the class with most segments first; things before stuff."""
    categories = manifest.categories

    def length(value: int, largest: int) -> float:
        return 100 * math.log10(1 + value) / max(math.log10(1 + largest), 1e-9)

    most, widest = max(manifest.segments, default=0), max(counts.class_pixels, default=0)
    order = sorted(range(len(categories)), key=lambda c: (not categories.is_thing[c], -manifest.segments[c]))
    cells = []
    for kind, heading in ((True, "things"), (False, "stuff")):
        chosen = [c for c in order if categories.is_thing[c] == kind and manifest.segments[c]]
        if not chosen:
            continue
        heads = (heading, "", "segments", "images", "pixels")
        cells += [f'<span class="head{" number" * (k > 1)}">{head}</span>' for k, head in enumerate(heads)]
        for c in chosen:
            name = escape(categories.names[c])
            colour = ",".join(map(str, categories.colours[c]))
            bars = (
                f'<i style="width:{length(manifest.segments[c], most):.1f}%;background:var(--accent)"></i>'
                f'<i style="width:{length(counts.class_pixels[c], widest):.1f}%;background:rgb({colour})"></i>'
            )
            crowds = f"{counts.class_crowds[c]} of them crowds"
            cells.append(
                f'<span class="name" title="{name}">{name}</span><div class="pair" title="{crowds}">{bars}</div>'
            )
            figures = (f"{manifest.segments[c]:,}", f"{counts.class_images[c]:,}", share(counts, c))
            cells += [f'<span class="number">{figure}</span>' for figure in figures]
    key = (
        '<div class="key"><span><i style="background:var(--accent)"></i>segments</span>'
        '<span><i style="background:linear-gradient(90deg,#c33,#3a3,#33c)"></i>'
        "pixels, in the colour of the class</span></div>"
    )
    absent = [escape(categories.names[c]) for c in order if not manifest.segments[c]]
    rest = f"<p>{len(absent)} classes have no segment: {', '.join(absent)}.</p>" if absent else ""
    return f'{key}<div class="bars five">{"".join(cells)}</div>{rest}'


def _area_plot(manifest: Manifest, counts: Statistics) -> str:
    """Things and stuff on top of each other."""
    areas = np.asarray(counts.areas, np.int64).reshape(-1, BINS)
    thing = np.array(manifest.categories.is_thing, bool)
    kinds = areas[thing].sum(0), areas[~thing].sum(0)
    occurring = np.flatnonzero(kinds[0] + kinds[1])
    if not len(occurring):
        return "<p>There is no segment.</p>"
    first, last = occurring[0], occurring[-1] + 1
    names = [_short(2**k) for k in range(first, last)]
    key = '<div class="key"><span><i style="background:var(--accent)"></i>things</span>'
    key += '<span><i style="background:var(--outline)"></i>stuff</span></div>'
    bars = [(int(things), int(stuff)) for things, stuff in zip(*(kind[first:last] for kind in kinds), strict=True)]
    return key + _histogram(names, bars, "pixels of the segment, from", "segments")


def _segment_plot(counts: Statistics) -> str:
    """At most 60 bars; of more numbers, several neighbours share one."""
    wide = max(1, -(-len(counts.segments) // 60))
    bars = [(sum(counts.segments[k : k + wide]), 0) for k in range(0, len(counts.segments), wide)]
    names = [f"{k}" for k in range(0, len(counts.segments), wide)]
    if not bars:
        return "<p>There is no image.</p>"
    return _histogram(names, bars, "segments of the image" + f" (from, {wide} to a bar)" * (wide > 1), "images")


def _histogram(names: Sequence[str], bars: Sequence[tuple[int, int]], below: str, beside: str) -> str:
    """Bars of two parts on top of each other, with the name of every bar, or of as many as have room."""
    width, height, left, bottom = _PLOT
    top, high = 22, max(sum(bar) for bar in bars)
    step = max(1.0, axis_step(high))
    end = step * math.ceil(high / step)
    room = (width - left - 10) / len(bars)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - value / end)

    marks = _rows_of_grid(end, step, y, left, width - 10)
    every = max(1, math.ceil(len(bars) * 42 / (width - left)))
    for k, (name, (one, two)) in enumerate(zip(names, bars, strict=True)):
        x = left + k * room
        title = f"<title>{escape(name)}: {one + two:,}</title>"
        size = f'x="{x + 1:.1f}" width="{max(room - 2, 1):.1f}"'
        marks.append(f'<rect {size} y="{y(one):.1f}" height="{y(0) - y(one):.1f}">{title}</rect>')
        if two:
            span = f'y="{y(one + two):.1f}" height="{y(one) - y(one + two):.1f}"'
            marks.append(f'<rect class="second" {size} {span}>{title}</rect>')
        if k % every == 0:
            at = f'x="{x + room / 2:.1f}" y="{height - bottom + 18}"'
            marks.append(f'<text class="faint" text-anchor="middle" {at}>{escape(name)}</text>')
    return _svg(marks, below, beside)


def _size_plot(counts: Statistics) -> str:
    """Width and height of the images."""
    width, height, left, bottom = _PLOT
    points = size_pairs(counts)
    grain = 1
    while len(points) > POINTS:
        grain *= 2
        merged: dict[tuple[int, int], int] = {}
        for h, w, count in size_pairs(counts):
            place = (max(h // grain, 1) * grain, max(w // grain, 1) * grain)
            merged[place] = merged.get(place, 0) + count
        points = [(h, w, count) for (h, w), count in merged.items()]
    if not points:
        return "<p>There is no image.</p>"
    widest, highest, most = (max(point[k] for point in points) for k in (1, 0, 2))
    (right, column), (end, row) = ((s * math.ceil(1.04 * v / s), s) for v in (widest, highest) for s in [axis_step(v)])

    def x(value: float) -> float:
        return left + (width - left - 24) * value / right

    def y(value: float) -> float:
        return 22 + (height - 22 - bottom) * (1 - value / end)

    marks = _rows_of_grid(end, row, y, left, width - 24)
    for k in range(round(right / column) + 1):
        marks.append(f'<line x1="{x(k * column):.1f}" x2="{x(k * column):.1f}" y1="{y(end):.1f}" y2="{y(0):.1f}"/>')
        at = f'x="{x(k * column):.1f}" y="{height - bottom + 18}"'
        marks.append(f'<text class="faint" text-anchor="middle" {at}>{k * column:g}</text>')
    for h, w, count in sorted(points, key=lambda point: -point[2]):
        radius = 4 + 14 * math.sqrt(count / most) * (most > 1)
        title = f"<title>{w} x {h}: {count:,} images</title>"
        marks.append(f'<circle class="many" cx="{x(w):.1f}" cy="{y(h):.1f}" r="{radius:.1f}">{title}</circle>')
    return _svg(marks, "width in pixels", "height in pixels")


def _rows_of_grid(end: float, step: float, y, left: float, right: float) -> list[str]:
    marks = []
    for k in range(round(end / step) + 1):
        marks.append(f'<line x1="{left}" x2="{right}" y1="{y(k * step):.1f}" y2="{y(k * step):.1f}"/>')
        at = f'x="{left - 8}" y="{y(k * step) + 4:.1f}"'
        marks.append(f'<text class="faint" text-anchor="end" {at}>{_short(k * step)}</text>')
    return marks


def _svg(marks: Sequence[str], below: str, beside: str) -> str:
    width, height, left, _ = _PLOT
    names = (
        f'<text class="faint" text-anchor="middle" x="{(left + width) / 2}" y="{height - 6}">{escape(below)}</text>'
        f'<text class="faint beside" x="0" y="11">{escape(beside)}</text>'
    )
    drawing = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(marks)}{names}</svg>'
    return f'<div class="scroll">{drawing}</div>'


def _short(value: float) -> str:
    """A number in at most four characters or so: 1.5k, 16M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.{0 if value >= 10 * size else 1}f}".removesuffix(".0") + letter
    return f"{value:g}"


def _examples(examples: Sequence[tuple[str, Pictures]]) -> str:
    figures = (f"<figure><figcaption>{escape(n)}</figcaption>{panels(n, p)}</figure>" for n, p in examples)
    text = "Evenly spaced over the data set. Hatched: void. Segments of one class have shades of its colour."
    body = "".join(figures).replace('class="panels"', 'class="panels two"')
    return section("Examples", text, f'<div class="figures">{body}</div>') if examples else ""


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return ""
    rows = [[problem.name, " → ".join(filter(None, (problem.reason, problem.remedy)))] for problem in problems[:SHOWN]]
    rest = f" The first {SHOWN} are listed." if len(problems) > SHOWN else ""
    return section(f"{len(problems):,} images left out", f"They failed validation.{rest}", table(rows, "facts"))


def _listed(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _facts(manifest: Manifest) -> list[list[str]]:
    source = manifest.source
    facts = {
        "data set": source.get("root", ""),
        "split": manifest.split,
        "reader": source.get("reader", ""),
        "shards": f"{len(manifest.shards)} at {manifest.uri}" if manifest.shards else "",
        "content hash": manifest.hash,
        "largest height x width": f"{manifest.maximum_height} x {manifest.maximum_width}",
    }
    return [[name, str(value)] for name, value in facts.items() if value]
