"""One worker writes one shard: it reads and checks its images and writes one Arrow file."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from panoptic.png import decode_image, decode_segments, encode_segments, image_size, silence_opencv
from panoptic.segmentation import Categories, Sample, Segmentation
from pipelines.cluster import storage
from pipelines.data import resume, statistics
from pipelines.data.config import Orientation
from pipelines.data.copies import Copies, copy_name
from pipelines.data.manifest import SCHEMA_VERSION
from pipelines.data.readers.archive import read_file
from pipelines.data.readers.faults import Fault
from pipelines.data.readers.source import Decode, Problem, decode_coco
from pipelines.data.shard_file import SUFFIX, Encoded, encode_shard, shard_schema
from pipelines.data.shard_index import Entries
from pipelines.data.validation import COPY, DEFAULT_REMEDY, EMPTY, check_photograph, sound_segments


class Report(NamedTuple):
    """The account of a shard by the task that wrote it; plain values, so that it travels as JSON."""

    path: str
    rows: int
    size: int
    sha256: str
    spans: list[list[int]]  # of each row, as the index has them
    names: list[str]
    image_ids: list[int] | list[str]
    digests: list[str]  # of the content of each row
    sizes: list[list[int]]
    segments: list[int]  # of each class
    crowds: int
    empty: int
    area_mismatches: int
    problems: list[list[str]]
    repairs: dict[str, int]  # values, segments or pixels by the kind of repair that they need
    images: int  # that were read, good and bad
    warnings: dict[str, int]  # images or segments by what is odd in them without being wrong
    photographs: list[str]  # a key of each, which copies share
    statistics: dict[str, Any]  # the fields of a `Statistics`
    before: bool = False  # True where an earlier attempt had finished it

    @property
    def entries(self) -> Entries:
        """The rows as the index lists them."""
        return Entries(self.spans, self.names, self.image_ids)


def write_shard(
    rows: pa.Table,
    out: str | None,
    categories: Categories,
    decode: Decode = decode_coco,
    orientation: Orientation = "applied",
    copies: Copies | None = None,
    inputs: str = "",
) -> pa.Table:
    """Read, check and write the images of one shard: a Ray Data batch function.

    A shard that an earlier attempt finished with the same inputs is left as it is.

    Args:
        rows: light rows of a `Source`, with a column `shard`, the number of the shard.
        out: the folder of the shards; None to check the images and write nothing.
        categories: of the dataset.
        decode, orientation, copies: of its `Source`; with copies, the rows have a column `number`, their place among
            all.
        inputs: stands for files, classes and options in the key of a finished shard; "" keeps no account of them.

    Returns:
        One row with one column, `report`: a `Report` as JSON.
    """
    numbers = set(rows["shard"].to_pylist())
    if len(numbers) != 1:
        raise RuntimeError(f"one task got rows of the shards {sorted(numbers)}; Ray Data must give it whole blocks")
    path = f"shard-{numbers.pop():05d}{SUFFIX}"
    key = resume.shard_key(rows, inputs) if out is not None and inputs else ""
    if out is not None and key and (finished := resume.finished_report(out, path, key)):
        return pa.table({"report": [json.dumps({**finished, "before": True})]})
    silence_opencv()
    with ThreadPoolExecutor(8) as pool:  # hides the latency of remote storage
        checked = list(pool.map(lambda row: _check(row, categories, decode, orientation), rows.to_pylist()))
        good = [entry for entry in checked if isinstance(entry, _Good)]
        if copies is not None:
            fit = [isinstance(entry, _Good) for entry in checked]
            numbered = zip(good, rows["number"].filter(pa.array(fit)).to_pylist(), strict=True)
            good = list(chain.from_iterable(pool.map(lambda pair: _copied(pair[0], pair[1], copies), numbered)))
    columns = [entry.columns for entry in good]
    encoded = Encoded(memoryview(b""), [])
    if good and out is not None:
        encoded = encode_shard(columns, stored_schema(rows.schema.field("image_id").type, categories))
        storage.write_bytes(storage.join(out, path), encoded.data)
    labels = np.concatenate([np.zeros(0, np.int64), *(row["labels"] for row in columns)])
    report = Report(
        path=path,
        rows=len(good),
        size=len(encoded.data),
        sha256=hashlib.sha256(encoded.data).hexdigest(),
        spans=[list(span) for span in encoded.spans],
        names=[row["name"] for row in columns],
        image_ids=[row["image_id"] for row in columns],
        digests=[entry.digest for entry in good],
        sizes=[[row["height"], row["width"]] for row in columns],
        segments=np.bincount(labels, minlength=len(categories)).tolist(),
        crowds=sum(int(row["crowd"].sum()) for row in columns),
        empty=sum(len(row["labels"]) == 0 for row in columns),
        area_mismatches=sum(entry.area_mismatches for entry in good),
        problems=[[entry.name, entry.reason, entry.remedy] for entry in checked if isinstance(entry, Problem)],
        repairs=sum((entry.repairs for entry in good), Counter()),
        images=rows.num_rows,
        warnings=sum((entry.warnings for entry in good), Counter()),
        photographs=[_photograph_key(row["image"]) for row in columns],
        statistics=vars(statistics.of_images([entry.segments for entry in good], len(categories))),
    )
    if out is not None and key:
        resume.keep_report(out, path, key, report._asdict(), len(encoded.data))
    return pa.table({"report": [json.dumps(report._asdict())]})


class _Good(NamedTuple):
    """An image that passed validation, without its decoded map: the maps of a whole shard would fill the memory."""

    columns: dict[str, Any]
    digest: str
    area_mismatches: int
    repairs: Counter[str]
    warnings: Counter[str]
    segments: statistics.Segments


def _check(row: dict, categories: Categories, decode: Decode, orientation: Orientation) -> _Good | Problem:
    """Open the files of a light row and check them against each other and the record."""
    name = row["name"]
    try:
        photograph = read_file(row["image"])
        files = {row["image"]: photograph}  # a format whose labels have no size of their own asks for the photograph
        if row["png"]:
            files[row["png"]] = read_file(row["png"])  # here, as nobody should wait for a store while others decode

        def read(address: str) -> bytes:
            return files[address] if address in files else read_file(address)

        if not photograph:
            raise Fault(EMPTY, COPY)
        stated = image_size(photograph, name)
        with DECODING.share(stated[0] * stated[1]):
            found = decode(row, read, categories)
            truth, areas, rules, odd = sound_segments(found.segmentation, categories, found.areas)
            image, repairs = check_photograph(photograph, name, truth.size, row.get("orientation", orientation))
            segments = encode_segments(truth.segments, len(truth.labels) if areas.all() else None)
            columns = {
                "name": name,
                "image": image,
                "segments": segments,
                "labels": truth.labels,
                "crowd": truth.is_crowd(),
                "height": truth.size[0],
                "width": truth.size[1],
                "image_id": row["image_id"],
            }
            counts = Counter(found.repairs) + Counter(repairs) + Counter(rules)
            warnings = Counter(found.warnings) + Counter(odd)
            digest, segments = row_digest(columns, truth), statistics.Segments.of(truth, areas)
            return _Good(columns, digest, found.area_mismatches, counts, warnings, segments)
    except storage.Unavailable:  # says nothing about the image
        raise
    except Fault as fault:
        return Problem(name, fault.reason.removeprefix(f"{name}: "), fault.remedy)
    except (ValueError, OSError) as error:
        return Problem(name, str(error).removeprefix(f"{name}: "), DEFAULT_REMEDY)


def _copied(good: _Good, number: int, copies: Copies) -> list[_Good]:
    """The rows of an image that passed: itself, where it is kept, and its copies."""
    columns = good.columns
    size = columns["height"], columns["width"]
    with DECODING.share(size[0] * size[1]):
        truth = Segmentation(decode_segments(columns["segments"], size), columns["labels"], columns["crowd"])
        sample = Sample(decode_image(columns["image"], columns["name"], size), truth, columns["name"])
        rows = [good] if copies.augment.originals else []
        for copy, view in copies.views(sample, number):
            own = {
                **columns,
                "name": copy_name(columns["name"], copy),
                "image": copies.encode(view),
                "segments": encode_segments(view.truth.segments),
                "labels": view.truth.labels,
                "crowd": view.truth.is_crowd(),
                "height": view.truth.size[0],
                "width": view.truth.size[1],
            }
            first = not rows  # what is odd in the image is counted once
            rows.append(
                good._replace(
                    columns=own,
                    digest=row_digest(own, view.truth),
                    area_mismatches=good.area_mismatches * first,
                    repairs=good.repairs if first else Counter(),
                    warnings=good.warnings if first else Counter(),
                    segments=statistics.Segments.of(view.truth),
                )
            )
    return rows


class _Share:
    """A limit on the number of images that threads decode at the same time, and on their pixels in all.

    Args:
        pixels: the most pixels at once; an image of more is decoded alone.
        images: the most images at once.
    """

    def __init__(self, pixels: int, images: int) -> None:
        self._free, self._all, self._images = pixels, pixels, images
        self._changed = threading.Condition()

    @contextmanager
    def share(self, pixels: int) -> Iterator[None]:
        """A context that waits until `pixels` and an image are free, and holds them."""
        pixels = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels and self._images > 0)
            self._free -= pixels
            self._images -= 1
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._images += 1
                self._changed.notify_all()


DECODING = _Share(25_000_000, images=2)
"""One photograph of 22 megapixels at a time, or two smaller ones: some 30 bytes a pixel are held while it is checked.
More at once, on the one core that a task has, throw each other out of its caches: 8 cost an eighth more CPU."""


def _photograph_key(data: bytes) -> str:
    """A key that two copies of a file share: of its length and its last bytes, which compression makes its own."""
    return f"{len(data)}:{hashlib.sha256(data[-4096:]).hexdigest()[:16]}"


def row_digest(columns: dict, truth: Segmentation) -> str:
    """The sha256 of a row's content, decoded where an encoder's version could show."""
    digest = hashlib.sha256(json.dumps([columns["name"], columns["image_id"], truth.size]).encode())
    digest.update(columns["image"])
    for array, kind in ((truth.segments, "<u2"), (truth.labels, "<i4"), (truth.is_crowd(), "u1")):
        digest.update(np.ascontiguousarray(array, kind).data)
    return digest.hexdigest()


def stored_schema(image_id: pa.DataType, categories: Categories) -> pa.Schema:
    """The schema of a shard with what a reader of the file alone needs to know: version and classes."""
    metadata = {
        "panoptic.schema_version": str(SCHEMA_VERSION),
        "panoptic.categories": json.dumps(categories.to_coco()),
    }
    return shard_schema(image_id).with_metadata(metadata)
