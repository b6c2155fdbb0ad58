"""Scenes as files: a COCO-panoptic folder.

    images/{train,val}/NNNNNN.jpg
    annotations/panoptic_{train,val}/NNNNNN.png     id = R + 256 G + 65536 B, 0 = void
    annotations/panoptic_{train,val}.json           written last, so that it marks a complete split

Neither torch nor Ray is imported here or below, so that a drawing process starts at once (which is why the
PNG is not written by `panoptic.png`).

Shapes: H x W pixels.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np

from pipelines.data.scenes.compose import SPLITS, render
from pipelines.data.scenes.drawing import STUFF, Scene
from pipelines.data.scenes.things import THINGS

VERSION = 2
"""Raise it whenever a scene of the same seed comes out differently, and folders are written anew."""
DESCRIPTION = "drawn scenes"
MIN_PIXELS = 8
"""A segment of which fewer pixels are seen is void: nobody would annotate it."""

COLOURS = {
    "person": (220, 20, 60),
    "car": (0, 60, 200),
    "house": (190, 110, 60),
    "tree": (20, 120, 30),
    "boat": (150, 60, 190),
    "ball": (250, 150, 0),
    "bird": (240, 240, 60),
    "sign": (230, 90, 160),
    "sky": (110, 180, 230),
    "mountain": (120, 110, 130),
    "grass": (140, 220, 110),
    "road": (100, 70, 110),
    "water": (40, 140, 170),
    "sand": (235, 215, 160),
}
CATEGORY_IDS = {name: k for k, name in enumerate(THINGS, 1)} | {name: k for k, name in enumerate(STUFF, 21)}
"""With a gap, as COCO's ids have."""
CATEGORIES = [
    {"id": k, "name": name, "supercategory": "scene", "isthing": int(name in THINGS), "color": list(COLOURS[name])}
    for name, k in CATEGORY_IDS.items()
]


def record(scene: Scene, index: int) -> tuple[np.ndarray, dict, dict]:
    """The scene's truth as COCO-panoptic: id map int64 [H, W], `images` entry, `annotations` entry."""
    count = len(scene.names)
    areas = np.bincount(scene.segments.ravel(), minlength=count + 1)
    areas[0] = 0
    # such ids use all three channels of the PNG, as those of real data do
    ids = np.where(areas >= MIN_PIXELS, np.arange(count + 1) * 70_001, 0)
    infos = [
        {
            "id": int(ids[k]),
            "category_id": CATEGORY_IDS[scene.names[k - 1]],
            "iscrowd": int(scene.crowd[k - 1]),
            "area": int(areas[k]),
            "bbox": list(cv2.boundingRect((scene.segments == k).view(np.uint8))),
        }
        for k in np.flatnonzero(ids)
    ]
    height, width = scene.size
    image = {"id": index, "file_name": f"{index:06d}.jpg", "width": width, "height": height}
    return ids[scene.segments], image, {"image_id": index, "file_name": f"{index:06d}.png", "segments_info": infos}


def write_scene(root: Path, seed: int, split: str, index: int) -> tuple[dict, dict]:
    """Draw a scene and write its JPEG and PNG; returns its `images` and `annotations` entries."""
    scene = render(seed, split, index)
    ids, image, annotation = record(scene, index)
    # OpenCV takes B, G, R
    channels = np.stack([ids >> 16, (ids >> 8) & 255, ids & 255], -1).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
    png = cv2.imencode(".png", channels, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1]
    (root / "images" / split / image["file_name"]).write_bytes(jpeg.tobytes())
    (root / "annotations" / f"panoptic_{split}" / annotation["file_name"]).write_bytes(png.tobytes())
    return image, annotation


def write_scenes(root: str | Path, train: int, val: int, seed: int = 0, workers: int = 0) -> Path:
    """Write scenes as a COCO-panoptic folder; a folder that has just these already is left alone.

    Args:
        root: the folder; created when missing.
        train: number of images of the training split.
        val: of the validation split.
        seed: of the drawing. Image k of a split is the same whatever the numbers of images.
        workers: processes that draw; 0 and 1 draw in this one. The files do not depend on it.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: a number is negative, or the folder holds annotations that this function did not write.
        RuntimeError: a drawing process failed.
    """
    root = Path(root)
    for name, number in (("train", train), ("val", val), ("seed", seed)):
        if number < 0:
            raise ValueError(f"{name} is {number}; it must not be negative")
    for split, count in zip(SPLITS, (train, val), strict=True):
        info = {"description": DESCRIPTION, "version": VERSION, "seed": seed, "split": split, "count": count}
        target = root / "annotations" / f"panoptic_{split}.json"
        if not _is_written(target, info):
            _write_split(root, target, info, workers)
    return root


def _is_written(target: Path, info: dict) -> bool:
    if not target.exists():
        return False
    try:
        written = json.loads(target.read_text())["info"]
        ours = written["description"] == DESCRIPTION
    except (ValueError, KeyError, TypeError):
        written, ours = None, False
    if not ours:
        raise ValueError(f"{target}: not written by write_scenes (field info); give the scenes a folder of their own")
    return written == info


def _write_split(root: Path, target: Path, info: dict, workers: int) -> None:
    """The JSON goes first and comes last, so that an interrupted rewrite is noticed, too."""
    target.unlink(missing_ok=True)
    seed, split, count = info["seed"], info["split"], info["count"]
    for folder in (root / "images" / split, target.with_suffix("")):
        folder.mkdir(parents=True, exist_ok=True)
    if workers > 1 and count > workers:
        pairs = _in_processes(root, seed, split, count, workers)
    else:
        pairs = [write_scene(root, seed, split, index) for index in range(count)]
    images, annotations = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    partial = target.with_suffix(".partial")
    partial.write_text(
        json.dumps({"info": info, "images": images, "annotations": annotations, "categories": CATEGORIES})
    )
    partial.replace(target)


def _in_processes(root: Path, seed: int, split: str, count: int, workers: int) -> list:
    """The entries of all scenes, drawn by fresh interpreters that import only this package.

    Not multiprocessing: a fork of a process that runs Ray's and torch's threads can hang, and a spawn
    would import the caller's main module, which takes longer than the drawing.
    """
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH")]))
    bounds = np.linspace(0, count, workers + 1).astype(int).astype(str)
    command = [sys.executable, "-m", "pipelines.data.scenes", str(root.resolve()), str(seed), split]
    processes = [
        subprocess.Popen([*command, *part], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})
        for part in itertools.pairwise(bounds)
    ]
    outputs = [process.communicate()[0] for process in processes]
    failed = [process.returncode for process in processes if process.returncode]
    if failed:
        raise RuntimeError(
            f"a process that draws scenes into {root} ended with status {failed[0]}; see its error above"
        )
    return [pair for output in outputs for pair in json.loads(output)]


def draw_part(root: str, seed: str, split: str, start: str, stop: str) -> None:
    """Draw scenes start .. stop - 1 and print their entries as JSON: one process of `write_scenes`."""
    cv2.setNumThreads(1)
    print(json.dumps([write_scene(Path(root), int(seed), split, index) for index in range(int(start), int(stop))]))
