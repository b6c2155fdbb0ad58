"""Sky, mountains, ground, water and roads.

Their colours overlap on purpose: water mirrors the sky, mountains fade into it, sand, dry grass and dusty
roads share browns and greys. What they are shows in texture and place.

Shapes: H x W pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipelines.data.scenes.drawing import STUFF, TILE, Colour, Scene, fill, pick, texture, textures
from pipelines.data.scenes.things import blob

SKIES = (((96, 150, 214), (196, 216, 232)), ((150, 168, 186), (206, 208, 208)), ((74, 96, 160), (240, 186, 140)))
SKIES += (((120, 190, 220), (226, 228, 208)), ((108, 104, 140), (226, 160, 150)), ((168, 178, 182), (222, 216, 204)))
"""Zenith and horizon."""
GRASSES = ((96, 140, 62), (128, 148, 66), (74, 112, 58), (142, 146, 84))
SANDS = ((216, 190, 142), (196, 174, 134), (184, 164, 130), (222, 206, 172))
ROADS = ((112, 112, 116), (88, 90, 96), (146, 144, 142))
WATERS = ((72, 124, 160), (84, 140, 140), (110, 136, 154), (96, 110, 96))
ROCKS = ((120, 112, 108), (112, 124, 152), (140, 122, 108), (90, 96, 112))
CLOUD = np.array((246, 244, 242), np.float32)
SNOW = np.array((236, 238, 244), np.float32)


def index_of(name: str) -> int:
    """The segment of a stuff class, the same in every scene."""
    return 1 + STUFF.index(name)


def paint_backdrop(scene: Scene, rng: np.random.Generator, zenith: Colour) -> None:
    """Sky with clouds, and in most scenes one or two chains of mountains."""
    height, width = scene.size
    fade = np.clip(np.arange(height, dtype=np.float32) / scene.horizon, 0, 1)[:, None, None]
    cloud = np.clip(texture(rng, "cloud", height, width) - rng.uniform(0.0, 1.6), 0, 1.2)[..., None] * np.float32(0.6)
    sky = zenith * (1 - fade) + scene.haze * fade
    scene.image[:] = np.clip(sky + (CLOUD - sky) * cloud, 0, 255)
    scene.segments[:] = index_of("sky")
    if rng.random() < 0.7:
        for depth in range(int(rng.integers(1, 3))):
            _paint_mountains(scene, rng, depth)


def _paint_mountains(scene: Scene, rng: np.random.Generator, depth: int) -> None:
    """A chain; `depth` 1 stands before 0: lower, darker, clearer."""
    height, width = scene.size
    xs = np.linspace(0, width, 33)
    waves = ((5, 0.5), (9, 0.3), (23, 0.1), (51, 0.05))
    ridge = np.sum([np.abs(np.sin(xs / width * f + rng.uniform(0, 6))) * a for f, a in waves], axis=0)
    tall = scene.horizon * rng.uniform(0.3, 0.75) * (1 - 0.35 * depth)
    edge = np.stack([xs, scene.horizon - tall * (0.15 + ridge)], 1)
    rock = pick(rng, ROCKS, 8) * (1 - 0.12 * depth)
    rock = rock + (scene.haze - rock) * rng.uniform(0.1, 0.45) * (1 - 0.4 * depth)
    facets = texture(rng, "rock", height, width)[..., None] * np.float32(0.13 * np.sign(scene.light.side))
    colour = rock * (1 + facets)
    if rng.random() < 0.4:
        above = scene.horizon - 0.62 * tall - np.arange(height, dtype=np.float32)
        snow = np.clip(above[:, None, None] / 4 + facets * 12, 0, 1)
        colour = colour + (SNOW * (1 + 0.5 * facets) - colour) * snow
    foot = [(width, scene.horizon + 2), (0, scene.horizon + 2)]
    scene.cover(index_of("mountain"), scene.polygon(np.concatenate([edge, foot])), colour)


def paint_ground(scene: Scene, rng: np.random.Generator, zenith: Colour) -> None:
    """Grass or sand, often a patch of the other, often water up to a shoreline, often a road."""
    height, width = scene.size
    depth = height - scene.horizon
    grounds = {"grass": (pick(rng, GRASSES, 8), "grass", 0.13), "sand": (pick(rng, SANDS, 8), "fine", 0.06)}
    first, second = ("grass", "sand") if rng.random() < 0.58 else ("sand", "grass")
    mask = np.zeros(scene.size, np.uint8)
    mask[scene.horizon :] = 255
    scene.cover(index_of(first), mask, _plane(scene, rng, *grounds[first]))
    if rng.random() < 0.35:
        x, y = rng.uniform(0, width), scene.horizon + depth * rng.uniform(0.6, 1)
        patch = blob(rng, x, y, width * rng.uniform(0.2, 0.45), depth * rng.uniform(0.15, 0.35))
        patch = np.maximum(patch, (-np.inf, scene.horizon + 3))
        scene.cover(index_of(second), scene.polygon(patch), _plane(scene, rng, *grounds[second]))
    shore = rng.uniform(0.18, 0.55) if rng.random() < 0.48 else 0.0
    if shore:
        _paint_water(scene, rng, zenith, shore)
    if rng.random() < 0.62:
        _paint_road(scene, rng, shore)


def _plane(scene: Scene, rng: np.random.Generator, colour: Colour, kind: str, strength: float) -> np.ndarray:
    """float32 [H, W, 3]: a textured plane in perspective, fading into the haze. Black above the horizon."""
    height, width = scene.size
    near = np.linspace(0.04, 1, height - scene.horizon, dtype=np.float32)[:, None]
    step = near**-0.7
    across = np.arange(-(width // 2), width - width // 2, dtype=np.float32) * step + np.float32(rng.uniform(0, TILE))
    along = np.repeat(np.cumsum(step, 0) + np.float32(rng.uniform(0, TILE)), width, 1)
    tile = cv2.remap(textures()[kind], across, along, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    haze = np.exp(-6 * near) / 2
    bright = (1 - haze) * (1 + np.float32(strength) * tile * near**0.25)
    plane = np.zeros((height, width, 3), np.float32)
    plane[scene.horizon :] = bright[..., None] * colour + (haze * scene.haze)[:, None]
    return plane


def _paint_water(scene: Scene, rng: np.random.Generator, zenith: Colour, shore: float) -> None:
    """From the horizon to a wavy shoreline at `shore` of the way to the bottom."""
    height, width = scene.size
    xs = np.linspace(-2, width + 2, 25)
    wave = shore + 0.07 * np.sin(xs / width * rng.uniform(2, 7) + rng.uniform(0, 6))
    line = np.stack([xs, scene.horizon + (height - scene.horizon) * wave], 1)
    mask = scene.polygon(np.concatenate([line, [(width + 2, scene.horizon), (-2, scene.horizon)]]))
    colour = pick(rng, WATERS, 8) * 0.55 + zenith * 0.45
    scene.cover(index_of("water"), mask, _plane(scene, rng, colour, "water", 0.1))


def _paint_road(scene: Scene, rng: np.random.Generator, shore: float) -> None:
    """A road to the horizon, or one across the scene (always so behind a shore), with lane markings."""
    height, width = scene.size
    depth = height - scene.horizon
    if shore == 0 and rng.random() < 0.55:
        start = np.array((rng.uniform(0.25, 0.75) * width, scene.horizon))
        end = np.array((rng.uniform(0.3, 0.7) * width, height + 1))
        side, ease = np.array((rng.uniform(0.24, 0.42) * width, 0)), 2.2
        road = np.array([start - (1, 0), start + (1, 0), end + side, end - side])
    else:
        row = scene.horizon + depth * rng.uniform(shore + 0.16, max(0.62, shore + 0.3))
        slant = rng.uniform(-0.08, 0.08) * width
        start, end = np.array((-2, row - slant)), np.array((width + 2, row + slant))
        side, ease = np.array((0, depth * rng.uniform(0.1, 0.17))), 1.0
        road = np.array([start - side, end - side, end + side, start + side])
    mask = scene.polygon(road)
    mask[: scene.horizon] = 0
    scene.cover(index_of("road"), mask, _plane(scene, rng, pick(rng, ROADS, 8), "fine", 0.045))
    paint = pick(rng, ((228, 226, 214), (228, 226, 214), (222, 190, 90)), 6)
    for k in range(9):
        dash = [((k + s) / 9) ** ease for s in (0.25, 0.7)]
        (a, b), (c, d) = ((start + (end - start) * t, side * 0.06 * (t if ease > 1 else 1)) for t in dash)
        fill(scene.image, np.array([a - b, c - d, c + d, a + b]), paint)
