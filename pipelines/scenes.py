"""The embedded data set: drawn scenes as an ordinary COCO-panoptic folder, with exact ground truth.

A scene is composed back to front: sky, mountains, ground, water, road, then things by their distance,
then what nobody labels (letterbox, bonnet, smear). Each object is drawn into the image and, from the
same polygons, into the map of segments; shadows, haze and noise touch the image only. Image `index` of
a split depends on (seed, split, index) alone, whatever the number of processes and of images.

    images/{train,val}/NNNNNN.jpg
    annotations/panoptic_{train,val}/NNNNNN.png     id = R + 256 G + 65536 B, 0 = void
    annotations/panoptic_{train,val}.json           written last, so that it marks a complete split

This module and `scene_drawing` import neither torch nor Ray: a writing process starts at once.

Shapes: H x W pixels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from pipelines.scene_drawing import THINGS, TILE, Light, Part, blob, box, cast_shadow, draw, fill, pick, texture, textures

VERSION = 1
"""Raise it whenever a scene of the same seed comes out differently."""
SPLITS = ("train", "val")
STUFF = ("sky", "mountain", "grass", "road", "water", "sand")
COLOURS = {
    "person": (220, 20, 60), "car": (0, 60, 200), "house": (190, 110, 60), "tree": (20, 120, 30), "boat": (150, 60, 190),
    "ball": (250, 150, 0), "bird": (240, 240, 60), "sign": (230, 90, 160), "sky": (110, 180, 230), "mountain": (120, 110, 130),
    "grass": (140, 220, 110), "road": (100, 70, 110), "water": (40, 140, 170), "sand": (235, 215, 160),
}  # fmt: skip
CATEGORY_IDS = {name: k + 1 for k, name in enumerate(THINGS)} | {name: k + 21 for k, name in enumerate(STUFF)}
CATEGORIES = [
    {"id": k, "name": name, "supercategory": "scene", "isthing": int(name in THINGS), "color": list(COLOURS[name])}
    for name, k in CATEGORY_IDS.items()
]
MIN_PIXELS = 8
"""A segment of which fewer pixels are seen is void: nobody would annotate it."""

SKIES = (((96, 150, 214), (196, 216, 232)), ((150, 168, 186), (206, 208, 208)), ((74, 96, 160), (240, 186, 140)))
SKIES += (((120, 190, 220), (226, 228, 208)), ((108, 104, 140), (226, 160, 150)), ((168, 178, 182), (222, 216, 204)))
GRASSES = ((96, 140, 62), (128, 144, 66), (74, 112, 58), (150, 146, 88), (110, 120, 84))
SANDS = ((216, 190, 142), (196, 174, 134), (176, 160, 136), (222, 206, 172), (158, 146, 108))
ROADS = ((112, 112, 116), (88, 90, 96), (150, 146, 140), (140, 122, 104))
WATERS = ((72, 124, 160), (84, 140, 140), (110, 136, 154), (96, 110, 96))
ROCKS = ((120, 112, 108), (98, 120, 92), (112, 124, 152), (156, 134, 108), (90, 96, 112))


@dataclass(frozen=True)
class Habit:
    """Where a thing class stands and how often."""

    on: tuple[str, ...]
    near: tuple[float, float]
    """Range of the foot between the horizon (0) and the bottom of the image (1)."""
    mean: float
    """Expected number of groups in a scene that has its ground."""
    together: float
    """Probability that another one stands right beside the last."""


HABITS = {
    "person": Habit(("grass", "sand", "road"), (0.2, 0.92), 1.9, 0.4),
    "car": Habit(("road",), (0.15, 0.75), 1.8, 0.35),
    "house": Habit(("grass", "sand"), (0.03, 0.24), 1.1, 0.45),
    "tree": Habit(("grass", "sand"), (0.05, 0.5), 1.5, 0.4),
    "boat": Habit(("water",), (0.03, 0.5), 1.9, 0.25),
    "ball": Habit(("grass", "sand"), (0.35, 0.95), 1.3, 0.3),
    "bird": Habit(("sky",), (0.0, 1.0), 1.5, 0.2),
    "sign": Habit(("grass", "sand"), (0.25, 0.7), 1.1, 0.12),
}


@dataclass
class Scene:
    """A scene while it is drawn."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    segments: np.ndarray
    """int32 [H, W]; segment k is entry k - 1 of `names`; stuff comes first, 0 is void."""
    horizon: int
    scale: float
    """Pixels per metre at the bottom of the image."""
    light: Light
    haze: np.ndarray
    """float64 [3], the colour of the far distance."""
    names: list[str] = field(default_factory=lambda: list(STUFF))
    crowd: list[bool] = field(default_factory=lambda: [False] * len(STUFF))

    def scale_at(self, row: float) -> float:
        """Pixels per metre for what stands at `row`."""
        near = (row - self.horizon) / (self.segments.shape[0] - self.horizon)
        return self.scale * (0.12 + 0.88 * near)


def render(seed: int, split: str, index: int) -> Scene:
    """Draw one scene; it depends on the three arguments alone."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    height, width = int(rng.integers(160, 257)), int(rng.integers(224, 353))
    if rng.random() < 0.12:
        height, width = width, int(height * 0.9)
    top, low = (np.clip(np.array(c) + rng.normal(0, 10, 3), 0, 250) for c in SKIES[rng.integers(len(SKIES))])
    scene = Scene(
        image=np.zeros((height, width, 3), np.uint8),
        segments=np.zeros((height, width), np.int32),
        horizon=int(height * rng.uniform(0.28, 0.44)),
        scale=rng.uniform(26, 36) * min(height, width) / 200,
        light=Light(rng.uniform(-1, 1), rng.choice([-0.12, 0.22, 0.34]), rng.uniform(0.35, 1.0)),
        haze=low,
    )
    _paint_backdrop(scene, rng, top)
    _paint_ground(scene, rng, top)
    _place_things(scene, rng)
    _leave_void(scene, rng)
    _develop(scene, rng)
    return scene


# ---------------------------------------------------------------- stuff


def _cover(scene: Scene, name: str, mask: np.ndarray, colour: np.ndarray) -> None:
    """Blend `colour` [H, W, 3] in where `mask` uint8 [H, W] covers, and label what is at least half covered."""
    weight = mask[..., None] / np.float32(255)
    scene.image[:] = scene.image * (1 - weight) + np.clip(colour, 0, 255) * weight
    scene.segments[mask > 127] = 1 + STUFF.index(name)


def _paint_backdrop(scene: Scene, rng: np.random.Generator, top: np.ndarray) -> None:
    """Sky with clouds, and in most scenes a chain of mountains."""
    height, width = scene.segments.shape
    fade = np.clip(np.arange(height, dtype=np.float32) / scene.horizon, 0, 1)[:, None, None]
    cloud = np.clip(texture(rng, "cloud", height, width) - rng.uniform(0.0, 1.6), 0, 1.2)[..., None] * np.float32(0.6)
    sky = top * (1 - fade) + scene.haze * fade
    sky = sky + (np.array((246, 244, 242)) - sky) * cloud
    _cover(scene, "sky", np.full((height, width), 255, np.uint8), sky)
    if rng.random() < 0.7:
        for depth in range(int(rng.integers(1, 3))):
            _paint_mountains(scene, rng, depth)


def _paint_mountains(scene: Scene, rng: np.random.Generator, depth: int) -> None:
    height, width = scene.segments.shape
    xs = np.linspace(0, width, 33)
    ridge = sum(np.abs(np.sin(xs / width * f + rng.uniform(0, 6))) * a for f, a in ((5, 0.5), (9, 0.3), (23, 0.1), (51, 0.05)))
    tall = scene.horizon * rng.uniform(0.3, 0.75) * (1 - 0.35 * depth)
    edge = np.stack([xs, scene.horizon - tall * (0.15 + ridge)], 1)  # type: ignore[operator]
    mask = np.zeros((height, width), np.uint8)
    fill(mask, np.concatenate([edge, [(width, scene.horizon + 2), (0, scene.horizon + 2)]]), 255)
    rock = pick(rng, ROCKS) * (1 - 0.12 * depth)
    rock = rock + (scene.haze - rock) * rng.uniform(0.1, 0.45) * (1 - 0.4 * depth)
    facets = texture(rng, "rock", height, width)[..., None] * 0.13 * np.sign(scene.light.side)
    colour = rock * (1 + facets)
    if rng.random() < 0.4:
        snow = np.clip((scene.horizon - 0.62 * tall - np.arange(height))[:, None] / 4 + facets[..., 0] * 12, 0, 1)
        colour += (np.array((236, 238, 244)) * (1 + 0.5 * facets) - colour) * snow[..., None]
    _cover(scene, "mountain", mask, colour)


def _ground_colour(scene: Scene, rng: np.random.Generator, colour: np.ndarray, kind: str, strength: float) -> np.ndarray:
    """float32 [H, W, 3]: a textured plane in perspective, fading into the haze. Rows above the horizon are unused."""
    height, width = scene.segments.shape
    near = np.clip((np.arange(height, dtype=np.float32) - scene.horizon) / (height - scene.horizon), 0.04, 1)
    step = near**-0.7
    across = (np.arange(width, dtype=np.float32) - width / 2)[None] * step[:, None] + rng.uniform(0, TILE)
    along = np.repeat((np.cumsum(step) + rng.uniform(0, TILE))[:, None], width, 1)
    tile = cv2.remap(textures()[kind], across % TILE, (along % TILE).astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    plain = colour * (1 + strength * (tile * near[:, None] ** 0.25)[..., None])
    haze = (0.5 * np.exp(-6 * near))[:, None, None]
    return (plain * (1 - haze) + scene.haze * haze).astype(np.float32)


def _paint_ground(scene: Scene, rng: np.random.Generator, sky: np.ndarray) -> None:
    """Grass or sand, patches of the other, often water up to a shoreline, often a road."""
    height, width = scene.segments.shape
    kinds = ["grass", "sand"] if rng.random() < 0.58 else ["sand", "grass"]
    grounds = {"grass": (pick(rng, GRASSES), "grass", 0.13), "sand": (pick(rng, SANDS), "fine", 0.06)}
    mask = np.zeros((height, width), np.uint8)
    mask[scene.horizon :] = 255
    _cover(scene, kinds[0], mask, _ground_colour(scene, rng, *grounds[kinds[0]]))
    depth = height - scene.horizon
    if rng.random() < 0.35:
        mask = np.zeros((height, width), np.uint8)
        patch = blob(rng, rng.uniform(0, width), rng.uniform(scene.horizon + depth * 0.6, height), width * rng.uniform(0.2, 0.45), depth * rng.uniform(0.15, 0.35))
        fill(mask, np.maximum(patch, (-np.inf, scene.horizon + 3)), 255)
        _cover(scene, kinds[1], mask, _ground_colour(scene, rng, *grounds[kinds[1]]))
    shore = 0.0
    if rng.random() < 0.48:
        shore = rng.uniform(0.18, 0.55)
        xs = np.linspace(-2, width + 2, 25)
        wave = scene.horizon + depth * (shore + 0.07 * np.sin(xs / width * rng.uniform(2, 7) + rng.uniform(0, 6)))
        mask = np.zeros((height, width), np.uint8)
        fill(mask, np.concatenate([np.stack([xs, wave], 1), [(width + 2, scene.horizon), (-2, scene.horizon)]]), 255)
        mirrored = pick(rng, WATERS) * 0.55 + sky * 0.45
        _cover(scene, "water", mask, _ground_colour(scene, rng, mirrored, "water", 0.1))
    if rng.random() < 0.62:
        _paint_road(scene, rng, shore)


def _paint_road(scene: Scene, rng: np.random.Generator, shore: float) -> None:
    """A road to the horizon, or one across the scene (always so behind a shore), with lane markings."""
    height, width = scene.segments.shape
    depth, centre = height - scene.horizon, rng.uniform(0.3, 0.7) * width
    if shore == 0 and rng.random() < 0.55:
        far, half = np.array((rng.uniform(0.25, 0.75) * width, scene.horizon)), rng.uniform(0.24, 0.42) * width
        road = np.array([far - (1, 0), far + (1, 0), (centre + half, height + 1), (centre - half, height + 1)])
        start, end, ease, stripe = far, np.array((centre, height + 1)), 2.2, half * 0.06
    else:
        row = scene.horizon + depth * rng.uniform(shore + 0.16, max(0.62, shore + 0.3))
        half, slant = depth * rng.uniform(0.1, 0.17), rng.uniform(-0.08, 0.08) * width
        road = np.array([(-2, row - half - slant), (width + 2, row - half + slant), (width + 2, row + half + slant), (-2, row + half - slant)])
        start, end, ease, stripe = np.array((-2, row - slant)), np.array((width + 2, row + slant)), 1.0, 0.0
    mask = np.zeros((height, width), np.uint8)
    fill(mask, road, 255)
    mask[: scene.horizon] = 0
    _cover(scene, "road", mask, _ground_colour(scene, rng, pick(rng, ROADS), "fine", 0.045))
    paint = np.array((228, 226, 214)) if rng.random() < 0.75 else np.array((222, 190, 90))
    for k in range(9):
        first, last = (start + (end - start) * ((k + s) / 9) ** ease for s in (0.25, 0.7))
        side = (stripe * np.array([((k + s) / 9) ** ease for s in (0.25, 0.7)]))[:, None] * (1, 0) + (0, 0 if stripe else max(half * 0.06, 0.7))
        fill(scene.image, np.array([first - side[0], last - side[1], last + side[1], first + side[0]]), paint * 0.95)


# ---------------------------------------------------------------- things


@dataclass(frozen=True)
class Placed:
    """A thing with the place where it stands."""

    name: str
    parts: list[Part]
    foot: tuple[float, float]
    scale: float
    group: int = 0
    """Non-zero: a member of that crowd, which is one segment."""


def _thing(rng: np.random.Generator, name: str) -> list[Part]:
    side = rng.choice([-1.0, 1.0])
    return [Part(part.points * (side, 1), part.colour, part.grain) for part in THINGS[name](rng)]


def _find_foot(scene: Scene, rng: np.random.Generator, name: str) -> tuple[float, float] | None:
    """A random place on the right ground, or None when a few draws find none."""
    height, width = scene.segments.shape
    allowed = [1 + STUFF.index(ground) for ground in HABITS[name].on]
    for _ in range(8):
        near = rng.uniform(*HABITS[name].near)
        x = rng.uniform(0.02, 0.98) * width
        y = scene.horizon * (0.08 + 0.72 * near) if name == "bird" else scene.horizon + (height - scene.horizon) * near
        if scene.segments[min(int(y), height - 1), int(x)] in allowed:
            return x, y
    return None


def _plan(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """What stands where, in no order. Neighbours of a class are put edge to edge."""
    plan: list[Placed] = []
    for name, habit in HABITS.items():
        for _ in range(min(int(rng.poisson(habit.mean)), 4)):
            foot = _find_foot(scene, rng, name)
            if foot is None:
                continue
            x, y = foot
            scale = rng.uniform(9, 34) * scene.scale / 31 if name == "bird" else scene.scale_at(y)
            edge = None
            for _ in range(4):
                parts = _thing(rng, name)
                span = np.concatenate([part.points for part in parts])[:, 0] * scale
                if edge is not None:
                    x = edge - span.min() - rng.uniform(-0.02, 0.16) * np.ptp(span)
                plan.append(Placed(name, parts, (x, y), scale))
                edge, y = x + span.max(), y + rng.normal(0, 0.3)
                if rng.random() > habit.together:
                    break
    return plan


def _plan_crowd(scene: Scene, rng: np.random.Generator, name: str, group: int) -> list[Placed]:
    """A group that nobody would outline one by one: people close together, or a flock."""
    foot = _find_foot(scene, rng, name)
    if foot is None:
        return []
    flock = name == "bird"
    scale = rng.uniform(7, 11) if flock else scene.scale_at(foot[1]) * 0.9
    spread = np.array((1.5, 0.7) if flock else (0.95, 0.1)) * scale
    feet = [np.array(foot) + rng.normal(0, 1, 2) * spread for _ in range(int(rng.integers(8, 15)))]
    return [Placed(name, _thing(rng, name), (float(x), float(y)), scale, group) for x, y in feet]


def _place_things(scene: Scene, rng: np.random.Generator) -> None:
    """Draw the planned things from far to near, each after its shadow."""
    plan = _plan(scene, rng)
    for group, (name, chance) in enumerate((("person", 0.16), ("bird", 0.12)), 1):
        if rng.random() < chance:
            plan += _plan_crowd(scene, rng, name, group)
    groups: dict[int, int] = {}
    for item in sorted(plan, key=lambda placed: placed.foot[1]):
        if item.name != "bird":
            cast_shadow(scene.image, item.parts, item.foot, item.scale, scene.light, scene.horizon)
        own = draw(scene.image, item.parts, item.foot, item.scale, scene.light, rng)
        if own is None:
            continue
        if item.group not in groups:
            scene.names.append(item.name)
            scene.crowd.append(item.group > 0)
        segment = groups.get(item.group, len(scene.names))
        if item.group:
            groups[item.group] = segment
        where, mask = own
        scene.segments[where][mask] = segment


# ---------------------------------------------------------------- what the camera adds


def _leave_void(scene: Scene, rng: np.random.Generator) -> None:
    """In some scenes a letterbox, the bonnet of the car that carries the camera, or a smear: all unlabelled."""
    height, width = scene.segments.shape
    kind, mask = rng.random(), np.zeros((height, width), np.uint8)
    if kind < 0.07:
        bar = int(height * rng.uniform(0.04, 0.1))
        mask[:bar] = mask[height - bar :] = 255
        colour = np.full(3, rng.uniform(0, 16))
    elif kind < 0.16:
        fill(mask, blob(rng, width * rng.uniform(0.4, 0.6), height * 1.02, width * rng.uniform(0.4, 0.6), height * rng.uniform(0.1, 0.17), 0.01), 255)
        colour = pick(rng, ((40, 42, 48), (90, 30, 30), (60, 70, 90)))
    elif kind < 0.26:
        fill(mask, blob(rng, width * rng.random(), height * rng.random(), width * rng.uniform(0.05, 0.12), height * rng.uniform(0.05, 0.12), 0.25), 255)
        colour = rng.uniform(60, 230, 3)
    else:
        return
    sheen = 1 + 0.12 * np.sin(np.linspace(0, 3, width))[None, :, None]
    weight = mask[..., None] / np.float32(255)
    scene.image[:] = scene.image * (1 - weight) + np.clip(colour * sheen, 0, 255) * weight
    scene.segments[mask > 127] = 0


def _develop(scene: Scene, rng: np.random.Generator) -> None:
    """Colour cast, exposure, falling-off light, slight blur and grain."""
    height, width = scene.segments.shape
    image = scene.image.astype(np.float32)
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.75))
    sweep = 1 + 0.1 * rng.uniform(-1, 1) * np.linspace(-1, 1, width, dtype=np.float32)[None, :, None]
    image *= sweep * (rng.uniform(0.78, 1.1) * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
    grain = texture(rng, "fine", height, width)[..., None] + 0.4 * np.stack([texture(rng, "fine", height, width) for _ in range(3)], -1)
    scene.image = np.clip(image + grain * np.float32(rng.uniform(1, 6)), 0, 255).astype(np.uint8)


# ---------------------------------------------------------------- files


def record(scene: Scene, index: int) -> tuple[np.ndarray, dict, dict]:
    """The scene's truth as COCO-panoptic: id map int64 [H, W], `images` entry and `annotations` entry."""
    count = len(scene.names)
    areas = np.bincount(scene.segments.ravel(), minlength=count + 1)
    areas[0] = 0
    # ids that use all three channels, like those of real data
    ids = np.where(areas >= MIN_PIXELS, np.arange(count + 1) * 70_001, 0)
    infos = []
    for k in np.flatnonzero(ids):
        rows, columns = ((scene.segments == k).any(axis).nonzero()[0] for axis in (1, 0))
        bbox = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        infos.append({
            "id": int(ids[k]), "category_id": CATEGORY_IDS[scene.names[k - 1]], "iscrowd": int(scene.crowd[k - 1]),
            "area": int(areas[k]), "bbox": [int(v) for v in bbox],
        })  # fmt: skip
    height, width = scene.segments.shape
    image = {"id": index, "file_name": f"{index:06d}.jpg", "width": width, "height": height}
    return ids[scene.segments], image, {"image_id": index, "file_name": f"{index:06d}.png", "segments_info": infos}


def write_scene(root: Path, seed: int, split: str, index: int) -> tuple[dict, dict]:
    """Draw a scene and write its JPEG and PNG; returns its `images` and `annotations` entries."""
    scene = render(seed, split, index)
    ids, image, annotation = record(scene, index)
    channels = np.stack([ids >> 16, (ids >> 8) & 255, ids & 255], -1).astype(np.uint8)  # OpenCV writes B, G, R
    files = {
        root / "images" / split / image["file_name"]: (".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92]),
        root / "annotations" / f"panoptic_{split}" / annotation["file_name"]: (".png", channels, [cv2.IMWRITE_PNG_COMPRESSION, 3]),
    }
    for path, (suffix, pixels, options) in files.items():
        path.write_bytes(cv2.imencode(suffix, pixels, options)[1].tobytes())
    return image, annotation


def write_scenes(root: str | Path, train: int, val: int, seed: int = 0, workers: int = 0) -> Path:
    """Write `train` and `val` scenes as a COCO-panoptic folder; a folder that has them already is left alone.

    Args:
        root: the folder; created when missing.
        train: number of images of the training split.
        val: of the validation split.
        seed: of the drawing.
        workers: processes that draw; 0 and 1 draw in this one. The files do not depend on it.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: a count is negative, or the folder holds annotations that this function did not write.
    """
    root = Path(root)
    for split, count in (("train", train), ("val", val)):
        if count < 0:
            raise ValueError(f"{split} is {count}; the number of scenes must not be negative")
        info = {"description": "drawn scenes", "version": VERSION, "seed": seed, "split": split, "count": count}
        target = root / "annotations" / f"panoptic_{split}.json"
        if not _is_written(target, info):
            _write_split(root, target, info, workers)
    return root


def _is_written(target: Path, info: dict) -> bool:
    if not target.exists():
        return False
    found = json.loads(target.read_text()).get("info")
    if not isinstance(found, dict) or found.get("description") != info["description"]:
        raise ValueError(f"{target}: not written by write_scenes (field info); give a folder of its own for the scenes")
    return found == info


def _write_split(root: Path, target: Path, info: dict, workers: int) -> None:
    target.unlink(missing_ok=True)
    split, count = info["split"], info["count"]
    for folder in (root / "images" / split, root / "annotations" / f"panoptic_{split}"):
        folder.mkdir(parents=True, exist_ok=True)
    if workers > 1 and count > workers:
        pairs = _in_processes(root, info["seed"], split, count, workers)
    else:
        pairs = [write_scene(root, info["seed"], split, index) for index in range(count)]
    content = {"info": info, "images": [p[0] for p in pairs], "annotations": [p[1] for p in pairs], "categories": CATEGORIES}
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps(content))
    partial.replace(target)


def _in_processes(root: Path, seed: int, split: str, count: int, workers: int) -> list:
    """The entries of all scenes, drawn by fresh interpreters that import only this module.

    Not multiprocessing: a fork of a process that runs Ray's and torch's threads can hang, and a spawn
    would import the caller's main module, which takes longer than drawing.
    """
    bounds = np.linspace(0, count, workers + 1).astype(int)
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pipelines.scenes", str(root.resolve()), str(seed), split]
    processes = [
        subprocess.Popen([*command, str(a), str(b)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    outputs = [process.communicate()[0] for process in processes]
    failed = [process.returncode for process in processes if process.returncode]
    if failed:
        raise RuntimeError(f"drawing scenes into {root} failed (exit status {failed[0]}); the error is printed above")
    return [pair for output in outputs for pair in json.loads(output)]


def main(arguments: Sequence[str]) -> None:
    """Draw scenes start .. stop - 1 of a split and print their entries as JSON: one process of `write_scenes`."""
    root, seed, split, start, stop = arguments
    cv2.setNumThreads(1)
    print(json.dumps([write_scene(Path(root), int(seed), split, index) for index in range(int(start), int(stop))]))


if __name__ == "__main__":
    main(sys.argv[1:])
