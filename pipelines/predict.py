"""Predictions as files: COCO-panoptic submissions, Cityscapes ids, overlays, of photographs or of shards.

Actors read, predict and write; what comes back to the driver is the record of each image. An image that cannot be
read is left out with one line that says why.

| format | files |
|---|---|
| coco | panoptic.json (annotations, images, categories) and panoptic/<name>.png: what the official evaluation takes |
| cityscapes | cityscapes/<name>_labelIds.png and _instanceIds.png (16 bit: label, or 1000 label + number) |
| overlay | overlays/<name>.jpg |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np

from panoptic.draw import overlay
from panoptic.engine import evaluation_step
from panoptic.models.interface import PanopticModel
from panoptic.png import decode_image, encode_segments, to_coco
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.transforms import evaluation_view
from pipelines import storage
from pipelines.actors import Pool, each
from pipelines.evaluate import Task, placed, stored_of
from pipelines.feed import evaluation_batches
from pipelines.ingest import is_cut
from pipelines.manifest import Manifest

FORMATS = ("coco", "cityscapes", "overlay")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Of files that are taken for photographs."""

CHUNK = 16
"""Images of one item of work."""


@dataclass(frozen=True)
class Image:
    """One image to predict."""

    uri: str
    """Of its file; empty for a row of the shards."""
    stem: str
    """Of the files that are written: its path below the folder, without suffix."""
    image_id: int | str
    file_name: str
    row: int = -1
    """Of the shards."""


@dataclass(frozen=True)
class Output:
    """Where predictions go and in which form."""

    folder: str
    formats: tuple[str, ...] = ("coco",)


@dataclass(frozen=True)
class Predicted:
    """What came of one image."""

    image: Image
    size: tuple[int, int] = (0, 0)
    annotation: dict[str, Any] | None = None
    problem: str = ""


def photographs(root: str) -> list[Image]:
    """Every photograph below a folder or S3 prefix (or the one file that `root` is), in order of their names.

    Raises:
        ValueError: there is none.
    """
    root = storage.absolute(root)
    if root.lower().endswith(SUFFIXES) and storage.exists(root):
        root, names = root.rsplit("/", 1)
    else:
        if not storage.exists(root):
            raise ValueError(f"{root}: no such folder, prefix or file")
        names = [name for name in storage.list_files(root) if name.lower().endswith(SUFFIXES)]
    names = [names] if isinstance(names, str) else names
    if not names:
        raise ValueError(f"{root}: no photograph there; looked for {', '.join(SUFFIXES)}")
    stems = Counter(_stem(name) for name in names)
    return [
        # a.jpg and a.png would write one file
        Image(storage.join(root, name), _stem(name) if stems[_stem(name)] == 1 else name.replace(".", "_"), k, name)
        for k, name in enumerate(names, 1)
    ]


def rows(manifest: Manifest) -> list[Image]:
    """Every image of the shards, under the ids of its dataset."""
    import pyarrow.parquet as pq

    found = []
    for file in manifest.files:
        filesystem, path = storage.resolve(file)
        table = pq.read_table(path, columns=["name", "image_id"], filesystem=filesystem)
        for entry in table.to_pylist():
            found.append(Image("", _stem(entry["name"]), entry["image_id"], entry["name"], len(found)))
    return found


def predict(task: Task, images: Sequence[Image], output: Output, pool: Pool) -> Iterator[Predicted]:
    """Predict and write every image; the records in order, and `panoptic.json` at the end.

    Args:
        task: its manifest is where `images` with a row come from.
        output: the folder may be local (of every worker) or on S3.

    Raises:
        ValueError: a format is unknown or does not fit the categories, before any work.
    """
    unknown = [name for name in output.formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"formats {', '.join(unknown)}: there are {', '.join(FORMATS)}")
    categories = stored_of(task).model.categories
    if "cityscapes" in output.formats:
        check_cityscapes(categories)
    output = replace(output, folder=storage.absolute(output.folder))
    chunks = [list(images[first : first + CHUNK]) for first in range(0, len(images), CHUNK)]
    done: dict[int | str, Predicted] = {}
    for part in each(predictor, (task, output), chunks, pool):
        done |= {one.image.image_id: one for one in part}
    results = [done[image.image_id] for image in images]
    if "coco" in output.formats:
        _write_json(results, categories, output)
    yield from results


def predictor(task: Task, output: Output) -> Callable[[Sequence[Image]], list[Predicted]]:
    """The function of an actor: predict and write some images."""
    model = placed(task)

    def work(images: Sequence[Image]) -> list[Predicted]:
        found = []
        of_shards = images[0].row >= 0
        for image, sample in _read(task, model, images) if of_shards else _read_files(images):
            if isinstance(sample, str):
                found.append(Predicted(image, problem=sample))
                continue
            picture, segmentation = _one(task, model, sample)
            annotation = write(picture, segmentation, model.categories, image, output)
            found.append(Predicted(image, segmentation.size, annotation))
        return found

    return work


def write(
    picture: np.ndarray, found: Segmentation, categories: Categories, image: Image, output: Output
) -> dict[str, Any]:
    """The files of one image; its entry of `annotations`."""
    found = found.compact()
    png, annotation = to_coco(found, categories, image.image_id, f"{image.stem}.png")
    files: dict[str, bytes] = {}
    if "coco" in output.formats:
        files[f"panoptic/{image.stem}.png"] = png
    if "cityscapes" in output.formats:
        labels, instances = cityscapes_ids(found, categories)
        files[f"cityscapes/{image.stem}_labelIds.png"] = encode_segments(labels)
        files[f"cityscapes/{image.stem}_instanceIds.png"] = encode_wide(instances)
    if "overlay" in output.formats:
        drawn = cv2.cvtColor(overlay(picture, found, categories), cv2.COLOR_RGB2BGR)
        files[f"overlays/{image.stem}.jpg"] = cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    for name, data in files.items():
        storage.write_bytes(storage.join(output.folder, name), data)
    return annotation


def check_cityscapes(categories: Categories) -> None:
    """Refuse categories whose ids the 16 bits of Cityscapes' instance maps cannot hold.

    Raises:
        ValueError: names them.
    """
    high = [name for name, i, thing in zip(categories.names, categories.ids, categories.is_thing, strict=True)
            if i > (65 if thing else 255) or i < 0]  # fmt: skip
    if high:
        raise ValueError(
            f"format cityscapes holds ids of things up to 65 and of stuff up to 255, but {', '.join(high[:8])} have "
            "others; write the format coco"
        )


def cityscapes_ids(found: Segmentation, categories: Categories) -> tuple[np.ndarray, np.ndarray]:
    """Label ids and instance ids int32 [H, W]: label, or 1000 label + number from 0 for things; void is 0.

    Raises:
        ValueError: an image has more than 1000 instances of a class, or ids beyond 16 bits.
    """
    ids = np.array(categories.ids, np.int64)[found.labels]
    instances = ids.copy()
    seen: Counter[int] = Counter()
    for k, label in enumerate(found.labels.tolist()):
        if categories.is_thing[label]:
            instances[k] = 1000 * ids[k] + seen[label]
            seen[label] += 1
    if max(seen.values(), default=0) > 1000 or instances.max(initial=0) > 65535:
        raise ValueError("an image has more instances of a class than Cityscapes' ids can tell apart")
    tables = (np.concatenate([[0], values]).astype(np.int32) for values in (ids, instances))
    labels, numbers = (table[found.segments] for table in tables)
    return labels, numbers


def encode_wide(ids: np.ndarray) -> bytes:
    """A single-channel 16-bit PNG, whatever the values."""
    return cv2.imencode(".png", ids.astype(np.uint16))[1].tobytes()


def _read(task: Task, model: PanopticModel, images: Sequence[Image]) -> Iterator[tuple[Image, Sample | str]]:
    """The samples of some rows of the shards, in evaluation view."""
    by_row = {image.row: image for image in images}
    experiment = task.experiment
    for _, _, samples in evaluation_batches(
        task.manifest, experiment.resize, 1, divisor=model.divisor, threads=2, rows=sorted(by_row)
    ):
        yield by_row[samples[0].position], samples[0]


def _read_files(images: Sequence[Image]) -> Iterator[tuple[Image, Sample | str]]:
    """Photographs as they are, or the reason why one cannot be read."""
    for image in images:
        try:
            data = storage.read_bytes(image.uri)
            if is_cut(data):
                raise ValueError("the JPEG ends before its image does (partial download?)")
            pixels = decode_image(data, image.file_name)
        except (ValueError, OSError) as error:
            yield image, " ".join(str(error).split()).removeprefix(f"{image.file_name}: ")
            continue
        nothing = Segmentation(np.zeros(pixels.shape[:2], np.int32), np.zeros(0, np.int64))
        yield image, Sample(pixels, nothing, image.file_name)


def _one(task: Task, model: PanopticModel, sample: Sample) -> tuple[np.ndarray, Segmentation]:
    """The image at its own size and its map."""
    experiment = task.experiment
    view = sample if sample.original is not None else evaluation_view(sample, experiment.resize)
    images, targets = collate([view], model.divisor, experiment.resize.canvas)
    found = evaluation_step(model, images, targets, experiment.engine, losses=False).maps[0]
    if sample.image.shape[:2] == found.size:
        return sample.image, found
    return cv2.resize(sample.image, found.size[::-1], interpolation=cv2.INTER_LINEAR), found


def _write_json(results: Sequence[Predicted], categories: Categories, output: Output) -> None:
    good = [one for one in results if one.annotation is not None]
    content = {
        "images": [
            {"id": o.image.image_id, "file_name": o.image.file_name, "height": o.size[0], "width": o.size[1]}
            for o in good
        ],
        "annotations": [one.annotation for one in good],
        "categories": categories.to_coco(),
    }
    storage.write_bytes(storage.join(output.folder, "panoptic.json"), json.dumps(content).encode())


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return (path.parent / path.stem).as_posix()
