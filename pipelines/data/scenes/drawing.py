"""The canvas of a scene, its light and textures, and polygons put on it.

Shapes: H x W pixels, h x w a window, K corners of a polygon. Objects are in metres: x to the right, y up,
(0, 0) where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np

Colour = np.ndarray
"""[3], RGB, 0..255."""

STUFF = ("sky", "mountain", "grass", "road", "water", "sand")
"""The stuff classes, in the order of their segments in every scene."""
SUBPIXEL = 4
"""Fractional bits of polygon corners."""
TILE = 512
"""Side of the noise tiles, longer than any scene."""


@dataclass(frozen=True)
class Part:
    """One filled polygon of an object."""

    points: np.ndarray
    """float64 [K, 2], metres."""
    colour: Colour
    grain: float = 0.0
    """Strength of the leaf texture on it."""


@dataclass(frozen=True)
class Light:
    """The direction of a scene's light."""

    side: float
    """-1 (from the left) .. 1 (from the right)."""
    depth: float
    """Length of a shadow toward the viewer, per metre of height; negative falls away from the viewer."""
    strength: float
    """0 (overcast, no shadow) .. 1."""


@dataclass
class Scene:
    """A scene while it is drawn."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    segments: np.ndarray
    """int32 [H, W]; segment k is entry k - 1 of `names`; stuff comes first, 0 is void."""
    horizon: int
    """The row where ground ends."""
    scale: float
    """Pixels per metre at the bottom of the image."""
    light: Light
    haze: Colour
    """The colour of the far distance."""
    names: list[str] = field(default_factory=lambda: list(STUFF))
    crowd: list[bool] = field(default_factory=lambda: [False] * len(STUFF))

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.segments.shape[0], self.segments.shape[1]

    def scale_at(self, row: float) -> float:
        """Pixels per metre for what stands at `row`."""
        return self.scale * (0.12 + 0.88 * (row - self.horizon) / (self.size[0] - self.horizon))

    def polygon(self, points: np.ndarray) -> np.ndarray:
        """uint8 [H, W], how far each pixel is covered. `points` [K, 2] are x, y in pixels."""
        mask = np.zeros(self.size, np.uint8)
        fill(mask, points, 255)
        return mask

    def cover(self, segment: int, mask: np.ndarray, colour: np.ndarray) -> None:
        """Blend `colour` ([H, W, 3] or what broadcasts) in where `mask` uint8 [H, W] covers; a half-covered pixel
        belongs to `segment`."""
        weight = mask[..., None] / np.float32(255)
        self.image[:] = self.image + (np.clip(colour, 0, 255) - self.image) * weight
        self.segments[mask > 127] = segment


def pick(rng: np.random.Generator, colours: Sequence[tuple[int, int, int]], spread: float = 14.0) -> Colour:
    """One of `colours`, jittered, float32."""
    colour = np.array(colours[int(rng.integers(len(colours)))]) + rng.normal(0, spread, 3)
    return np.clip(colour, 8, 250).astype(np.float32)


@lru_cache(maxsize=1)
def textures() -> dict[str, np.ndarray]:
    """Tiles float32 [TILE, TILE] of about zero mean and unit deviation, the same in every process."""
    rng = np.random.default_rng(20240)

    def noise(across: float = 0, down: float = 0) -> np.ndarray:
        white = rng.standard_normal((TILE, TILE)).astype(np.float32)
        return _unit(cv2.GaussianBlur(white, (0, 0), across, sigmaY=down or across) if across else white)

    slope = np.array([[1, 0.55, 0], [0, 1, 0]], np.float32)
    rock = cv2.warpAffine(noise(2, 9), slope, (TILE, TILE), borderMode=cv2.BORDER_WRAP)
    return {
        "fine": noise(),
        "grass": _unit(noise(0.7, 2.2) + 0.5 * noise(9)),
        "water": noise(7, 1.1),
        "rock": _unit(np.sign(rock) * np.sqrt(np.abs(rock))),
        "cloud": _unit(3 * noise(6, 3) + 7 * noise(14, 7) + 15 * noise(30, 15)),
        "leaf": noise(1.3),
    }


def _unit(tile: np.ndarray) -> np.ndarray:
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def texture(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """A random window of a tile, float32 [height, width]."""
    top, left = rng.integers(TILE - height + 1), rng.integers(TILE - width + 1)
    return textures()[name][top : top + height, left : left + width]


# ---------------------------------------------------------------- pixels


def fill(
    target: np.ndarray, points: np.ndarray, value: float | np.ndarray, origin: tuple[float, float] = (0, 0)
) -> None:
    """Fill a polygon, antialiased, in place. `points` [K, 2] and `origin` are x, y in pixels."""
    corners = np.rint((points - origin) * (1 << SUBPIXEL)).astype(np.int32)
    cv2.fillPoly(target, [corners], value if isinstance(value, float | int) else value.tolist(), cv2.LINE_AA, SUBPIXEL)


def window(points: np.ndarray, height: int, width: int) -> tuple[int, int, int, int] | None:
    """top, bottom, left, right of the pixels that polygons with these corners can touch; None when outside."""
    left, top = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    right, bottom = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (width, height))
    return (top, bottom, left, right) if top < bottom and left < right else None


def draw(
    scene: Scene, parts: Sequence[Part], foot: tuple[float, float], scale: float, rng: np.random.Generator
) -> tuple[tuple[slice, slice], np.ndarray] | None:
    """Draw an object into the image, darker on the side away from the light.

    Args:
        scene: its image is changed, its segments are not.
        parts: back to front.
        foot: x, y in pixels of the object's origin.
        scale: pixels per metre.
        rng: of the texture.

    Returns:
        the window and bool [h, w] of the pixels that are the object's own (at least half covered), or
        None when it lies outside the image.
    """
    placed = [part.points * (scale, -scale) + foot for part in parts]
    corners = np.concatenate(placed)
    where = window(corners, *scene.size)
    if where is None:
        return None
    top, bottom, left, right = where
    view = scene.image[top:bottom, left:right]
    mask, grain = np.zeros(view.shape[:2], np.uint8), np.zeros(view.shape[:2], np.uint8)
    for part, points in zip(parts, placed, strict=True):
        fill(view, points, np.minimum(part.colour, 255), (left, top))
        fill(mask, points, 255, (left, top))
        if part.grain:
            fill(grain, points, 255 * part.grain, (left, top))
    across = (np.arange(left, right, dtype=np.float32) - foot[0]) / max(float(np.ptp(corners[:, 0])), 1.0)
    up = (foot[1] - np.arange(top, bottom, dtype=np.float32)) / max(float(np.ptp(corners[:, 1])), 1.0) - 0.5
    shade = scene.light.strength * (0.42 * scene.light.side * across[None] + 0.22 * up[:, None]) - 0.02
    if any(part.grain for part in parts):
        shade += grain * texture(rng, "leaf", *view.shape[:2]) / np.float32(255)
    shade *= mask / np.float32(255)
    np.clip(view * (1 + shade[..., None]), 0, 255, out=view, casting="unsafe")
    return (slice(top, bottom), slice(left, right)), mask > 127


def cast_shadow(scene: Scene, parts: Sequence[Part], foot: tuple[float, float], scale: float) -> None:
    """Darken the ground where an object keeps the light off it. Only the image changes, never the truth."""
    lean = np.array([[1, 0], [-scene.light.side * 0.9, scene.light.depth]])
    placed = [part.points @ lean * scale + foot for part in parts]
    where = window(np.concatenate(placed), *scene.size)
    if where is None or where[1] <= max(where[0], scene.horizon):
        return
    top, bottom, left, right = max(where[0], scene.horizon), *where[1:]
    mask = np.zeros((bottom - top, right - left), np.uint8)
    for points in placed:
        fill(mask, points, 255, (left, top))
    view = scene.image[top:bottom, left:right]
    np.multiply(
        view, 1 - (0.5 * scene.light.strength / 255) * mask[..., None].astype(np.float32), out=view, casting="unsafe"
    )
