"""A tiny COCO-panoptic folder for tests, with no drawing library behind it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from panoptic.png import to_coco
from panoptic.segmentation import Categories, Segmentation

CATEGORIES = Categories(
    names=("person", "sky", "car"),
    is_thing=(True, False, True),
    ids=(24, 7, 3),
    colours=((1, 2, 3), (4, 5, 6), (7, 8, 9)),
)


def write_folder(root: Path, split: str, count: int, height: int = 20, width: int = 30) -> dict:
    """`count` images of one sky and two persons, the second a crowd; the last image is all void.

    Returns:
        the content of annotations/panoptic_{split}.json.
    """
    pngs, images = root / "annotations" / f"panoptic_{split}", root / "images" / split
    pngs.mkdir(parents=True)
    images.mkdir(parents=True)
    content: dict = {"images": [], "annotations": [], "categories": CATEGORIES.to_coco()}
    for k in range(count):
        segments = np.zeros((height, width), np.int32)
        labels = np.array([1, 0, 0] if k + 1 < count else [], np.int64)
        if len(labels):
            segments[: height // 2] = 1
            segments[-5:, k % 10 : k % 10 + 5] = 2
            segments[-5:, 20:] = 3
        truth = Segmentation(segments, labels, np.arange(len(labels)) == 2)
        png, annotation = to_coco(truth, CATEGORIES, 100 + k, f"{k:03d}.png")
        (pngs / f"{k:03d}.png").write_bytes(png)
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
        (images / f"{k:03d}.jpg").write_bytes(cv2.imencode(".jpg", pixels)[1].tobytes())
        content["images"].append({"id": 100 + k, "file_name": f"{k:03d}.jpg", "height": height, "width": width})
        content["annotations"].append(annotation)
    write_json(root, split, content)
    return content


def write_json(root: Path, split: str, content: dict) -> None:
    """annotations/panoptic_{split}.json."""
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
