"""Preparing shards: ours against a bare loop of the decoding, checking and encoding that it must do (row prepare).

The bare loop reads the two files of an image, decodes both, renumbers the map, which compares its ids with the record,
encodes it and appends photograph and map to a file. Ours also tells faults apart, hashes the content, counts the
statistics and writes a shard.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from panoptic.png import decode_ids, decode_image, encode_segments, to_coco
from panoptic.segmentation import Categories, Segmentation, renumber
from pipelines.data.readers import coco_panoptic
from pipelines.data.shard_writer import write_shard
from tests.benchmarks import inputs
from tests.benchmarks.timing import Row

IMAGES = 16
"""Of the shard that is written."""

SEGMENTS = 11
"""Of an image, as in COCO."""


ROUNDS = 7
"""Of ours and of the bare loop in turn, of which the median counts."""


def rows(folder: Path, size: tuple[int, int]) -> list[Row]:
    """Row prepare: a shard of photographs of `size` (H, W).

    CPU time of the process, as ours works in threads.

    Args:
        folder: of its own, for the data set and the shards.
        size: of the photographs.

    Raises:
        ValueError: the two do not count the same segments.
    """
    classes = inputs.categories(80, 53)
    _write(folder, size, classes)
    source = coco_panoptic(folder, "val")
    light = source.rows.append_column("shard", pa.array([0] * IMAGES))

    def ours() -> list[int]:
        report = write_shard(light, str(folder / "out"), classes, source.decode, source.orientation)
        return json.loads(report["report"][0].as_py())["segments"]

    def bare() -> list[int]:
        return _bare(light.to_pylist(), classes, folder / "bare")

    if (found := ours()) != (expected := bare()):
        raise ValueError(f"prepare: {sum(found)} segments, the bare loop counts {sum(expected)}")
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for run, times in zip((ours, bare), taken, strict=True):
            begin = time.process_time()
            run()
            times.append(time.process_time() - begin)
    mine, theirs = (IMAGES / statistics.median(times) for times in taken)
    work = f"{size[1]}x{size[0]} JPEG + id PNG: decode, check, encode, write"
    return [Row("prepare", work, mine, "images/s of CPU", "bare loop", theirs, mine / theirs)]


def _bare(rows: list[dict], classes: Categories, out: Path) -> list[int]:
    counts = np.zeros(len(classes), int)
    label = {number: k for k, number in enumerate(classes.ids)}
    for row in rows:
        infos = json.loads(row["record"])["segments_info"]
        photograph = Path(row["image"]).read_bytes()
        decode_image(photograph)
        segments, unlisted, present = renumber(
            decode_ids(Path(row["png"]).read_bytes()), [info["id"] for info in infos]
        )
        if len(unlisted) or not present.all():
            raise ValueError(f"{row['name']}: map and record differ")
        with out.open("ab") as file:
            file.write(photograph + encode_segments(segments))
        counts += np.bincount([label[info["category_id"]] for info in infos], minlength=len(classes))
    return counts.tolist()


def _write(folder: Path, size: tuple[int, int], classes: Categories) -> None:
    """A COCO-panoptic folder of blobs on a background, as round as people draw."""
    rng = np.random.default_rng(6)
    images, pngs = folder / "images/val", folder / "annotations/panoptic_val"
    images.mkdir(parents=True)
    pngs.mkdir(parents=True)
    content: dict = {"images": [], "annotations": [], "categories": classes.to_coco()}
    height, width = size
    for k in range(IMAGES):
        segments = np.ones(size, np.int32)
        for number in range(2, SEGMENTS + 1):
            centre = (int(rng.integers(width)), int(rng.integers(height)))
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            radii = rng.uniform(0.6, 1.0, 40) * rng.integers(height // 12, height // 3)
            outline = np.stack([centre[0] + radii * np.cos(angles), centre[1] + radii * np.sin(angles)], -1)
            cv2.fillPoly(segments, [outline.astype(np.int32)], number)
        labels = np.concatenate([[classes.stuff[k % 7]], rng.choice(np.array(classes.things), SEGMENTS - 1)])
        png, annotation = to_coco(Segmentation(segments, labels.astype(np.int64)), classes, k, f"{k}.png")
        (pngs / f"{k}.png").write_bytes(png)
        truth = Segmentation(segments, labels.astype(np.int64))
        (images / f"{k}.jpg").write_bytes(inputs.encode_jpeg(inputs.draw_image(rng, truth)))
        content["images"].append({"id": k, "file_name": f"{k}.jpg", "height": height, "width": width})
        content["annotations"].append(annotation)
    (folder / "annotations/panoptic_val.json").write_text(json.dumps(content))
