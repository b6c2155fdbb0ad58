"""One scene: stuff, then things from far to near, then what the camera adds.

Shapes: H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pipelines.data.scenes.drawing import Light, Part, Scene, cast_shadow, draw, pick, texture
from pipelines.data.scenes.stuff import SKIES, index_of, paint_backdrop, paint_ground
from pipelines.data.scenes.things import THINGS, blob

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Habit:
    """The places of a thing class, and its frequency."""

    on: tuple[str, ...]
    """The stuff on which its foot may stand."""
    near: tuple[float, float]
    """Range of the foot between the horizon (0) and the bottom of the image (1)."""
    mean: float
    """Expected number of groups where such stuff is plenty."""
    together: float
    """Probability that another one stands right beside the last."""


HABITS = {
    "person": Habit(("grass", "sand", "road"), (0.2, 0.92), 1.4, 0.4),
    "car": Habit(("road",), (0.15, 0.75), 1.6, 0.35),
    "house": Habit(("grass", "sand"), (0.03, 0.24), 1.2, 0.45),
    "tree": Habit(("grass", "sand"), (0.05, 0.5), 1.1, 0.4),
    "boat": Habit(("water",), (0.03, 0.5), 1.7, 0.25),
    "ball": Habit(("grass", "sand"), (0.35, 0.95), 1.1, 0.3),
    "bird": Habit(("sky",), (0.0, 1.0), 1.1, 0.2),
    "sign": Habit(("grass", "sand"), (0.25, 0.7), 1.0, 0.12),
}
CROWDS = (("person", 0.14), ("bird", 0.12))
"""Things that come in groups which nobody would outline one by one, and how probable a group is in a scene."""


def render(seed: int, split: str, index: int) -> Scene:
    """Draw one scene; it depends on the three arguments alone."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    height, width = int(rng.integers(160, 257)), int(rng.integers(224, 353))
    if rng.random() < 0.12:
        height, width = width, int(height * 0.9)
    zenith, haze = (pick(rng, [colour], 10) for colour in SKIES[rng.integers(len(SKIES))])
    scene = Scene(
        image=np.zeros((height, width, 3), np.uint8),
        segments=np.zeros((height, width), np.int32),
        horizon=int(height * rng.uniform(0.28, 0.44)),
        scale=rng.uniform(36, 46) * min(height, width) / 200,
        light=Light(rng.uniform(-1, 1), rng.choice([-0.12, 0.22, 0.34]), rng.uniform(0.35, 1.0)),
        haze=haze,
    )
    paint_backdrop(scene, rng, zenith)
    paint_ground(scene, rng, zenith)
    place_things(scene, rng)
    leave_void(scene, rng)
    develop(scene, rng)
    return scene


@dataclass(frozen=True)
class Placed:
    """A thing with the place where it stands."""

    name: str
    parts: list[Part]
    foot: tuple[float, float]
    """x, y in pixels."""
    scale: float
    """Pixels per metre."""
    group: int = 0
    """Non-zero: a member of that crowd, which is one segment."""


def place_things(scene: Scene, rng: np.random.Generator) -> None:
    """Draw the planned things from far to near, each after its shadow."""
    plan = _plan(scene, rng)
    for group, (name, chance) in enumerate(CROWDS, 1):
        if rng.random() < chance:
            plan += _plan_crowd(scene, rng, name, group)
    groups: dict[int, int] = {}
    for item in sorted(plan, key=lambda placed: placed.foot[1]):
        if item.name != "bird":
            cast_shadow(scene, item.parts, item.foot, item.scale)
        own = draw(scene, item.parts, item.foot, item.scale, rng)
        if own is None:
            continue
        if item.group not in groups:
            scene.names.append(item.name)
            scene.crowd.append(item.group > 0)
        segment = groups.get(item.group, len(scene.names))
        if item.group:
            groups[item.group] = segment
        window, mask = own
        scene.segments[window][mask] = segment


def _plan(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """The things of a scene and their places, in no order. Neighbours of a class touch or overlap a little."""
    plan: list[Placed] = []
    for name, habit in HABITS.items():
        for _ in range(min(int(rng.poisson(habit.mean)), 4)):
            foot = _find_foot(scene, rng, name)
            if foot is None:
                continue
            x, y = foot
            scale = rng.uniform(18, 44) * scene.scale / 41 if name == "bird" else scene.scale_at(y)
            edge = None
            for _ in range(4):
                parts = _turned(rng, name)
                span = np.concatenate([part.points for part in parts])[:, 0] * scale
                if edge is not None:
                    x = edge - span.min() - rng.uniform(-0.02, 0.16) * np.ptp(span)
                plan.append(Placed(name, parts, (x, y), scale))
                edge, y = x + span.max(), y + rng.normal(0, 0.3)
                if rng.random() > habit.together:
                    break
    return plan


def _plan_crowd(scene: Scene, rng: np.random.Generator, name: str, group: int) -> list[Placed]:
    """People close together, or a flock."""
    foot = _find_foot(scene, rng, name)
    if foot is None:
        return []
    flock = name == "bird"
    scale = rng.uniform(7, 11) if flock else scene.scale_at(foot[1]) * 0.9
    spread = np.array((1.5, 0.7) if flock else (0.95, 0.1)) * scale
    feet = [np.array(foot) + rng.normal(0, 1, 2) * spread for _ in range(int(rng.integers(8, 15)))]
    return [Placed(name, _turned(rng, name), (float(x), float(y)), scale, group) for x, y in feet]


def _turned(rng: np.random.Generator, name: str) -> list[Part]:
    """A new thing that faces left or right."""
    side = rng.choice([-1.0, 1.0])
    return [Part(part.points * (side, 1), part.colour, part.grain) for part in THINGS[name](rng)]


def _find_foot(scene: Scene, rng: np.random.Generator, name: str) -> tuple[float, float] | None:
    """A random place on the right stuff, or None when a few draws find none."""
    height, width = scene.size
    allowed = [index_of(stuff) for stuff in HABITS[name].on]
    for _ in range(8):
        near = rng.uniform(*HABITS[name].near)
        x = rng.uniform(0.02, 0.98) * width
        y = scene.horizon * (0.08 + 0.72 * near) if name == "bird" else scene.horizon + (height - scene.horizon) * near
        if scene.segments[min(int(y), height - 1), int(x)] in allowed:
            return x, y
    return None


def leave_void(scene: Scene, rng: np.random.Generator) -> None:
    """In some scenes a letterbox, the bonnet of the car that carries the camera, or a smear: all unlabelled."""
    height, width = scene.size
    kind = rng.random()
    if kind < 0.07:
        bar = int(height * rng.uniform(0.04, 0.1))
        mask = np.zeros(scene.size, np.uint8)
        mask[:bar] = mask[height - bar :] = 255
        colour = np.full(3, rng.uniform(0, 16))
    elif kind < 0.16:
        rx, ry = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.1, 0.17)
        mask = scene.polygon(blob(rng, width * rng.uniform(0.4, 0.6), height * 1.02, rx, ry, 0.01))
        colour = pick(rng, ((40, 42, 48), (90, 30, 30), (60, 70, 90)))
    elif kind < 0.26:
        rx, ry = width * rng.uniform(0.05, 0.12), height * rng.uniform(0.05, 0.12)
        mask = scene.polygon(blob(rng, width * rng.random(), height * rng.random(), rx, ry, 0.1))
        colour = rng.uniform(60, 230, 3)
    else:
        return
    sheen = 1 + 0.12 * np.sin(np.linspace(0, 3, width))[None, :, None]
    scene.cover(0, mask, colour * sheen)


def develop(scene: Scene, rng: np.random.Generator) -> None:
    """Colour cast, exposure, falling-off light, slight blur and grain, on the image alone."""
    height, width = scene.size
    image = scene.image.astype(np.float32)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.75))
    sweep = 1 + 0.1 * rng.uniform(-1, 1) * np.linspace(-1, 1, width)[:, None]
    image *= (sweep * rng.uniform(0.82, 1.1) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    chroma = np.stack([texture(rng, "fine", height, width) for _ in range(3)], -1)
    grain = texture(rng, "fine", height, width)[..., None] + np.float32(0.4) * chroma
    scene.image = np.clip(image + grain * np.float32(rng.uniform(1, 6)), 0, 255).astype(np.uint8)
