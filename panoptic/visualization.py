"""Pictures of panoptic maps: overlays, truth beside prediction, errors, a legend.

Each segment is tinted in its class's colour, varied a little from one instance of a class to the
next; things are outlined in white, void is dark and hatched, crowds are hatched in their colour.

Shapes: H x W pixels, N segments. Images are uint8 [H, W, 3], RGB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from panoptic.metrics.panoptic_quality import overlaps, pair
from panoptic.segmentation import VOID, Categories, Segmentation

TINT = 0.58
"""Share of the segment's colour in a pixel."""

NAMED_AREA = 0.004
"""A segment is named from this share of the image on."""

FONT = cv2.FONT_HERSHEY_SIMPLEX

INK, PAPER = (40, 40, 40), (255, 255, 255)
"""Colours of text and of the ground around pictures."""


def overlay(image: np.ndarray, segmentation: Segmentation, categories: Categories, names: bool = True) -> np.ndarray:
    """The map drawn over its image, uint8 [H, W, 3].

    Args:
        image: uint8 [H, W, 3], RGB.
        segmentation: of the same size.
        names: write the class on every segment that is large enough.

    Raises:
        ValueError: the sizes differ.
    """
    if image.shape[:2] != segmentation.size:
        raise ValueError(f"overlay: the image is {image.shape[:2]}, the map {segmentation.size}; resize one of them")
    segments = segmentation.segments
    colours = segment_colours(segmentation, categories)
    # lighter and less coloured underneath, so that the tints of dark and bright photographs look alike
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    base = 0.6 * image + 0.4 * (40 + 0.8 * grey.astype(np.float32))
    drawn = (1 - TINT) * base + TINT * colours[segments]
    void = segments == VOID
    drawn[void] = 0.35 * image[void]
    stripes = _stripes(segmentation.size)
    drawn[void & stripes] += 45
    crowd = np.concatenate([[False], segmentation.is_crowd()])[segments]
    drawn[crowd & stripes] *= 0.72
    drawn = _outlined(drawn, segmentation, categories)
    result = np.clip(drawn, 0, 255).round().astype(np.uint8)
    return _named(result, segmentation, categories, colours) if names else result


RIGHT, MISSED, MADE_UP, EDGE = range(4)
ERROR_COLOURS = {RIGHT: (120, 190, 130), MISSED: (60, 120, 235), MADE_UP: (235, 70, 60), EDGE: (250, 190, 40)}
"""Colours of the pixels in `errors`: RIGHT within a matched pair, MISSED in a true segment without a match, MADE_UP in
a predicted segment that is a false positive (also where it lies on a missed one), EDGE where segments that have a match
do not meet it."""


def errors(image: np.ndarray, truth: Segmentation, prediction: Segmentation) -> np.ndarray:
    """The errors of a prediction in `ERROR_COLOURS`, uint8 [H, W, 3]; where the truth is void, the image alone.

    Segments match as they do for PQ.

    Args:
        image: uint8 [H, W, 3], RGB.
        truth, prediction: of the same size.

    Raises:
        ValueError: the sizes differ.
    """
    if image.shape[:2] != truth.size:
        raise ValueError(f"errors: the image is {image.shape[:2]}, the map {truth.size}; resize one of them")
    pairs = pair(overlaps(truth, prediction), truth.labels, truth.is_crowd(), prediction.labels)
    partner = np.zeros(len(truth.labels) + 1, np.int32)
    partner[pairs.truth + 1] = pairs.prediction + 1
    missed, false = (np.concatenate([[False], flags]) for flags in (pairs.missed, pairs.false))
    kind = np.full(truth.size, EDGE)
    kind[missed[truth.segments]] = MISSED
    kind[false[prediction.segments]] = MADE_UP
    kind[(partner[truth.segments] == prediction.segments) & (prediction.segments != VOID)] = RIGHT
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, 2).astype(np.float32)
    strength = np.array([0.12, 0.6, 0.6, 0.75], np.float32)[kind][..., None]
    colours = np.array([ERROR_COLOURS[k] for k in range(4)], np.float32)[kind]
    drawn = 0.8 * grey * (1 - strength) + colours * strength
    ignored = (truth.segments == VOID) | np.concatenate([[False], truth.is_crowd()])[truth.segments]
    drawn[ignored] = 0.4 * grey[ignored]
    return np.clip(drawn, 0, 255).round().astype(np.uint8)


def side_by_side(
    image: np.ndarray,
    truth: Segmentation | None,
    prediction: Segmentation | None,
    categories: Categories,
    key: bool = True,
) -> np.ndarray:
    """Image, truth and prediction in a row under their titles, uint8 [H', W', 3].

    Args:
        image: uint8 [H, W, 3], RGB.
        truth: left out when None.
        prediction: left out when None.
        key: add a legend of the classes that occur.
    """
    panels = [("image", image)]
    maps = [(title, m) for title, m in (("truth", truth), ("prediction", prediction)) if m is not None]
    panels += [(title, overlay(image, m, categories)) for title, m in maps]
    gap = max(4, round(image.shape[1] / 100))
    scale = _text_scale(image.shape[:2])
    strips = [_titled(title, panel, scale) for title, panel in panels]
    space = np.full((strips[0].shape[0], gap, 3), PAPER, np.uint8)
    row = np.hstack([part for strip in strips for part in (strip, space)][:-1])
    if not key or not maps:
        return row
    present = {int(label) for _, m in maps for label in m.compact().labels}
    return np.vstack([row, legend(categories, row.shape[1], present, scale)])


def legend(
    categories: Categories, width: int, only: Iterable[int] | None = None, scale: float | None = None
) -> np.ndarray:
    """Swatches and names in columns, things before stuff, on white: uint8 [h, width, 3].

    Args:
        width: in pixels; the height follows.
        only: the contiguous classes to show, all of them by default.
        scale: of the text; by default from the width.
    """
    chosen = set(range(len(categories))) if only is None else set(only)
    entries = [i for i in (*categories.things, *categories.stuff) if i in chosen]
    scale = scale or min(0.6, max(0.4, width / 2000))
    line = round(44 * scale)
    widest = max((_text_size(categories.names[i], scale)[0] for i in entries), default=0)
    column = min(width, widest + 2 * line)
    columns = max(1, width // max(column, 1))
    rows = -(-len(entries) // columns)
    picture = np.full((max(1, rows) * line + line // 2, width, 3), PAPER, np.uint8)
    for k, i in enumerate(entries):
        x, y = (k // rows) * column + line // 3, (k % rows) * line + line // 3
        side = round(0.7 * line)
        cv2.rectangle(picture, (x, y), (x + side, y + side), categories.colours[i], cv2.FILLED)
        border = INK if categories.is_thing[i] else (200, 200, 200)
        cv2.rectangle(picture, (x, y), (x + side, y + side), border, 1, cv2.LINE_AA)
        _write(picture, categories.names[i], (x + side + line // 4, y + round(0.58 * line)), scale, INK)
    return picture


def segment_colours(segmentation: Segmentation, categories: Categories) -> np.ndarray:
    """float32 [N + 1, 3], RGB of void and of each segment; the first of a class has the class's own colour."""
    table = np.array(categories.colours, np.float32).reshape(-1, 3)
    base = table[segmentation.labels] if len(segmentation.labels) else np.zeros((0, 3), np.float32)
    turns = np.zeros(len(base), np.float32)
    seen: dict[int, int] = {}
    for k, label in enumerate(segmentation.labels.tolist()):
        turns[k] = seen.get(label, 0)
        seen[label] = seen.get(label, 0) + 1
    if len(base):
        base = _varied(base, turns)
    return np.concatenate([np.zeros((1, 3), np.float32), base])


def _varied(colours: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Colours [N, 3] moved in lightness (up to 16) and hue (up to 22 degrees) by low-discrepancy sequences."""
    light, a, b = cv2.cvtColor(colours[:, None] / 255, cv2.COLOR_RGB2LAB)[:, 0].T
    lightness, hue = ((turns * step + 0.5) % 1 - 0.5 for step in (0.7548777, 0.5698403))
    cosine, sine = np.cos(np.deg2rad(44 * hue)), np.sin(np.deg2rad(44 * hue))
    moved = np.stack([np.clip(light + 32 * lightness, 18, 92), a * cosine - b * sine, a * sine + b * cosine], 1)
    result = 255 * np.clip(cv2.cvtColor(moved[:, None].astype(np.float32), cv2.COLOR_LAB2RGB)[:, 0], 0, 1)
    return np.where(turns[:, None] == 0, colours, result)


def _stripes(size: tuple[int, int]) -> np.ndarray:
    """bool [H, W], diagonal hatching."""
    period = max(6, round(min(size) / 50))
    rows, columns = np.ogrid[: size[0], : size[1]]
    return (rows + columns) % period < max(2, period // 3)


def _outlined(drawn: np.ndarray, segmentation: Segmentation, categories: Categories) -> np.ndarray:
    """White borders around things, faint dark ones between the rest."""
    thing = np.array([False, *(categories.is_thing[i] for i in segmentation.labels.tolist())])
    things = np.where(thing[segmentation.segments], segmentation.segments, 0)
    wide = max(segmentation.size) > 1000
    for edge, colour, share in (
        (_edges(segmentation.segments, wide), 20.0, 0.35),
        (_edges(things, wide) & thing[segmentation.segments], 255.0, 0.85),
    ):
        drawn[edge] = (1 - share) * drawn[edge] + share * colour
    return drawn


def _edges(ids: np.ndarray, wide: bool) -> np.ndarray:
    """bool [H, W], the pixels with a neighbour (left, right, above, below) of another id."""
    edge = np.zeros(ids.shape, bool)
    across, down = ids[:, 1:] != ids[:, :-1], ids[1:] != ids[:-1]
    edge[:, 1:] |= across
    edge[1:] |= down
    edge[:, :-1] |= across
    edge[:-1] |= down
    return cv2.dilate(edge.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) if wide else edge


def _named(picture: np.ndarray, segmentation: Segmentation, categories: Categories, colours: np.ndarray) -> np.ndarray:
    """Class names inside the segments that hold them, largest first, none over another."""
    areas = segmentation.areas()
    scale = _text_scale(segmentation.size)
    taken: list[tuple[int, int, int, int]] = []
    for k in np.argsort(-areas).tolist():
        if areas[k] < NAMED_AREA * picture[..., 0].size:
            break
        text = categories.names[int(segmentation.labels[k])]
        box = _place(segmentation.segments == k + 1, _text_size(text, scale), picture.shape[:2])
        if box is None or any(_overlap(box, other) for other in taken):
            continue
        taken.append(box)
        x0, y0, x1, y1 = box
        # a chip in the segment's colour, darkened until white text can be read on it
        chip = colours[k + 1] * min(0.75, 90 / max(1.0, float(colours[k + 1] @ (0.299, 0.587, 0.114))))
        picture[y0:y1, x0:x1] = (0.25 * picture[y0:y1, x0:x1] + 0.75 * chip).astype(np.uint8)
        pad = round(8 * scale)
        _write(picture, text, (x0 + pad, y1 - pad), scale, PAPER)
    return picture


def _place(inside: np.ndarray, text: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The place x0 y0 x1 y1 of a text box in a mask [H, W], around its innermost point; None where it does not fit."""
    distance = cv2.distanceTransform(np.pad(inside, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    width, height = text
    across = np.flatnonzero(inside[row])
    if 2 * distance[row, column] < height or np.ptp(across) < 0.9 * width:
        return None
    x = int(np.clip(column - width // 2, 0, max(0, size[1] - width)))
    y = int(np.clip(row - height // 2, 0, max(0, size[0] - height)))
    return x, y, min(x + width, size[1]), min(y + height, size[0])


def _overlap(a: Sequence[int], b: Sequence[int]) -> bool:
    """Two boxes x0 y0 x1 y1 share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _text_scale(size: tuple[int, int]) -> float:
    """Scale of OpenCV's font, so that text can be read at the width that a page gives the picture."""
    return float(np.clip(min(size) / 1000, 0.38, 1.0))


def _text_size(text: str, scale: float) -> tuple[int, int]:
    """(width, height) of a text with its margin, in pixels."""
    (width, _), _ = cv2.getTextSize(text, FONT, scale, 1)
    (_, height), below = cv2.getTextSize("Ag", FONT, scale, 1)
    pad = round(8 * scale)
    return width + 2 * pad, height + below // 2 + 2 * pad


def _write(picture: np.ndarray, text: str, corner: tuple[int, int], scale: float, colour: Sequence[int]) -> None:
    """Text from its lower left corner."""
    cv2.putText(picture, text, corner, FONT, scale, colour, 1 if scale < 0.8 else 2, cv2.LINE_AA)


def _titled(title: str, panel: np.ndarray, scale: float) -> np.ndarray:
    """A panel under a strip of white with its title."""
    strip = np.full((_text_size(title, scale)[1] + 4, panel.shape[1], 3), PAPER, np.uint8)
    _write(strip, title, (round(8 * scale), strip.shape[0] - round(10 * scale)), scale, INK)
    return np.vstack([strip, panel])
