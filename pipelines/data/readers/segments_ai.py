"""Segments.ai: a release file and its bitmaps of instance ids.

The release is a JSON that lists the samples; its SDK (`SegmentsDataset`) puts the photograph of each, `NAME.jpg`, and
its bitmap, `NAME_label_LABELSET.png`, into one folder. A bitmap is RGBA, id = R + 256 G + 65536 B; the SDK stores small
ids with one channel. The other export of the tool, coco-panoptic, is read by `coco_panoptic`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import pydantic_core

from panoptic.segmentation import Categories, shown
from pipelines.cluster import storage
from pipelines.data.config import Orientation
from pipelines.data.readers.archive import read_file, readable
from pipelines.data.readers.faults import FETCH
from pipelines.data.readers.places import holding, image_places, tree_and_file
from pipelines.data.readers.rows import Row, fingerprint_of, table_of
from pipelines.data.readers.source import Problem, Source
from pipelines.data.readers.tree import Folder, Tree, given

_GROUND_TRUTH = "ground-truth"
_IMAGES = ("jpg", "jpeg", "png", "JPG", "JPEG", "PNG", "webp", "bmp")


def segments_ai(
    root: storage.Uri,
    split: str,
    *,
    json_file: storage.Uri = "",
    images: storage.Uri = "",
    pngs: storage.Uri = "",
    label_set: str = "",
    things: Sequence[str] = (),
    exif: Literal["auto"] | Orientation = "auto",
) -> Source:
    """A release of Segments.ai, task type segmentation-bitmap.

    Args:
        root: the folder of the release file, or the file.
        split: any name; a release has none.
        json_file: the release file, where the folder holds several JSONs.
        images, pngs: folders of photographs and bitmaps, where they are elsewhere than in one folder below the root.
        label_set: by default "ground-truth", or the only one.
        things: names of the classes that are things, where `has_instances` does not say it.
        exif: the frame of the maps where sizes do not tell it; by default the upright image, which annotators see.

    Raises:
        ValueError: there is no release file, it is of another task type, or has no such label set.
    """
    tree, json_file = tree_and_file(root, json_file)
    at, path = given(tree, json_file, "--data.json-file") if json_file else (tree, only_json(tree, "release file"))
    file = readable(at.address(path))
    data = read_file(at.address(path))
    samples, entries = read_release(data, file)
    chosen = _label_set(samples, label_set, file)
    categories = _categories(entries, things, file)
    labelled = [sample for sample in samples if (sample.get("labels") or {}).get(chosen)]
    stems = [_stem(sample) for sample in labelled[:20]]
    names = [f"{stem}_label_{chosen}.png" for stem in stems]
    maps = _folder(tree, pngs, "--data.pngs", names, split, "folder of bitmaps")
    names = [f"{stem}.{ending}" for stem in stems for ending in _IMAGES]
    photographs = _folder(tree, images, "--data.images", names, split, "folder of images")
    rows, problems, stamps = [], [], []
    known, seen = set(categories.ids), set()
    for sample in labelled:
        name, stem = str(sample.get("name")), _stem(sample)
        bitmap = maps.match(f"{stem}_label_{chosen}.png")
        photograph = next((f"{stem}.{e}" for e in _IMAGES if f"{stem}.{e}" in photographs), None)
        photograph = photograph or photographs.match(name)
        infos, reason, remedy = _segments(sample["labels"][chosen], known)
        if name in seen:
            reason, remedy = "a second sample has this name", "rename one of them, and release again"
        elif photograph is None:
            reason, remedy = f"image is missing: {photographs.lacks(name)} (partial download?)", FETCH
        elif bitmap is None:
            reason = f"bitmap is missing: {maps.lacks(f'{stem}_label_{chosen}.png')} (partial download?)"
            remedy = FETCH
        seen.add(name)
        if reason or photograph is None or bitmap is None:
            problems.append(Problem(name, reason, remedy))
            continue
        record = json.dumps({"image_id": name, "segments_info": infos})
        rows.append(Row(photograph, photographs.address(photograph), maps.address(bitmap), name, record))
        stamps.append((photographs.stamps[photograph], maps.stamps[bitmap]))
    return Source(
        reader="segments-ai",
        root=tree.root,
        split=split,
        categories=categories,
        rows=table_of(rows),
        problems=tuple(problems),
        unannotated=tuple(str(sample.get("name")) for sample in samples if sample not in labelled),
        bytes=sum(image[0] + label[0] for image, label in stamps),
        fingerprint=fingerprint_of(
            "segments-ai", stamps, [(row.name, row.record) for row in rows], categories.to_coco()
        ),
        orientation="applied" if exif == "auto" else exif,
    )


def only_json(tree: Tree, what: str) -> str:
    """The one JSON that lies right in a folder.

    Raises:
        ValueError: there is none, or there are several.
    """
    files = [name for name in tree.names() if name.lower().endswith(".json")]
    if len(files) != 1:
        listed = f"it holds {', '.join(files[:10])}" if files else "it holds none"
        raise ValueError(f"{tree.root}: looked for one JSON, the {what}, and {listed}; name it with --data.json-file")
    return files[0]


def read_release(data: bytes, file: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The samples and the categories of a release file.

    Raises:
        ValueError: it is no JSON, no release, or of another task type.
    """
    try:
        dataset = pydantic_core.from_json(data)["dataset"]
        samples, kind = dataset["samples"], str(dataset.get("task_type", ""))
        entries = dataset["task_attributes"]["categories"]
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); is the download complete?") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: is no release file of Segments.ai (dataset with samples and task_attributes.categories)"
        ) from error
    if not kind.startswith("segmentation-bitmap"):
        raise ValueError(f"{file}: its task type is {kind or 'not stated'}; bitmaps need segmentation-bitmap")
    if not isinstance(samples, list) or not all(isinstance(sample, dict) and sample.get("name") for sample in samples):
        raise ValueError(f"{file}: dataset.samples must be a list of samples, each with a name")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: task_attributes.categories is {shown(entries)}; it must be a list of categories")
    return samples, entries


def _label_set(samples: Sequence[dict[str, Any]], label_set: str, file: str) -> str:
    names = list(dict.fromkeys(name for sample in samples for name in sample.get("labels") or {}))
    if label_set or _GROUND_TRUTH in names or len(names) != 1:
        chosen = label_set or _GROUND_TRUTH
        if chosen not in names:
            raise ValueError(f"{file}: has no label set {chosen}; name one with --data.label-set: {', '.join(names)}")
        return chosen
    return names[0]


def _categories(entries: Sequence[dict[str, Any]], things: Sequence[str], file: str) -> Categories:
    """The classes; a thing has instances.

    Raises:
        ValueError: nothing says which classes are things, or `things` names one that is not there.
    """
    names = [str(entry.get("name")) for entry in entries]
    if unknown := [name for name in things if name not in names]:
        raise ValueError(f"--data.things {', '.join(unknown)}: {file} has no such class; it has {', '.join(names)}")
    if not things and not any("has_instances" in entry for entry in entries):
        raise ValueError(
            f"{file}: does not say which classes are things (has_instances); name them with --data.things, of "
            f"{', '.join(names)}"
        )
    kinds = [entry.get("name") in things if things else bool(entry.get("has_instances")) for entry in entries]
    listed = [
        {**{k: v for k, v in entry.items() if k != "color"}, **_colour(entry), "isthing": int(kind)}
        for entry, kind in zip(entries, kinds, strict=True)
    ]
    return Categories.from_coco(listed, file)


def _colour(entry: dict[str, Any]) -> dict[str, list[int]]:
    colour = entry.get("color")
    usable = isinstance(colour, list) and len(colour) >= 3 and all(isinstance(value, int) for value in colour[:3])
    return {"color": colour[:3]} if usable and colour else {}


def _stem(sample: dict[str, Any]) -> str:
    name = str(sample["name"])
    head, dot, ending = name.rpartition(".")
    return head if dot and "/" not in ending else name


def _folder(tree: Tree, place: storage.Uri, option: str, names: Sequence[str], split: str, what: str) -> Folder:
    """The folder that an option names, or the one below the root that holds some of the files."""
    if place:
        return Folder(*given(tree, place, option))
    inner = [f"segments/{one}/{two}" for one in tree.folders("segments") for two in tree.folders(f"segments/{one}")]
    return Folder(tree, holding(tree, [*image_places(split), *inner], [""], names, what, option))


def _segments(label: Any, known: set[int]) -> tuple[list[dict[str, int]], str, str]:
    """The segments of a label; a reason and a remedy where it is no such."""
    annotations = label.get("attributes", {}).get("annotations") if isinstance(label, dict) else None
    infos = []
    for entry in annotations if isinstance(annotations, list) else ():
        number, category = (entry.get(key) if isinstance(entry, dict) else None for key in ("id", "category_id"))
        if not isinstance(number, int) or not isinstance(category, int) or not 0 <= number < 1 << 24:
            return [], f"annotation {shown(entry)} has no id to 16777215 and category_id", "release the data set again"
        if category not in known:
            return [], f"category_id {category} is not in the release's categories", "add it there"
        infos.append({"id": number, "category_id": category})
    if not isinstance(annotations, list):
        return [], "its label has no list of annotations", "release the data set again"
    return infos, "", ""
