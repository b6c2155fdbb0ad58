"""Predictions as files: COCO-panoptic submissions, Cityscapes ids, overlays, of photographs or of shards.

Actors read, predict and write; what comes back to the driver is the record of each image. An image that cannot be
read, or whose prediction a format cannot hold, is left out with one line that says why.

| format | files |
|---|---|
| coco | panoptic.json (annotations, images, categories) and panoptic/<name>.png: what the official evaluation takes |
| rle | instances.json: each segment, of things and stuff, as an object of COCO's detection form, its mask as RLE |
| cityscapes | cityscapes/<name>_labelIds.png and _instanceIds.png (16 bit: label, or 1000 label + number) |
| overlay | overlays/<name>.jpg |

`images` says which name and id an image has.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np

from panoptic.classes import classes
from panoptic.evaluation.step import evaluation_step
from panoptic.models.base import PanopticModel
from panoptic.png import decode_image, encode_jpeg, encode_segments, silence_opencv, to_coco
from panoptic.rle import encode_segments as encode_rle
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.transforms import evaluation_view
from panoptic.visualization import overlay
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Pool, each
from pipelines.cluster.progress import progress
from pipelines.data.loader import evaluation_batches
from pipelines.data.validation import is_cut
from pipelines.evaluation.config import FORMATS
from pipelines.evaluation.evaluate import Task, classes_of, placed
from pipelines.evaluation.inputs import Image

FURTHER = {
    **{"ground": (6, False), "parking": (9, False), "rail track": (10, False), "guard rail": (14, False)},
    **{"bridge": (15, False), "tunnel": (16, False), "polegroup": (18, False)},
    **{"caravan": (29, True), "trailer": (30, True)},
}
"""Labels of Cityscapes that its evaluation leaves out: id, and whether they are things."""

CHUNK = 16
"""Images of one item of work."""


@dataclass(frozen=True)
class Output:
    """The folder (local or s3://) and the formats of predictions."""

    folder: str
    formats: tuple[str, ...] = ("coco",)
    """Members of `FORMATS`."""


@dataclass(frozen=True)
class Predicted:
    """The record of one image: its prediction is written, or there is a problem."""

    image: Image
    size: tuple[int, int] = (0, 0)
    """Height and width."""
    annotation: dict[str, Any] | None = None
    """Entry of COCO's `annotations`."""
    masks: tuple[str, ...] = ()
    """Compressed RLE of each segment of the entry, where the format rle is written."""
    problem: str = ""
    """A line that says why the image was left out; "" = none."""


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
    categories = classes_of(task)
    if "cityscapes" in output.formats:
        cityscapes_labels(categories)
    output = replace(output, folder=storage.absolute(output.folder))
    chunks = [list(images[first : first + CHUNK]) for first in range(0, len(images), CHUNK)]
    done: dict[str, Predicted] = {}
    problems = 0
    with progress("predicted", len(images)) as state:
        for part in each(predictor, (task, output), chunks, pool):
            done |= {one.image.stem: one for one in part}
            problems += sum(bool(one.problem) for one in part)
            state.advance(len(part), failed=problems)
    results = [done[image.stem] for image in images]
    if "coco" in output.formats:
        _write_json(results, categories, output)
    if "rle" in output.formats:
        _write_instances(results, categories, output)
    yield from results


def predictor(task: Task, output: Output) -> Callable[[Sequence[Image]], list[Predicted]]:
    """The function of an actor: predict and write some images."""
    model = placed(task)
    silence_opencv()

    def work(images: Sequence[Image]) -> list[Predicted]:
        records = []
        of_shards = images[0].row >= 0
        for image, sample in _read(task, model, images) if of_shards else _read_files(images):
            if isinstance(sample, str):
                records.append(Predicted(image, problem=sample))
                continue
            try:
                picture, segmentation = _one(task, model, sample)
                annotation = write(picture, segmentation, model.categories, image, output)
            except (ValueError, RuntimeError, cv2.error) as error:  # of this image; the others go on
                records.append(Predicted(image, problem=_line(error, image)))
                continue
            masks = tuple(encode_masks_of(segmentation)) if "rle" in output.formats else ()
            records.append(Predicted(image, segmentation.size, annotation, masks))
        return records

    return work


def write(
    picture: np.ndarray, segmentation: Segmentation, categories: Categories, image: Image, output: Output
) -> dict[str, Any]:
    """Write the files of one image, none where one of them cannot be made; returns its entry of `annotations`.

    Args:
        picture: the image, uint8 [H, W, 3], for the overlay.
        segmentation: its prediction, of the same size.

    Raises:
        ValueError: a format cannot hold the prediction.
    """
    segmentation = segmentation.compact()
    png, annotation = to_coco(segmentation, categories, image.image_id, f"{image.stem}.png")
    files: dict[str, bytes] = {}
    if "coco" in output.formats:
        files[f"panoptic/{image.stem}.png"] = png
    if "cityscapes" in output.formats:
        labels, instances = cityscapes_ids(segmentation, categories)
        files[f"cityscapes/{image.stem}_labelIds.png"] = encode_segments(labels)
        files[f"cityscapes/{image.stem}_instanceIds.png"] = encode_wide(instances)
    if "overlay" in output.formats:
        files[f"overlays/{image.stem}.jpg"] = encode_jpeg(overlay(picture, segmentation, categories), 90)
    for name, data in files.items():
        storage.write_bytes(storage.join(output.folder, name), data)
    return annotation


def cityscapes_labels(categories: Categories) -> list[int]:
    """The label id that Cityscapes gives each class, by its name, whatever its id in the model's data set was.

    Raises:
        ValueError: a class is none of Cityscapes', or a thing that is stuff there, or the reverse.
    """
    known = classes("cityscapes")
    ids = {name: (i, thing) for name, i, thing in zip(known.names, known.ids, known.is_thing, strict=True)} | FURTHER
    plain = [" ".join(name.lower().replace("_", " ").replace("-", " ").split()) for name in categories.names]
    wrong = [name for name, key in zip(categories.names, plain, strict=True) if key not in ids]
    if wrong:
        raise ValueError(
            f"format cityscapes: {', '.join(wrong[:8])} {'is no class' if len(wrong) == 1 else 'are no classes'} of "
            "Cityscapes; write the format coco, or give --map-prediction FILE, a class map to Cityscapes' names"
        )
    pairs = zip(plain, categories.names, categories.is_thing, strict=True)
    turned = [name for key, name, thing in pairs if ids[key][1] != thing]
    if turned:
        raise ValueError(
            f"format cityscapes: {', '.join(turned[:8])}: things there and stuff here, or the reverse; write the "
            "format coco, or give --map-prediction FILE"
        )
    return [ids[key][0] for key in plain]


def cityscapes_ids(segmentation: Segmentation, categories: Categories) -> tuple[np.ndarray, np.ndarray]:
    """Label ids and instance ids int32 [H, W]: label, or 1000 label + number from 0 for things; void is 0.

    Raises:
        ValueError: an image has more than 1000 instances of a class, or a class is none of Cityscapes'.
    """
    ids = np.array(cityscapes_labels(categories), np.int64)[segmentation.labels]
    instances = ids.copy()
    numbered: Counter[int] = Counter()  # instances of each class so far
    for k, label in enumerate(segmentation.labels.tolist()):
        if categories.is_thing[label]:
            instances[k] = 1000 * ids[k] + numbered[label]
            numbered[label] += 1
    for label, number in numbered.items():
        if number > 1000:
            raise ValueError(f"{number} instances of {categories.names[label]}; Cityscapes' ids hold 1000 of a class")
    tables = (np.concatenate([[0], values]).astype(np.int32) for values in (ids, instances))
    labels, numbers = (table[segmentation.segments] for table in tables)
    return labels, numbers


def encode_masks_of(segmentation: Segmentation) -> list[str]:
    """COCO's compressed RLE of each segment, in the order in which `write` lists them."""
    segmentation = segmentation.compact()
    masks = encode_rle(segmentation.segments, np.arange(1, len(segmentation.labels) + 1))
    return [mask["counts"].decode("ascii") for mask in masks]


def encode_wide(ids: np.ndarray) -> bytes:
    """A single-channel 16-bit PNG, whatever the values."""
    return cv2.imencode(".png", ids.astype(np.uint16))[1].tobytes()


def _read(task: Task, model: PanopticModel, images: Sequence[Image]) -> Iterator[tuple[Image, Sample | str]]:
    """The samples of some rows of the shards, in evaluation view, or the reason why one cannot be read."""
    by_row = {image.row: image for image in images}
    left = dict.fromkeys(sorted(by_row))
    with contextlib.suppress(ValueError):  # of one of those that are left, which are read one by one below
        for sample in _samples(task, model, list(left)):
            del left[sample.position]
            yield by_row[sample.position], sample
    for row in left:
        try:
            (sample,) = _samples(task, model, [row])
        except ValueError as error:
            yield by_row[row], _line(error, by_row[row])
            continue
        yield by_row[row], sample


def _samples(task: Task, model: PanopticModel, rows: Sequence[int]) -> Iterator[Sample]:
    resize = task.experiment.resize
    for _, _, samples in evaluation_batches(task.manifest, resize, 1, divisor=model.divisor, threads=2, rows=rows):
        yield samples[0]


def _read_files(images: Sequence[Image]) -> Iterator[tuple[Image, Sample | str]]:
    """Photographs as they are, or the reason why one cannot be read."""
    for image in images:
        try:
            data = storage.read_bytes(image.uri)
            if is_cut(data):
                raise ValueError("the JPEG ends before its image does (partial download?)")
            pixels = decode_image(data, image.file_name)
        except (ValueError, OSError) as error:
            yield image, _line(error, image)
            continue
        nothing = Segmentation(np.zeros(pixels.shape[:2], np.int32), np.zeros(0, np.int64))
        yield image, Sample(pixels, nothing, image.file_name)


def _line(error: Exception, image: Image) -> str:
    """The error's message in one line, without the name of the image."""
    return " ".join(str(error).split()).removeprefix(f"{image.file_name}: ")


def _one(task: Task, model: PanopticModel, sample: Sample) -> tuple[np.ndarray, Segmentation]:
    """The image at its own size and its map."""
    experiment = task.experiment
    view = sample if sample.original is not None else evaluation_view(sample, experiment.resize)
    images, targets = collate([view], model.divisor, experiment.resize.canvas)
    maps = evaluation_step(model, images, targets, experiment.engine, ("maps",), losses=False).prediction.maps
    assert maps is not None
    (segmentation,) = maps
    if sample.image.shape[:2] == segmentation.size:
        return sample.image, segmentation
    return cv2.resize(sample.image, segmentation.size[::-1], interpolation=cv2.INTER_LINEAR), segmentation


def _write_instances(results: Sequence[Predicted], categories: Categories, output: Output) -> None:
    """`instances.json`, as COCO's object detection has it: what FiftyOne and supervision read."""
    good = [one for one in results if one.annotation is not None]
    objects = []
    for one in good:
        assert one.annotation is not None
        for entry, counts in zip(one.annotation["segments_info"], one.masks, strict=True):
            mask = {"size": list(one.size), "counts": counts}
            objects.append(
                {"id": len(objects) + 1, "image_id": one.image.image_id, "category_id": entry["category_id"]}
                | {"segmentation": mask, "bbox": entry["bbox"], "area": entry["area"], "iscrowd": 0}
                | ({"score": entry["score"]} if "score" in entry else {})
            )
    kinds = ("stuff", "thing")
    content = {
        "images": _images(good),
        "annotations": objects,
        "categories": [{**entry, "supercategory": kinds[entry["isthing"]]} for entry in categories.to_coco()],
    }
    storage.write_bytes(storage.join(output.folder, "instances.json"), json.dumps(content).encode())


def _images(good: Sequence[Predicted]) -> list[dict[str, Any]]:
    """Entries of COCO's `images`."""
    return [
        {"id": o.image.image_id, "file_name": o.image.file_name, "height": o.size[0], "width": o.size[1]} for o in good
    ]


def _write_json(results: Sequence[Predicted], categories: Categories, output: Output) -> None:
    """`panoptic.json`, with the images that were predicted."""
    good = [one for one in results if one.annotation is not None]
    content = {
        "images": _images(good),
        "annotations": [one.annotation for one in good],
        "categories": categories.to_coco(),
    }
    storage.write_bytes(storage.join(output.folder, "panoptic.json"), json.dumps(content).encode())
