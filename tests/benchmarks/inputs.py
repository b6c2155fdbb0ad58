"""Seeded inputs with the statistics of photographs: ragged contours, dozens of segments, some void.

Shapes: H x W pixels, C classes, N segments.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from panoptic.segmentation import Categories, Sample, Segmentation, collate, default_colour
from panoptic.targets.dense import centre_heatmap, centre_offsets, segment_moments

BYTES_PER_PIXEL = 160_000 / (640 * 480)
"""Of a JPEG: COCO's mean."""


def categories(things: int, stuff: int) -> Categories:
    """So many classes, stuff first."""
    count = things + stuff
    return Categories(
        names=tuple(f"class {k}" for k in range(count)),
        is_thing=tuple(k >= stuff for k in range(count)),
        ids=tuple(range(1, count + 1)),
        colours=tuple(default_colour(k) for k in range(count)),
    )


def draw_truth(
    rng: np.random.Generator, size: tuple[int, int], things: int, stuff: int, classes: Categories
) -> Segmentation:
    """Regions of stuff under blobs of things (one of them a crowd), with some void."""
    score = np.stack([_smooth(rng, size, 6) + 0.06 * _smooth(rng, size, 60) for _ in range(stuff)])
    segments = score.argmax(0).astype(np.int32) + 1
    labels = rng.choice(np.array(classes.stuff), stuff, replace=False).tolist()
    for row, column in _spread(rng, size, things):
        labels.append(int(rng.choice(np.array(classes.things))))
        radius = min(size) * np.clip(0.05 * rng.lognormal(0, 0.7), 0.02, 0.3)
        cv2.fillPoly(segments, [_blob(rng, row, column, radius)], len(labels))
    for row, column in _spread(rng, size, 3):
        cv2.fillPoly(segments, [_blob(rng, row, column, 0.04 * min(size))], 0)
    crowd = np.zeros(len(labels), bool)
    crowd[-1] = True
    return Segmentation(segments, np.array(labels, np.int64), crowd).compact()


def disturb(rng: np.random.Generator, truth: Segmentation, classes: Categories) -> Segmentation:
    """A prediction: contours off by some pixels, some classes wrong, one segment in ten missing."""
    rows, columns = (np.arange(side, dtype=np.float32) for side in truth.size)
    reach = 0.006 * min(truth.size)
    x = columns + reach * _smooth(rng, truth.size, 25)
    y = rows[:, None] + reach * _smooth(rng, truth.size, 25)
    source = truth.segments.astype(np.uint16)
    moved = np.asarray(cv2.remap(source, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE), np.uint16)
    count = len(truth.labels)
    kept = np.concatenate([[False], rng.random(count) > 0.1])
    wrong = (rng.random(count) < 0.15) & np.isin(truth.labels, classes.things)
    labels = np.where(wrong, rng.choice(np.array(classes.things), count), truth.labels)
    return Segmentation((moved * kept[moved]).astype(np.int32), labels).compact()


def draw_image(rng: np.random.Generator, truth: Segmentation) -> np.ndarray:
    """uint8 [H, W, 3], every segment in a colour, shaded and textured."""
    colours = rng.integers(40, 216, (len(truth.labels) + 1, 3)).astype(np.float32)
    shade = 25 * _smooth(rng, truth.size, 5) + 14 * _smooth(rng, truth.size, 90)
    grain = cv2.GaussianBlur(rng.normal(0, 22, (*truth.size, 3)).astype(np.float32), (0, 0), 0.7)
    return np.clip(colours[truth.segments] + shade[..., None] + grain, 0, 255).astype(np.uint8)


def encode_jpeg(image: np.ndarray) -> bytes:
    """At the best quality whose size does not exceed the mean of COCO's files by area."""
    for quality in range(98, 10, -2):
        data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= BYTES_PER_PIXEL * image.shape[0] * image.shape[1]:
            break
    return data


def draw_outputs(
    rng: np.random.Generator, truth: Segmentation, classes: Categories, sigma: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """What a trained Panoptic-DeepLab would give: smooth stride-4 maps brought to full size.

    Returns:
        class int64 [H, W], heatmap float32 [H, W], offset float32 [2, H, W].
    """
    _, targets = collate([Sample(np.zeros((*truth.size, 3), np.uint8), truth, "drawn")])
    moments = segment_moments(targets)
    peaks = centre_heatmap(targets, classes, moments, sigma)[0, 0].numpy()
    heatmap = _coarse(peaks + rng.uniform(0, 1e-3, peaks.shape).astype(np.float32))  # no network gives equal heights
    noise = 2 * np.stack([_smooth(rng, truth.size, 40) for _ in range(2)])
    offset = np.stack([_coarse(plane) for plane in centre_offsets(targets, classes, moments)[0].numpy()])
    predicted = disturb(rng, truth, classes).semantic().astype(np.int64)
    semantic = np.where(predicted < 0, classes.stuff[0], predicted)
    return torch.from_numpy(semantic), torch.from_numpy(heatmap), torch.from_numpy((offset + noise).astype(np.float32))


def _coarse(plane: np.ndarray) -> np.ndarray:
    """Through stride 4 and back, as heads see it."""
    small = plane[::4, ::4]
    return cv2.resize(np.ascontiguousarray(small), plane.shape[::-1], interpolation=cv2.INTER_LINEAR)


def _smooth(rng: np.random.Generator, size: tuple[int, int], detail: int) -> np.ndarray:
    """float32 [H, W] noise of unit variance, about `detail` bumps along the short side."""
    step = max(1.0, min(size) / detail)
    small = rng.normal(size=(int(size[0] / step) + 2, int(size[1] / step) + 2)).astype(np.float32)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


def _spread(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[tuple[float, float]]:
    """Points that keep apart, so that every thing keeps a centre of its own."""
    apart = 0.55 * (size[0] * size[1] / max(1, count)) ** 0.5
    points: list[tuple[float, float]] = []
    while len(points) < count:
        row, column = rng.uniform(0.06, 0.94, 2) * size
        if all(np.hypot(row - y, column - x) >= apart for y, x in points):
            points.append((row, column))
        apart *= 0.999
    return points


def _blob(rng: np.random.Generator, row: float, column: float, radius: float) -> np.ndarray:
    """int32 [48, 2], the corners (x, y) of a ragged blob."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    waves = sum(rng.normal(0, 0.25 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(1, 6))
    reach = radius * np.clip(1 + waves + rng.normal(0, 0.05, 48), 0.3, 2)
    return np.stack([column + reach * np.cos(angle), row + 1.4 * reach * np.sin(angle)], 1).astype(np.int32)
