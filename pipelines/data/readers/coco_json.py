"""The JSON of COCO-panoptic: its types, checked while it is parsed, and what is repaired in it.

The file is read in pieces of some megabytes (`json_stream`). pydantic parses and checks each at once; only a piece that
this strict pass refuses is read a second time, value by value: numbers and flags written as text or as decimal numbers
are repaired and counted, and what is left is refused with its place. Annotations are kept as text, a tenth of the
memory that their dictionaries take.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, NotRequired

import pyarrow as pa
import pydantic_core
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from panoptic.png import MAX_ID
from panoptic.segmentation import SHOWN, count_respelt, flag, shown, whole_number
from pipelines.data.readers.json_stream import NotAnObject, NotJson, Readable, chunks, members

STRICT = ConfigDict(strict=True)
"""No value is converted in silence: true is no number and "7" is none either."""

ImageId = Annotated[int, Field(ge=-(2**63), lt=2**63)] | str
Length = Annotated[int, Field(ge=1, lt=2**31)]


@with_config(STRICT)
class SegmentInfo(TypedDict):
    """One segment of an annotation."""

    id: Annotated[int, Field(ge=0, le=MAX_ID)]  # 0 is void: left out, and counted
    category_id: int
    iscrowd: NotRequired[Annotated[int, Field(ge=0, le=1)]]
    area: NotRequired[Any]  # never used, only compared with the pixels
    bbox: NotRequired[Any]  # likewise


@with_config(STRICT)
class Annotation(TypedDict):
    """The segments of one image."""

    image_id: ImageId
    file_name: NotRequired[str | None]
    segments_info: list[SegmentInfo]


@with_config(STRICT)
class Image(TypedDict):
    """One entry of `images`."""

    id: ImageId
    file_name: Annotated[str, Field(min_length=1)]
    height: NotRequired[Length | None]  # never used, only compared with the files
    width: NotRequired[Length | None]


_IMAGE, _ANNOTATION = TypeAdapter(Image), TypeAdapter(Annotation)
_IMAGES, _ANNOTATIONS = TypeAdapter(list[Image]), TypeAdapter(list[Annotation])

_LISTS = ("images", "annotations", "categories")

_RULES = {
    "height": "a whole number of pixels from 1",
    "width": "a whole number of pixels from 1",
    "file_name": "text, the path of the file in its folder",
    "image_id": "the id of an image: a whole number of 64 bits, or text",
    "segments_info": "the list of the image's segments",
    "category_id": "the id of a category, a whole number",
    "iscrowd": "0 or 1",
}
_SEGMENT_ID = f"a whole number from 0 to {MAX_ID}, as in the PNG"
_IMAGE_ID = "a whole number of 64 bits, or text"


class Annotations:
    """The annotations of a file in its order, kept as JSON text in Arrow's memory and parsed one at a time."""

    def __init__(self) -> None:
        self._parts: list[pa.Array] = []

    def append(self, texts: Iterable[bytes]) -> None:
        """Add annotations, each as JSON text."""
        self._parts.append(pa.array(texts, pa.binary()).cast(pa.large_string()))

    @property
    def texts(self) -> pa.ChunkedArray:
        """JSON text of each annotation: image_id, file_name if it has one, segments_info without what is not used."""
        return pa.chunked_array(self._parts, pa.large_string())

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __iter__(self) -> Iterator[Annotation]:
        for part in self._parts:
            for text in part:
                yield pydantic_core.from_json(text.as_py())


@dataclass(frozen=True)
class Content:
    """A parsed JSON: every entry has its fields, of the right types."""

    images: list[Image] = dataclasses.field(default_factory=list)
    annotations: Annotations = dataclasses.field(default_factory=Annotations)
    categories: Any = None
    """The value of `categories` as the file holds it, for `Categories.from_coco`."""
    faults: dict[int, str] = dataclasses.field(default_factory=dict)
    """Faults of the segments of single annotations, by position; those are left as they are."""
    repairs: dict[str, int] = dataclasses.field(default_factory=dict)
    """Number of values that were read although they are not written as the format asks, by kind."""
    digest: Any = dataclasses.field(default_factory=hashlib.sha256)
    """The sha256 of the whole text, which can be continued."""


def parse(source: bytes | Readable, file: str, optional: Collection[str] = ()) -> Content:
    """The content of a COCO-panoptic JSON.

    Args:
        source: the text, or the file at its beginning, in UTF-8 or, with its byte order mark, another UTF.
        file: its name, for messages.
        optional: lists that may be missing.

    Raises:
        ValueError: not JSON, or not COCO-panoptic; one line for each wrong entry with the file, the place and what
            belongs there. What is wrong inside `segments_info` concerns one image and is in `faults` instead.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    parser = _Parser(file, optional)
    try:
        for key, text, position in members(chunks(stream, parser.digest.update), _LISTS[:2]):
            parser.read(key, text, position)
    except NotAnObject as error:
        raise ValueError(f"{file}: holds {error}; COCO-panoptic is an object with {', '.join(_LISTS)}") from error
    except NotJson as error:
        raise ValueError(f"{file}: not valid JSON ({error}); is the download complete?") from error
    return parser.content()


class _Parser:
    """Takes the members of the object as they come, repairs what can be, and says what is wrong with the rest."""

    def __init__(self, file: str, optional: Collection[str] = ()) -> None:
        self._file, self._optional = file, optional
        self._content = Content()
        self._categories: Any = None
        self._keys: set[str] = set()
        self._problems: dict[str, list[str]] = {key: [] for key in _LISTS[:2]}
        self.digest = self._content.digest

    def read(self, key: str, text: bytes, position: int | None) -> None:
        """A member, or from `position` on a piece of one of the two lists."""
        if key in self._keys and not position and key in _LISTS:
            raise ValueError(f"{self._file}: has {key} twice; keep one of them")
        self._keys.add(key)
        if key == "images" and position is not None:
            self._images(text, position)
        elif key == "annotations" and position is not None:
            self._annotations(text, position)
        elif key in _LISTS[:2]:
            raise ValueError(
                f"{self._file}: {key} is {shown(self._parsed(text))}; it must be a list with an entry for each image"
            )
        else:
            value = self._parsed(text)
            if key == "categories":
                self._categories = value

    def content(self) -> Content:
        """All that was read.

        Raises:
            ValueError: a list is missing, or has wrong entries.
        """
        missing = [key for key in _LISTS if key not in self._keys and key not in self._optional]
        if missing:
            needs = "COCO-panoptic needs images, annotations and categories"
            raise ValueError(f"{self._file}: has no {', '.join(missing)}; {needs}")
        problems = [f"{self._file}: {problem}" for found in self._problems.values() for problem in found]
        if problems:
            raise ValueError(_listed(problems, limit=SHOWN, separator="\n"))
        return replace(self._content, categories=self._categories)

    def _parsed(self, text: bytes) -> Any:
        try:
            return pydantic_core.from_json(text)
        except ValueError as error:
            raise ValueError(f"{self._file}: {_invalid(str(error))}") from error

    def _images(self, text: bytes, position: int) -> None:
        try:
            self._content.images.extend(_IMAGES.validate_json(text))
            return
        except ValidationError:
            entries = self._parsed(text)
        for place, entry in enumerate(entries, position):
            _respell_image(entry, self._content.repairs)
            problems = _problems(_IMAGE, entry, f"images[{place}]", _IMAGE_ID)
            self._problems["images"] += problems
            if not problems:
                self._content.images.append(_IMAGE.validate_python(entry))

    def _annotations(self, text: bytes, position: int) -> None:
        try:
            entries = _ANNOTATIONS.validate_json(text)
        except ValidationError:
            raw = self._parsed(text)
            self._refuse_instances(raw)
            entries = [self._repaired(e, place) for place, e in enumerate(raw, position)]
        self._content.annotations.append(map(pydantic_core.to_json, entries))

    def _refuse_instances(self, entries: list) -> None:
        """Raise ValueError for a file of instances, which people take for the panoptic one of the same download."""
        first = entries[0] if entries else None
        if isinstance(first, dict) and "segments_info" not in first and {"segmentation", "bbox"} & set(first):
            raise ValueError(
                f"{self._file}: this is the instance form (annotations have a segmentation and no segments_info); read "
                "it with --data.reader coco-instances, or give the panoptic file (of COCO: "
                "panoptic_annotations_trainval2017.zip)"
            )

    def _repaired(self, entry: Any, position: int) -> Any:
        place = f"annotations[{position}]"
        _respell_annotation(entry, self._content.repairs)
        found = _problems(_ANNOTATION, entry, place, _SEGMENT_ID)
        inside = [problem for problem, field in found.items() if field == "segments_info"]
        self._problems["annotations"] += [problem for problem in found if problem not in inside]
        if inside:
            self._content.faults[position] = _listed(inside, limit=3, separator="; ")
        return entry if found else _ANNOTATION.validate_python(entry)


DEEP = "recursion limit"
"""Words of pydantic for JSON that is nested too deeply; it raises the bare ValueError that cut files have, too."""


def _invalid(reason: str) -> str:
    """The fault of a text that could not be parsed, and what to do about it."""
    if DEEP in reason:
        return f"is nested too deeply ({reason}); COCO-panoptic needs four levels, so remove what lies deeper"
    return f"not valid JSON ({reason}); is the download complete?"


def _respell_image(entry: Any, repairs: MutableMapping[str, int]) -> None:
    if not isinstance(entry, dict):
        return
    if isinstance(entry.get("id"), float):  # text may be an id
        _respell(entry, "id", "images", whole_number, repairs)
    for field in ("height", "width"):
        _respell(entry, field, "images", whole_number, repairs)


def _respell_annotation(entry: Any, repairs: MutableMapping[str, int]) -> None:
    if not isinstance(entry, dict):
        return
    if isinstance(entry.get("image_id"), float):
        _respell(entry, "image_id", "annotations", whole_number, repairs)
    infos = entry.get("segments_info")
    for info in infos if isinstance(infos, list) else ():
        if isinstance(info, dict):
            _respell(info, "id", "segments_info", whole_number, repairs)
            _respell(info, "category_id", "segments_info", whole_number, repairs)
            _respell(info, "iscrowd", "segments_info", lambda value: int(flag(value)), repairs)


def _respell(
    entry: dict[str, Any], field: str, of: str, read: Callable[[Any], int], repairs: MutableMapping[str, int]
) -> None:
    """Put the number that a value means in its place; a value that means none stays, to be refused."""
    value = entry.get(field)
    if type(value) is int or field not in entry:
        return
    try:
        entry[field] = read(value)
    except ValueError:
        return
    count_respelt(repairs, f"{of}.{field}", value)


def _problems(adapter: TypeAdapter, entry: Any, place: str, id_rule: str) -> dict[str, str]:
    """One sentence for each wrong value of an entry, with the field of the entry in which it lies ("" = none)."""
    try:
        adapter.validate_python(entry)
    except ValidationError as error:
        sentences: dict[str, str] = {}  # the two errors of a value that may be a number or text become one
        missing: dict[str, tuple[str, list[str]]] = {}
        for found in error.errors(include_url=False):
            owner, field = _place(found["loc"], place)
            first = str(found["loc"][0]) if found["loc"] else ""
            if found["type"] == "missing":
                missing.setdefault(owner, (first, []))[1].append(field)
            elif not field:
                sentences[f"{owner} is {shown(found['input'])}; it must be an object"] = first
            else:
                sentences[f"{owner}.{field} is {shown(found['input'])}; it must be {_rule(field, id_rule)}"] = first
        lacking = {
            f"{owner} has no {', '.join(fields)}; it needs {_needed(fields, id_rule)}": first
            for owner, (first, fields) in missing.items()
        }
        return lacking | sentences
    return {}


def _place(loc: tuple[int | str, ...], place: str) -> tuple[str, str]:
    """The place of an error: the entry that holds the value, and the name of its field, "" for the entry itself."""
    field = ""
    for part in loc:
        if isinstance(part, int):
            place, field = f"{place}{'.' * bool(field)}{field}[{part}]", ""
        elif part not in _PARTS_OF_UNIONS:
            place, field = f"{place}{'.' * bool(field)}{field}", part
    return place, field


_PARTS_OF_UNIONS = ("str", "int", "constrained-int")
"""Words that pydantic appends to the place of a value that may be of several types."""


def _needed(fields: list[str], id_rule: str) -> str:
    return _rule(fields[0], id_rule) if len(fields) == 1 else "each of them"


def _rule(field: str, id_rule: str) -> str:
    return id_rule if field == "id" else _RULES[field]


def _listed(items: list[str], limit: int, separator: str) -> str:
    rest = [f"and {len(items) - limit} more"] * (len(items) > limit)
    return separator.join(items[:limit] + rest)
