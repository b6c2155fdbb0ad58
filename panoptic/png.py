"""COCO-panoptic PNG files to and from `Segmentation`, and image files to arrays.

COCO stores a panoptic map as an RGB PNG whose colour is the segment's id (id = R + 256 G + 65536 B,
0 = void) beside a JSON record that lists the segments (Kirillov et al., Panoptic Segmentation, 2019;
format of cocodataset.org). Shards keep the renumbered map 1..N as a single-channel PNG without filters
instead, which decodes about eight times faster.

Maps are decoded by kornia-rs where it is installed (the extra `fast`), else by OpenCV, to the same pixels.

Shapes: H x W pixels, N segments.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from panoptic.segmentation import Categories, Segmentation, flag, renumber, shown, shown_ids, shown_size, whole_number

try:  # imported here, as maps are decoded in threads
    from kornia_rs import io as compiled  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
except ImportError:
    compiled = None

MAX_ID = (1 << 24) - 1
"""The largest id that three colour channels hold."""

MAX_JPEG = 65500
"""The largest width and height that libjpeg writes."""

MAX_PIXELS = 178_956_970
"""The most pixels of an image file that is decoded, about half a gigabyte as RGB; Pillow's limit, too.

A PNG of a few kilobytes may state a picture of gigabytes, so the size is read from the header first.
"""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
"""The first bytes of every PNG."""

_GREY, _RGB, _PALETTE, _RGBA = 0, 2, 3, 6
_TRANSPARENCY = b"tRNS"
_COLOUR_TYPES = {_GREY: "greyscale", _RGB: "RGB", _PALETTE: "palette", 4: "greyscale with alpha", _RGBA: "RGBA"}


HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of the files that iPhones write, in their first twelve bytes; AVIF has brands of its own."""


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """(H, W) of an image file, read from its header: nothing is decoded, and an EXIF orientation is not applied.

    Raises:
        ValueError: the bytes are no image file, or state more than `MAX_PIXELS` pixels or none; starts with `name`.
    """
    if not data:
        raise ValueError(f"{name}: the file is empty (0 bytes); copy it again from its source")
    if data.startswith(PNG_SIGNATURE):
        size = _png_size(data)
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg_size(data)
    else:
        size = _other_size(data, name)
    if size is None and data[4:8] == b"ftyp" and data[8:12] in HEIC:
        raise ValueError(f"{name}: HEIC, which cannot be decoded here; save it as JPEG, AVIF or PNG")
    if size is None:
        raise ValueError(f"{name}: cannot be decoded as an image ({len(data)} bytes); the file is damaged or no image")
    if min(size) < 1:
        raise ValueError(f"{name}: its header says {shown_size(size)} pixels (height x width); the file is damaged")
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(_too_large(name, f"its header says {shown_size(size)} pixels (height x width)"))
    return size


def decode_ids(png: bytes) -> np.ndarray:
    """The ids of a COCO-panoptic PNG.

    Returns:
        int32 [H, W], id = R + 256 G + 65536 B; an alpha channel is ignored.

    Raises:
        ValueError: as `decode_colours`.
    """
    packed = pack_colours(decode_colours(png))
    return np.bitwise_and(packed, MAX_ID, out=packed)


def decode_colours(png: bytes) -> np.ndarray:
    """The colours of a COCO-panoptic PNG, for who makes ids of them part by part (`pack_colours`).

    Returns:
        uint8 [H, W, 3] or [H, W, 4], contiguous: red, green, blue and maybe alpha, which is no part of the id.

    Raises:
        ValueError: not a PNG, damaged, larger than `MAX_PIXELS`, or not 8-bit RGB(A): ids cannot be read off a
            palette or greys.
    """
    colour, depth = _header(png)
    if colour not in (_RGB, _RGBA) or depth != 8:
        raise ValueError(
            f"a {depth}-bit {_COLOUR_TYPES.get(colour, '?')} PNG holds no COCO-panoptic ids; "
            "save the map as 8-bit RGB with id = R + 256 G + 65536 B"
        )
    colours = _decode_compiled(png, "rgb" if colour == _RGB else "rgba", depth)
    if colours is None:
        colours = _decode(png, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return colours


def pack_colours(colours: np.ndarray, rgba: np.ndarray | None = None) -> np.ndarray:
    """The ids of colours in the lower 24 bits, and alpha in the upper 8.

    Who looks at some of the pixels masks these only; the mask of `decode_ids` passes over all.

    Args:
        colours: uint8 [H, W, 3] or [H, W, 4], as `decode_colours` gives them.
        rgba: uint8 [H, W, 4] that may be written to, so that no memory is asked for.

    Returns:
        int32 [H, W], contiguous; a view of `rgba`, or of `colours` where they have four channels.
    """
    if colours.shape[2] == 3:
        rgba = cv2.cvtColor(colours, cv2.COLOR_RGB2RGBA, dst=rgba)
    else:
        rgba = colours
    # four bytes R G B A are one little-endian integer, so one mask (in place) replaces three multiply-adds
    return rgba.view("<i4")[..., 0].astype(np.int32, copy=False)


def decode_labels(png: bytes) -> np.ndarray:
    """The values of a label map that has one channel.

    A palette is not looked up: the index is the label. 16 bits stay 16.

    Returns:
        int32 [H, W].

    Raises:
        ValueError: not a PNG, damaged, larger than `MAX_PIXELS`, or of several channels.
    """
    colour, depth = _header(png)
    if colour not in (_GREY, _PALETTE):
        raise ValueError(
            f"a {depth}-bit {_COLOUR_TYPES.get(colour, '?')} PNG is no label map; the labels are the values of one "
            "channel (a PNG of colours is for eyes only)"
        )
    if colour == _GREY and depth >= 8 and _TRANSPARENCY not in png:
        return _decode(png, cv2.IMREAD_UNCHANGED).astype(np.int32)
    values = _pillow(png).astype(np.int32)
    if colour == _GREY and 1 < depth < 8:
        values //= 255 // ((1 << depth) - 1)  # Pillow spreads 2 and 4 bits over 0 to 255
    return values


def decode_channels(png: bytes, channels: int) -> np.ndarray:
    """The bytes of a label map that keeps its values in 3 or 4 channels; alpha is a value like the others.

    Returns:
        uint8 [H, W, channels], in the order red, green, blue, alpha.

    Raises:
        ValueError: not a PNG, damaged, larger than `MAX_PIXELS`, or not 8-bit with so many channels.
    """
    colour, depth = _header(png)
    wanted = {3: _RGB, 4: _RGBA}[channels]
    if colour != wanted or depth != 8:
        raise ValueError(
            f"a {depth}-bit {_COLOUR_TYPES.get(colour, '?')} PNG, where the labels need 8-bit {_COLOUR_TYPES[wanted]}; "
            "give the file as its owner ships it, since a converted one has lost a part of them"
        )
    if _TRANSPARENCY in png:
        return _pillow(png)
    swap = cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGRA2RGBA
    return cv2.cvtColor(_decode(png, cv2.IMREAD_UNCHANGED), swap)


def _pillow(png: bytes) -> np.ndarray:
    """The stored values of a PNG, in its own mode: OpenCV looks palettes up and makes transparency a channel."""
    image_size(png, "PNG")
    try:
        with Image.open(io.BytesIO(png)) as image:
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"PNG: cannot be decoded ({error}); the file is damaged") from error


def encode_ids(ids: np.ndarray) -> bytes:
    """A COCO-panoptic RGB PNG of int [H, W] ids.

    Raises:
        ValueError: an id is negative or above 2^24 - 1.
    """
    _check_range(ids, MAX_ID, "ids of a COCO-panoptic PNG have 24 bits")
    rgba = np.ascontiguousarray(ids, "<i4").view(np.uint8).reshape(*ids.shape, 4)
    return _encode(cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGR))


def decode_segments(png: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """The int32 [H, W] segment map of a single-channel 8- or 16-bit PNG, as `encode_segments` writes it.

    Args:
        size: (H, W) that its row states, compared with the header before the map is decoded.

    Raises:
        ValueError: not a PNG, damaged, of another size, larger than `MAX_PIXELS`, or of another pixel format.
    """
    colour, depth = _header(png)
    if size is not None and (stated := image_size(png, "PNG")) != tuple(size):
        raise ValueError(f"the map is {shown_size(stated)} but the record says {shown_size(size)} (height x width)")
    if colour != _GREY or depth not in (8, 16):
        raise ValueError(
            f"a {depth}-bit {_COLOUR_TYPES.get(colour, '?')} PNG is no segment map; expected one channel of 8 or "
            "16 bits (a COCO-panoptic RGB PNG is read by decode_ids)"
        )
    pixels = _decode_compiled(png, "mono", depth)
    if pixels is None:
        pixels = _decode(png, cv2.IMREAD_UNCHANGED)
    return pixels.reshape(pixels.shape[:2]).astype(np.int32)


def encode_segments(segments: np.ndarray, count: int | None = None) -> bytes:
    """A single-channel PNG of int [H, W] segments 0..N: 8 bits where N < 256, else 16.

    Args:
        segments: the map.
        count: N, where the map is known to hold the segments 1..N; else it is looked through.

    Raises:
        ValueError: a value is negative or above 65535.
    """
    highest = count
    if highest is None or highest > 65535:
        highest = _check_range(segments, 65535, "a segment map holds at most 65535 segments")
    pixels = np.ascontiguousarray(segments, np.uint8 if highest < 256 else np.uint16)
    # written once, read every epoch: a map of few values gets smaller without filters, and is decoded 2.5 times faster
    options = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
    return _encode(pixels, [*options, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE])


def decode_image(data: bytes, name: str = "image", size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file (PNG, JPEG, or another kind that OpenCV and Pillow know) as uint8 [H, W, 3] RGB.

    Grey is repeated over the channels, alpha is dropped, the EXIF orientation is applied, and 16 bits become the
    upper 8. Where no value of 16 bits reaches 4096, they are the 12 of a camera, and their upper 8 are taken
    (`holds_12_bits`).

    Args:
        data: the file's bytes.
        name: of the file, for messages.
        size: (H, W) that its record states, compared with the header before the image is decoded; as EXIF may turn
            the image, the header may say (W, H).

    Raises:
        ValueError: the bytes are no readable image, of another size, or larger than `MAX_PIXELS`; the message starts
            with `name`.
    """
    stated = image_size(data, name)
    if size is not None and tuple(size) not in (stated, stated[::-1]):
        raise ValueError(
            f"{name}: the image is {shown_size(stated)} but the record says {shown_size(size)} (height x width)"
        )
    return _decode_colour(data, name)


def decode_stored(data: bytes, name: str = "image") -> np.ndarray:
    """The pixels of an image file as they are stored: `decode_image` without its EXIF orientation.

    Raises:
        ValueError: the bytes are no readable image; the message starts with `name`.
    """
    return _decode_colour(data, name, cv2.IMREAD_IGNORE_ORIENTATION)


def check_jpeg(data: bytes, name: str = "image") -> None:
    """Refuse a JPEG that `decode_image` refuses, for two thirds of its cost.

    All coefficients are read, where a damaged file shows, but only an eighth of the rows and columns are computed.

    Raises:
        ValueError: as `decode_image`.
    """
    _decode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8, name)


def holds_12_bits(data: bytes) -> bool:
    """Tell 12-bit photographs: PNG or TIFF files of 16 bits in which no value reaches 4096, and some value is not 0."""
    if not (data.startswith((b"II*\0", b"MM\0*")) or (data.startswith(b"\x89PNG") and data[24:25] == b"\x10")):
        return False
    pixels = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    return pixels.dtype == np.uint16 and 0 < pixels.max() < 4096


def encode_image(image: np.ndarray) -> bytes:
    """The PNG of a picture, uint8 [H, W, 3] RGB."""
    return _encode(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def encode_raw(image: np.ndarray) -> bytes:
    """The pixels of a picture, uint8 [H, W, 3] RGB, as they are, behind a header: a binary Netpbm file (P6).

    Decoding it copies 3 bytes a pixel: 0.1 ms for 512 x 512, where JPEG takes 1 ms.
    """
    height, width = image.shape[:2]
    return b"P6\n%d %d\n255\n" % (width, height) + np.ascontiguousarray(image, np.uint8).tobytes()


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """The JPEG of a picture, uint8 [H, W, 3] RGB.

    Raises:
        ValueError: it is wider or higher than a JPEG can be.
    """
    if max(image.shape[:2]) > MAX_JPEG:
        raise ValueError(
            f"a picture of {shown_size(image.shape[:2])} pixels is too large for a JPEG (up to {MAX_JPEG})"
        )
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def silence_opencv() -> None:
    """Silence OpenCV's warnings about broken files in this process: readers say what is wrong with a file.

    libpng and libjpeg write some of their warnings past OpenCV.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def from_coco(
    png: bytes, record: Mapping, categories: Categories, name: str, size: tuple[int, int] | None = None
) -> Segmentation:
    """One image's truth or prediction from its PNG and its entry of the JSON's `annotations`.

    Segment k is entry k of the record's `segments_info`. Areas are never read from the record
    (`area_mismatches` reports them).

    Args:
        png: the file's bytes.
        record: with `segments_info`, each entry with `id`, `category_id` and optionally `iscrowd`, `score`. Whole
            numbers may be written as text or as decimal numbers, and `iscrowd` as a truth value.
        categories: of the dataset.
        name: of the file, for messages.
        size: (H, W) that the JSON or the photograph states, compared with the PNG's where given.

    Raises:
        ValueError: one message that starts with `name` and lists every problem.
    """
    problems = []
    try:
        _header(png)
        stated = image_size(png, "PNG")
        if size is not None and stated != tuple(size):
            problems.append(f"the PNG is {shown_size(stated)} but the image is {shown_size(size)} (height x width)")
            if math.prod(stated) > math.prod(size):  # not worth its memory
                raise ValueError("; ".join(problems))
        id_map = decode_ids(png)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return from_ids(id_map, record, categories, name, problems)


def from_ids(
    id_map: np.ndarray,
    record: Mapping,
    categories: Categories,
    name: str,
    problems: Sequence[str] = (),
    of_map: tuple[np.ndarray, np.ndarray] | None = None,
) -> Segmentation:
    """`from_coco` of a PNG that is decoded already.

    Args:
        id_map: int [H, W], as `decode_ids` gives it.
        record, categories, name: see `from_coco`.
        problems: what is wrong with the image already.
        of_map: the `segmentation.runs` of the map, where they are known.

    Raises:
        ValueError: one message that starts with `name` and lists every problem.
    """
    infos = record.get("segments_info")
    if not isinstance(infos, list):
        what = f"has segments_info {shown(infos)}" if infos is not None else "has no segments_info"
        raise ValueError(f"{name}: the record {what}; each annotation needs the list of its segments")
    entries, found = _read_entries(infos, categories)
    problems = [*problems, *found]
    ids = [entry.id for entry in entries]
    segments, unlisted, present = renumber(id_map, ids, of_map)
    if len(unlisted):
        problems.append(f"segments in the PNG that the record does not list: {shown_ids(unlisted.tolist())}")
    absent = [i for i, there in zip(ids, present, strict=True) if not there and ids.count(i) == 1]
    if absent:
        problems.append(f"segments that the record lists but the PNG does not hold: {shown_ids(absent)}")
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))
    scored = bool(infos) and all("score" in info for info in infos)
    return Segmentation(
        segments,
        labels=np.array([entry.label for entry in entries], np.int64),
        crowd=np.array([entry.crowd for entry in entries], bool),
        scores=np.array([info["score"] for info in infos], np.float32) if scored else None,
    )


def to_coco(
    segmentation: Segmentation, categories: Categories, image_id: int | str, file_name: str
) -> tuple[bytes, dict]:
    """The PNG and the `annotations` entry of one image, as COCO's submission format wants them.

    The id of a segment is its number after those without a pixel are left out (the official evaluation
    refuses them). `area` and `bbox` (x, y, width, height) are counted from pixels.
    """
    from scipy import ndimage  # a tenth of a second that most processes need not spend

    alive = segmentation.compact()
    crowd, areas = alive.is_crowd(), alive.areas()
    infos = []
    for k, window in enumerate(ndimage.find_objects(alive.segments, max_label=len(alive.labels))):
        rows, columns = window
        info = {
            "id": k + 1,
            "category_id": categories.ids[int(alive.labels[k])],
            "area": int(areas[k]),
            "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
            "iscrowd": int(crowd[k]),
        }
        if alive.scores is not None:
            info["score"] = float(alive.scores[k])
        infos.append(info)
    return encode_ids(alive.segments), {"image_id": image_id, "file_name": file_name, "segments_info": infos}


def area_mismatches(segmentation: Segmentation, record: Mapping) -> list[tuple[int, int, int]]:
    """(id, area in the record, pixels) of each segment whose record states an area that the pixels deny.

    `segmentation` is what `from_coco` made of `record`. A wrong area does not hurt us, but other tools
    trust it: it is why their PQ can exceed 100.
    """
    rows = zip(record["segments_info"], segmentation.areas().tolist(), strict=True)
    return [(info["id"], info["area"], area) for info, area in rows if info.get("area") not in (None, area)]


class _Entry(NamedTuple):
    """One entry of `segments_info`."""

    id: int
    label: int
    crowd: bool


def _read_entries(infos: list[Mapping], categories: Categories) -> tuple[list[_Entry], list[str]]:
    """The entries of a record whose id can be read, and all problems that show without the PNG.

    An entry with another problem keeps its id, so that its pixels are not reported as unlisted, too.
    """
    index = {number: label for label, number in enumerate(categories.ids)}
    entries, problems = [], []
    for k, info in enumerate(infos):
        if not isinstance(info, Mapping):
            problems.append(f"segments_info[{k}] is {shown(info)}; each segment is an object with id and category_id")
            continue
        missing = [key for key in ("id", "category_id") if key not in info]
        if missing:
            problems.append(f"segments_info[{k}] has no {' and no '.join(missing)}")
        number = _number(info.get("id"))
        if "id" in info and (number is None or not 0 < number <= MAX_ID):
            rule = f"ids are whole numbers from 1 to {MAX_ID}"
            problems.append(f"segments_info[{k}] has the id {shown(info['id'])}; {rule}")
            number = None
        category = _number(info.get("category_id"))
        label = None if category is None else index.get(category)
        if "category_id" in info and label is None:
            what = f"the category {shown(info['category_id'])}"
            problems.append(f"segment {shown(info.get('id', '?'))} has {what}, which categories do not list")
        try:
            crowd = flag(info.get("iscrowd", 0))
        except ValueError as error:
            problems.append(f"segments_info[{k}].iscrowd is {error}")
            crowd = False
        if "score" in info and (isinstance(info["score"], bool) or not isinstance(info["score"], int | float)):
            problems.append(f"segments_info[{k}].score is {shown(info['score'])}; it must be a number")
        if number is not None:
            entries.append(_Entry(number, -1 if label is None else label, crowd))
    twice = [i for i, times in Counter(entry.id for entry in entries).items() if times > 1]
    if twice:
        problems.append(f"ids that the record lists more than once: {shown_ids(sorted(twice))}")
    return entries, problems


def _number(value: object) -> int | None:
    """The whole number that a value means, None where it means none."""
    try:
        return whole_number(value)
    except ValueError:
        return None


def _check_range(ids: np.ndarray, limit: int, rule: str) -> int:
    """The largest value of a map.

    Raises:
        ValueError: a value is negative or above the limit; says the rule.
    """
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high > limit:
        raise ValueError(f"values run from {low} to {high}; {rule} (0..{limit})")
    return high


def _header(png: bytes) -> tuple[int, int]:
    """(colour type, bit depth) of a PNG. OpenCV would silently expand palettes and scale depths."""
    if not png:
        raise ValueError("not a PNG file: it is empty (0 bytes); copy it again from its source")
    if len(png) < 26 or not png.startswith(PNG_SIGNATURE):
        raise ValueError("not a PNG file (wrong first bytes); check that the file is complete")
    return png[25], png[24]


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) of a PNG, from the chunk IHDR that begins it; None where that is cut."""
    if len(data) < 24 or data[12:16] != b"IHDR":
        return None
    return int.from_bytes(data[20:24]), int.from_bytes(data[16:20])


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) of a JPEG, from its first frame header (ITU-T T.81, B.2.2); None where there is none before the scan."""
    place = 2
    while place + 9 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker == 0xFF:  # fill bytes, and what decoders pass over
            place += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # markers without a segment
            place += 2
        elif marker in (0xD9, 0xDA):  # the end, or the scan
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame headers SOF0 to SOF15
            return int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None


def _other_size(data: bytes, name: str) -> tuple[int, int] | None:
    """(H, W) of a file that is neither PNG nor JPEG, as Pillow reads it from its header; None where it is no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(name, "its header says more")) from error
    except (OSError, ValueError, SyntaxError):  # a kind that Pillow does not know, or a broken header
        return None


def _too_large(name: str, stated: str) -> str:
    return f"{name}: {stated}, and images of up to {MAX_PIXELS} pixels are read; cut it into tiles, or scale it down"


def _decode_colour(data: bytes, name: str, flags: int = 0) -> np.ndarray:
    """The uint8 [H, W, 3] RGB of an image file."""
    image = _decode(data, cv2.IMREAD_COLOR_RGB | flags, name)
    if image.max() > 16 or not holds_12_bits(data):  # the upper 8 of 12 bits end at 15, or at 16 where TIFF rounds
        return image
    # IMREAD_COLOR_RGB swaps the channels of a deep TIFF
    deep = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | flags, name)
    return cv2.cvtColor((deep >> 4).astype(np.uint8), cv2.COLOR_BGR2RGB)


def _decode(data: bytes, flags: int, name: str = "PNG") -> np.ndarray:
    """OpenCV's array of an image file, with an error where the header states too much or OpenCV gives None."""
    image_size(data, name)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ValueError(f"{name}: cannot be decoded as an image ({len(data)} bytes): {error}") from error
    if pixels is None:
        raise ValueError(f"{name}: cannot be decoded as an image ({len(data)} bytes); the file is damaged or no image")
    return pixels


def _decode_compiled(png: bytes, mode: str, depth: int) -> np.ndarray | None:
    """The pixels of a PNG by kornia-rs, writable, of the file's own channels and depth.

    Returns:
        [H, W, C], uint8 or uint16; None where kornia-rs is absent or refuses the file: OpenCV then reads it after all,
        or says what is wrong with it.
    """
    if compiled is None:
        return None
    size = image_size(png, "PNG")
    decode = compiled.decode_image_png_u8 if depth == 8 else compiled.decode_image_png_u16
    try:
        return decode(png, size, mode)
    except Exception:  # the class that kornia-rs raises itself
        return None


def _encode(pixels: np.ndarray, options: list[int] | None = None) -> bytes:
    """The PNG of an array in OpenCV's order of channels."""
    done, buffer = cv2.imencode(".png", pixels, options or [])
    if not done:
        raise ValueError(f"a map of shape {pixels.shape} cannot be encoded as PNG; it needs at least one pixel")
    return buffer.tobytes()
