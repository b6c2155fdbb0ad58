"""The annotation file of COCO's training set by its size: 118,287 images of about 11 segments each, 400 MB."""

from __future__ import annotations

import json
import random
from pathlib import Path

IMAGES = 118_287


def write_large_json(file: Path, images: int = IMAGES) -> list[str]:
    """Write the file, and return the stem of each image's name."""
    rng = random.Random(0)
    ids = sorted(rng.sample(range(1, 600_000), images))
    stems = [f"{number:012d}" for number in ids]
    classes = [{"id": k, "name": f"class {k}", "isthing": int(k < 81), "color": [k, k, k]} for k in range(1, 134)]
    with file.open("w") as stream:
        stream.write('{"info": {"description": "drawn by chance"}, "images": [')
        for k, (number, stem) in enumerate(zip(ids, stems, strict=True)):
            url = f"http://images.cocodataset.org/train2017/{stem}.jpg"
            entry = {"file_name": f"{stem}.jpg", "coco_url": url, "height": 480, "width": 640, "id": number}
            stream.write(", " * (k > 0) + json.dumps({"license": 3, **entry, "date_captured": "2013-11-14 11:18:45"}))
        stream.write('], "annotations": [')
        for k, (number, stem) in enumerate(zip(ids, stems, strict=True)):
            infos = [_segment(rng) for _ in range(max(1, round(rng.gauss(11, 4))))]
            annotation = {"segments_info": infos, "file_name": f"{stem}.png", "image_id": number}
            stream.write(", " * (k > 0) + json.dumps(annotation, indent=5))
        stream.write(f'], "categories": {json.dumps(classes)}}}')
    return stems


def _segment(rng: random.Random) -> dict:
    box = [rng.randrange(1, 640) for _ in range(4)]
    area = rng.randrange(1, 200_000)
    return {
        "id": rng.randrange(1, 1 << 24),
        "category_id": rng.randrange(1, 134),
        "iscrowd": 0,
        "bbox": box,
        "area": area,
    }
