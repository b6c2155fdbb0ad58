"""Checks of a single image file against the size that its record states."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import PIL.Image

from panoptic.png import PNG_SIGNATURE, check_jpeg, decode_image, decode_stored, holds_12_bits, image_size
from panoptic.segmentation import Categories, Segmentation, shown_size
from pipelines.data.config import Orientation
from pipelines.data.readers.exif import EXIF_MARKS
from pipelines.data.readers.faults import Fault

TWELVE_BITS = "16-bit photographs without a value from 4096, read as 12 bits"
STORED_FRAME = "photographs whose map lies over the stored pixels, freed of their EXIF orientation"
UPRIGHT_FRAME = "photographs that EXIF turns or mirrors within their size; their maps are taken to lie over the result"
"""Kinds of repairs, as the manifest counts them."""

GREY = "photographs in grey, repeated over three channels"
CMYK = "photographs in CMYK, converted to RGB"
SIXTEEN_BITS = "16-bit photographs, of which the upper 8 bits are taken"
ANIMATED = "animations, of which the first picture is taken"
STUFF_UNITED = "segments of a stuff class in one image, united"
STUFF_CROWD = "segments of stuff marked as crowds, which only things have"
"""Further kinds of repairs."""

SEVERAL_CROWDS = "images have several crowds of one class, of which panopticapi's evaluation knows only the last"
"""Kind of warning of `sound_segments`."""

EMPTY = "the image file is empty (0 bytes)"
"""Reason of a fault."""

COPY = "copy the file again from its source"
PAIR = "check that map and photograph belong together, and export the map in the size of the photograph"
DEFAULT_REMEDY = "replace the file, or correct its entry in the annotations"
"""Remedies that messages about a broken image end with."""


def check_photograph(
    data: bytes, name: str, size: tuple[int, int], orientation: Orientation = "applied"
) -> tuple[bytes, list[str]]:
    """Check an image file against its map.

    An EXIF orientation is applied wherever images are read, so the map must lie over the upright image. Where the
    sizes show that it lies over the stored pixels instead, the orientation is removed from the file. Where EXIF turns
    or mirrors the image within its size, `orientation` says which it is.

    Args:
        data: the file's bytes.
        name: of the file, for messages.
        size: (H, W) of the map.
        orientation: "stored" as in the public data sets, or "applied".

    Returns:
        The bytes to keep, and the kinds of repairs that their reading needs.

    Raises:
        ValueError: empty, cut or unreadable, of another size, or of a kind whose orientation cannot be removed.
    """
    if not data:
        raise Fault(EMPTY, COPY)
    if is_cut(data):
        raise Fault("the JPEG ends before its image does (partial download?)", COPY)
    header = image_size(data, name)
    if tuple(size) not in (header, header[::-1]):
        raise Fault(_unequal(size, header, header), PAIR)
    repairs = stored_forms(data)
    if data.startswith(b"\xff\xd8") and not _may_be_turned(data):
        check_jpeg(data, name)
        if tuple(size) != header:
            raise Fault(_unequal(size, header, header), PAIR)
        return data, repairs
    image = decode_image(data, name)
    stored = decode_stored(data, name) if _may_be_turned(data) else image
    turned = (image.shape == stored.shape and not np.array_equal(image, stored)) or _turned_tiff(data, image)
    if image.shape[:2] != size and stored.shape[:2] != size:
        raise Fault(_unequal(size, stored.shape, image.shape), PAIR)
    if image.shape[:2] != size or (turned and orientation == "stored"):
        data = without_exif(data)
        if _turned_tiff(data, image) or not np.array_equal(decode_image(data, name), stored):
            raise Fault(
                f"its map lies over the stored pixels ({shown_size(stored.shape)}, height x width), but its EXIF "
                f"orientation turns the image ({shown_size(image.shape)}) and cannot be removed from a file of this "
                "kind",
                "save it as JPEG or PNG without the orientation",
            )
        repairs.append(STORED_FRAME)
    elif turned:
        repairs.append(UPRIGHT_FRAME)
    return data, repairs


def _unequal(size: Sequence[int], stored: Sequence[int], upright: Sequence[int]) -> str:
    exif = f" (by its EXIF orientation {shown_size(upright)})" if tuple(stored[:2]) != tuple(upright[:2]) else ""
    return f"the map is {shown_size(size)} but the photograph {shown_size(stored)}{exif}, height x width"


def stored_forms(data: bytes) -> list[str]:
    """Kinds of repairs that decoding to RGB of 8 bits makes of an image file, read from its header."""
    deep, animated = "", False
    if data.startswith(b"\xff\xd8"):
        grey, cmyk = ((_jpeg_header(data)[1] == components) for components in (1, 4))
    elif data.startswith(PNG_SIGNATURE):
        grey, cmyk = data[25:26] in (b"\0", b"\x04"), False
        deep = SIXTEEN_BITS if data[24:25] == b"\x10" else ""
        animated = b"acTL" in data[: data.find(b"IDAT")]
    else:
        with PIL.Image.open(io.BytesIO(data)) as image:
            grey, cmyk = image.mode in ("1", "L", "LA", "I", "I;16", "I;16B"), image.mode == "CMYK"
            deep = SIXTEEN_BITS if image.mode.startswith("I;16") else ""
            animated = getattr(image, "n_frames", 1) > 1
    if holds_12_bits(data):
        deep = TWELVE_BITS
    kinds = {deep: bool(deep), GREY: grey, CMYK: cmyk, ANIMATED: animated}
    return [kind for kind, applies in kinds.items() if applies]


def _jpeg_header(data: bytes) -> tuple[int, int]:
    """The position of a JPEG's first scan, and the number of the JPEG's components; 0 where a part is missing."""
    place, components = 2, 0
    while place + 10 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        kind = data[place + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame header, SOF0 to SOF15
            components = data[place + 9]
        fill = kind == 0xFF
        place += 1 if fill else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return place, components


def _may_be_turned(data: bytes) -> bool:
    """True if a file may have an EXIF orientation. In a JPEG it stands before the scan; elsewhere anywhere."""
    if data.startswith(b"\xff\xd8"):
        data = data[: _jpeg_header(data)[0]]
    return any(mark in data for mark in EXIF_MARKS)


class Sound(NamedTuple):
    """A map in which a stuff class is one segment and no crowd, as PQ counts it."""

    segmentation: Segmentation
    areas: np.ndarray
    """int64 [N], the pixels of each segment."""
    repairs: dict[str, int]
    """Number of each kind of repair."""
    warnings: dict[str, int]
    """Number of each kind of warning."""


def sound_segments(truth: Segmentation, categories: Categories, areas: np.ndarray | None = None) -> Sound:
    """A map whose stuff classes are one segment each and no crowds.

    Args:
        truth: as a reader gives it.
        categories: of the data set.
        areas: int64 [N], the pixels of each segment, where they are known.
    """
    areas = truth.areas() if areas is None else areas
    stuff, crowd = ~np.array(categories.is_thing, bool)[truth.labels], truth.is_crowd()
    repairs = {STUFF_CROWD: int((stuff & crowd).sum())}
    crowd = crowd & ~stuff
    # the segment that each one becomes a part of: the first of its class for stuff, itself for a thing
    owner = np.arange(len(truth.labels))
    for label in np.unique(truth.labels[stuff]):
        same = np.flatnonzero(truth.labels == label)
        owner[same] = same[0]
    kept = owner == np.arange(len(owner))
    repairs[STUFF_UNITED] = int((~kept).sum())
    # every crowd left is one of things; several of a class are kept, but PQ of panopticapi sees only the last
    crowds = np.bincount(truth.labels[crowd], minlength=1)
    warnings = {SEVERAL_CROWDS: int((crowds > 1).any())}
    if repairs[STUFF_UNITED]:
        # numbers of segments without gaps, from 1; 0 stays void
        position = np.cumsum(kept)[owner]
        segments = np.concatenate([[0], position]).astype(np.int32)[truth.segments]
        truth = Segmentation(segments, truth.labels[kept], crowd[kept])
        areas = np.bincount(position - 1, areas, minlength=len(truth.labels)).astype(np.int64)
    elif repairs[STUFF_CROWD]:
        truth = Segmentation(truth.segments, truth.labels, crowd)
    occurring = [{kind: count for kind, count in counts.items() if count} for counts in (repairs, warnings)]
    return Sound(truth, areas, *occurring)


def without_exif(jpeg: bytes) -> bytes:
    """A JPEG or PNG without the parts that hold EXIF, and so without its orientation; other files stay as they are."""
    if jpeg.startswith(PNG_SIGNATURE):
        return _png_without_exif(jpeg)
    parts, place = [jpeg[:2]], 2
    while jpeg.startswith(b"\xff\xd8") and jpeg[place : place + 1] == b"\xff" and jpeg[place + 1] not in (0xDA, 0xD9):
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place : place + 2] != b"\xff\xe1" or jpeg[place + 4 : place + 8] != b"Exif":
            parts.append(jpeg[place:end])
        place = end
    return b"".join(parts) + jpeg[place:]


def _png_without_exif(png: bytes) -> bytes:
    parts, place = [png[:8]], 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] != b"eXIf":
            parts.append(png[place:end])
        place = end
    return b"".join(parts)


def _turned_tiff(data: bytes, image: np.ndarray) -> bool:
    """True for a TIFF with an orientation that leaves its size: OpenCV turns it even where it is to read as stored."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II*\0") else "big"
    if order == "big" and not data.startswith(b"MM\0*"):
        return False
    directory = int.from_bytes(data[4:8], order)
    for place in range(directory + 2, directory + 2 + 12 * int.from_bytes(data[directory : directory + 2], order), 12):
        if int.from_bytes(data[place : place + 2], order) == 274:  # the tag Orientation
            orientation = int.from_bytes(data[place + 8 : place + 10], order)
            return orientation in (2, 3, 4) or (orientation > 4 and image.shape[0] == image.shape[1])
    return False


MARKERS = re.compile(rb"\xff[\xc0-\xcf\xd8-\xef\xfe]")
"""Markers that begin a segment of a JPEG, the image or its end. None can stand in the coded pixels between segments:
there a byte 0xff is followed by 0 or is a restart marker (0xd0 to 0xd7)."""


def is_cut(data: bytes) -> bool:
    """Tell a JPEG that ends before its end marker: some versions of OpenCV fill the missing rows with grey, unasked.

    Segments are skipped by their length, thumbnails in them too; what lies behind the end marker (the film of a motion
    photo) is none of the image. 0.1 ms for 160 kB.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    place = 2
    while marker := MARKERS.search(data, place):
        kind, start = data[marker.end() - 1], marker.end()
        if kind in (0xD8, 0xD9):  # another image begins before this one has ended, or it has ended
            return kind == 0xD8
        place = start + int.from_bytes(data[start : start + 2], "big")
    return True
