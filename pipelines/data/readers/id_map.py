"""The id map of COCO-panoptic beside its record: what programs get wrong when they write one, told apart and repaired.

An id is R + 256 G + 65536 B (format of cocodataset.org), so a map that was written in another order of channels, with
fewer bits, as a JPEG or after a smooth resize holds ids that its record does not list. The kind of difference says what
went wrong.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from panoptic.png import PNG_SIGNATURE, decode_ids, decode_labels
from panoptic.segmentation import VOID, count_repair, runs, shown_ids
from pipelines.data.config import Unlisted
from pipelines.data.readers.faults import Fault

REPEATED = "segment id listed twice with the same category"
COVERED = "segments without a pixel, left out"
VOID_LISTED = "segments of id 0, which is void, left out"
ONE_CHANNEL = "id maps of one channel, whose values are the ids"
UNLISTED = "pixels of ids or colours that nothing lists, made void"
BGR = "id maps whose channels stand in the order blue, green, red"
"""Kinds of repairs, as the manifest adds them up."""


SPECKS = 8
"""A map with at least this many unlisted ids, most of them on fewer pixels than `SPECK`, was smoothed."""
SPECK = 5
"""Pixels below which an id covers a speck only."""


class Regions(NamedTuple):
    """The pixels of each id of a map, seen as runs of equal pixels, which are many times fewer than pixels."""

    runs: tuple[np.ndarray, np.ndarray]
    """Values and lengths of the runs, as of `segmentation.runs`."""
    order: np.ndarray
    """The runs sorted by id, those of an id in the order of rows."""
    first: np.ndarray
    """The place in `order` of the first run of each id."""
    pixels: dict[int, int]
    """The number of pixels of each id, in the order of ids."""
    width: int

    @classmethod
    def of(cls, ids: np.ndarray) -> Regions:
        """The regions of a map of ids, int [H, W]."""
        values, lengths = runs(ids)
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        first = np.flatnonzero(np.concatenate([np.ones(min(1, len(order)), bool), ordered[1:] != ordered[:-1]]))
        counts = np.add.reduceat(lengths[order], first) if len(first) else first
        pixels = dict(zip(ordered[first].tolist(), counts.tolist(), strict=True))
        return cls((values, lengths), order, first, pixels, ids.shape[1])

    def boxes(self) -> dict[int, list[int]]:
        """The box of each id as COCO has it: x, y, width, height."""
        lengths = self.runs[1]
        last = np.cumsum(lengths) - 1
        top, bottom = (last - lengths + 1) // self.width, last // self.width
        wraps = bottom > top  # a run that goes on in the next row touches both sides
        left = np.where(wraps, 0, last - lengths + 1 - top * self.width)
        right = np.where(wraps, self.width - 1, last - bottom * self.width)
        ends = np.append(self.first[1:], len(self.order)) - 1
        x0 = np.minimum.reduceat(left[self.order], self.first)
        x1 = np.maximum.reduceat(right[self.order], self.first)
        y0, y1 = top[self.order[self.first]], bottom[self.order[ends]]
        boxes = np.stack([x0, y0, x1 - x0 + 1, y1 - y0 + 1], -1)
        return dict(zip(self.pixels, boxes.tolist(), strict=True))


class Read(NamedTuple):
    """A map and its record that belong together."""

    ids: np.ndarray
    """int32 [H, W]."""
    record: dict[str, Any]
    """Each id stands once, and none is 0."""
    repairs: dict[str, int]
    """Number of repairs, by kind."""
    area_mismatches: int
    """Segments whose stated area their pixels deny."""
    box_mismatches: int
    """Segments whose stated box their pixels deny by more than a pixel."""
    regions: Regions
    """The regions of the map."""


def read_ids(
    png: bytes,
    record: dict[str, Any],
    *,
    bgr: bool = False,
    covered: bool = False,
    unlisted: Unlisted = "refuse",
) -> Read:
    """A map and its record, repaired where that is safe.

    Args:
        png: the file of the map.
        record: the annotation: `segments_info` with `id`, `category_id` and, where it has them, `iscrowd` and `area`.
        bgr: all maps of the data set have red and blue exchanged.
        covered: leave out segments without a pixel, which ADE20K's prepared form lists where things cover stuff.
        unlisted: what becomes of pixels whose id the record does not list, where nothing shows that the map was
            spoilt (written as a JPEG, resized smoothly, cut to 8 bits): that stays a fault.

    Raises:
        Fault: map and record do not belong together, and the reason shows in the difference.
        ValueError: it is no PNG, or is damaged.
    """
    repairs: dict[str, int] = {}
    infos = _listed_once(record["segments_info"], repairs)
    listed = {info["id"] for info in infos}
    ids, regions = _decoded(png, listed, bgr, repairs)
    counts = regions.pixels
    if others := sorted(counts.keys() - listed - {VOID}):
        if fault := _spoilt(counts, listed, others):
            raise fault
        if unlisted == "refuse":
            raise _fault_of_unlisted(counts, others)
        count_repair(repairs, UNLISTED, sum(counts[value] for value in others))
        ids = np.where(np.isin(ids, others), VOID, ids).astype(np.int32)
        regions = Regions.of(ids)
        counts = regions.pixels
    absent = listed - counts.keys()
    if gone := [info for info in infos if covered and info["id"] in absent]:
        count_repair(repairs, COVERED, len(gone))
        infos = [info for info in infos if info["id"] not in absent]
    if left := sorted(absent & {info["id"] for info in infos}):
        raise Fault(
            f"segments that the record lists but the PNG does not hold: {shown_ids(left)}",
            "take them out of segments_info, or draw them in the map",
        )
    mismatches = sum(info.get("area") not in (None, counts[info["id"]]) for info in infos)
    boxes = regions.boxes() if any(info.get("bbox") is not None for info in infos) else {}
    others = sum(info.get("bbox") is not None and _differ(info["bbox"], boxes[info["id"]]) for info in infos)
    return Read(ids, {**record, "segments_info": infos}, repairs, mismatches, others, regions)


def _differ(stated: Any, box: Sequence[int]) -> bool:
    """True if a stated box is none, or differs from another by more than a pixel, by which tools disagree."""
    if not isinstance(stated, list) or len(stated) != 4 or not all(isinstance(v, int | float) for v in stated):
        return True
    return any(abs(a - b) > 1 for a, b in zip(stated, box, strict=True))


def stands_in_bgr(png: bytes, record: dict[str, Any]) -> bool | None:
    """True if a map fits its record with red and blue exchanged only, False as it is only; None if that does not show.

    Raises:
        ValueError: it is no COCO-panoptic PNG.
    """
    listed = {info["id"] for info in record["segments_info"]} - {VOID}
    values = Regions.of(decode_ids(png)).pixels.keys()
    as_is, exchanged = (_fits(values, ids) for ids in (listed, _all_exchanged(listed)))
    return None if as_is == exchanged else exchanged


def _listed_once(infos: Sequence[dict[str, Any]], repairs: dict[str, int]) -> list[dict[str, Any]]:
    """The entries without those of void; two of the same id and category become one."""
    entries: dict[int, dict[str, Any]] = {}
    for info in infos:
        same = entries.setdefault(info["id"], info)
        if info["id"] == VOID:
            count_repair(repairs, VOID_LISTED)
        elif same["category_id"] != info["category_id"]:
            raise Fault(
                f"segment {info['id']} is listed twice, with the categories {same['category_id']} and "
                f"{info['category_id']}",
                "give the two segments ids of their own in the map and the record",
            )
        elif same is not info:
            count_repair(repairs, REPEATED)
            both = int(bool(same.get("iscrowd", 0)) and bool(info.get("iscrowd", 0)))
            entries[info["id"]] = {**same, "iscrowd": both}
    entries.pop(VOID, None)
    return list(entries.values())


def _decoded(png: bytes, listed: set[int], bgr: bool, repairs: dict[str, int]) -> tuple[np.ndarray, Regions]:
    """The ids of a PNG of any kind whose meaning is certain, and their regions."""
    if png.startswith(b"\xff\xd8"):
        raise Fault("the map is a JPEG, whose compression makes up ids", "export it again as a PNG")
    colour, depth = (png[25], png[24]) if png.startswith(PNG_SIGNATURE) and len(png) > 25 else (2, 8)
    if colour in (0, 3):
        ids = decode_labels(png)
        regions = Regions.of(ids)
        if not listed <= regions.pixels.keys():
            raise Fault(
                f"the map has one channel of {depth} bits, and its values are not the ids of the record",
                "save the map as 8-bit RGB with id = R + 256 G + 65536 B",
            )
        count_repair(repairs, ONE_CHANNEL)
        return ids, regions
    ids = decode_ids(png)
    regions = Regions.of(ids)
    values = regions.pixels.keys()
    as_is = _fits(values, listed)
    if as_is and not bgr:
        return ids, regions
    exchanged = _fits(values, _all_exchanged(listed))
    if bgr and (exchanged or not as_is):
        count_repair(repairs, BGR)
        ids = _exchanged(ids)
        return ids, Regions.of(ids)
    if bgr or (exchanged and not listed & values):
        order, others = ("RGB", "BGR") if bgr else ("BGR", "RGB")
        raise Fault(
            f"the channels of the map stand in {order} order, those of other maps in {others}",
            "write all maps of the data set in RGB order (OpenCV writes the first channel as blue)",
        )
    return ids, regions


def _exchanged(ids: Any) -> Any:
    """An id, or an array of them, with red and blue exchanged."""
    return (ids & 0x00FF00) | (ids >> 16) | ((ids & 0xFF) << 16)


def _all_exchanged(ids: Collection[int]) -> set[int]:
    return {_exchanged(value) for value in ids}


def _fits(values: Collection[int], listed: Collection[int]) -> bool:
    """True if a map holds each id that is listed, of which there is one, and no other."""
    return bool(listed) and set(values) - {VOID} == listed


def _spoilt(counts: dict[int, int], listed: set[int], unlisted: Sequence[int]) -> Fault | None:
    """The fault of a map whose ids show that it was spoilt after it was drawn."""
    if len(unlisted) >= SPECKS and statistics.median(counts[value] for value in unlisted) < SPECK:
        return Fault(
            f"the map holds {len(unlisted)} ids that the record does not list, most of them on fewer than {SPECK} "
            "pixels: it was saved as a JPEG, or resized smoothly",
            "export it again as a PNG in its own size, or resize it to the nearest pixel",
        )
    if listed and max(counts) < 256 <= max(listed) and {value & 255 for value in listed} >= set(unlisted):
        return Fault(
            f"all ids of the map are below 256, but the record lists up to {max(listed)}: it was saved with 8 bits",
            "export it again as 8-bit RGB with id = R + 256 G + 65536 B",
        )
    return None


def _fault_of_unlisted(counts: dict[int, int], unlisted: Sequence[int]) -> Fault:
    """The fault of ids that the record does not list."""
    largest = sorted(unlisted, key=lambda value: -counts[value])
    shown = [f"{value} ({counts[value]} pixels)" for value in largest[:8]]
    rest = f" and {len(unlisted) - 8} more" if len(unlisted) > 8 else ""
    return Fault(
        f"segments in the PNG that the record does not list: {', '.join(shown)}{rest}",
        "list them in segments_info, or make them void: id 0 in the map, or --data.unlisted void",
    )
